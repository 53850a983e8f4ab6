"""Does it fit? Weights, key-value cache, staging and what is there already, against a device. Pure.

Estimates name what they leave out: activations and a framework's own buffers are not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpuload.kv_cache import kv_cache_bytes
from gpuload.moving.plan import Placement, Transfer, slice_tensor
from gpuload.server.layout import plan_blocks
from mfs.errors import UsageError
from mfs.safetensors import Header

CONTEXT_BYTES = 600 << 20
"""What a process with CUDA and cuBLAS takes before its first tensor. From reports, not measured here."""

CARDS = {"80 GB": 81_559 << 20, "141 GB": 143_771 << 20}
"""Memory that nvidia-smi reports for an A100/H100 of 80 GB and an H200."""

WORLDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Sizes:
    """What a model's tables say."""

    tensors_count: int
    shards_count: int
    bytes_total: int
    bytes_by_dtype: Mapping[str, int]
    """Largest first."""
    rank_bytes: Mapping[int, int]
    """Tensor-parallel size -> bytes of its largest rank."""
    whole: Mapping[int, int]
    """Tensor-parallel size -> tensors that a rule names and that cannot be cut so, kept whole on every rank."""


@dataclass(frozen=True)
class Fit:
    """One sum. All in bytes."""

    weights_bytes: int
    kv_cache_bytes: int
    context_bytes: int
    staging_bytes: int
    resident_bytes: int
    """Weights the server holds there already."""
    others_bytes: int
    """Everything else that is in use there."""
    device_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.context_bytes + self.staging_bytes

    @property
    def room_bytes(self) -> int:
        """For a key-value cache: what is left when all but that is there."""
        taken = self.needed_bytes - self.kv_cache_bytes + self.resident_bytes + self.others_bytes
        return max(0, self.device_bytes - taken)

    @property
    def shortfall_bytes(self) -> int:
        """0 if it fits."""
        return max(0, self.needed_bytes + self.resident_bytes + self.others_bytes - self.device_bytes)


def model_sizes(headers: Sequence[Header], rules: Mapping[str, int | None]) -> Sizes:
    """Sum the tables up, for one card and for every tensor-parallel size."""
    tensors = [(shard, t) for shard, header in enumerate(headers) for t in header.tensors]
    by_dtype: dict[str, int] = {}
    for _, t in tensors:
        by_dtype[t.dtype] = by_dtype.get(t.dtype, 0) + t.nbytes
    rank_bytes: dict[int, int] = {}
    whole: dict[int, int] = {}
    for world in WORLDS:
        placement, total = Placement(world=world, rules=rules), 0
        for shard, t in tensors:
            try:
                total += slice_tensor(t, shard, placement).nbytes
            except UsageError:
                total += t.nbytes
                whole[world] = whole.get(world, 0) + 1
        rank_bytes[world] = total
    return Sizes(
        tensors_count=len(tensors),
        shards_count=len(headers),
        bytes_total=sum(by_dtype.values()),
        bytes_by_dtype=dict(sorted(by_dtype.items(), key=lambda item: -item[1])),
        rank_bytes=rank_bytes,
        whole=whole,
    )


def arena_bytes(transfers: Sequence[Transfer], granule_bytes: int, device: str) -> int:
    """What a model takes in an otherwise empty arena of one device, whole granules counted."""
    return sum(b.granules_count(granule_bytes) for b in plan_blocks(transfers, granule_bytes, device)) * granule_bytes


@dataclass(frozen=True)
class Block:
    """One block of a model, as an arena would hold it."""

    content: bytes | None
    """What its bytes are; None if nobody has hashed them."""
    arena_bytes: int
    """Whole granules."""


def together_bytes(models: Sequence[Sequence[Block]]) -> int:
    """What models take in one arena: blocks of equal content once, those of which nothing is known each."""
    known: dict[bytes, int] = {}
    unknown = 0
    for block in (block for blocks in models for block in blocks):
        if block.content is None:
            unknown += block.arena_bytes
        else:
            known[block.content] = block.arena_bytes
    return unknown + sum(known.values())


def smallest_world(
    sizes: Sizes, config: Mapping[str, Any] | None, tokens: int, base: Fit, item_bytes: int | None = None
) -> int | None:
    """The smallest tensor-parallel size with which one rank fits `base`'s device; None if none of WORLDS does."""
    for world in WORLDS:
        kv = kv_cache_bytes(config, tokens, world, item_bytes) if config is not None and tokens else 0
        if not replace(base, weights_bytes=sizes.rank_bytes[world], kv_cache_bytes=kv).shortfall_bytes:
            return world
    return None
