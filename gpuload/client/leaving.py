"""Leases of this process, and how they end: memory is unmapped first, the connection that stands for it closed then.

To unmap memory of a GPU has to wait for the device, which would break a CUDA graph that is being captured: no business
of a finalizer's. What is let go of there is put aside, for whoever next says that it is a good time.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections import deque
from collections.abc import Sequence

from gpuload.device.base import Change
from gpuload.device.base import Mapping as DeviceMapping


class Left:
    """What nobody uses any more, and what to unmap has to wait."""

    def __init__(self) -> None:
        self._left: deque[tuple[Sequence[DeviceMapping | Change], socket.socket]] = deque()
        atexit.register(self._leave)

    def leave(self, left: Sequence[DeviceMapping | Change], sock: socket.socket, *, is_ours: bool = True) -> None:
        """Close mappings, or changes to such, and their connection then; later, if that waits for the device. For
        finalizers. is_ours: not a forked child, for whom nothing waits."""
        if is_ours and any(one.waits_to_close for one in left):
            self._left.append((left, sock))
            return
        _end(left, sock)

    def close(self) -> None:
        """Close what was put aside. Waits for the device. From any thread."""
        while self._left:
            try:
                left, sock = self._left.popleft()
            except IndexError:  # another thread was first
                return
            _end(left, sock)

    def _leave(self) -> None:
        """At the end of the process: the kernel unmaps, and closes the connections afterwards."""
        while self._left:
            self._left.popleft()[1].detach()


def _end(left: Sequence[DeviceMapping | Change], sock: socket.socket) -> None:
    """Unmapped first: the server may give the memory to others once the connection is closed."""
    with sock:
        for one in left:
            one.close()


class Lease:
    """The mappings and the connection that stands for their lease."""

    def __init__(self, sock: socket.socket, left: Left) -> None:
        self.sock = sock
        self.mappings: list[DeviceMapping] = []
        self.left, self._pid = left, os.getpid()

    def close(self) -> None:
        """Idempotent."""
        try:
            while self.mappings:
                self.mappings.pop().close()
        finally:
            self.sock.close()

    def __del__(self) -> None:
        try:
            self.left.leave(self.mappings, self.sock, is_ours=self._pid == os.getpid())
        except Exception:  # while the interpreter ends, parts of it are gone; the kernel unmaps and closes then
            pass
