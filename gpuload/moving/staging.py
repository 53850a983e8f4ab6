"""A ring of page-locked buffers: the only host memory a load uses, and its only backpressure.

A buffer goes round: taken by a reader, filled, copied from, put back at once with the copy's event. Whoever takes it
next waits for that event, so nobody watches events and nothing is filled while the device still reads it.

Page-locking is slow (tens of milliseconds for what a link moves in one), so a load begins with the first buffer that
is there, and the others come while it is at work: `Ring.grow`, in a thread of its own.
"""

from __future__ import annotations

import threading
from collections import deque

from gpuload.device.base import Device, Event, Staging


class Buffer:
    """One staging buffer and the copy that may still read from it."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self.pending: Event | None = None

    def settle(self, timeout_s: float) -> None:
        """Block until nothing reads from this buffer. Raises: DeviceError, BusyError."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.wait(timeout_s)


class Ring:
    """Up to `count` buffers of `buffer_bytes`, going round between threads. It has none until `grow` made some."""

    def __init__(self, device: Device, *, buffer_bytes: int, count: int) -> None:
        self.buffer_bytes, self.count = buffer_bytes, count
        self._device = device
        self._changed = threading.Condition()
        self._buffers: list[Buffer] = []
        self._idle: deque[Buffer] = deque()
        self._coming = 0
        self._is_stopped = False

    def grow(self, most: int | None = None) -> None:
        """Page-lock the buffers that are missing, or as many as make `most`, one by one; each is taken as it is there.
        Until `stop`. Blocks; several threads at once are that much faster.

        Raises: DeviceError; whoever waits in `take` must be stopped then.
        """
        while self._one_more(most or self.count):
            try:
                buffer = Buffer(self._device.alloc_staging(self.buffer_bytes))
            except BaseException:
                with self._changed:
                    self._coming -= 1
                raise
            with self._changed:
                self._coming -= 1
                self._buffers.append(buffer)
                self._idle.append(buffer)
                self._changed.notify()

    def _one_more(self, most: int) -> bool:
        with self._changed:
            wanted = len(self._buffers) + self._coming < most and not self._is_stopped
            self._coming += wanted
            return wanted

    def take(self) -> Buffer | None:
        """The buffer that was put back longest ago; blocks while all are out. None after `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._is_stopped)
            return None if self._is_stopped else self._idle.popleft()

    def put(self, buffer: Buffer) -> None:
        with self._changed:
            self._idle.append(buffer)
            self._changed.notify()

    def stop(self) -> None:
        """Nobody gets a buffer any more, until `rest`."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def rest(self) -> None:
        """For whoever knows that no stream copies from any of these buffers any more: ready for the next load."""
        self._is_stopped = False
        for buffer in self._buffers:
            buffer.pending = None

    def close(self) -> None:
        """Give all buffers back; none may be out, nor copied from."""
        self._idle.clear()
        while self._buffers:
            self._buffers.pop().staging.close()
