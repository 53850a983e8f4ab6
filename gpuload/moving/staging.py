"""A ring of page-locked buffers: the only host memory a load uses, and its only backpressure.

A buffer goes round: taken by a reader, filled, copied from, put back at once with the copy's event. Whoever takes it
next waits for that event, so nobody watches events and nothing is filled while the device still reads it.

Page-locking is slow, one range at a time: 3 ms for what a link moves in 0.6, and touching fresh memory costs as much
again. So buffers are made as readers ask for them; the first fill touches one, and its reader has it page-locked before
it queues the copy, while the others read. Of a new buffer little is filled, so that the link begins after the first few
MiB; all of it when it comes round again, few buffers at a time, while the others keep the link busy. Who stays (the
server) makes all of them at once, whole: `Ring.grow`.
"""

from __future__ import annotations

import threading
from collections import deque

from gpuload.device.base import Device, Event, Staging
from gpuload.device.nodes import beside

FIRST_BYTES = 8 << 20
"""Filled of a new buffer. Less would be there sooner, but each batch costs Python as much as a large one."""

GROWING_MOST = 2
"""Buffers that grow at once. Page-locking is one at a time; more of them would only be missed by the link."""


class Buffer:
    """One staging buffer and the copy that may still read from it."""

    def __init__(self, staging: Staging, room: int) -> None:
        self.staging = staging
        self.pending: Event | None = None
        self.room = room
        """Bytes to fill at most, for now."""
        self.is_growing = False
        """Some of its room is touched and page-locked by whoever has it now."""

    def settle(self, timeout_s: float) -> None:
        """Block until nothing reads from this buffer. Raises: DeviceError, BusyError."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.wait(timeout_s)


class Ring:
    """Up to `count` buffers of `buffer_bytes`, going round between threads."""

    def __init__(self, device: Device, *, buffer_bytes: int, count: int, first_bytes: int | None = None) -> None:
        """first_bytes: the room of a new buffer; None: all of it."""
        self.buffer_bytes, self.count = buffer_bytes, count
        self.first_bytes = min(first_bytes or buffer_bytes, buffer_bytes)
        self._device = device
        self._changed = threading.Condition()
        self._buffers: list[Buffer] = []
        self._idle: deque[Buffer] = deque()
        self._made_count = 0
        self._growing_count = 0
        self._is_stopped = False

    def grow(self) -> None:
        """Make the buffers that are missing, whole and page-locked. Blocks. Raises: DeviceError."""
        with beside(self._device.node):
            while self._may_make():
                self.put(self._make(self.buffer_bytes, is_locked=True))

    def take(self) -> Buffer | None:
        """A buffer that nothing copies from, a new one, or the one that was put back longest ago; blocks while all are
        out. None after `stop`. Before the copy: `Staging.lock`. Raises: DeviceError.
        """
        buffer: Buffer | None = None
        with self._changed:
            while not self._is_stopped:
                buffer = next((buffer for buffer in self._idle if buffer.pending is None), None)
                if buffer is not None:
                    self._idle.remove(buffer)
                    break
                if self._made_count < self.count:
                    self._made_count += 1
                    break
                if self._idle:
                    buffer = self._idle.popleft()
                    break
                self._changed.wait()
            else:
                return None
            grows = buffer is None or (buffer.room < self.buffer_bytes and self._growing_count < GROWING_MOST)
            self._growing_count += grows
        if buffer is None:
            try:
                buffer = self._make(self.first_bytes, is_locked=False)
            except BaseException:
                with self._changed:
                    self._growing_count -= 1
                raise
        elif grows:
            buffer.room = self.buffer_bytes
        buffer.is_growing = grows
        return buffer

    @property
    def room(self) -> int:
        """What the next buffers have at least."""
        with self._changed:
            is_made = self._made_count == self.count
            return min((buffer.room for buffer in self._buffers), default=0) if is_made else self.first_bytes

    def _may_make(self) -> bool:
        with self._changed:
            may = self._made_count < self.count and not self._is_stopped
            self._made_count += may
            return may

    def _make(self, room: int, *, is_locked: bool) -> Buffer:
        try:
            buffer = Buffer(self._device.alloc_staging(self.buffer_bytes, is_locked=is_locked), room)
        except BaseException:
            with self._changed:
                self._made_count -= 1
                self._changed.notify()
            raise
        with self._changed:
            self._buffers.append(buffer)
        return buffer

    def put(self, buffer: Buffer) -> None:
        with self._changed:
            self._growing_count -= buffer.is_growing
            buffer.is_growing = False
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
        self._made_count = 0
