"""What one arena holds: blocks by content, models made of blocks, leases on models. Bookkeeping only; no bytes move.

Invariants, checked by `gauges` in tests:
- a block has granules exactly as long as `holds` > 0; every model holds each of its blocks once, a load in progress too
- a model with a name is served; one without (`retired`) waits for its last lease
- nothing is evicted while leased or pinned, and nothing at all before `make_room` knows that the room will do

All of it runs on the trio thread between checkpoints; there are no locks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gpuload.device.base import Run
from gpuload.errors import FitError
from gpuload.server.digests import Digest
from gpuload.server.granules import Granules
from mfs.errors import NotFoundError


@dataclass(eq=False)
class Block:
    """Some granules and what they hold."""

    runs: list[Run]
    nbytes: int
    digest: Digest = b""
    """Empty while it is being filled."""
    pieces: list[tuple[int, int, Digest]] = field(default_factory=list)
    """(offset, nbytes, digest), in order."""
    holds: int = 0

    @property
    def granules_count(self) -> int:
        return sum(count for _, count in self.runs)


@dataclass(frozen=True, slots=True)
class ResidentTensor:
    """One row of a model's table, as clients get it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    block: int
    """Index into the model's blocks; -1 for a tensor without bytes."""
    offset: int
    nbytes: int


@dataclass(eq=False)
class Model:
    """One complete model in the arena."""

    name: str | None
    """What it is served as; None once it was swapped out or unloaded while leased."""
    digest: str
    """Hex; of every tensor's name, type, shape and bytes."""
    tensors: list[ResidentTensor]
    blocks: list[Block]
    metadata: list[dict[str, str] | None]
    """Each shard's own strings."""
    label: str = ""
    """Where it was loaded from, for people."""
    is_pinned: bool = False
    leases_count: int = 0
    retain: str = "lru"
    """'lru': stays until its room is needed; 'lease': goes when its last lease ends."""
    generation: int = 1
    """Counts the swaps of this name."""
    used_at: int = 0
    """The catalog's clock at its last use."""

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.blocks)


class Catalog:
    """All that stands in one arena."""

    def __init__(self, device: str, granules_count: int, granule_bytes: int) -> None:
        self.device = device
        self.granule_bytes = granule_bytes
        self.granules = Granules(granules_count)
        self.models: dict[str, Model] = {}
        self.retired: list[Model] = []
        self.blocks: dict[Digest, Block] = {}
        self._pieces: dict[Digest, dict[Block, int]] = {}
        self._clock = itertools.count(1)

    def find(self, name: str) -> Model:
        """Raises: NotFoundError naming what there is."""
        if name not in self.models:
            there = ", ".join(sorted(self.models)) or "none"
            raise NotFoundError(f"no model {name!r} is resident on {self.device}; there are: {there}")
        return self.models[name]

    def find_content(self, digest: str) -> Model | None:
        """A served model with exactly this content."""
        return next((m for m in self.models.values() if m.digest == digest), None)

    def find_piece(self, digest: Digest) -> tuple[Block, int] | None:
        """Some complete block that has these bytes, and at which offset."""
        return next(iter(self._pieces.get(digest, {}).items()), None)

    def touch(self, model: Model) -> None:
        model.used_at = next(self._clock)

    def make_room(self, granules: int, what: str, *, keep: Iterable[Model] = ()) -> list[Model]:
        """Whom to evict, oldest use first, so that `granules` are free. Nobody is evicted here.

        Raises: FitError naming every part of the sum, if evicting all that may be evicted would not do.
        """
        kept = set(map(id, keep))
        candidates = [m for m in self.models.values() if not m.leases_count and not m.is_pinned and id(m) not in kept]
        candidates.sort(key=lambda m: m.used_at)
        lost: dict[Block, int] = {}
        room, victims = self.granules.free_count, []
        for model in candidates:
            if room >= granules:
                break
            victims.append(model)
            for block in model.blocks:
                lost[block] = lost.get(block, 0) + 1
                if lost[block] == block.holds:
                    room += block.granules_count
        if room >= granules:
            return victims
        raise self._refusal(what, granules, room)

    def _refusal(self, what: str, granules: int, room: int) -> FitError:
        unit = self.granule_bytes
        held: dict[str, int] = {}
        for model in [*self.models.values(), *self.retired]:
            kind = "leased" if model.leases_count else "pinned" if model.is_pinned else "unleased"
            held[kind] = held.get(kind, 0) + model.nbytes
        parts = ", ".join(f"{kind} {_gib(n)}" for kind, n in sorted(held.items())) or "nothing resident"
        short = (granules - room) * unit
        return FitError(
            f"{what} needs {_gib(granules * unit)} on {self.device}: the arena has {_gib(self.granules.count * unit)},"
            f" free {_gib(self.granules.free_count * unit)}, free after evicting what may go {_gib(room * unit)}"
            f" ({parts}); short by {_gib(short)}; nothing was evicted",
            shortfall_bytes=short,
        )

    def reserve(self, nbytes: int) -> Block:
        """A block with granules, held once. The caller made room."""
        return Block(self.granules.take(-(-nbytes // self.granule_bytes)), nbytes, holds=1)

    def hold(self, block: Block) -> None:
        block.holds += 1

    def let_go(self, block: Block) -> None:
        """Give up one hold; the last one frees the granules."""
        block.holds -= 1
        if block.holds:
            return
        self.granules.put(block.runs)
        block.runs = []
        if block.digest and self.blocks.get(block.digest) is block:
            del self.blocks[block.digest]
        for _, _, digest in block.pieces:
            owners = self._pieces.get(digest)
            if owners is not None and owners.pop(block, None) is not None and not owners:
                del self._pieces[digest]

    def complete(self, block: Block, digest: Digest, pieces: Sequence[tuple[int, int, Digest]]) -> Block:
        """Its bytes are in place: let others find it. If an equal one is there already, that one is held instead."""
        equal = self.blocks.get(digest)
        if equal is not None:
            self.hold(equal)
            self.let_go(block)
            return equal
        block.digest, block.pieces = digest, list(pieces)
        self.blocks[digest] = block
        for offset, _, piece in pieces:
            self._pieces.setdefault(piece, {}).setdefault(block, offset)
        return block

    def publish(self, model: Model) -> None:
        """Serve `model` under its name from now on; whoever had the name is retired, and gone unless leased."""
        assert model.name is not None
        old = self.models.get(model.name)
        if old is not None:
            model.generation = old.generation + 1
            self.retire(old)
        self.models[model.name] = model
        self.touch(model)

    def retire(self, model: Model) -> None:
        """Take its name away: no new lease; its memory goes with its last lease."""
        assert model.name is not None
        del self.models[model.name]
        model.name = None
        self.retired.append(model)
        self._drop_if_unused(model)

    def lease(self, model: Model) -> None:
        model.leases_count += 1
        self.touch(model)

    def end_lease(self, model: Model) -> None:
        model.leases_count -= 1
        if model.name is None:
            self._drop_if_unused(model)
        elif model.retain == "lease" and not model.leases_count and not model.is_pinned:
            self.retire(model)

    def _drop_if_unused(self, model: Model) -> None:
        if not model.leases_count:
            self.retired.remove(model)
            for block in model.blocks:
                self.let_go(block)
            model.blocks = []

    def gauges(self) -> dict[str, int]:
        """Everything that must be zero when nothing is resident."""
        return {
            "models": len(self.models),
            "retired": len(self.retired),
            "leases": sum(m.leases_count for m in self._all()),
            "blocks": len(self.blocks),
            "pieces": len(self._pieces),
            "granules_used": self.granules.count - self.granules.free_count,
        }

    def _all(self) -> Iterator[Model]:
        yield from self.models.values()
        yield from self.retired


def _gib(nbytes: int) -> str:
    return f"{nbytes} bytes" if nbytes < 1 << 20 else f"{nbytes / (1 << 30):.2f} GiB"
