"""Brings models into arenas: digests, fit, eviction, moves, and only then the name. One load at a time per device, but
for those whose bytes do not come (`turns`).

    blocks known to be resident ──> held in place
    the rest ──free room for all of it?──no──> hash pass over what is not known (moves nothing): now the sum is exact
             └─> memory that lacks (or refuse) → make room → granules → one pass over the files, each piece hashed:
                    found in the arena → its block held, nothing crosses the bus
                known, and in the RAM tier → copied from there, not read
                    else               → to its place
    blocks that turned out to be resident → held in place, their granules given back; other found pieces → copied inside
    complete blocks → publish the name

A model may spread over several devices: all their turns are taken, room is made on all or none, they are filled at the
same time, and the name is published on all between two checkpoints. Until then the old model serves and nothing of it
is touched. A failure or a cancellation at any point, on any device, gives every granule back. Models that were evicted
to make room stay evicted: the room was promised before, not the copy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import trio

from gpuload.device.base import Device
from gpuload.device.host import HostDevice
from gpuload.errors import FitError
from gpuload.moving.pipeline import Decide, Limits, RunsOf, move_batches
from gpuload.moving.plan import Batch, Piece, Transfer, pack_pieces, plan_transfers
from gpuload.moving.pool import Mapper, lenders_of, open_source
from gpuload.moving.source import FileSource, Source
from gpuload.moving.staging import Ring
from gpuload.moving.timing import TimedSource
from gpuload.server.catalog import Block, Model, Part, ResidentTensor, namesakes
from gpuload.server.commits import Commits, NoSource, check_there
from gpuload.server.digests import DigestCache, digest_views, now_ns
from gpuload.server.estate import Estate
from gpuload.server.generations import Generations
from gpuload.server.pulled import PulledSource
from gpuload.server.returning import Returning, TierSource
from gpuload.server.room import STEP, take_places
from gpuload.server.site import InsideCopy, Site
from gpuload.server.turns import Turns, WatchedSource
from gpuload.server.versions import stamp_of
from gpuload.server.work import Job, PartWork, PieceKey, Report, Work
from mfs.errors import ChangedError, NotFoundError, UsageError

T = TypeVar("T")

CONTENT_PREFIX = "content:"
"""Of the names of models that were opened without one."""

MATCHES_MAX = 10_000_000
"""Tensors times rules of one job; a match takes about a microsecond."""


class Loader:
    """All loads of a server."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        digests: DigestCache,
        limits: Limits,
        estate: Estate,
        mapper: Mapper | None = None,
    ) -> None:
        """mapper: keeps what mounts lend over loads; None: every load maps it anew."""
        self.sites, self._estate = sites, estate
        self.generations = Generations(estate.counters)
        self.commits = Commits()
        self._digests, self._limits, self._mapper = digests, limits, mapper
        self._thinkers = trio.CapacityLimiter(4)

    async def _think(self, work: Callable[[], T]) -> T:
        """Run what computes over all tensors of a model beside the loop; it touches no catalog."""
        return await trio.to_thread.run_sync(work, limiter=self._thinkers)

    async def load(self, job: Job) -> tuple[Model, Report]:
        """Make `job` resident and serve it; exactly the old state after any exception, but for evicted models.

        Raises: FitError before anything is touched; UsageError if the name is taken by other content and this is no
            swap; ChangedError if a file changes meanwhile; NotFoundError for a device without an arena; BusyError; what
            devices and files raise.
        Cancellation: safe.
        """
        began = time.monotonic()
        transfers, sites = await self._think(lambda: self._planned(job))
        turns = Turns(sites)
        try:
            with _traced(job, "turn"), _timed(job, "turn"):
                await turns.take()
            while True:
                try:
                    work = await self._think(lambda: Work(job, transfers, sites))
                    model = await self._loaded(work, turns)
                    break
                except FitError:
                    if not await turns.wait_for_room():
                        raise
        finally:
            turns.end()
        work.report.seconds = time.monotonic() - began
        return model, work.report

    async def _loaded(self, work: Work, turns: Turns) -> Model:
        began_ns = now_ns()
        await self._recall(work)
        model = await self._resident(work) if work.is_known else None
        return model or await self._bring(work, turns, began_ns)

    def _planned(self, job: Job) -> tuple[list[Transfer], list[Site]]:
        headers = [s.header for s in job.shards]
        matches = sum(len(h.tensors) for h in headers) * sum(len(p.rules) for p in job.placements)
        if matches > MATCHES_MAX:
            raise UsageError(f"{matches} pairs of a tensor and a rule to compare, more than {MATCHES_MAX}: fewer rules")
        transfers = [t for placement in job.placements for t in plan_transfers(headers, placement)]
        return transfers, self._sites_of(transfers, job.placements[0].device)

    def _sites_of(self, transfers: Sequence[Transfer], default: str) -> list[Site]:
        """In the server's order, so that two loads never wait for each other's turns. Raises: NotFoundError."""
        wanted = {t.device: t.name for t in reversed(transfers)} or {default: ""}
        for name, tensor in wanted.items():
            if not name:
                raise UsageError(f"the device map leaves {tensor!r} without a device: add '' to it, for the rest")
            if name not in self.sites:
                raise NotFoundError(
                    f"this server has no arena on {name} (for {tensor!r}); it has: {', '.join(self.sites)}"
                )
        return [site for name, site in self.sites.items() if name in wanted]

    async def _recall(self, work: Work) -> None:
        """Fill in the digests that are remembered for these very files."""
        if work.job.known is not None:
            work.digests.update(work.job.known)
            await self._think(work.learn)
            check_there(work)
            return
        await self._think(lambda: work.recall([self._digests.find(version) for version in work.versions]))

    async def _remember(self, work: Work, turns: Turns, began_ns: int) -> None:
        """Keep the digests that are known by now, and learn from them."""
        if work.job.known is not None:
            return

        def tell() -> None:
            for shard, version, digests in zip(work.job.shards, work.versions, work.found(), strict=True):
                self._digests.add(version, shard.fd, began_ns, digests)

        await turns.call(work.job.files, tell)
        await self._think(work.learn)

    async def _resident(self, work: Work) -> Model | None:
        """The model that already is what the job asks for, if there is one. All digests must be known."""
        job = work.job
        catalogs = [part.site.catalog for part in work.parts]
        if not any(catalog.models for catalog in catalogs):
            return None
        await self._think(work.find_content)
        assert work.content is not None
        _, content = work.content
        if job.name is None:
            model = catalogs[0].find_content(content) if catalogs else None
        else:
            there = namesakes(job.name, catalogs)
            model = there[0] if len(there) == 1 and there[0].content == content else None
            if there and model is None and not job.is_swap:
                where = ", ".join(dict.fromkeys(device for m in there for device in m.devices))
                raise UsageError(f"{job.name!r} on {where} is other content; swap it, or use another name")
        if model is not None:
            work.report.bytes_kept, work.report.bytes_moved_inside = work.report.bytes_total, 0
            model.is_pinned = model.is_pinned or job.is_pinned
            model.touch()
        return model

    async def _bring(self, work: Work, turns: Turns, began_ns: int) -> Model:
        try:
            with ExitStack() as opened:
                source = await self._opened(work.job, turns, opened)
                for part in work.parts:
                    await part.site.look()
                unsure = [part for part in work.parts if self._must_know(part)]
                if unsure:
                    with _traced(work.job, "hash"):
                        await turns.beside(lambda rings: self._hash_pass(work, unsure, source, rings))
                    await self._remember(work, turns, began_ns)
                    model = await self._resident(work) if work.is_known else None
                    if model is not None:
                        return model
                if work.job.known is None and any(part.site.tier is not None for part in work.parts):
                    work.lenders = await turns.call(work.job.files, lambda: lenders_of(work.job.shards))
                was_known = work.is_known
                await take_places(work)
                self._estate.sync()  # before a byte goes where victims were: see `estate`
                table: list[ResidentTensor] = []

                async def fill(rings: Mapping[str, Ring]) -> None:
                    async with trio.open_nursery() as nursery:
                        for part in work.parts:
                            nursery.start_soon(self._fill, work, part, source, rings[part.site.name])
                        table.extend(await self._think(work.table))  # what needs no bytes, while these are on their way
                        await self._think(work.describe)

                with _traced(work.job, "fill"):
                    await turns.beside(fill)
            await self._remember(work, turns, began_ns)
            model = await self._resident(work) if turns.was_aside or not was_known else None
            if model is None:
                await self._think(work.find_content)
                for part in work.parts:
                    await self._complete(work, part)
                made = self._made(work, table)
                async with self._estate.recorded(made):
                    for part in work.parts:
                        part.own = []  # the model holds them from here on
                    olds = namesakes(work.job.name, [part.catalog for part in made.parts])
                    is_pinned = any(old.is_pinned for old in olds) if olds else work.inherits_pin  # said meanwhile
                    made.is_pinned = work.job.is_pinned or is_pinned
                    self.generations.publish(made)
                    if work.job.name is not None:
                        self.commits.note(work.job, work.digests)
                return made
            work.let_go()
            return model
        except BaseException:
            work.let_go()
            raise

    async def _opened(self, job: Job, turns: Turns, opened: ExitStack) -> WatchedSource:
        """Its source; `opened` closes it."""

        async def open_one(_: Mapping[str, Ring]) -> Source:
            with turns.watch:
                made = await job.files.open(lambda: self._open_source(job))
            opened.callback(made.close)
            return made

        return WatchedSource(NoSource(job) if job.known is not None else await turns.beside(open_one), turns.watch)

    def _open_source(self, job: Job) -> Source:
        traceparent = job.span.context.traceparent if job.span is not None else ""
        source: Source
        if job.asked_fd is not None:
            source = PulledSource(FileSource(job.shards), job.shards[0].fd, job.asked_fd)
        else:
            source = open_source(job.shards, self._mapper, traceparent)
        return TimedSource(source, job.timing) if job.timing is not None else source

    def _must_know(self, part: PartWork) -> bool:
        """Whether somebody might have to go for bytes that turn out to be resident, if their digests stay unknown."""
        catalog, unit = part.site.catalog, part.site.arena.granule_bytes
        if not catalog.has_pieces or part.is_known:
            return False
        missing = [plan for i, plan in enumerate(part.plans) if part.resident(i) is None]
        return sum(plan.granules_count(unit) for plan in missing) > catalog.open_count

    async def _hash_pass(
        self, work: Work, parts: Sequence[PartWork], source: WatchedSource, rings: Mapping[str, Ring]
    ) -> None:
        device = HostDevice(is_direct=False, reaches_all=True)
        async with trio.open_nursery() as nursery:
            for part in parts:
                unknown = await self._think(lambda part=part: list(work.unknown(part)))  # type: ignore[misc]
                work.report.bytes_hashed_before += sum(p.nbytes for p in unknown)
                ring = rings[part.site.name]
                nursery.start_soon(self._read, work, ring, source, unknown, device, lambda _: [])
        work.report.bytes_hashed += work.report.bytes_hashed_before

    async def _fill(self, work: Work, part: PartWork, source: WatchedSource, ring: Ring) -> None:
        """Bring the bytes of every block that is not complete, from inside the device where they are there."""
        site, report = part.site, work.report
        places: dict[PieceKey, tuple[Block, int]] = {}
        found: dict[PieceKey, tuple[Block, int]] = {}  # each of these blocks is held, once for each piece
        outside: list[Piece] = []
        returning = part.returning
        undecided: set[PieceKey] = set()
        sizes: dict[PieceKey, int] = {}

        def is_there(key: PieceKey) -> bool:
            there = site.catalog.find_piece(work.digests[key])
            if there is not None:
                site.catalog.hold(there[0])
                found[key] = there
            return there is not None

        def find(keys: Sequence[PieceKey]) -> None:
            for key in keys:
                if not is_there(key):
                    report.bytes_copied += sizes[key]

        def decide(batch: Batch) -> None:
            """Its pieces are hashed by now: look for them, once for the batch, where the catalog is looked at."""
            keys = [key for piece in batch.pieces if (key := (piece.transfer, piece.offset)) in undecided]
            if keys:
                trio.from_thread.run_sync(find, keys)

        def runs_of(piece: Piece) -> list[tuple[int, int]]:
            """Where it goes; nowhere if its bytes are there already."""
            key = (piece.transfer, piece.offset)
            if key in undecided and key in found:
                return []
            block, offset = places[key]
            return site.runs_to_fill(block, offset, piece.nbytes)

        try:
            for plan, block, digest in zip(part.plans, part.own, part.digests, strict=True):
                if block is None or block.digest or returning.find_block(digest, block):
                    continue
                for offset, piece in plan.pieces:
                    if len(places) % STEP == 0:
                        await trio.lowlevel.checkpoint()
                    key = (piece.transfer, piece.offset)
                    places[key] = (block, offset)
                    if key not in work.digests:
                        undecided.add(key)
                        sizes[key] = piece.nbytes
                        report.bytes_hashed += piece.nbytes
                    elif is_there(key) or returning.find_piece(work.digests[key], piece.nbytes, block, offset):
                        continue
                    outside.append(piece)
            device = site.device
            if not site.catalog.has_pieces:
                undecided.clear()  # nothing to be found
            elif undecided and device.is_direct:
                # looked at before it is written: most may have no need to be
                device = HostDevice(is_direct=False, reaches_all=True)
            report.bytes_copied += sum(p.nbytes for p in outside if (p.transfer, p.offset) not in undecided)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(site.shape, [block for block in part.own if block is not None])
                await self._return(work, site, ring, returning)
                await self._read(work, ring, source, outside, device, runs_of, decide if undecided else None)
            await self._think(lambda: work.learn_part(part))
            self._share_in_place(work, part)
            inside: list[InsideCopy] = [
                (*places[piece.transfer, piece.offset], *found[piece.transfer, piece.offset], piece.nbytes)
                for plan, block in zip(part.plans, part.own, strict=True)
                if block is not None and not block.digest
                for _, piece in plan.pieces
                if (piece.transfer, piece.offset) in found
            ]
            report.bytes_moved_inside += sum(nbytes for *_, nbytes in inside)
            if inside:
                await trio.to_thread.run_sync(site.copy_inside, inside, self._limits.step_timeout_s)
        finally:
            for block, _ in found.values():
                site.catalog.let_go(block)
            returning.let_go()

    async def _return(self, work: Work, site: Site, ring: Ring, returning: Returning) -> None:
        """Copy back what stands in the RAM tier. Its bytes were hashed when they came to a device, and nobody else can
        write there: they are not looked at again."""
        if not returning.copies:
            return
        assert site.tier is not None

        def runs_of(piece: Piece) -> list[tuple[int, int]]:
            block, offset, _, _, _ = returning.copies[piece.transfer]
            return site.runs_to_fill(block, offset + piece.offset, piece.nbytes)

        await move_batches(
            await self._think(lambda: returning.batches(self._limits.buffer_bytes)),
            source=TierSource(site.tier, returning.blocks),
            device=site.device,
            runs_of=runs_of,
            limits=self._limits,
            lent=ring,
            timing=work.job.timing,
        )
        work.report.bytes_from_ram += returning.nbytes
        site.tier.totals.returned += returning.nbytes

    def _share_in_place(self, work: Work, part: PartWork) -> None:
        """Blocks whose bytes, known by now, turned out to be resident: hold those, give the reserved granules back."""
        for i, plan in enumerate(part.plans):
            block = part.own[i]
            if block is None or block.digest:
                continue
            there = part.resident(i)
            if there is not None:
                part.site.catalog.hold(there)
                part.own[i] = there
                part.site.catalog.let_go(block)
                work.report.bytes_kept += plan.placed_bytes

    async def _read(
        self,
        work: Work,
        ring: Ring,
        source: WatchedSource,
        pieces: Sequence[Piece],
        device: Device,
        runs_of: RunsOf,
        decide: Decide | None = None,
    ) -> None:
        """Move `pieces`; every byte that passes is hashed, and refused if it is not what was remembered: before
        `decide` has looked for it, or while its copy is under way."""
        job = work.job

        def check(piece: Piece, views: Sequence[memoryview]) -> None:
            with _timed(job, "hash"):
                digest = digest_views(views)
            if work.digests.setdefault((piece.transfer, piece.offset), digest) != digest:
                shard = work.transfers[piece.transfer].shard
                self._digests.forget(work.versions[shard])
                raise ChangedError(f"{job.shards[shard].path} changed while it was loaded; load it again")

        def check_files() -> None:
            if job.asked_fd is not None or job.known is not None:  # written while it is read, by whoever brought it
                return
            for shard, version in zip(job.shards, work.versions, strict=True):
                if stamp_of(os.fstat(shard.fd)) != version.stamp:
                    raise ChangedError(f"{shard.path} changed while it was loaded; load it again")

        def pack() -> list[Batch]:
            with_shards = ((work.transfers[p.transfer].shard, p) for p in pieces)
            in_order = sorted(with_shards, key=lambda sp: (sp[0], sp[1].start))
            return pack_pieces(in_order, buffer_bytes=self._limits.buffer_bytes)

        await move_batches(
            await self._think(pack),
            source=source,
            device=device,
            runs_of=runs_of,
            limits=self._limits,
            check=check,
            checks_later=decide is None,
            decide=decide,
            lent=ring,
            timing=job.timing,
        )
        with source.watch:
            await job.files.call(check_files)

    async def _complete(self, work: Work, part: PartWork) -> None:
        """Its bytes are all in place: let other loads find them."""
        catalog = part.site.catalog
        for i, block in enumerate(part.own):
            digest, pieces = part.digests[i], part.known[i]
            assert block is not None
            assert digest is not None
            assert pieces is not None
            if block.digest:
                continue
            while digest not in catalog.blocks and len(block.pieces) + STEP < len(pieces):
                catalog.index(block, pieces[len(block.pieces) :][:STEP])
                await trio.lowlevel.checkpoint()
            block.lenders = work.lenders_of(part.plans[i])
            part.own[i] = catalog.complete(block, digest, pieces)

    def _made(self, work: Work, table: list[ResidentTensor]) -> Model:
        job = work.job
        parts = []
        assert work.content is not None
        whole, content = work.content
        for part in work.parts:
            blocks = [block for block in part.own if block is not None]
            parts.append(Part(part.site.catalog, content[part.site.name], blocks))
        return Model(
            name=job.name if job.name is not None else content_name(content),
            digest=whole,
            parts=parts,
            tensors=table,
            metadata=[s.header.metadata for s in job.shards],
            placements=job.placements,
            label=job.label,
            retain=job.retain,
        )


def _timed(job: Job, phase: str) -> AbstractContextManager[None]:
    return job.timing.within(phase) if job.timing is not None else nullcontext()


@contextmanager
def _traced(job: Job, name: str) -> Iterator[None]:
    if job.span is None:
        yield
        return
    span, error = job.span.child(name), ""
    try:
        yield
    except BaseException as failure:
        error = type(failure).__name__
        raise
    finally:
        span.end(error=error)


def content_name(content: Mapping[str, str]) -> str:
    """What a model without a name is served as: another one for other bytes, or for another spread of them."""
    if len(content) == 1:
        return f"{CONTENT_PREFIX}{next(iter(content.values()))[:16]}"
    return f"{CONTENT_PREFIX}{digest_views([memoryview(repr(sorted(content.items())).encode())]).hex()[:16]}"
