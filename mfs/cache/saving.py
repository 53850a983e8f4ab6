"""Writing what stands in RAM to the SSD tier: when, with what outcome, and who waits for it. On the trio thread.

A chunk keeps its slot while it is written. Complete chunks are written as they come, by the thread that has fetched all
of it or by another order; others when they have been quiet. A disk that is full or fails is left alone for a while, and
everything is served on without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from mfs.cache.chunk_state import CacheCounters, Chunk, ObjectState
from mfs.cache.chunks import full_mask
from mfs.cache.slots import Slots
from mfs.errors import MfsError
from mfs.workers.frames import Frame
from mfs.workers.job import Job, Priority, WorkerEndedError
from mfs.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_PAUSE_S = 30.0  # without writes after the disk was full or failed


class Saver:
    """Has chunks written to the SSD tier."""

    def __init__(self, pool: WorkerPool, slots: Slots, counters: CacheCounters, *, enabled: bool) -> None:
        """enabled: whether the workers have an SSD tier."""
        self._pool = pool
        self._slots = slots
        self._counters = counters
        self._enabled = enabled
        self._mark = 0
        self._much_saved = trio.Event()
        self.on_saved: Callable[[ObjectState], None] | None = None
        """Told of each write that went well."""
        self.suspended_until = 0.0
        """time.monotonic() until which nothing is written, because the disk was full or failed."""

    @property
    def is_possible(self) -> bool:
        return self._enabled and time.monotonic() >= self.suspended_until

    def is_safe(self, chunk: Chunk) -> bool:
        """Whether the chunk can lose its slot without a loss that writing it could prevent."""
        return not chunk.valid & ~chunk.saved or not self.is_possible

    def resume(self) -> None:
        """The SSD tier is there again: what it was suspended for is over."""
        self.suspended_until = 0.0

    def save(self, chunk: Chunk) -> None:
        """Have the blocks the SSD lacks written there, holding the slot until they are."""
        if not self.is_possible or chunk.saving is not None:
            return
        mask = chunk.valid & ~chunk.saved
        if not mask:
            return
        self.begin(chunk)
        self._order(chunk, mask)

    def following(self, chunk: Chunk, mask: int) -> Job | None:
        """What a worker goes on with that fills `mask` of a chunk from the origin, if that is all of it: to write it to
        the SSD tier, without another order. `begin` when it does. None where that is not to be, or the piece is sent
        with each order.
        """
        if not self.is_possible or mask != full_mask(chunk.length) or not chunk.place.file.stays:
            return None
        return self._job(chunk, mask, {})

    def begin(self, chunk: Chunk) -> None:
        """The chunk is being written, and keeps its slot."""
        chunk.saving = trio.Event()
        chunk.file_lost = False

    def _order(self, chunk: Chunk, mask: int) -> None:
        sums = [[block, checksum] for block, checksum in chunk.sums.items() if mask >> block & 1]
        self._pool.submit(self._job(
            chunk, mask, {"obj": chunk.state.wire, "index": chunk.index, "piece": chunk.piece, "sums": sums}
        ))  # fmt: skip

    def _job(self, chunk: Chunk, mask: int, arguments: Frame) -> Job:
        return Job(
            "persist", arguments, lambda result, error: self._saved(chunk, mask, result, error), Priority.BACKGROUND
        )

    def _saved(self, chunk: Chunk, mask: int, result: Frame | None, error: MfsError | None) -> None:
        if result is not None and result.get("later"):
            self._order(chunk, mask)
            return
        saving, chunk.saving = chunk.saving, None
        assert saving is not None
        self._slots.give_left(chunk)
        if error is not None and (self._pool.closing or isinstance(error, WorkerEndedError)):
            logger.warning("%s; the chunk is saved later, if it still can be", error)
        elif error is not None:
            # It will hardly go better in a moment, and whoever waits for a clean slot would try for ever.
            logger.warning("%s; serving on without writing to the cache for %.0f s", error, _PAUSE_S)
            self.suspended_until = time.monotonic() + _PAUSE_S
        elif result is not None and result["full"]:
            if self.is_possible:
                logger.warning("cache disk is full: serving on without writing to it for %.0f s", _PAUSE_S)
            self.suspended_until = time.monotonic() + _PAUSE_S
        elif result is not None and result["away"]:  # said already; `resume` comes with the tier
            self.suspended_until = time.monotonic() + _PAUSE_S
        else:
            if not chunk.file_lost:  # else the file that was dropped meanwhile may have been this very one
                chunk.saved |= mask
                chunk.written |= mask
                chunk.note_ssd(chunk.on_ssd | mask)
            self._count(result["bytes"] if result else 0)
            self._slots.demote_if_done(chunk)
            if self.on_saved is not None:
                self.on_saved(chunk.state)
        saving.set()
        if chunk.idle:
            self._slots.wake()

    def _count(self, nbytes: int) -> None:
        self._counters.saved_bytes += nbytes
        if self._counters.saved_bytes >= self._mark:
            self._much_saved.set()

    def save_quiet(self, *, older_than_s: float) -> None:
        """Start saving incomplete chunks that have not changed for a while; complete ones are saved as they come."""
        horizon = time.monotonic() - older_than_s
        for chunk in self._slots.chunks:
            if chunk.idle and chunk.valid & ~chunk.saved and chunk.changed_at <= horizon:
                self.save(chunk)

    # -- waiting

    async def wait_saved(self) -> None:
        """Until no write is under way."""
        for chunk in list(self._slots.chunks):
            if chunk.saving is not None:
                await chunk.saving.wait()

    async def wait_saved_more(self, nbytes: int) -> None:
        """Until the SSD tier was given so many bytes more than now."""
        self._mark = self._counters.saved_bytes + nbytes
        self._much_saved = trio.Event()
        await self._much_saved.wait()

    async def wait_on_ssd(self, chunk: Chunk) -> None:
        """Until all of a leased chunk is on SSD, or could not be written."""
        saved_before = -1
        while chunk.valid & ~chunk.saved and chunk.saved != saved_before:
            saved_before = chunk.saved
            self.save(chunk)
            if chunk.saving is None:
                return
            await chunk.saving.wait()  # perhaps of a part, begun before the rest was there: then once more
