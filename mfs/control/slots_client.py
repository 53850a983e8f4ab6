"""The pool path from the reader's side: bytes of a mounted file, read in place in the daemon's slots.

Synchronous, for loaders. A `SlotReader` is one connection and belongs to one thread at a time, but for `Loan.release`
and `SlotReader.stop`, which any thread may call. `Slots` is the mapping; connections to one daemon share it. See
`control.slots` for the protocol.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mfs.control import runtime
from mfs.control.slots import MESSAGE_BYTES_MAX
from mfs.errors import StoreError, from_wire

_TIMEOUT_S = 120.0
"""Longest wait for an answer. The daemon answers within its own --timeout; this outlasts it and ends a hang."""


class Slots:
    """One daemon's slots, mapped read-only into this process."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """fd stays the caller's. Raises: StoreError if it cannot be mapped."""
        self.key = slots_key(fd)
        self.size_bytes = size_bytes
        try:
            self._map = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise StoreError(f"the mount's slots cannot be mapped: {error}") from error
        self.view = memoryview(self._map)
        self.address = int(np.frombuffer(self._map, dtype=np.uint8).ctypes.data)
        """Where the mapping begins in this process."""

    def close(self) -> None:
        """Unmap. Whoever still has a view keeps the mapping alive: an address may then still be read, never reused."""
        self.view.release()
        try:
            self._map.close()
        except BufferError:  # the traceback of a failed read may hold a view a while longer
            pass


def slots_key(fd: int) -> tuple[int, int]:
    """Tells one daemon's slots from another's: their file's device and inode."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


class Loan:
    """A range of a file in place: good until `release`, or until the connection it came by is closed."""

    __slots__ = ("_number", "_reader", "pieces", "views")

    def __init__(self, reader: SlotReader, number: int, pieces: Sequence[tuple[int, int]]) -> None:
        self._reader = reader
        self._number: int | None = number
        self.pieces = pieces
        """(offset in the slots, nbytes), in the order of the file."""
        self.views = [reader.slots.view[offset : offset + nbytes] for offset, nbytes in pieces]
        """The bytes; read-only."""

    def release(self) -> None:
        """The daemon may use these slots again. Idempotent; never raises: a daemon that is gone holds nothing."""
        number, self._number = self._number, None
        if number is None:
            return
        for view in self.views:
            view.release()
        self._reader.give_back(number)


class SlotReader:
    """A connection to one mount's slots."""

    def __init__(self, socket_path: Path, map_slots: Callable[[int, int], Slots] = Slots) -> None:
        """Connect; `map_slots(fd, size_bytes)` gives the mapping, which stays whoever's made it: see `close`.

        Raises: StoreError if there is no such door, AccessError if it is shut.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_TIMEOUT_S)
        self._owns_slots = map_slots is Slots
        fds: list[int] = []
        try:
            self._socket.connect(str(socket_path))
            data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES_MAX, 1)
            hello = _checked(data)
            self.lease_bytes_max: int = hello["lease_bytes_max"]
            """Longest range of one lease."""
            self.slots = map_slots(fds[0], hello["size_bytes"])
        except OSError as error:
            self._socket.close()
            raise StoreError(f"slots of {socket_path}: {error}") from error
        except BaseException:
            self._socket.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def open(self, path: str, inode: int | None = None) -> tuple[int, int, str]:
        """(file number, size in bytes, identity of the version) of a file, by its path from the mount's root.

        inode: what fstat said of the file the caller has open, so that both are one version.
        Raises: NotFoundError; ChangedError if the inode is another one's.
        """
        answer = self._ask({"open": path, "inode": inode})
        return answer["file"], answer["size"], answer["identity"]

    def borrow(self, file: int, start: int, stop: int) -> Loan:
        """The bytes [start, stop) of a file, in place, until the loan is released; at most `lease_bytes_max` at once.

        Raises: MfsError of the fetch; TransientStoreError if others hold all that is lent.
        """
        answer = self._ask({"file": file, "start": start, "stop": stop})
        return Loan(self, answer["lease"], [(offset, nbytes) for offset, nbytes in answer["pieces"]])

    @contextmanager
    def lease(self, file: int, start: int, stop: int) -> Iterator[list[memoryview]]:
        """`borrow` for the length of a block; the views are good inside it only."""
        loan = self.borrow(file, start, stop)
        try:
            yield loan.views
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
        """Whether the daemon has ended; for a connection that has asked nothing."""
        watch = select.poll()
        watch.register(self._socket, select.POLLIN)
        return bool(watch.poll(0))  # the daemon says nothing unasked, so this can only be the end

    def close(self) -> None:
        """Give everything back; unmap, if the mapping is this connection's own."""
        self._socket.close()
        if self._owns_slots:
            self.slots.close()

    def _ask(self, ask: dict[str, Any]) -> dict[str, Any]:
        try:
            self._socket.send(json.dumps(ask).encode())
            data = self._socket.recv(MESSAGE_BYTES_MAX)
        except BaseException as error:
            self._socket.close()  # an answer that comes later would pass for that of the next question
            if not isinstance(error, OSError):
                raise
            raise StoreError(f"the mount's daemon is gone or does not answer: {error}") from error
        return _checked(data)


def find(path: str) -> tuple[Path, str] | None:
    """(slots socket, path from the mount's root) of a file under an mfs mount that lends slots to us; None
    elsewhere.
    """
    try:
        served = runtime.find_mount(path)
    except Exception:  # not under a mount, or a mount table we cannot read: the file is read like any other
        return None
    door = slots_path(served.socket)
    return (door, served.place.path) if os.access(door, os.W_OK) else None


def slots_path(control_socket: Path) -> Path:
    """Where the slots' door stands, beside the control socket."""
    return control_socket.with_suffix(".slots")


def _checked(data: bytes) -> dict[str, Any]:
    if not data:
        raise StoreError("the mount's daemon closed the connection")
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise from_wire(*answer["error"])
    return answer
