"""The pool path from the reader's side: bytes of a mounted file, read in place in the daemon's slots.

Synchronous, for loaders; a `SlotReader` belongs to one thread at a time. See `control.slots` for the protocol.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mfs.control import runtime
from mfs.control.slots import MESSAGE_BYTES_MAX
from mfs.errors import StoreError, from_wire

_TIMEOUT_S = 120.0
"""Longest wait for an answer. The daemon answers within its own --timeout; this outlasts it and ends a hang."""


class SlotReader:
    """A connection to one mount's slots."""

    def __init__(self, socket_path: Path) -> None:
        """Connect and map the slots, read-only. Raises: StoreError if there is no such door, AccessError if it is
        shut.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_TIMEOUT_S)
        try:
            self._socket.connect(str(socket_path))
            data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES_MAX, 1)
        except OSError as error:
            self._socket.close()
            raise StoreError(f"slots of {socket_path}: {error}") from error
        try:
            hello = _checked(data)
            self.lease_bytes_max: int = hello["lease_bytes_max"]
            """Longest range of one lease."""
            self._slots = mmap.mmap(fds[0], hello["size_bytes"], prot=mmap.PROT_READ)
        except BaseException:
            self._socket.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        self._view = memoryview(self._slots)

    def open(self, path: str, inode: int | None = None) -> tuple[int, int, str]:
        """(file number, size in bytes, identity of the version) of a file, by its path from the mount's root.

        inode: what fstat said of the file the caller has open, so that both are one version.
        Raises: NotFoundError; ChangedError if the inode is another one's.
        """
        answer = self._ask({"open": path, "inode": inode})
        return answer["file"], answer["size"], answer["identity"]

    @contextmanager
    def lease(self, file: int, start: int, stop: int) -> Iterator[list[memoryview]]:
        """The bytes [start, stop) of a file, in place; the views are good inside the context only.

        At most `lease_bytes_max` at once. Raises: MfsError of the fetch.
        """
        answer = self._ask({"file": file, "start": start, "stop": stop})
        views = [self._view[offset : offset + nbytes] for offset, nbytes in answer["pieces"]]
        try:
            yield views
        finally:
            for view in views:
                view.release()
            self._tell({"release": answer["lease"]})

    def close(self) -> None:
        """Give everything back."""
        self._socket.close()
        self._view.release()
        self._slots.close()

    def _ask(self, ask: dict[str, Any]) -> dict[str, Any]:
        self._tell(ask)
        try:
            return _checked(self._socket.recv(MESSAGE_BYTES_MAX))
        except OSError as error:
            raise StoreError(f"the mount's daemon does not answer: {error}") from error

    def _tell(self, ask: dict[str, Any]) -> None:
        try:
            self._socket.send(json.dumps(ask).encode())
        except OSError as error:
            raise StoreError(f"the mount's daemon is gone: {error}") from error


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
