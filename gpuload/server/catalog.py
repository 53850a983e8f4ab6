"""What the arenas hold: blocks by content, models made of blocks, leases on models. Bookkeeping only; no bytes move.

A `Catalog` is one arena's. A `Model` has a part in each arena it stands in, and one name, one life and one count of
leases for all of them: it is served, retired and evicted whole.

Invariants, checked by `gauges` in tests: - a block has granules exactly as long as `holds` > 0; every model holds
each of its blocks once, a load in progress too
- a model with a name is served by the catalog of every part; one without (`retired`) waits for its last lease
- nothing is evicted while leased or pinned, and nothing at all before `make_room` knows that the room will do
- no more granules than `budget_count` are taken or free, but for those that were when it was made smaller

All of it runs on the trio thread between checkpoints; there are no locks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from gpuload.device.base import Run, total_granules
from gpuload.errors import FitError
from gpuload.moving.plan import Placement
from gpuload.moving.pool import Range
from gpuload.server.digest_files import Digest
from gpuload.server.granules import Granules, Pieces
from gpuload.server.piece_index import PieceIndex
from mfs.errors import NotFoundError
from mfs.units import format_size


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
    lenders: Sequence[Range] = ()
    """Where on mounts the bytes of all its tensors came from; empty if some came from elsewhere."""

    @property
    def granules_count(self) -> int:
        return total_granules(self.runs)


class ResidentTensor(NamedTuple):
    """One row of a model's table; a tuple, since it is made thousands of times, and packed as it is (`records`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: int
    """Index into the model's parts."""
    block: int
    """Index into the part's blocks; -1 for a tensor without bytes."""
    offset: int
    nbytes: int


@dataclass(eq=False)
class Part:
    """What of a model stands in one arena."""

    catalog: Catalog
    digest: str
    """Hex; of the files' own strings and the name, type, shape and bytes of every tensor here."""
    blocks: list[Block]

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.blocks)


NAMES_MAX = 50
"""Models that a refusal names."""

LAGGARDS_MAX = 5
"""Old generations, and programs of each, that a refusal names."""

_clock = itertools.count(1)
"""One for all arenas: uses of models that stand in several are compared."""


@dataclass(eq=False)
class Model:
    """One complete model, in one arena or spread over several."""

    name: str | None
    """What it is served as; None once it was swapped out or unloaded while leased."""
    digest: str
    """Hex; of the files' own strings and every tensor's name, type, shape and bytes, wherever they stand."""
    parts: list[Part]
    tensors: list[ResidentTensor]
    metadata: list[dict[str, str] | None]
    """Each shard's own strings."""
    placements: Sequence[Placement] = (Placement(),)
    """How it was spread, one for each rank that stands here: what a swap that says nothing else keeps."""
    label: str = ""
    """Where it was loaded from, for people."""
    is_pinned: bool = False
    leases: list[Lease] = field(default_factory=list)
    retain: str = "lru"
    """'lru': stays until its room is needed; 'lease': goes when its last lease ends."""
    generation: int = 0
    """See `generations`; 0 until it is served."""
    was: str = ""
    """The name that it has lost."""
    used_at: int = 0
    """The clock at its last use."""
    number: int = 0
    """What the estate knows it by; 0 before that has its record."""
    is_unwanted: bool = False
    """Somebody unloaded it: what goes with it is not kept in RAM."""

    @property
    def devices(self) -> list[str]:
        return [part.catalog.device for part in self.parts]

    @property
    def content(self) -> dict[str, str]:
        """Device -> digest of what stands there: equal for two models exactly if one can serve for the other."""
        return {part.catalog.device: part.digest for part in self.parts}

    @property
    def leases_count(self) -> int:
        return len(self.leases)

    def blocks_in(self, catalog: Catalog) -> list[Block]:
        return [block for part in self.parts if part.catalog is catalog for block in part.blocks]

    def publish(self) -> None:
        """Serve it under its name from now on; whoever had the name on any of its devices is retired, whole."""
        assert self.name is not None
        for old in namesakes(self.name, [part.catalog for part in self.parts]):
            old.retire()
        for part in self.parts:
            part.catalog.models[self.name] = self
        self.touch()

    def retire(self) -> None:
        """Take its name away: no new lease; its memory goes with its last lease."""
        assert self.name is not None
        for part in self.parts:
            del part.catalog.models[self.name]
            part.catalog.retired.append(self)
        self.was, self.name = self.name, None
        self.drop_if_unused()

    def touch(self) -> None:
        self.used_at = next(_clock)

    def lease(self, pid: int = 0, uid: int = 0) -> Lease:
        made = Lease(self, pid, uid)
        self.leases.append(made)
        self.touch()
        return made

    def end(self, lease: Lease) -> None:
        self.leases.remove(lease)
        if self.name is None:
            self.drop_if_unused()
        elif self.retain == "lease" and not self.leases_count and not self.is_pinned:
            self.retire()

    def drop_if_unused(self) -> None:
        """Give its blocks back, if it is retired and nobody has a lease."""
        if self.leases_count:
            return
        for part in self.parts:
            part.catalog.retired.remove(self)
            for block in part.blocks:
                part.catalog.let_go(block, is_unwanted=self.is_unwanted)
            part.blocks = []


@dataclass(eq=False)
class Lease:
    """One client's hold on a model, all of it."""

    model: Model
    pid: int
    """Who attached; a forked child may hold it on. 0: the server's pid namespace does not have him."""
    uid: int

    def end(self) -> None:
        self.model.end(self)


def namesakes(name: str | None, catalogs: Iterable[Catalog]) -> list[Model]:
    """The served models of that name in these arenas, each once."""
    found = {id(m): m for catalog in catalogs if name is not None and (m := catalog.models.get(name)) is not None}
    return list(found.values())


def holders(leases: Sequence[Lease]) -> str:
    """'pid 12 (user 0), pid 13 (user 0)', and how many more there are."""
    return listed([f"pid {lease.pid or '?'} (user {lease.uid})" for lease in leases], LAGGARDS_MAX)


def listed(names: Sequence[str], most: int) -> str:
    """Some of these names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Catalog:
    """All that stands in one arena."""

    def __init__(
        self,
        device: str,
        granules_count: int,
        granule_bytes: int,
        *,
        present_count: int | None = None,
        places_count: int | None = None,
    ) -> None:
        """present_count: of how many granules there is memory from the start; None: of all.
        places_count: where memory comes in pieces, how many numbers there are for granules; of none there is memory.
        """
        self.device = device
        self.granule_bytes = granule_bytes
        if places_count is None:
            self.granules = Granules(granules_count, present_count=present_count)
        else:
            self.granules = Pieces(places_count)
        self.budget_count = granules_count
        """Of how many there may be memory."""
        self.obtainable_count = 0
        """Granules that the device had memory for, beside ours, when somebody last looked."""
        self.promised_count = 0
        """Free granules that a load has asked memory for and is about to take: not to be given back."""
        self.on_freed: Callable[[], object] = lambda: None
        """Called when granules became free."""
        self.models: dict[str, Model] = {}
        self.retired: list[Model] = []
        self.blocks: dict[Digest, Block] = {}
        self._pieces: PieceIndex[Block] = PieceIndex()
        self.on_leaving: Callable[[Block], object] = lambda block: None
        """Called with a complete block that nobody holds any more, and that somebody may want again, before its
        granules are free."""

    def find(self, name: str) -> Model:
        """Raises: NotFoundError naming what there is."""
        if name not in self.models:
            there = listed(sorted(self.models), NAMES_MAX) or "none"
            raise NotFoundError(f"no model {name!r} is resident on {self.device}; there are: {there}")
        return self.models[name]

    def find_content(self, content: Mapping[str, str]) -> Model | None:
        """A served model with exactly this content on exactly these devices; see `Model.content`."""
        return next((m for m in self.models.values() if m.content == content), None)

    def find_piece(self, digest: Digest) -> tuple[Block, int] | None:
        """Some complete block that has these bytes, and at which offset."""
        return self._pieces.find(digest)

    @property
    def has_pieces(self) -> bool:
        """Whether any bytes are there to be found."""
        return bool(self._pieces)

    def make_room(
        self, granules: int, what: str, *, keep: Iterable[Model] = (), going: Iterable[Model] = ()
    ) -> list[Model]:
        """Whom to evict, oldest use first, so that `granules` are free. Nobody is evicted here.

        going: models that leave anyway, to make room elsewhere.
        Raises: FitError naming every part of the sum, if evicting all that may be evicted would not do.
        """
        candidates = self._evictable({id(m) for m in (*keep, *going)})
        leaving = [*going]
        room, victims = self._room_without(leaving), []
        for model in candidates:
            if room >= granules:
                break
            victims.append(model)
            room = self._room_without([*leaving, *victims])
        if room >= granules:
            return victims
        raise self._refusal(what, granules, room, self._lost_count([*leaving, *victims]))

    def make_budget(self, granules: int) -> list[Model]:
        """Whom to evict, oldest use first, so that no more than `granules` are taken. Nobody is evicted here.

        Raises: FitError if that would not do.
        """
        victims: list[Model] = []
        taken = self.granules.taken_count
        for model in self._evictable(set()):
            if taken - self._lost_count(victims) <= granules:
                break
            victims.append(model)
        stay = taken - self._lost_count(victims)
        if stay <= granules:
            return victims
        needs, stays = format_size(granules * self.granule_bytes), format_size(stay * self.granule_bytes)
        raise FitError(
            f"the arena on {self.device} cannot be made {needs}: {stays} would stay after evicting what may go"
            f" ({self._held()}); nothing was evicted",
            shortfall_bytes=(stay - granules) * self.granule_bytes,
        )

    def lacking_count(self, granules: int, going: Iterable[Model]) -> int:
        """How many granules must get memory so that `granules` are free once these models are gone."""
        return max(0, granules - self.granules.free_count - self._lost_count(going))

    def unmatched(self, sizes: Sequence[int], going: Iterable[Model]) -> list[int]:
        """Of blocks of so many granules, those for which memory is to be made in their shape, once these models are
        gone."""
        return self.granules.unmatched(sizes, [run for block in self._lost(going) for run in block.runs])

    @property
    def room_count(self) -> int:
        """Granules that are free, or would be without everything that may be evicted."""
        return self._room_without(self._evictable(set()))

    @property
    def evictable_count(self) -> int:
        """Granules that go with everything that may be evicted."""
        return self._lost_count(self._evictable(set()))

    @property
    def open_count(self) -> int:
        """Granules that can be had without evicting anybody: free ones, and those that the device has memory for."""
        return self._room_without(())

    def spare_count(self, keep_count: int) -> int:
        """Free granules whose memory nobody needs, if `keep_count` are to have memory in any case."""
        wanted = max(self.granules.taken_count + self.promised_count, min(keep_count, self.budget_count))
        return max(0, min(self.granules.present_count - wanted, self.granules.free_count - self.promised_count))

    def _evictable(self, kept: Set[int]) -> list[Model]:
        """Whoever is neither leased nor pinned nor in `kept` (by id), oldest use first."""
        found = [m for m in self.models.values() if not m.leases_count and not m.is_pinned and id(m) not in kept]
        return sorted(found, key=lambda m: m.used_at)

    def _room_without(self, models: Iterable[Model]) -> int:
        """Granules that could be had without these models."""
        own = self.granules
        by_memory = own.free_count + min(self.obtainable_count, own.absent_count)
        return min(self.budget_count - own.taken_count, by_memory) + self._lost_count(models)

    def _lost_count(self, models: Iterable[Model]) -> int:
        """Granules that go with these models."""
        return sum(block.granules_count for block in self._lost(models))

    def _lost(self, models: Iterable[Model]) -> list[Block]:
        """Blocks that go with these models: each with the last who holds it."""
        lost: dict[Block, int] = {}
        for model in models:
            for block in model.blocks_in(self):
                lost[block] = lost.get(block, 0) + 1
        return [block for block, count in lost.items() if count == block.holds]

    def _held(self) -> str:
        """What is resident, by who keeps it, for messages."""
        held: dict[str, int] = {}
        for model in self._all():
            kind = "leased" if model.leases_count else "pinned" if model.is_pinned else "unleased"
            held[kind] = held.get(kind, 0) + sum(block.nbytes for block in model.blocks_in(self))
        return ", ".join(f"{kind} {format_size(n)}" for kind, n in sorted(held.items())) or "nothing resident"

    def _refusal(self, what: str, granules: int, room: int, lost: int) -> FitError:
        unit, own = self.granule_bytes, self.granules
        short = (granules - room) * unit
        needs, has, present, free, after = (
            format_size(n * unit)
            for n in (granules, self.budget_count, own.present_count, self.budget_count - own.taken_count, room)
        )
        waits = self.budget_count - own.taken_count + lost >= granules
        why = f"the arena has {has}, free {free}"
        if waits:
            why = f"the arena may have {has} and has {present}, but others hold the device's memory; could be had"
            why += f" {format_size(self.open_count * unit)}"
        return FitError(
            f"{what} needs {needs} on {self.device}: {why}, after evicting what may go {after}"
            f" ({self._held()}); short by {format_size(short)}; nothing was evicted{self._laggards(granules, room)}",
            shortfall_bytes=short,
            waits=waits,
        )

    def bytes_alone(self, *models: Model) -> int:
        """What of the arena nobody else holds: it would be free without these models."""
        return self._lost_count(models) * self.granule_bytes

    def _laggards(self, granules: int, room: int) -> str:
        """Who holds what was swapped out or unloaded, for a refusal: it is they who stand in the way, perhaps."""
        if not self.retired:
            return ""
        more = self.bytes_alone(*self.retired)
        is_enough = room * self.granule_bytes + more >= granules * self.granule_bytes
        told = [
            f"{model.was!r} generation {model.generation} by {holders(model.leases)}"
            for model in self.retired[:LAGGARDS_MAX]
        ]
        told += [f"{len(self.retired) - LAGGARDS_MAX} more"] if len(self.retired) > LAGGARDS_MAX else []
        return (
            f"; old generations still hold {format_size(more)}"
            f"{', enough if their programs refresh or let go' if is_enough else ''}: {', '.join(told)}"
        )

    def reserve(self, *sizes: int) -> list[Block]:
        """Blocks of so many bytes, with granules, each held once. The caller made room. Of some, memory may have to
        come yet (`Site.shape`)."""
        taken = self.granules.take_all([-(-nbytes // self.granule_bytes) for nbytes in sizes])
        return [Block(runs, nbytes, holds=1) for runs, nbytes in zip(taken, sizes, strict=True)]

    def hold(self, block: Block) -> None:
        block.holds += 1

    def let_go(self, block: Block, *, is_unwanted: bool = False) -> None:
        """Give up one hold; the last one frees the granules. is_unwanted: it need not be kept elsewhere."""
        block.holds -= 1
        if block.holds:
            return
        if block.digest and not is_unwanted:
            self.on_leaving(block)
        self.granules.put(block.runs)
        block.runs = []
        self.on_freed()
        if block.digest and self.blocks.get(block.digest) is block:
            del self.blocks[block.digest]
        self._pieces.remove(block, block.pieces)

    def complete(self, block: Block, digest: Digest, pieces: Sequence[tuple[int, int, Digest]]) -> Block:
        """Its bytes are in place: let others find it. If an equal one is there already, that one is held instead."""
        equal = self.blocks.get(digest)
        if equal is not None:
            self.hold(equal)
            self.let_go(block)
            return equal
        self.index(block, pieces[len(block.pieces) :])
        block.digest = digest
        self.blocks[digest] = block
        return block

    def index(self, block: Block, pieces: Sequence[tuple[int, int, Digest]]) -> None:
        """The next of a block's pieces are in place: let others find them. For blocks of many, ahead of `complete`."""
        block.pieces.extend(pieces)
        self._pieces.add(block, pieces)

    def gauges(self) -> dict[str, int]:
        """Everything that must be zero when nothing is resident."""
        return {
            "models": len(self.models),
            "retired": len(self.retired),
            "leases": sum(m.leases_count for m in self._all()),
            "blocks": len(self.blocks),
            "pieces": len(self._pieces),
            "granules_used": self.granules.taken_count,
        }

    def _all(self) -> Iterator[Model]:
        yield from self.models.values()
        yield from self.retired
