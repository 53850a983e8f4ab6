"""Handing a mount to the next daemon while it is in use: what the old one gives, and how the new one asks.

The old daemon listens beside its control socket; only its own user may connect. One SOCK_SEQPACKET connection, one JSON
message each way per question. This docstring is the protocol's only reference; descriptors travel as SCM_RIGHTS, and
what is large (*) as a file in memory, in MessagePack:

    <- {ask: describe}  -> {} with [*description, standard error]
    <- {ask: take}      -> {} with [*state, /dev/fuse, the lock, the journal]   the mount is paused: requests wait
    <- {ask: mine}      -> {yours: true}          once the new daemon is held, the old one never touches the mount again
    <- {ask: held}      the new daemon's holder has the descriptors, or it has none: it serves from now on
    closing             the new daemon is registered, and the old one ends
    any failure         -> {error: [name, message]} as `mfs.errors.to_wire`

Whatever goes wrong before `held` leaves the old daemon serving: it has the kernel send again what was not answered.
Either daemon may be killed at any moment. Of the new one its holder knows whether it was held; of the old one its own
holder does, which has a copy of the connection before `yours` is said and waits for `held` in its place
(`mfs.holder`). So there is never more than one that serves, nor less, but where a daemon stands without a holder.

`held` decides, also of a new daemon that was only slow: whoever gives up waiting for it shuts its end for reading
before it goes on. The kernel refuses it from then on, or shows that it has come; and without it nothing is done to the
mount.
"""

from __future__ import annotations

import array
import json
import logging
import os
import select
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgpack
import trio

from mfs import __version__, limits
from mfs.config import FIXED, MountConfig, places
from mfs.control import listening, wire
from mfs.control.connecting import connect
from mfs.control.holding import HolderLink
from mfs.errors import (
    AccessError,
    ConfigError,
    MfsError,
    StoreError,
    TransientStoreError,
    UsageError,
    from_wire,
    to_wire,
)
from mfs.fuse.device import Agreement, is_connected
from mfs.fuse.journal import Journal
from mfs.looking import LastLook
from mfs.manager import notify
from mfs.mount import Mount

log = logging.getLogger(__name__)

FORMAT = 2
"""Of the state; another one is not understood."""
_DOOR_MODE = 0o600
_MESSAGE_BYTES_MAX = 64 << 10
_CONNECTIONS_MAX = 16
_READY_S = 20.0
"""How long the mount stays paused for a new daemon that says nothing."""
_REGISTER_S = 30.0
_DEAD_S = 5.0  # between the end of a process' connections and that of the process
_ANSWER_S = 30.0  # above what the old daemon may need to save what is only in RAM
_TEXT = "surrogatepass"


def door_path(control_socket: Path) -> Path:
    """Where a daemon hands over, beside its control socket."""
    return control_socket.with_suffix(".next")


# -- the old daemon


class Giver:
    """The old daemon's side."""

    def __init__(self, mount: Mount, lock: int, environment: dict[str, str], holder: HolderLink) -> None:
        """lock: descriptor of the mount's lock. environment: what the next daemon may need, credentials say."""
        self._holder = holder
        self._mount = mount
        self._lock = lock
        self._environment = environment
        self._busy = False
        self.gone = trio.Event()
        """Set when the mount is another daemon's and that one is registered."""

    async def serve(self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Raises: ConfigError if the socket cannot be made."""
        with listening.door(path, _DOOR_MODE, socket.SOCK_SEQPACKET) as listener:
            task_status.started()
            async with trio.open_nursery() as nursery:
                limit = trio.CapacityLimiter(_CONNECTIONS_MAX)
                while True:
                    nursery.start_soon(self._serve_one, await listening.accept(listener), limit)

    async def _serve_one(self, sock: trio.socket.SocketType, limit: trio.CapacityLimiter) -> None:
        with sock:
            try:
                limit.acquire_on_behalf_of_nowait(sock)
            except trio.WouldBlock:
                full = TransientStoreError(f"{_CONNECTIONS_MAX} others ask to take this mount over: try later")
                with suppress(OSError):
                    await sock.send(json.dumps({"error": to_wire(full)}).encode())
                return
            try:
                while (message := await sock.recv(_MESSAGE_BYTES_MAX)) and not self.gone.is_set():
                    try:
                        await self._answer(sock, wire.parse_object(message))
                    except MfsError as error:
                        await sock.send(json.dumps({"error": to_wire(error)}).encode())
            except OSError as error:
                log.info("whoever wanted the mount went away: %s", error)
            except Exception:  # a defect here must not end the mount
                log.exception("a handover failed")
            finally:
                limit.release_on_behalf_of(sock)

    async def _answer(self, sock: trio.socket.SocketType, ask: dict[str, Any]) -> None:
        pid, uid = _peer(sock)
        if uid != os.geteuid():
            raise AccessError(f"uid {uid} may not take this mount over: only uid {os.geteuid()}, who mounted, may")
        match ask:
            case {"ask": "describe"}:
                await _send(sock, {}, [_memory_file(self._description()), 2], closing=1)
            case {"ask": "take", "format": int(theirs)}:
                if theirs != FORMAT:
                    raise ConfigError(
                        f"mfs {__version__} hands over in format {FORMAT}, the new daemon takes {theirs}: "
                        f"unmount and mount again"
                    )
                await self._give(sock, pid, main_pid=int(ask.get("main", pid)))
            case _:
                raise UsageError(f"not a question this door knows: {str(ask)[:200]}")

    def _description(self) -> dict[str, Any]:
        agreement = self._mount.session.agreement
        return {
            "version": __version__, "pid": os.getpid(), "config": self._mount.config.to_json(),
            "environment": self._environment, "held": self._holder.is_there,
            "request": agreement.request, "reply": agreement.reply,
            "ram_used_bytes": self._mount.memory.used_bytes + self._mount.memory.warm_bytes,
        }  # fmt: skip

    async def _give(self, sock: trio.socket.SocketType, pid: int, *, main_pid: int) -> None:
        """Give the mount away, or go on serving it. Raises: MfsError if it cannot be given away.

        main_pid: the process that a service manager is to watch.
        """
        session = self._mount.session
        if self._busy:
            raise TransientStoreError("the mount is being handed over already")
        if not session.is_ours:
            raise StoreError("the mount was handed over already")
        if not session.agreement.can_resend:
            raise ConfigError(
                f"Linux {os.uname().release} cannot hand a mount over (6.9 or later can): unmount and mount again"
            )
        self._busy = True
        try:
            await self._mount.save()
            async with _record_held(self._mount):
                await session.pause()
                paused_at, given = time.monotonic(), False
                try:
                    given = await self._offer(sock)
                finally:
                    if given:
                        session.release()
                        self._holder.given()
                    else:
                        self._holder.hold(session.device, self._lock, self._mount.operations.journal.fd)
                        session.resume()
                        log.warning("the mount was not handed over to pid %d: going on", pid)
        finally:
            self._busy = False
        log.info("handed over to pid %d, after a pause of %.0f ms", pid, (time.monotonic() - paused_at) * 1e3)
        notify(f"MAINPID={main_pid}")
        with trio.move_on_after(_REGISTER_S), suppress(OSError):
            while await sock.recv(1):  # `held` first, which was only looked at
                pass
        self.gone.set()

    async def _offer(self, sock: trio.socket.SocketType) -> bool:
        """Send everything; whether the other side took it. The mount is paused."""
        state = _memory_file(_exported(self._mount))
        journal = self._mount.operations.journal.fd
        await _send(sock, {}, [state, self._mount.session.device, self._lock, journal], closing=1)
        with trio.move_on_after(_READY_S):
            message = await sock.recv(_MESSAGE_BYTES_MAX)
            if not message:
                raise OSError("it closed the connection")
            if wire.parse_object(message) != {"ask": "mine"}:
                raise UsageError(f"expected 'mine', got {message[:200]!r}")
            self._holder.giving(sock.fileno())
            await sock.send(b'{"yours": true}')
            # It stays there for our holder, should we be killed before that one knows.
            if not await sock.recv(_MESSAGE_BYTES_MAX, socket.MSG_PEEK):
                raise OSError("it ended before anybody held the mount")
            return True
        # It lives, and may be slow: the kernel lets it say so no more, or shows that it has.
        sock.shutdown(socket.SHUT_RD)
        late = await sock.recv(_MESSAGE_BYTES_MAX, socket.MSG_PEEK)
        if late and wire.parse_object(late) == {"ask": "held"}:
            return True
        raise StoreError(f"the new daemon did not say within {_READY_S:g} s that it can serve")


@asynccontextmanager
async def _record_held(mount: Mount) -> AsyncIterator[None]:
    """Nothing is written to the record of times meanwhile; nor later, if the mount is somebody else's by then."""
    if mount.publication is None:
        yield
        return
    await mount.publication.writing.acquire()
    try:
        yield
    finally:
        if mount.session.is_ours:
            mount.publication.writing.release()


def _exported(mount: Mount) -> dict[str, Any]:
    """All that a mount in use needs of its daemon, beside what every daemon of it has. No checkpoint."""
    return {
        "tree": mount.namespace.export(),
        "handles": mount.operations.export(),
        "names": list(mount.session.unsaid_names),
        "refreshed": [[last.at, last.errors] for last in mount.looking.last],
        "unrecorded": mount.publication.unrecorded() if mount.publication else [],
    }


# -- the new daemon


def _restore(mount: Mount, state: dict[str, Any], journal: Journal) -> None:
    """Make a mount that was never listed the one that `_exported` described. Raises: ConfigError."""
    try:
        mount.namespace.restore(state["tree"])
        mount.operations.inherit(journal)
        mount.operations.restore(state["handles"])
        mount.looking.last = [LastLook(*last) for last in state["refreshed"]]
        if mount.publication is not None:
            mount.publication.record_again(state["unrecorded"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"what the old daemon hands over is not understood: {error!r}") from error


class Heir:
    """The new daemon's side, and the shell command's. Blocks; every wait is bounded."""

    def __init__(self, path: Path) -> None:
        """Connect to the old daemon's door. Raises: StoreError if nobody answers there, and what it says."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connect(self._socket, path, _ANSWER_S)
            _, (description, self.stderr) = self._ask({"ask": "describe"}, 2)
        except OSError as error:
            self._socket.close()
            raise StoreError(f"no daemon hands over at {path}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise
        found = _read_memory_file(description)
        self.pid: int = found["pid"]
        self._process = os.pidfd_open(self.pid)
        self.version: str = found["version"]
        self.config = MountConfig.from_json(found["config"])
        """As the old daemon was told, secrets too."""
        self.environment: dict[str, str] = found["environment"]
        self._is_held: bool = found["held"]
        self.agreement = Agreement(found["request"], found["reply"])
        """See `mount.Predecessor`."""
        # It drops what nobody uses once we serve; where another control group pays for ours, that does not help.
        shared = limits.groups().keys() == limits.groups(pid=self.pid).keys()
        self.coming_bytes = found.get("ram_used_bytes", self.config.ram_bytes) if shared else 0
        """Memory that will be there for the new daemon's RAM tier once this one serves no more."""
        self.lock = -1
        """The mount's lock, once taken."""
        self.main_pid = os.getpid()
        """The process that a service manager is to watch from then on."""
        self._is_dead = False

    def check_same(self, config: MountConfig) -> None:
        """Raises: ConfigError if a mount with these settings would not be the same mount."""
        for name in FIXED:
            was, wanted = getattr(self.config, name), getattr(config, name)
            if was != wanted:
                raise ConfigError(
                    f"{name} cannot change while mounted: it is {was}, asked for {wanted}; unmount and mount again"
                )
        if places(self.config) != places(config):
            raise ConfigError("the sources cannot change while mounted: unmount and mount again")

    async def hand_over(self, mount: Mount) -> None:
        """See `mount.Predecessor`. Readers wait meanwhile."""
        state, device, journal = await trio.to_thread.run_sync(self._take)
        try:
            _restore(mount, state, Journal(journal))
            await trio.to_thread.run_sync(self._confirm, device)
            if not is_connected(device):
                raise StoreError("the mount was taken away while it was handed over")
            mount.session.connect(device, self.agreement)
        finally:
            os.close(device)
        mount.session.invalidate_names((inode, name) for inode, name in state["names"])

    def take_hold(self, mount: Mount, holder: HolderLink) -> None:
        """Have the mount held, and the old daemon told that it is ours. Raises: StoreError if it is not: it is as it
        was then."""
        fds = mount.session.device, self.lock, mount.operations.journal.fd
        if self._is_dead:
            holder.hold(*fds)
            return
        was_told = holder.hold_given(*fds, self._socket.fileno())
        if was_told is None:  # by nobody, as far as we know
            try:
                was_told = bool(self._socket.send(b'{"ask": "held"}'))
            except OSError:
                was_told = False
        if not was_told:
            mount.session.release()
            raise StoreError(
                f"the old daemon (pid {self.pid}) was not told in time that this one serves: it keeps the mount"
            )

    def _take(self) -> tuple[dict[str, Any], int, int]:
        """(state, descriptor of /dev/fuse, that of the journal)."""
        ask = {"ask": "take", "format": FORMAT, "main": self.main_pid}
        try:
            _, (state, device, self.lock, journal) = self._ask(ask, 4)
        except OSError as error:
            raise StoreError(f"the old daemon (pid {self.pid}) does not hand over: {error}") from error
        return _read_memory_file(state), device, journal

    def _confirm(self, device: int) -> None:
        """Make the mount ours. Raises: StoreError if the old daemon keeps it."""
        try:
            answer, _ = self._ask({"ask": "mine"}, 0)
        except OSError as error:
            if select.select([self._process], [], [], _DEAD_S)[0]:
                if not is_connected(device):
                    raise StoreError("the mount was taken away while it was handed over") from error
                if self._is_held:
                    why = f"the old daemon (pid {self.pid}) died while it handed over: its successor has the mount"
                    raise StoreError(why) from error
                # One that nobody held left it to us: we have all that it had, and nobody else has.
                log.warning("the old daemon (pid %d) died while it handed over", self.pid)
                self._is_dead = True
                return
            raise StoreError(f"the old daemon (pid {self.pid}) keeps the mount: {error}") from error
        if answer != {"yours": True}:
            raise StoreError(f"the old daemon (pid {self.pid}) keeps the mount: it said {answer}")

    def close(self) -> None:
        """Let the old daemon end; or go on, if the mount is still its."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        for fd in {self.stderr, self.lock, self._process} - {-1}:
            os.close(fd)

    def _ask(self, ask: dict[str, Any], fds_count: int) -> tuple[dict[str, Any], list[int]]:
        self._socket.send(json.dumps(ask).encode())
        message, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES_MAX, fds_count, socket.MSG_CMSG_CLOEXEC)
        answer = wire.parse_object(message) if message else None
        if answer is None or "error" in answer or len(fds) != fds_count:
            for fd in fds:
                os.close(fd)
            if answer and "error" in answer:
                raise from_wire(*answer["error"])
            raise OSError("it closed the connection" if answer is None else "descriptors were lost on the way")
        return answer, fds


def _peer(sock: trio.socket.SocketType) -> tuple[int, int]:
    """(pid, uid) of whoever connected."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


async def _send(sock: trio.socket.SocketType, answer: dict[str, Any], fds: list[int], *, closing: int) -> None:
    """Send an answer with descriptors; the first `closing` of them are not needed here afterwards."""
    try:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        await sock.sendmsg([json.dumps(answer).encode()], [rights])
    finally:
        for fd in fds[:closing]:
            os.close(fd)


def _memory_file(value: dict[str, Any]) -> int:
    fd = os.memfd_create("mfs-handover", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(msgpack.packb(value, unicode_errors=_TEXT))
    return fd


def _read_memory_file(fd: int) -> dict[str, Any]:
    with open(fd, "rb") as file:
        file.seek(0)
        found: dict[str, Any] = msgpack.unpackb(file.read(), unicode_errors=_TEXT, strict_map_key=False)
    return found
