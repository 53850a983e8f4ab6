"""Tensors given out while the rest of the model is on its way, in memory that is made as they are reached.

    consumer's thread   make memory for what comes next ── wait for this tensor ── yield it
    the load's thread   feeder waits until a batch's memory is there ── pipeline ── tells what has landed

Memory is made in the consumer's thread, because on CUDA it is the consumer's stream whose kernels may still use it.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import trio

from gpuload.client import tensors
from gpuload.client.door import Inside
from gpuload.client.into_tensors import batches_to, devices_of, move_to_addresses
from gpuload.moving.pipeline import Limits
from gpuload.moving.plan import Batch, Transfer
from gpuload.moving.shards import Shard


def stream_transfers(
    shards: Sequence[Shard], transfers: Sequence[Transfer], limits: Limits
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every transfer, in their order. See `load.stream`."""
    batches = {name: batches_to(name, transfers, limits) for name in devices_of(transfers)}
    window = _Window(transfers, batches, limits.ahead_bytes)
    landed: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    async def work() -> None:
        try:
            await move_to_addresses(shards, batches, window.addresses, limits, landed.put, window.admit)
        finally:
            landed.put(None)

    inside = Inside(work)
    try:
        here = {i for i, t in enumerate(transfers) if not t.nbytes}
        for index, transfer in enumerate(transfers):
            inside.run_soon(partial(window.admitted, window.open_up(index)))
            while index not in here:
                got = landed.get()
                if got is None:
                    inside.join()  # raises what ended it
                    return
                here.add(got)
            yield transfer.name, window.take(index)  # no name for it here: the consumer's is the only hold on it
        inside.join()
    finally:
        inside.cancel()


class _Window:
    """The tensors between those that were given out and those that are not reached yet."""

    def __init__(self, transfers: Sequence[Transfer], batches: Mapping[str, Sequence[Batch]], ahead_bytes: int) -> None:
        self._transfers = transfers
        self._ahead_bytes = ahead_bytes
        self._made: dict[int, torch.Tensor] = {}
        self._made_bytes = 0
        """Made and not given out."""
        self._next = 0
        self.addresses = [0] * len(transfers)
        self._needs = list(range(len(transfers)))  # what shares a batch with a transfer must be made before it can land
        for batch in (batch for own in batches.values() for batch in own):
            last = max(piece.transfer for piece in batch.pieces)
            for piece in batch.pieces:
                self._needs[piece.transfer] = max(self._needs[piece.transfer], last)
        self._admitted = 0  # on the load's thread from here on
        self._more = trio.Event()

    def open_up(self, index: int) -> int:
        """Make what is needed for transfer `index`, and more once half of the window is used up; how many are made."""
        first, count = self._next, len(self._transfers)
        is_low = self._made_bytes <= self._ahead_bytes // 2  # not at every tensor: each round waits for the device
        while self._next <= self._needs[index] or (
            is_low and self._next < count and self._made_bytes + self._transfers[self._next].nbytes <= self._ahead_bytes
        ):
            t = self._transfers[self._next]
            tensor = self._made[self._next] = tensors.empty(t.dtype, t.shape, t.name, t.device)
            self.addresses[self._next] = tensor.data_ptr()
            self._made_bytes += t.nbytes
            self._next += 1
        for device in dict.fromkeys(t.device for t in self._transfers[first : self._next]):
            tensors.settle(device)
        return self._next

    def take(self, index: int) -> torch.Tensor:
        self._made_bytes -= self._transfers[index].nbytes
        return self._made.pop(index)

    def admitted(self, count: int) -> None:
        """On the load's thread: the first `count` tensors have memory."""
        self._admitted = count
        self._more.set()
        self._more = trio.Event()

    async def admit(self, batch: Batch) -> None:
        """Wait until every tensor of the batch has memory."""
        last = max(piece.transfer for piece in batch.pieces)
        while last >= self._admitted:
            await self._more.wait()
