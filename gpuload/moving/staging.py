"""A fixed ring of page-locked buffers: the only host memory a load uses, and its only backpressure.

A buffer goes round: taken by a reader, filled, copied from, put back at once with the copy's event. Whoever takes it
next waits for that event in a thread, so nobody watches events and nothing is filled while the device still reads it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

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
    """Buffers going round. Made by `open_ring`."""

    def __init__(self, buffers: Sequence[Buffer], buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._buffers = buffers
        self._put, self._get = trio.open_memory_channel[Buffer](len(buffers))
        for buffer in buffers:
            self._put.send_nowait(buffer)

    async def take(self) -> Buffer:
        """The buffer that was put back longest ago; waits while all are out."""
        return await self._get.receive()

    def put(self, buffer: Buffer) -> None:
        self._put.send_nowait(buffer)

    def forget_copies(self) -> None:
        """For whoever knows that no stream copies from any of these buffers any more."""
        for buffer in self._buffers:
            buffer.pending = None


@asynccontextmanager
async def open_ring(device: Device, *, buffer_bytes: int, count: int) -> AsyncIterator[Ring]:
    """`count` buffers of `buffer_bytes`, page-locked now and given back at the end, both in a thread.

    Leave the block only when no stream copies from them any more. Raises: DeviceError.
    """
    buffers: list[Buffer] = []

    def take_all() -> None:
        for _ in range(count):
            buffers.append(Buffer(device.alloc_staging(buffer_bytes)))  # noqa: PERF401  kept if a later one fails

    def close_all() -> None:
        while buffers:
            buffers.pop().staging.close()

    try:
        await trio.to_thread.run_sync(take_all)
        yield Ring(tuple(buffers), buffer_bytes)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(close_all)
