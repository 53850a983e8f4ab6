"""Room for a load: memory that lacks is asked of the devices, and only once it is there somebody is evicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import trio

from gpuload.errors import FitError
from gpuload.server.catalog import Model, namesakes
from gpuload.server.site import MEMORY_POLL_S
from gpuload.server.work import PartWork, Work

STEP = 500
"""Pieces that are looked at in one go: some milliseconds, then others have the loop."""


@dataclass(frozen=True)
class _Room:
    """What a load does to have its room."""

    victims: Sequence[Model]
    olds: Sequence[Model]
    """Whom it is to replace."""
    had_gap: bool
    lacking: Sequence[int]
    """By part: granules that must get memory first."""


async def take_places(work: Work) -> None:
    """Hold blocks that are resident, make room, reserve the others. All or nothing, on all devices, whose turns are the
    caller's.

    Raises: FitError, with nobody evicted; holds are in `work` then, for its `let_go`.
    Cancellation: as an error.
    """
    for part in work.parts:
        part.own = [part.resident(i) for i in range(len(part.plans))]
        for block in part.own:
            if block is not None:
                part.site.catalog.hold(block)
    for part in work.parts:
        await _hold_in_ram(work, part)
    deadline = trio.current_time() + work.job.wait_s
    try:
        while True:
            for part in work.parts:
                await part.site.look()
            try:
                room = _find(work)  # no checkpoint from here on, if nothing lacks
                if not any(room.lacking):
                    return _take(work, room)
                await _grow(work, room)
            except FitError as error:
                if not error.waits:
                    raise
                if trio.current_time() >= deadline:
                    raise await _with_holders(error, work) from None
                await trio.sleep(MEMORY_POLL_S)
    finally:
        for part in work.parts:
            part.site.catalog.promised_count = 0
            part.site.catalog.on_freed()  # of what came for a load that had no room elsewhere nobody has need


async def _hold_in_ram(work: Work, part: PartWork) -> None:
    """See that what is evicted to make room for this does not drive its own blocks out of the RAM tier."""
    if part.site.tier is None:
        return
    seen = 0
    for plan, block, digest in zip(part.plans, part.own, part.digests, strict=True):
        if block is not None or part.returning.hold_block(digest):
            continue
        for _, piece in plan.pieces:
            if (piece.transfer, piece.offset) in work.digests:
                part.returning.hold_piece(work.digests[piece.transfer, piece.offset])
            seen += 1
            if not seen % STEP:
                await trio.lowlevel.checkpoint()


def _find(work: Work) -> _Room:
    """Who must go. Raises: FitError; nobody is evicted here."""
    job = work.job
    olds = namesakes(job.name, [part.site.catalog for part in work.parts])
    had_gap = False
    try:
        victims = _victims(work, keep=olds)
    except FitError:
        if not olds or not job.allow_gap or any(old.leases_count for old in olds):
            raise
        pins = [old.is_pinned for old in olds]
        try:
            for old in olds:
                old.is_pinned = False
            victims = _victims(work, keep=())
        finally:
            for old, was_pinned in zip(olds, pins, strict=True):
                old.is_pinned = was_pinned
        had_gap = any(old in victims for old in olds)
    lacking = [part.site.catalog.lacking_count(sum(_missing(part)), victims) for part in work.parts]
    return _Room(victims, olds, had_gap, lacking)


def _victims(work: Work, keep: Iterable[Model]) -> list[Model]:
    """Whom to evict so that all parts have room. Raises: FitError."""
    victims: list[Model] = []
    what = f"{'swapping in' if work.job.is_swap else 'loading'} {work.job.label}"
    for part in work.parts:
        victims += part.site.catalog.make_room(sum(_missing(part)), what, keep=keep, going=victims)
    return victims


async def _grow(work: Work, room: _Room) -> None:
    """Have memory for what lacks. Raises: FitError; what came stays promised to this load."""
    for part, lacking in zip(work.parts, room.lacking, strict=True):
        catalog = part.site.catalog
        catalog.promised_count = catalog.granules.free_count + lacking
        if lacking:
            sizes = catalog.unmatched(_missing(part), room.victims)
            await part.site.grow(lambda own=catalog: own.promised_count - own.granules.free_count, sizes)  # type: ignore[misc]


def _take(work: Work, room: _Room) -> None:
    work.inherits_pin = any(old.is_pinned for old in room.olds)
    work.report.had_gap = room.had_gap
    work.report.evicted = [v.name for v in room.victims if v.name is not None]
    for victim in room.victims:
        victim.retire()
    for part in work.parts:
        new = [i for i, block in enumerate(part.own) if block is None]
        work.report.bytes_kept += sum(part.plans[i].placed_bytes for i in set(range(len(part.plans))).difference(new))
        for i, block in zip(new, part.site.catalog.reserve(*(part.plans[i].nbytes for i in new)), strict=True):
            part.own[i] = block
        part.site.begin_filling([block for block in part.own if block is not None])


def _missing(part: PartWork) -> list[int]:
    """Granules of each block that it does not hold yet."""
    unit = part.site.arena.granule_bytes
    return [p.granules_count(unit) for p, block in zip(part.plans, part.own, strict=True) if block is None]


async def _with_holders(error: FitError, work: Work) -> FitError:
    who = [f"{part.site.name}: {await part.site.who_holds()}" for part in work.parts]
    waited = f"; waited {work.job.wait_s:.0f} s" if work.job.wait_s else ""
    return FitError(f"{error}{waited}; {'; '.join(who)}", shortfall_bytes=error.shortfall_bytes)
