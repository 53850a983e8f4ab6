"""Loading into this process's own tensors: a file, a whole model, or tensor by tensor while the rest comes."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

import torch
import trio

from gpuload import tensors
from gpuload.device import canonical_name, open_device
from gpuload.device.base import Device
from gpuload.door import Inside, run_inside
from gpuload.pipeline import Limits, RunsOf, move_batches
from gpuload.plan import MEGATRON_RULES, Batch, Piece, Placement, Transfer, plan_batches, plan_transfers
from gpuload.pool import open_source
from gpuload.shards import Shard, close_shards, find_shards, open_shards
from gpuload.source import Source
from mfs.errors import UsageError

Where = str | os.PathLike[str]


def load_file(filename: Where, device: str | int = "cpu", *, limits: Limits | None = None) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, bit for bit as `safetensors.torch.load_file` gives them.

    The tensors own their memory (no view of a mapped file remains), in the order of their bytes in the file.
    device: 'cpu', 'cuda', 'cuda:N' or N.
    Raises: NotFoundError, AccessError, IntegrityError for a hostile or truncated file, ChangedError if it is cut short
        meanwhile, DeviceError, UsageError. An interrupt cancels the load as one.
    """
    return _load([filename], Placement(device=canonical_name(device)), limits or Limits())


def load_model(
    where: Where,
    device: str | int = "cpu",
    *,
    device_map: Mapping[str, str | int] | None = None,
    rank: int = 0,
    world: int = 1,
    rules: Mapping[str, int | None] | None = None,
    limits: Limits | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of a model: a folder, an index, or one file; its shards are read in parallel.

    device_map: module prefix -> device, as in accelerate; names it does not cover go to `device`.
    rank, world, rules: this tensor-parallel rank's part of every tensor; see `plan.Placement`. Without `rules`,
        `plan.MEGATRON_RULES`. Only the wanted bytes are moved.
    Raises: as `load_file`; UsageError if a tensor cannot be cut as the rules say.
    """
    return _load(find_shards(where), _placement(device, device_map, rank, world, rules), limits or Limits())


def stream(
    where: Where,
    device: str | int = "cpu",
    *,
    device_map: Mapping[str, str | int] | None = None,
    rank: int = 0,
    world: int = 1,
    rules: Mapping[str, int | None] | None = None,
    order: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) as they land, so that computing starts before the copy ends.

    order: names to move first, in this order (a recorded order of first use, say); the others follow in file order.
        Without it: file order. Names that the model does not have raise UsageError.
    Closing the generator early cancels what is still on its way. Otherwise as `load_model`.
    """
    placement = _placement(device, device_map, rank, world, rules)
    shards = open_shards(find_shards(where))
    try:
        transfers = _ordered(plan_transfers([s.header for s in shards], placement), order)
        yield from _landing(shards, transfers, limits or Limits())
    finally:
        close_shards(shards)


def _landing(
    shards: Sequence[Shard], transfers: Sequence[Transfer], limits: Limits
) -> Iterator[tuple[str, torch.Tensor]]:
    made = make_all(transfers)
    landed: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    async def work() -> None:
        try:
            await move_all(shards, transfers, made, limits, landed.put)
        finally:
            landed.put(None)

    inside = Inside(work)
    try:
        here = {i for i, t in enumerate(transfers) if not t.nbytes}
        for index, transfer in enumerate(transfers):
            while index not in here:
                got = landed.get()
                if got is None:
                    inside.join()  # raises what ended it
                    return
                here.add(got)
            yield transfer.name, made[index]
        inside.join()
    finally:
        inside.cancel()


def _load(paths: Sequence[Where], placement: Placement, limits: Limits) -> dict[str, torch.Tensor]:
    shards = open_shards(paths)
    try:
        transfers = plan_transfers([s.header for s in shards], placement)
        made = make_all(transfers)
        run_inside(lambda: move_all(shards, transfers, made, limits))
        return {t.name: tensor for t, tensor in zip(transfers, made, strict=True)}
    finally:
        close_shards(shards)


async def move_all(
    shards: Sequence[Shard],
    transfers: Sequence[Transfer],
    made: Sequence[torch.Tensor],
    limits: Limits,
    on_landed: Callable[[int], None] | None = None,
    open_one: Callable[[str], Device] = open_device,
) -> None:
    """Fill every tensor of `made` (by `make_all`) from its transfer, all devices at once."""
    addresses = [tensor.data_ptr() for tensor in made]

    def runs_of(piece: Piece) -> list[tuple[int, int]]:
        return [(addresses[piece.transfer] + piece.offset, piece.nbytes)]

    with closing(open_source(shards)) as source:
        async with trio.open_nursery() as nursery:
            for name in dict.fromkeys(t.device for t in transfers):
                batches = plan_batches(transfers, buffer_bytes=limits.buffer_bytes, device=name)
                nursery.start_soon(_move_to, open_one(name), batches, source, runs_of, limits, on_landed)


async def _move_to(
    device: Device,
    batches: Sequence[Batch],
    source: Source,
    runs_of: RunsOf,
    limits: Limits,
    on_landed: Callable[[int], None] | None,
) -> None:
    try:
        await move_batches(batches, source=source, device=device, runs_of=runs_of, limits=limits, on_landed=on_landed)
    finally:
        device.close()


def make_all(transfers: Sequence[Transfer]) -> list[torch.Tensor]:
    """Memory for every transfer, free of the caller's earlier kernels. Call it in their thread, as streams are."""
    made = [tensors.empty(t.dtype, t.shape, t.name, t.device) for t in transfers]
    for device in dict.fromkeys(t.device for t in transfers):
        tensors.settle(device)
    return made


def _placement(
    device: str | int,
    device_map: Mapping[str, str | int] | None,
    rank: int,
    world: int,
    rules: Mapping[str, int | None] | None,
) -> Placement:
    return Placement(
        device=canonical_name(device),
        device_map={prefix: canonical_name(name) for prefix, name in (device_map or {}).items()},
        rank=rank,
        world=world,
        rules=MEGATRON_RULES if rules is None else rules,
    )


def _ordered(transfers: list[Transfer], order: Sequence[str] | None) -> list[Transfer]:
    if order is None:
        return transfers
    by_name = {t.name: t for t in transfers}
    unknown = [name for name in order if name not in by_name]
    if unknown:
        raise UsageError(f"the order names {len(unknown)} tensors that the model does not have, first {unknown[0]!r}")
    first = dict.fromkeys(order)
    return [by_name[name] for name in first] + [t for t in transfers if t.name not in first]
