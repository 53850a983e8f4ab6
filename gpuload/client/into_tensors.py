"""Transfers into torch tensors of this process: makes their memory, moves their bytes, all devices at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, closing

import torch
import trio

from gpuload.client import rings, tensors
from gpuload.device import open_device
from gpuload.device.base import Device
from gpuload.moving.pipeline import Limits, move_batches, move_one_by_one
from gpuload.moving.plan import Batch, Packing, Piece, Transfer, pack_transfers, plan_batches
from gpuload.moving.pool import open_source
from gpuload.moving.shards import Shard
from gpuload.moving.slabs import plan_slabs
from gpuload.moving.source import Source
from gpuload.moving.staging import FIRST_BYTES

DIRECT_BYTES = 16 << 20
"""Read at once where no buffer is between: small enough that two readers share a file of 32 MiB."""


async def move_all(
    shards: Sequence[Shard], transfers: Sequence[Transfer], made: Sequence[torch.Tensor], limits: Limits
) -> None:
    """Fill every tensor of `made` (by `make_all`) from its transfer, all devices at once."""
    addresses = [tensor.data_ptr() for tensor in made]
    await move_to_addresses(shards, batches_of(transfers, limits), addresses, limits)


def move_few(
    shards: Sequence[Shard], transfers: Sequence[Transfer], made: Sequence[torch.Tensor], limits: Limits
) -> bool:
    """As `move_all`, in the caller's thread, where that is no slower: to host memory, and no more than one read.
    Returns whether it was done."""
    if sum(t.nbytes for t in transfers) > DIRECT_BYTES or not all(_is_cpu(t.device) for t in transfers):
        return False
    addresses = [tensor.data_ptr() for tensor in made]
    batches = plan_batches(transfers, buffer_bytes=limits.buffer_bytes)
    with closing(open_source(shards)) as source, closing(open_device("cpu")) as device:
        move_one_by_one(
            batches, source=source, device=device, limits=limits,
            runs_of=lambda piece: [(addresses[piece.transfer] + piece.offset, piece.nbytes)],
        )  # fmt: skip
    return True


def devices_of(transfers: Sequence[Transfer]) -> list[str]:
    """Where they go, each device once."""
    return list(dict.fromkeys(t.device for t in transfers))


def batches_to(device: str, transfers: Sequence[Transfer], limits: Limits) -> list[Batch]:
    """What is moved to one device, in order."""
    most = min(limits.buffer_bytes, DIRECT_BYTES) if _is_cpu(device) else limits.buffer_bytes
    return plan_batches(transfers, buffer_bytes=most, device=device)


def batches_of(transfers: Sequence[Transfer], limits: Limits) -> dict[str, Sequence[Batch] | Packing]:
    """Device -> what is moved to it, in order; to a card planned as it is asked for, as large as the buffers of `rings`
    are by then."""
    first_bytes = min(limits.buffer_bytes, FIRST_BYTES)
    return {
        name: batches_to(name, transfers, limits) if _is_cpu(name)
        else pack_transfers(transfers, piece_bytes=first_bytes, device=name)
        for name in devices_of(transfers)
    }  # fmt: skip


def _is_cpu(device: str) -> bool:
    return device.startswith("cpu")


async def move_to_addresses(
    shards: Sequence[Shard],
    batches: Mapping[str, Sequence[Batch] | Packing],
    addresses: Sequence[int],
    limits: Limits,
    on_landed: Callable[[int], None] | None = None,
    admit: Callable[[Batch], Awaitable[None]] | None = None,
    source: Source | None = None,
) -> None:
    """Move the batches of every device, each transfer to its address; `admit` and `on_landed` as in `move_batches`.

    source: where the bytes come from, if not from the shards' files; it is closed.
    """

    def runs_of(piece: Piece) -> list[tuple[int, int]]:
        return [(addresses[piece.transfer] + piece.offset, piece.nbytes)]

    async def move_to(device: Device, own: Sequence[Batch] | Packing) -> None:
        with ExitStack() as held:
            held.callback(device.close)
            ring = None if device.is_direct else held.enter_context(rings.lent(device.name, limits)).ring
            await move_batches(
                own, source=opened, device=device, runs_of=runs_of, limits=limits, on_landed=on_landed, admit=admit,
                lent=ring,
            )  # fmt: skip

    with closing(source or open_source(shards)) as opened:
        async with trio.open_nursery() as nursery:
            for name, own in batches.items():
                nursery.start_soon(move_to, open_device(name), own)


def make_all(transfers: Sequence[Transfer]) -> list[torch.Tensor]:
    """Memory for every transfer, free of the caller's earlier kernels. Call it in their thread, as streams are."""
    slabbed = [t.device.startswith("cuda") for t in transfers]
    places, sizes = plan_slabs([t for t, is_slabbed in zip(transfers, slabbed, strict=True) if is_slabbed])
    rest = iter(places)
    slabs: dict[int, torch.Tensor] = {}
    made: list[torch.Tensor] = []
    for t, is_slabbed in zip(transfers, slabbed, strict=True):
        place = next(rest) if is_slabbed else None
        if place is None:
            made.append(tensors.empty(t.dtype, t.shape, t.name, t.device))
            continue
        if place.slab not in slabs:
            slabs[place.slab] = tensors.empty("U8", (sizes[place.slab],), t.name, t.device)
        part = slabs[place.slab][place.offset : place.offset + t.nbytes]
        made.append(tensors.view_as(part, t.dtype, t.shape, t.name))
    for device in devices_of(transfers):
        tensors.settle(device)
    return made
