"""Filling chunks: which orders bring what a reader lacks, and what becomes of the answers. On the trio thread.

A fill belongs to the cache, not to the reader that caused it; the protocol stands at the top of `chunk_cache`. A reader
may go along with an order that brings all he lacks: then the worker answers him before it tells us (`workers.replies`).
To us that is nothing: he waits and is given his bytes as if it had not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mfs.cache.chunk_state import CacheCounters, Chunk, Fill, ObjectState, Reply
from mfs.cache.chunks import lowest, mask_bytes, mask_span
from mfs.cache.saving import Saver
from mfs.cache.slots import Slots
from mfs.errors import ChangedError, MfsError, TransientStoreError
from mfs.tracing.spans import Span
from mfs.types import BLOCK_BYTES
from mfs.waits import Cause
from mfs.workers.frames import Frame
from mfs.workers.job import ATTEMPTS_OVER_DEAD_WORKERS, Job, Priority, WorkerEndedError
from mfs.workers.pool import WorkerPool
from mfs.workers.shares import Group


class Filler:
    """Has the workers bring blocks into chunks that have a slot."""

    def __init__(
        self, pool: WorkerPool, slots: Slots, saver: Saver, counters: CacheCounters, *, timeout_s: float,
        drop: Callable[[Chunk], None],
    ) -> None:  # fmt: skip
        """timeout_s: for one order. drop: takes the slot of an idle chunk away that nothing came for."""
        self._pool = pool
        self._slots = slots
        self._saver = saver
        self._counters = counters
        self._timeout_s = timeout_s
        self._drop = drop
        self.on_lost: Callable[[ObjectState], None] | None = None
        """Told of an object whose whole file turned out damaged and was dropped."""
        self.on_changed: Callable[[ObjectState], None] | None = None
        """Told when the origin turns out to hold another version."""
        self.on_filled: Callable[[Chunk, int, bool, Frame], None] | None = None
        """Told of blocks that came, as a mask, whether ahead of need, with what the worker said of them."""
        self.on_failed: Callable[[ObjectState, MfsError], None] | None = None
        """Told of each fill that failed for good."""
        self.span_of: Callable[[Group], Span | None] = lambda group: None
        """Below what a model's fills are traced, if they are."""

    def fill_for(self, chunk: Chunk, mask: int, extra: int, priority: Priority, reply: Reply | None = None) -> Fill:
        """A fill to wait for that brings at least one missing block of `mask`; all missing ones are under way after, or
        ahead of need as many of them as the origin's link is good for (`workers.pace`).

        reply: goes along with the order that brings all that is missing, if that is not with a worker yet.
        """
        missing = mask & ~chunk.valid
        under_way = 0
        first: Fill | None = None
        for fill in chunk.fills:
            if fill.mask & missing and priority is Priority.DEMAND and fill.job is not None:
                if fill.mask & ~missing and self._pool.pace(chunk.state.source).order_blocks is not None:
                    _take_out(fill, missing)
                else:
                    self._pool.hurry(fill.job)
            under_way |= fill.mask
            if fill.mask & missing:
                first = first or fill
                _send_along(reply, fill, missing)
        rest = missing & ~under_way
        if rest:
            wanted, on_ssd = (rest | extra) & ~chunk.valid & ~under_way, chunk.on_ssd
            from_origin = self._at_once(chunk, rest & ~on_ssd, wanted & ~on_ssd, priority) if rest & ~on_ssd else 0
            # By themselves, since what SSD has must not wait for what only the origin has.
            for part in (wanted & on_ssd, from_origin):
                if part:
                    fill = Fill(part)
                    chunk.fills.append(fill)
                    _send_along(reply, fill, missing)
                    self._submit(chunk, fill, priority, self._timeout_s)
                    first = first or (fill if part & missing else None)
        assert first is not None
        return first

    def _at_once(self, chunk: Chunk, rest: int, wanted: int, priority: Priority) -> int:
        """What of `wanted` is asked of the origin in one order. On a slow link a reader's order is for his own blocks,
        `rest`, alone.
        """
        blocks = self._pool.pace(chunk.state.source).order_blocks
        if blocks is None:
            return wanted
        return rest if priority is Priority.DEMAND else lowest(wanted, blocks)

    def _submit(self, chunk: Chunk, fill: Fill, priority: Priority, timeout_s: float) -> None:
        state = chunk.state
        fill.attempts += 1
        from_ssd = not fill.mask & ~chunk.on_ssd
        fill.cause = Cause.SSD if from_ssd else Cause.ORIGIN
        if not from_ssd:
            self._slots.begin_coming(chunk)
        order = {
            "source": state.source, "obj": state.wire, "index": chunk.index, "mask": fill.mask, "piece": chunk.piece,
            "replies": fill.replies,
        }  # fmt: skip
        fill.job = Job(
            "load" if from_ssd else "fill",
            order,
            lambda result, error: self._filled(chunk, fill, result, error),
            priority,
            timeout_s,
            lambda part: self._came(chunk, fill, part),
        )
        if not from_ssd:
            fill.job.followed_by = self._saver.following(chunk, fill.mask)
        above = self.span_of(state.group)
        if above is not None:
            fill.job.span = _span(above, chunk, fill)
        self._pool.submit(fill.job)

    def _came(self, chunk: Chunk, fill: Fill, part: Frame) -> None:
        """Some of what was ordered is there: it counts, whatever becomes of the rest."""
        assert fill.job is not None
        came = part["came"] & fill.mask
        if came:
            fill.mask &= ~came
            fill.came = True
            chunk.valid |= came
            chunk.sums.update(part["sums"])
            chunk.changed_at = time.monotonic()
            self._count(chunk, came, part, fill.job)
            fill.wake()
        under_way = [job for job in self._pool.under_way() if job.group[0] == chunk.state.source]
        self._pool.pace(chunk.state.source).note_trickle(
            since_s=fill.job.begun_s, now_s=time.monotonic(),
            asked_bytes=fill.job.arguments["mask"].bit_count() * BLOCK_BYTES, came_bytes=part["came_bytes"],
            under_way_bytes=sum(job.arguments["mask"].bit_count() * BLOCK_BYTES for job in under_way),
            timeout_s=self._timeout_s,
        )  # fmt: skip

    def _count(self, chunk: Chunk, mask: int, result: Frame, job: Job) -> None:
        """Blocks have come, and what that took."""
        if result["origin_bytes"] or result["shared_bytes"]:
            self._counters.brought_bytes += mask_bytes(mask, chunk.length) - result["ssd_bytes"]
        self._counters.ssd_hit_bytes += result["ssd_bytes"]
        self._counters.origin_bytes += result["origin_bytes"]
        self._counters.shared_bytes += result["shared_bytes"]
        if self.on_filled is not None and mask:
            self.on_filled(chunk, mask, job.priority is Priority.BACKGROUND, result)

    def _filled(self, chunk: Chunk, fill: Fill, result: Frame | None, error: MfsError | None) -> None:
        ended = isinstance(error, WorkerEndedError)
        chunk.is_clean = chunk.is_clean and not ended  # one that hangs in the kernel may still write there
        attempts_max = ATTEMPTS_OVER_DEAD_WORKERS if ended else 2
        if isinstance(error, TransientStoreError) and fill.attempts < attempts_max and not self._pool.closing:
            assert fill.job is not None
            # Once more: with a new deadline where a worker died, else in what is left of the old one. A dead origin
            # uses its deadline up: asking it for as long again would keep connections from the others.
            left_s = self._timeout_s if ended else fill.job.deadline_s - time.monotonic()
            if left_s > 0:
                self._submit(chunk, fill, fill.job.priority, left_s)
                return
        if isinstance(error, TransientStoreError) and fill.came:
            error = None  # who waits for the rest asks for it anew, in what he has left of his own time
        was_whole = chunk.state.whole
        if result is not None and result["lost"]:
            chunk.saved = 0
            chunk.file_lost = True
            chunk.note_ssd(0)
            for other in chunk.fills:
                other.file_lost = other.file_lost or other is not fill
        if result is not None and result.get("missing"):  # what SSD was believed to have
            # Whoever waits asks again, now the origin: by the same door as all, since he needs a share for that.
            fill.mask &= ~result["missing"]
            chunk.note_ssd(chunk.on_ssd & ~result["missing"])
        chunk.fills.remove(fill)
        if not chunk.fills:
            self._slots.end_coming(chunk)
        if error is not None:
            self._counters.origin_errors += 1
            fill.error = error
            if fill.job is not None:
                self._pool.pace(chunk.state.source).note_failed(since_s=fill.job.begun_s)
            if self.on_failed is not None:
                self.on_failed(chunk.state, error)
            if isinstance(error, ChangedError) and self.on_changed is not None:
                self.on_changed(chunk.state)
        elif result is not None:
            assert fill.job is not None
            chunk.valid |= fill.mask
            if fill.job.followed_by is not None:
                self._saver.begin(chunk)
            if not result["lost"] and not fill.file_lost:
                chunk.saved |= result["resident"]
                chunk.note_ssd(chunk.on_ssd | result["resident"])
            chunk.sums.update(result["sums"])
            chunk.changed_at = time.monotonic()
            fill.decode_s = result.get("decode_s", 0.0)
            if not result["requests"]:  # the files of SSD had it after all, or others there the same bytes
                fill.cause = Cause.SSD
            self._counters.ssd_hits += bool(result["ssd_bytes"])
            self._counters.ssd_misses += bool(result["requests"] or result["shared_bytes"])
            self._counters.origin_requests += result["requests"]
            self._count(chunk, fill.mask, result, fill.job)
            self._pool.pace(chunk.state.source).note_done(
                now_s=chunk.changed_at, took_s=chunk.changed_at - fill.job.begun_s, nbytes=result["origin_bytes"],
                timeout_s=self._timeout_s,
            )  # fmt: skip
        if was_whole and result is not None and result["lost"] and self.on_lost is not None:
            self.on_lost(chunk.state)
        fill.done.set()
        if error is None and chunk.complete:
            self._saver.save(chunk)
        if chunk.idle and not chunk.valid:
            self._drop(chunk)
        else:
            self._slots.wake()  # if not for a slot, then for the share


def _send_along(reply: Reply | None, fill: Fill, missing: int) -> None:
    """With a fill that brings all of `missing`, unless its order is out."""
    if reply is not None and not missing & ~fill.mask and (fill.job is None or not fill.job.started):
        fill.replies[reply.head] = reply.start, reply.stop


def _take_out(fill: Fill, mask: int) -> None:
    """Of an order that has not begun, what a reader asks for by himself: he waits for no more than that. Something is
    left of it.
    """
    assert fill.job is not None
    if not fill.job.started:
        fill.mask &= ~mask
        fill.job.arguments["mask"] = fill.mask
        fill.job.followed_by = None  # it is not all of the chunk any more
        fill.replies.clear()  # the daemon answers


def _span(above: Span, chunk: Chunk, fill: Fill) -> Span:
    assert fill.job is not None
    path, span = chunk.state.object.path, mask_span(chunk.index, fill.mask, chunk.state.object.size)
    made = above.child("fetch")
    made.attributes = {
        "mfs.from": fill.cause, "mfs.file": path, "mfs.start": span.start, "mfs.stop": span.stop,
        "mfs.ahead": fill.job.priority is Priority.BACKGROUND, "mfs.attempt": fill.attempts,
    }  # fmt: skip
    return made
