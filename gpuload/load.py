"""Loading into this process's own tensors: a file, a whole model, or tensor by tensor while the rest comes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import torch

from gpuload.device import canonical_name
from gpuload.door import run_inside
from gpuload.moving import make_all, move_all
from gpuload.pipeline import Limits
from gpuload.plan import MEGATRON_RULES, Placement, Transfer, plan_transfers
from gpuload.shards import close_shards, find_shards, open_shards
from gpuload.streaming import stream_transfers
from mfs.errors import UsageError

Where = str | os.PathLike[str]


def load_file(filename: Where, device: str | int = "cpu", *, limits: Limits | None = None) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, bit for bit as `safetensors.torch.load_file` gives them.

    The tensors own their memory (no view of a mapped file remains), in the order of their bytes in the file.
    device: 'cpu', 'cuda', 'cuda:N' or N. On 'cpu' the bytes are copied once: the tensors are the caller's to write, and
        no later truncation, I/O error or dead mount reaches them as SIGBUS. Lazy views of the mapped file are what
        `safetensors` gives, on a mount too; memory that is shared without a copy is what `attach` gives.
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
    Memory: tensors are made as they are reached, `limits.ahead_bytes` ahead of the consumer; who drops each tensor
        before asking for the next needs no more than that, however large the model. Who asks for none stops the load.
    Closing the generator early cancels what is still on its way. Otherwise as `load_model`.
    """
    placement = _placement(device, device_map, rank, world, rules)
    shards = open_shards(find_shards(where))
    try:
        transfers = _ordered(plan_transfers([s.header for s in shards], placement), order)
        yield from stream_transfers(shards, transfers, limits or Limits())
    finally:
        close_shards(shards)


def _load(paths: Sequence[Where], placement: Placement, limits: Limits) -> dict[str, torch.Tensor]:
    shards = open_shards(paths)
    try:
        transfers = plan_transfers([s.header for s in shards], placement)
        made = make_all(transfers)
        run_inside(lambda: move_all(shards, transfers, made, limits))
        return {t.name: tensor for t, tensor in zip(transfers, made, strict=True)}
    finally:
        close_shards(shards)


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
