"""Brings models into one arena: digests, fit, eviction, moves, and only then the name. One load at a time per device.

    known digests? ──no, and something is resident──> hash pass (reads, moves nothing)
    blocks that are resident already ──> held in place
    the rest: make room (or refuse) → granules → pieces found elsewhere in the arena: copied inside the device
                                              → all others: from the files, hashed on the way
    complete blocks → publish the name

Until `publish` the old model serves and nothing of it is touched. A failure or a cancellation at any point gives every
granule back. Models that were evicted to make room stay evicted: the room was promised before, not the copy.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass, field

import trio
from blake3 import blake3

from gpuload.device.base import Arena, Device
from gpuload.device.host import HostDevice
from gpuload.errors import BusyError, FitError, one_error
from gpuload.pipeline import Limits, RunsOf, move_batches
from gpuload.plan import Piece, Placement, Transfer, pack_pieces, plan_transfers
from gpuload.pool import open_source
from gpuload.server.catalog import Block, Catalog, Model, ResidentTensor
from gpuload.server.digests import (
    Digest,
    DigestCache,
    FileKey,
    digest_block,
    digest_views,
    file_key,
    geometry,
    now_ns,
)
from gpuload.server.layout import BlockPlan, plan_blocks
from gpuload.shards import Shard
from gpuload.staging import Ring
from mfs.errors import ChangedError, UsageError

WAITING_MAX = 64
"""Loads that may wait for a device; one more is refused."""

WAIT_S = 900.0
"""Longest wait for a turn."""

PieceKey = tuple[int, int]
"""(transfer, offset): names a piece within one job."""


@dataclass(frozen=True)
class Job:
    """What to load, and as what."""

    name: str | None
    """None: by content, shared with whoever loaded the same bytes."""
    label: str
    shards: Sequence[Shard]
    placement: Placement
    is_swap: bool = False
    """Replace whoever has the name."""
    allow_gap: bool = False
    """If both do not fit, give up the old model first; a failure then leaves neither."""
    is_pinned: bool = False
    retain: str = "lru"


@dataclass
class Report:
    """What a load did, in bytes of tensors."""

    bytes_total: int = 0
    bytes_kept: int = 0
    """In blocks that were resident and are shared in place."""
    bytes_moved_inside: int = 0
    """Copied from one place of the device to another."""
    bytes_copied: int = 0
    """Brought from the files, over the bus."""
    bytes_hashed_before: int = 0
    """Read by the hash pass, since their digests were not known."""
    evicted: list[str] = field(default_factory=list)
    had_gap: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class _Work:
    """One job on its way: pure planning results, then what it holds."""

    job: Job
    transfers: list[Transfer]
    plans: list[BlockPlan]
    keys: list[FileKey]
    began_ns: int
    digests: dict[PieceKey, Digest] = field(default_factory=dict)
    own: list[Block | None] = field(default_factory=list)
    inherits_pin: bool = False
    """A pin belongs to the name, so a swap passes it on."""
    report: Report = field(default_factory=Report)

    @property
    def is_known(self) -> bool:
        return len(self.digests) == sum(len(p.pieces) for plan in self.plans for p in plan.placed)

    def pieces(self) -> list[Piece]:
        return [piece for plan in self.plans for placed in plan.placed for piece in placed.pieces]

    def parts(self, plan: BlockPlan) -> list[tuple[int, int, Digest]]:
        """(offset in the block, nbytes, digest) of every piece of a block."""
        return [
            (placed.offset + piece.offset, piece.nbytes, self.digests[piece.transfer, piece.offset])
            for placed in plan.placed
            for piece in placed.pieces
        ]

    def model_digest(self) -> str:
        hasher = blake3()
        by_transfer: dict[int, list[Digest]] = {}
        for piece in self.pieces():
            by_transfer.setdefault(piece.transfer, []).append(self.digests[piece.transfer, piece.offset])
        for index, t in enumerate(self.transfers):
            hasher.update(repr((t.name, t.dtype, t.shape)).encode("utf-8"))
            hasher.update(b"".join(by_transfer.get(index, [])))
        return hasher.hexdigest()


class Loader:
    """All loads of one device."""

    def __init__(
        self, device: Device, arena: Arena, catalog: Catalog, digests: DigestCache, limits: Limits, ring: Ring
    ) -> None:
        self.device, self.arena, self.catalog = device, arena, catalog
        self._digests, self._limits = digests, limits
        self._ring = ring  # page-locked once, for all loads: one at a time uses it
        self._turn = trio.Lock()

    @property
    def waiting_count(self) -> int:
        """Loads at work or waiting."""
        statistics = self._turn.statistics()
        return int(statistics.locked) + statistics.tasks_waiting

    async def load(self, job: Job) -> tuple[Model, Report]:
        """Make `job` resident and serve it; exactly the old state after any exception, but for evicted models.

        Raises: FitError before anything is touched; UsageError if the name is taken by other content and this is no
            swap; ChangedError if a file changes meanwhile; BusyError; what device and files raise.
        Cancellation: safe.
        """
        began = time.monotonic()
        async with self._in_turn():
            transfers = plan_transfers([s.header for s in job.shards], job.placement)
            plans = plan_blocks(transfers, self.arena.granule_bytes)
            work = _Work(job, transfers, plans, [file_key(s.fd) for s in job.shards], now_ns())
            work.report.bytes_total = sum(t.nbytes for t in transfers)
            self._recall(work)
            if not work.is_known and (self.catalog.models or self.catalog.retired):
                await self._hash_pass(work)
            model = self._resident(work) or await self._bring(work)
            work.report.seconds = time.monotonic() - began
            return model, work.report

    @asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        if self.waiting_count > WAITING_MAX:
            raise BusyError(f"{self.waiting_count} loads wait for {self.device.name} already; try later")
        with trio.move_on_after(WAIT_S) as scope:
            await self._turn.acquire()
        if scope.cancelled_caught:
            raise BusyError(f"{self.device.name} was busy for {WAIT_S:.0f} s; nothing was changed")
        try:
            yield
        finally:
            self._turn.release()

    def _recall(self, work: _Work) -> None:
        """Fill in the digests that are remembered for these very files."""
        found = [self._digests.find(key) for key in work.keys]
        for piece in work.pieces():
            digest = found[work.transfers[piece.transfer].shard].get(geometry(piece))
            if digest is not None:
                work.digests[piece.transfer, piece.offset] = digest

    async def _hash_pass(self, work: _Work) -> None:
        unknown = [p for p in work.pieces() if (p.transfer, p.offset) not in work.digests]
        work.report.bytes_hashed_before = sum(p.nbytes for p in unknown)
        await self._read(work, unknown, HostDevice(is_direct=False), lambda _: [])
        self._remember(work)

    async def _read(self, work: _Work, pieces: Sequence[Piece], device: Device, runs_of: RunsOf) -> None:
        """Move `pieces`; every byte that passes is hashed, and refused if it is not what was remembered."""

        def check(piece: Piece, views: Sequence[memoryview]) -> None:
            digest = digest_views(views)
            if work.digests.setdefault((piece.transfer, piece.offset), digest) != digest:
                shard = work.transfers[piece.transfer].shard
                self._digests.forget(work.keys[shard])
                raise ChangedError(f"{work.job.shards[shard].path} changed while it was loaded; load it again")

        with_shards = ((work.transfers[p.transfer].shard, p) for p in pieces)
        batches = list(
            pack_pieces(
                sorted(with_shards, key=lambda sp: (sp[0], sp[1].start)), buffer_bytes=self._limits.buffer_bytes
            )
        )
        with closing(await trio.to_thread.run_sync(open_source, work.job.shards)) as source:
            await move_batches(
                batches,
                source=source,
                device=device,
                runs_of=runs_of,
                limits=self._limits,
                check=check,
                lent=self._ring,
            )
        for shard, key in zip(work.job.shards, work.keys, strict=True):
            if file_key(shard.fd) != key:
                raise ChangedError(f"{shard.path} changed while it was loaded; load it again")

    def _remember(self, work: _Work) -> None:
        by_shard: dict[int, list[tuple[tuple[int, int, int, int], Digest]]] = {}
        for piece in work.pieces():
            digest = work.digests.get((piece.transfer, piece.offset))
            if digest is not None:
                by_shard.setdefault(work.transfers[piece.transfer].shard, []).append((geometry(piece), digest))
        for shard, found in by_shard.items():
            self._digests.add(work.keys[shard], work.began_ns, found)

    def _resident(self, work: _Work) -> Model | None:
        """The model that already is what the job asks for, if there is one."""
        job = work.job
        digest = work.model_digest() if work.is_known else None
        if job.name is None:
            model = self.catalog.find_content(digest) if digest else None
        else:
            model = self.catalog.models.get(job.name)
            if model is not None and model.digest != digest and not job.is_swap:
                raise UsageError(f"{job.name!r} on {self.device.name} is other content; swap it, or use another name")
            if model is not None and model.digest != digest:
                model = None
        if model is not None:
            work.report.bytes_kept = work.report.bytes_total
            model.is_pinned = model.is_pinned or job.is_pinned
            self.catalog.touch(model)
        return model

    async def _bring(self, work: _Work) -> Model:
        try:
            self._take_places(work)  # no checkpoint inside: what was found to fit is taken at once
            await self._fill(work)
            self._remember(work)
            return self._publish(work)
        except BaseException:
            for block in work.own:
                if block is not None:
                    self.catalog.let_go(block)
            raise

    def _take_places(self, work: _Work) -> None:
        """Hold blocks that are resident, make room, reserve the others. All or nothing."""
        catalog, job = self.catalog, work.job
        named = [digest_block(work.parts(plan)) if work.is_known else b"" for plan in work.plans]
        work.own = [catalog.blocks.get(name) if name else None for name in named]
        for block in work.own:
            if block is not None:
                catalog.hold(block)
        unit = self.arena.granule_bytes
        missing = [i for i, block in enumerate(work.own) if block is None]
        need = sum(work.plans[i].granules_count(unit) for i in missing)
        old = catalog.models.get(job.name) if job.name is not None else None
        work.inherits_pin = old is not None and old.is_pinned
        what = f"{'swapping in' if job.is_swap else 'loading'} {job.label}"
        try:
            victims = catalog.make_room(need, what, keep=[old] if old else [])
        except FitError:
            if old is None or not job.allow_gap or old.leases_count:
                raise
            was_pinned, old.is_pinned = old.is_pinned, False
            try:
                victims = catalog.make_room(need, what)
            finally:
                old.is_pinned = was_pinned
            work.report.had_gap = old in victims
        work.report.evicted = [v.name for v in victims if v.name is not None]
        for victim in victims:
            catalog.retire(victim)
        for i in missing:
            work.own[i] = catalog.reserve(work.plans[i].nbytes)
        work.report.bytes_kept = sum(placed_bytes(plan) for i, plan in enumerate(work.plans) if i not in set(missing))

    async def _fill(self, work: _Work) -> None:
        """Bring the bytes of every block that is not complete, from inside the device where they are there."""
        places: dict[PieceKey, tuple[Block, int]] = {}
        outside: list[Piece] = []
        inside: list[tuple[Block, int, Block, int, int]] = []
        held: list[Block] = []
        for plan, block in zip(work.plans, work.own, strict=True):
            if block is None or block.digest:
                continue
            for placed in plan.placed:
                for piece in placed.pieces:
                    digest = work.digests.get((piece.transfer, piece.offset))
                    there = self.catalog.find_piece(digest) if digest is not None else None
                    if there is None:
                        places[piece.transfer, piece.offset] = (block, placed.offset + piece.offset)
                        outside.append(piece)
                        continue
                    self.catalog.hold(there[0])
                    held.append(there[0])
                    inside.append((block, placed.offset + piece.offset, *there, piece.nbytes))
        work.report.bytes_moved_inside = sum(nbytes for *_, nbytes in inside)
        work.report.bytes_copied = sum(piece.nbytes for piece in outside)

        def runs_of(piece: Piece) -> list[tuple[int, int]]:
            block, offset = places[piece.transfer, piece.offset]
            return self.runs(block, offset, piece.nbytes)

        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    if inside:
                        nursery.start_soon(trio.to_thread.run_sync, self._copy_inside, inside)
                    nursery.start_soon(self._read, work, outside, self.device, runs_of)
        finally:
            for block in held:
                self.catalog.let_go(block)

    def _copy_inside(self, copies: Sequence[tuple[Block, int, Block, int, int]]) -> None:
        stream = self.device.open_stream()
        try:
            for to, to_offset, source, source_offset, nbytes in copies:
                done = 0
                for dst, room in self.runs(to, to_offset, nbytes):
                    for src, n in self.runs(source, source_offset + done, room):
                        stream.copy_within(dst, src, n)
                        dst += n
                    done += room
            stream.record().wait(self._limits.step_timeout_s)
        finally:
            stream.close()

    def runs(self, block: Block, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Where bytes [offset, offset + nbytes) of a block stand: (address, nbytes), in order."""
        unit, found = self.arena.granule_bytes, []
        for first, count in block.runs:
            size = count * unit
            if offset < size and nbytes:
                n = min(nbytes, size - offset)
                found.append((self.arena.address + first * unit + offset, n))
                offset, nbytes = 0, nbytes - n
            else:
                offset -= size
        return found

    def _publish(self, work: _Work) -> Model:
        catalog, job = self.catalog, work.job
        for i, (plan, block) in enumerate(zip(work.plans, work.own, strict=True)):
            if block is not None and not block.digest:
                parts = work.parts(plan)
                work.own[i] = catalog.complete(block, digest_block(parts), parts)
        digest = work.model_digest()
        model = Model(
            name=job.name if job.name is not None else f"content:{digest[:16]}",
            digest=digest,
            tensors=_table(work),
            blocks=[block for block in work.own if block is not None],
            metadata=[s.header.metadata for s in job.shards],
            label=job.label,
            is_pinned=job.is_pinned or work.inherits_pin,
            retain=job.retain,
        )
        catalog.publish(model)
        return model


def placed_bytes(plan: BlockPlan) -> int:
    return sum(piece.nbytes for placed in plan.placed for piece in placed.pieces)


def _table(work: _Work) -> list[ResidentTensor]:
    where = {placed.transfer: (i, placed.offset) for i, plan in enumerate(work.plans) for placed in plan.placed}
    return [
        ResidentTensor(t.name, t.dtype, t.shape, *where.get(index, (-1, 0)), t.nbytes)
        for index, t in enumerate(work.transfers)
    ]
