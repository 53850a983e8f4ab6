"""The pool path from the reader's side: bytes of a mounted file, read in place in the daemon's RAM.

Synchronous, for loaders. A `Borrower` is one connection and belongs to one thread at a time, but for `Loan.release` and
`Borrower.stop`, which any thread may call. A `LentFile` is the mapping of one file; connections to one daemon may share
it. See `control.lending_door` for the protocol.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mfs.control import runtime
from mfs.control.connecting import connect
from mfs.control.lending_door import MESSAGE_BYTES_MAX, door_path
from mfs.errors import StoreError, TransientStoreError, from_wire
from mfs.mapping import address_of, map_file

_TIMEOUT_S = 120.0
"""Longest wait for an answer. The daemon answers within its own --timeout; this outlasts it and ends a hang."""


class LentFile:
    """A file of a daemon's RAM tier, mapped read-only into this process: one object version, at its own offsets."""

    def __init__(self, fd: int, size: int) -> None:
        """fd stays the caller's. Raises: TransientStoreError if it cannot be mapped: it may be read as a file."""
        self.key = file_key(fd)
        self.size = size
        try:
            self.view = map_file(fd, size) if size else memoryview(b"")
        except OSError as error:
            raise TransientStoreError(f"what the mount lends cannot be mapped: {error}") from error
        self.address = address_of(self.view) if size else 0
        """Where the mapping begins in this process."""

    def close(self) -> None:
        """Unmap. Whoever still has a view keeps the mapping alive: an address may then still be read, never reused."""
        self.view = memoryview(b"")


def file_key(fd: int) -> tuple[int, int]:
    """Tells one file in memory from another: its device and inode."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


class Opened(NamedTuple):
    """A file at one connection."""

    number: int
    file: LentFile
    identity: str
    """Of the version."""


class Loan:
    """A range of a file in place: good until `release`, or until the connection it came by is closed."""

    __slots__ = ("_borrower", "_number", "slots", "view")

    def __init__(self, borrower: Borrower, number: int, view: memoryview, slots: list[int]) -> None:
        self._borrower = borrower
        self._number: int | None = number
        self.view = view
        """The bytes; read-only."""
        self.slots = slots
        """See `lending_door`: a number for each 4 MiB of the file that the range touches."""

    def release(self) -> None:
        """The daemon may drop these bytes again. Idempotent; never raises: a daemon that is gone holds nothing."""
        number, self._number = self._number, None
        if number is None:
            return
        self.view.release()
        self._borrower.give_back(number)


class Borrower:
    """A connection to one mount's door."""

    def __init__(self, socket_path: Path) -> None:
        """Raises: StoreError if there is no such door, AccessError if it is shut."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connect(self._socket, socket_path, _TIMEOUT_S)
            hello = _checked(self._socket.recv(MESSAGE_BYTES_MAX))
            self.lease_bytes_max: int = hello["lease_bytes_max"]
            """Longest range of one lease."""
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            self.daemon_pid: int = struct.unpack("3i", credentials)[0]
        except OSError as error:
            self._socket.close()
            raise StoreError(f"{socket_path}: {error}") from error
        except BaseException:
            self._socket.close()
            raise

    def open(
        self, path: str, inode: int | None = None, map_file: Callable[[int, int], LentFile] = LentFile, *,
        traceparent: str = "",
    ) -> Opened:  # fmt: skip
        """A file, by its path from the mount's root; its mapping stays the caller's, also after `close`.

        traceparent: of the trace that it is loaded in, for the mount's own; '' for none.

        inode: what fstat said of the file the caller has open, so that both are one version. map_file(fd, size): gives
            the mapping, which may be one that is there already.
        Raises: NotFoundError; ChangedError if the inode is another one's; TransientStoreError if it cannot be
            lent, or not mapped.
        """
        ask = {"open": path, "inode": inode}
        answer, fds = self._ask(ask | {"traceparent": traceparent} if traceparent else ask, 1)
        try:
            if not fds:
                raise TransientStoreError("the mount's descriptor was lost: too many are open in this process")
            return Opened(answer["file"], map_file(fds[0], answer["size"]), answer["identity"])
        finally:
            for fd in fds:
                os.close(fd)

    def borrow(self, opened: Opened, start: int, stop: int, *, here: bool = False) -> Loan:
        """The bytes [start, stop) of a file, in place, until the loan is released; at most `lease_bytes_max` at once.

        here: only if RAM has them now.
        Raises: MfsError of the fetch; TransientStoreError if others hold all that is lent; NotFoundError if not `here`.
        """
        ask = {"file": opened.number, "start": start, "stop": stop}
        answer, _ = self._ask(ask | {"here": True} if here else ask)
        return Loan(self, answer["lease"], opened.file.view[start:stop], answer["slots"])

    @contextmanager
    def lease(self, opened: Opened, start: int, stop: int) -> Iterator[memoryview]:
        """`borrow` for the length of a block; the view is good inside it only."""
        loan = self.borrow(opened, start, stop)
        try:
            yield loan.view
        finally:
            loan.release()

    def give_back(self, number: int) -> None:
        """End a lease; from any thread, since one message is sent whole and nothing is answered."""
        try:
            self._socket.send(json.dumps({"release": number}).encode())
        except OSError:  # gone, or closed by us: either way the daemon holds nothing for this connection any more
            pass

    def stop(self) -> None:
        """Have the question that another thread waits for here fail with TransientStoreError, if there is one."""
        try:
            self._socket.send(b'{"stop": true}')
        except OSError:  # then that question fails by itself
            pass

    def is_gone(self) -> bool:
        """Whether the daemon has ended; while no question is under way."""
        watch = select.poll()
        watch.register(self._socket, select.POLLIN)
        return bool(watch.poll(0))  # the daemon says nothing unasked, so this can only be the end

    @property
    def is_closed(self) -> bool:
        """By `close`, or because the daemon did not answer."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Give every lease and file back."""
        self._socket.close()

    def _ask(self, ask: dict[str, Any], fds_max: int = 0) -> tuple[dict[str, Any], list[int]]:
        try:
            self._socket.send(json.dumps(ask).encode())
            data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES_MAX, fds_max, socket.MSG_CMSG_CLOEXEC)
        except BaseException as error:
            self._socket.close()  # an answer that comes later would pass for that of the next question
            if not isinstance(error, OSError):
                raise
            raise StoreError(f"the mount's daemon is gone or does not answer: {error}") from error
        return _checked(data), fds


def find(path: str) -> tuple[Path, str] | None:
    """(the door's socket, path from the mount's root) of a file under an mfs mount that lends to us; None elsewhere."""
    try:
        served = runtime.find_mount(path)
    except Exception:  # not under a mount, or a mount table we cannot read: the file is read like any other
        return None
    door = door_path(served.socket)
    return (door, served.place.path) if os.access(door, os.W_OK) else None


def _checked(data: bytes) -> dict[str, Any]:
    if not data:
        raise StoreError("the mount's daemon closed the connection")
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise from_wire(*answer["error"])
    return answer
