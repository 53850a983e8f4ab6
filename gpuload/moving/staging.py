"""A ring of page-locked buffers: the only host memory a load uses, and its only backpressure.

A buffer goes round: taken by a reader, filled, copied from, put back at once with the copy's event. Whoever takes it
next waits for that event, so nobody watches events and nothing is filled while the device still reads it.

Page-locking is slow, one range at a time: 3 ms for what a link moves in 0.6, and touching fresh memory costs as much
again; on a guest whose host has taken free memory back, twenty times as much. So the link begins with what the first
buffers hold, and they go round while others are made: one that is free is filled before a new one is touched.
The first fill touches a buffer, and its reader has it page-locked before it queues the copy. Of a new buffer little is
filled, all of it when it comes round again, one buffer at a time. Who stays (the server) makes all of them at once,
whole: `Ring.grow`.
"""

from __future__ import annotations

import threading
from collections import deque

from gpuload.device.base import Device, Event, Staging
from gpuload.device.nodes import beside
from gpuload.errors import BusyError

FIRST_BYTES = 8 << 20
"""Filled of a new buffer. Less would be there sooner, but each batch costs Python as much as a large one."""

GROWING_MOST = 1
"""Buffers that are made, or grow, at once. Page-locking is one at a time; more would only be missed by the link, and
two that wait for a host's memory stop both processors of a small guest (decisions/0007)."""


class Buffer:
    """One staging buffer and the copy that may still read from it."""

    def __init__(self, staging: Staging, room: int) -> None:
        self.staging = staging
        self.pending: Event | None = None
        self.room = room
        """Bytes to fill at most, for now."""
        self.is_growing = False
        """Some of its room is touched and page-locked by whoever has it now."""

    def is_at_rest(self) -> bool:
        """Whether nothing reads from this buffer any more, by a look at its event. Raises: DeviceError."""
        if self.pending is not None:
            try:
                self.pending.wait(0.0)
            except BusyError:
                return False
            self.pending = None
        return True

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
        """The buffer that was put back longest ago; a new one, where a copy still reads from that; blocks while all are
        out. None after `stop`. Before the copy: `Staging.lock`. Raises: DeviceError.
        """
        buffer: Buffer | None = None
        with self._changed:
            while not self._is_stopped:
                may_grow = self._growing_count < GROWING_MOST
                may_make = may_grow and self._made_count < self.count
                if self._idle and (not may_make or self._idle[0].is_at_rest()):
                    buffer = self._idle.popleft()
                    break
                if may_make:
                    self._made_count += 1
                    break
                self._changed.wait()
            else:
                return None
            grows = may_grow and (buffer is None or buffer.room < self.buffer_bytes)
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
