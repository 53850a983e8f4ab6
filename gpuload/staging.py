"""A fixed ring of page-locked buffers: the only host memory a load uses, and its only backpressure.

A buffer goes round: taken by a reader, filled, copied from, put back at once with the copy's event. Whoever takes it
next waits for that event in a thread, so nobody watches events and nothing is filled while the device still reads it.
"""

from __future__ import annotations

from types import TracebackType

import trio

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
    """`count` buffers of `buffer_bytes`, taken page-locked at construction, given back at exit.

    Leave the `with` block only when no stream copies from them any more.
    """

    def __init__(self, device: Device, *, buffer_bytes: int, count: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._buffers: list[Buffer] = []
        self._put, self._get = trio.open_memory_channel[Buffer](count)
        try:
            for _ in range(count):
                buffer = Buffer(device.alloc_staging(buffer_bytes))
                self._buffers.append(buffer)
                self._put.send_nowait(buffer)
        except BaseException:
            self.close()
            raise

    async def take(self) -> Buffer:
        """The buffer that was put back longest ago; waits while all are out."""
        return await self._get.receive()

    def put(self, buffer: Buffer) -> None:
        self._put.send_nowait(buffer)

    @property
    def free_count(self) -> int:
        return self._put.statistics().current_buffer_used

    def close(self) -> None:
        while self._buffers:
            self._buffers.pop().staging.close()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
