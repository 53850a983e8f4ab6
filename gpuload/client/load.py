"""Loading into this process's own tensors: a file, a whole model, or tensor by tensor while the rest comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from gpuload.client.device_maps import DeviceMap, DeviceName, by_strategy, check_there, explicit, free_bytes
from gpuload.client.door import run_inside
from gpuload.client.into_tensors import make_all, move_all, move_few
from gpuload.client.streaming import stream_transfers
from gpuload.device import canonical_name
from gpuload.moving.model_files import open_model
from gpuload.moving.pipeline import Limits
from gpuload.moving.plan import MEGATRON_RULES, Placement, Transfer, plan_transfers
from gpuload.moving.shards import Shard, close_shards, open_shards
from mfs.errors import UsageError
from mfs.safetensors import Header

Where = str | os.PathLike[str]
Place = Callable[[Sequence[Header]], Placement]


def load_file(filename: Where, device: DeviceName = "cpu", *, limits: Limits | None = None) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, bit for bit as `safetensors.torch.load_file` gives them.

    The tensors own their memory (no view of a mapped file remains), in the order of their bytes in the file.
    device: 'cpu', 'cuda', 'cuda:N', N, or a torch.device of these. On 'cpu' the bytes are copied once: the tensors are
        the caller's to write, and no later truncation, I/O error or dead mount reaches them as SIGBUS. Lazy views of a
        mapped file are what `safetensors` gives, on a mount too; memory that is shared without a copy is what `attach`
        gives.
    Raises: NotFoundError, AccessError, IntegrityError for a hostile or truncated file, ChangedError if it is cut short
        meanwhile, DeviceError, UsageError. An interrupt cancels the load as one.
    """
    placement = Placement(device=canonical_name(device))
    return _load(open_shards([filename]), lambda headers: placement, limits or Limits())


def load_model(
    where: Where,
    device: DeviceName = "cpu",
    *,
    device_map: DeviceMap | None = None,
    rank: int = 0,
    world: int = 1,
    rules: Mapping[str, int | None] | None = None,
    limits: Limits | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of a model: a folder, an index, or one file; its shards are read in parallel.

    device_map: as transformers takes it: module prefix -> device (what it does not cover goes to `device`), one device
        for all, or one of `device_maps.STRATEGIES`: 'auto' spreads the layers over the GPUs; what they cannot take, and
        all of it where there are none, goes to the CPU. Nothing goes to a disk.
    rank, world, rules: this tensor-parallel rank's part of every tensor; see `plan.Placement`. Without `rules`,
        `plan.MEGATRON_RULES`. Only the wanted bytes are moved.
    Raises: as `load_file`; UsageError if a tensor cannot be cut as the rules say.
    """
    place = _placing(device, device_map, rank, world, rules)
    return _load(open_model(where), place, limits or Limits())


def stream(
    where: Where,
    device: DeviceName = "cpu",
    *,
    device_map: DeviceMap | None = None,
    rank: int = 0,
    world: int = 1,
    rules: Mapping[str, int | None] | None = None,
    order: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) as they land, so that computing starts before the copy ends.

    order: names to move first, in this order (a recorded order of first use, say); the others follow in file order.
        Without it: file order. Names that the model does not have raise UsageError.
    Memory: tensors are made as they are reached, `limits.ahead_bytes` ahead of the consumer; who drops each tensor
        before asking for the next needs no more than that, however large the model. Who asks for none stops the load.
    Closing the generator early cancels what is still on its way. Otherwise as `load_model`.
    """
    place = _placing(device, device_map, rank, world, rules)
    shards = open_model(where)
    try:
        transfers = _ordered(_plan(shards, place), order)
        yield from stream_transfers(shards, transfers, limits or Limits())
    finally:
        close_shards(shards)


def _load(shards: Sequence[Shard], place: Place, limits: Limits) -> dict[str, torch.Tensor]:
    """Closes the shards."""
    try:
        transfers = _plan(shards, place)
        made = make_all(transfers)
        if not move_few(shards, transfers, made, limits):
            run_inside(lambda: move_all(shards, transfers, made, limits))
        return {t.name: tensor for t, tensor in zip(transfers, made, strict=True)}
    finally:
        close_shards(shards)


def _plan(shards: Sequence[Shard], place: Place) -> list[Transfer]:
    headers = [shard.header for shard in shards]
    transfers = plan_transfers(headers, place(headers))
    for device in dict.fromkeys(t.device for t in transfers):
        check_there(device)
    return transfers


def _placing(
    device: DeviceName, device_map: DeviceMap | None, rank: int, world: int, rules: Mapping[str, int | None] | None
) -> Place:
    """The placement, once the tables are known: a strategy needs the sizes. Raises: UsageError, at once."""
    spelled_out = explicit(device_map)
    placement = Placement(
        device=canonical_name(device),
        device_map=spelled_out or {},
        rank=rank,
        world=world,
        rules=MEGATRON_RULES if rules is None else rules,
    )
    if spelled_out is not None:
        return lambda headers: placement
    return lambda headers: replace(placement, device_map=by_strategy(str(device_map), headers, free_bytes()))


def _ordered(transfers: list[Transfer], order: Sequence[str] | None) -> list[Transfer]:
    if order is None:
        return transfers
    by_name = {t.name: t for t in transfers}
    unknown = [name for name in order if name not in by_name]
    if unknown:
        raise UsageError(f"the order names {len(unknown)} tensors that the model does not have, first {unknown[0]!r}")
    first = dict.fromkeys(order)
    return [by_name[name] for name in first] + [t for t in transfers if t.name not in first]
