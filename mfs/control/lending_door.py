"""The pool path's door: local processes get files of the RAM tier as descriptors, and leases on what stands in them.

One SOCK_SEQPACKET connection per reading thread; one JSON message each way per question, one question at a time, but
releases and stops at any time. This docstring is the protocol's only reference:

    -> on connecting: {lease_bytes_max}
    <- {open: path from the mount's root, inode: as fstat says, or null; traceparent: the trace it belongs to, or none}
                                -> {file, size, identity} with a descriptor of the object's file, as SCM_RIGHTS
    <- {file, start, stop}      -> {lease, slots: [number, ...]}: the range's bytes stand at [start, stop) of that file
    <- {file, start, stop, here: true}      -> the same, if RAM has all of it now and it need not wait; else an error
    <- {release: lease}         -> nothing
    <- {stop: true}             -> nothing; the question that is not answered yet, if there is one, is now, by an error
    any failure                 -> {error: [name, message]} as `mfs.errors.to_wire`

A lease keeps its bytes in place until it is released or the connection ends, however it ends. All borrowers together
hold a bounded share of the slots; who finds it taken for too long, or the door full, is refused with
TransientStoreError.

The file is sparse and changes where nothing is leased: a borrower looks nowhere else, for a touched hole takes memory.
`slots` has a number for each 4 MiB of the file that the range touches: while it is the same, so is the memory, and
pages that a borrower has locked are the file's own; another number means other pages.

Descriptors are read-only, and so is what can be made of them. The socket's mode and SO_PEERCRED decide who may connect
(the daemon's uid and root); who may, can read every model of the mount.
"""

from __future__ import annotations

import array
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any, Protocol

import trio

from mfs.control import listening, wire
from mfs.errors import AccessError, MfsError, TransientStoreError, UsageError, to_wire

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 64 << 10
CONNECTIONS_MAX = 64
_SOCKET_MODE = 0o600


def door_path(control_socket: Path) -> Path:
    """Where the door stands, beside the control socket."""
    return control_socket.with_suffix(".loans")


class Lender(Protocol):
    """What stands behind the door."""

    lease_bytes_max: int
    """Longest range of one lease."""

    async def open(self, path: str, inode: int | None, traceparent: str = "") -> tuple[Any, int]:
        """(a hold on one object version: has `.size`, `.identity`, `.close()`; a read-only descriptor of its file, the
        caller's to close). Raises MfsError."""
        ...

    async def lease(self, file: Any, start: int, stop: int, *, here: bool) -> tuple[Any, list[int]]:
        """(a hold with `.release()`, its slots' numbers). here: nothing is fetched, and nobody waited for.

        Raises MfsError. Cancellation: nothing is held.
        """
        ...


async def serve(
    lender: Lender, socket_path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled; then every lease is given back. Raises: ConfigError if the socket cannot be made."""
    limit = trio.CapacityLimiter(CONNECTIONS_MAX)
    with listening.door(socket_path, _SOCKET_MODE, socket.SOCK_SEQPACKET) as listener:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                sock = await listening.accept(listener)
                nursery.start_soon(_serve_one, lender, sock, limit)


async def _serve_one(lender: Lender, sock: trio.socket.SocketType, limit: trio.CapacityLimiter) -> None:
    with sock:
        try:
            if listening.peer_uid(sock) not in (0, os.geteuid()):
                await _send(sock, {"error": to_wire(AccessError("only root and the mount's own user may borrow"))})
                return
            try:
                limit.acquire_on_behalf_of_nowait(sock)
            except trio.WouldBlock:
                full = TransientStoreError(f"{CONNECTIONS_MAX} borrowers are connected already")
                await _send(sock, {"error": to_wire(full)})
                return
        except OSError:
            return
        conversation = _Conversation(lender, sock)
        try:
            await conversation.run()
        except* OSError as errors:
            log.debug("a borrower went away: %s", errors.exceptions[0])
        finally:
            conversation.close()
            limit.release_on_behalf_of(sock)


class _Conversation:
    """One connection and what it holds."""

    def __init__(self, lender: Lender, sock: trio.socket.SocketType) -> None:
        self._lender = lender
        self._sock = sock
        self._files: dict[int, Any] = {}
        self._leases: dict[int, Any] = {}
        self._serial = 0
        self._asking: trio.CancelScope | None = None

    async def run(self) -> None:
        await _send(self._sock, {"lease_bytes_max": self._lender.lease_bytes_max})
        async with trio.open_nursery() as nursery:
            while message := await self._sock.recv(MESSAGE_BYTES_MAX):
                try:
                    ask = wire.parse_object(message)
                    if self._obeyed(ask):
                        continue
                    if self._asking is not None:
                        raise UsageError("one question at a time: the one before is not answered yet")
                except MfsError as error:
                    await _send(self._sock, {"error": to_wire(error)})
                    continue
                self._asking = trio.CancelScope()
                nursery.start_soon(self._reply, ask, self._asking)
            nursery.cancel_scope.cancel()

    def _obeyed(self, ask: dict[str, Any]) -> bool:
        """Whether it was no question. Never behind one that waits: that may wait for this very release."""
        match ask:
            case {"release": int(number)} if number in self._leases:
                self._leases.pop(number).release()
                return True
            case {"stop": True}:
                if self._asking is not None:
                    self._asking.cancel()
                return True
        return False

    async def _reply(self, ask: dict[str, Any], asking: trio.CancelScope) -> None:
        answer: dict[str, Any] = {"error": to_wire(TransientStoreError("stopped, as was asked"))}
        fd = -1
        with asking:
            try:
                answer, fd = await self._answer(ask)
            except MfsError as error:
                answer = {"error": to_wire(error)}
            except Exception as error:  # a defect, or an odd question: it must not end the mount
                log.exception("a borrower's question failed")
                answer = {"error": to_wire(error)}
        self._asking = None
        await _send(self._sock, answer, fd)

    async def _answer(self, ask: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """(the answer, a descriptor that goes with it or -1)."""
        match ask:
            case {"open": str(path), "inode": int() | None as inode, **rest}:
                file, fd = await self._lender.open(path, inode, str(rest.get("traceparent", "")))
                number = self._keep(self._files, file)
                return {"file": number, "size": file.size, "identity": file.identity}, fd
            case {"file": int(number), "start": int(start), "stop": int(stop), **rest} if number in self._files:
                file = self._files[number]
                if not 0 <= start <= stop <= file.size or stop - start > self._lender.lease_bytes_max:
                    raise UsageError(f"range [{start}, {stop}) of a file of {file.size} bytes cannot be leased at once")
                lease, slots = await self._lender.lease(file, start, stop, here=rest.get("here") is True)
                return {"lease": self._keep(self._leases, lease), "slots": slots}, -1
        raise UsageError(f"not a question this door knows: {str(ask)[:200]}")

    def _keep(self, table: dict[int, Any], held: Any) -> int:
        self._serial += 1
        table[self._serial] = held
        return self._serial

    def close(self) -> None:
        for lease in self._leases.values():
            lease.release()
        for file in self._files.values():
            file.close()


async def _send(sock: trio.socket.SocketType, answer: dict[str, Any], fd: int = -1) -> None:
    """Send an answer, and a descriptor with it, which is closed."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
    try:
        await sock.sendmsg([json.dumps(answer).encode()], rights)
    finally:
        if fd >= 0:
            os.close(fd)
