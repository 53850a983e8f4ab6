"""Whole objects: sealed where they are complete, and given to the kernel as files to read by itself.

An object of which the SSD tier has every block is *sealed*: a worker forces it to the disk and marks it, and reads it
before only where it stands from an earlier life (`cache.sealing`). From then on its file is the object. Who opens it
gets that file (`fuse.backing`), and reads it at the speed of a local one, without us; also when we are gone. We do not
evict it while it is open: that would free nothing. Another mount of the same cache directory may, and a mapping whose
file is closed is not seen; both read on, from a file without a name.

What the kernel was given of it through us stands in the page cache of the old node, where those who come then do not
find it. It is read into that of the file first, and while a load goes on nobody is sent there: its readers share pages.

What somebody asked into RAM and, where there is no SSD tier, whatever stands there whole, is given from there, up to
half of RAM. It stays until room is needed and nobody has had it open for a while.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from io import FileIO

import trio

from mfs.cache.chunk_cache import ChunkCache
from mfs.cache.chunk_state import ObjectState
from mfs.cache.following import Follower
from mfs.errors import MfsError
from mfs.types import SMALL_FILE_BYTES, ObjectId
from mfs.workers.job import Priority
from mfs.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
_QUIET_S, _PATIENCE_S = 1.0, 15.0
"""Since the last block of an object was written; longer while anything is fetched or read through us: a load has disk
and cores for itself."""
_SCRUB_RATE = 20e6  # bytes a second, on average
_SCRUB_AFTER_S = 60.0  # since the mount began: mostly it is followed by loads
_SCRUB_PAUSE_S, _SCRUBBED_S = 10.0, 3600.0  # between objects, and after the last
_OPEN_S = 2.0  # that an open waits for the file; then it is read through us, as any other
_OPENS_MAX = 8  # threads that a disk which hangs may hold

OpenSealed = Callable[[ObjectId], int | None]
"""A descriptor of the object's sealed file, None if there is none. Blocks. Raises: OSError."""


class WholeFiles:
    """Seals objects and opens what is sealed. Everything here belongs to the trio thread."""

    def __init__(self, cache: ChunkCache, pool: WorkerPool, open_sealed: OpenSealed | None) -> None:
        """open_sealed: None where there is no SSD tier."""
        self._cache = cache
        self._pool = pool
        self._open_sealed = open_sealed
        self._coming: dict[ObjectState, float] = {}
        """Objects that may be complete, held, and when the last block of each was written."""
        self._some = trio.Event()
        """Set while there are any, as far as was looked."""
        self._sealing = trio.Lock()
        self.follower = Follower(pool)
        self._given: dict[ObjectState, int] = {}
        """Objects that the kernel reads by itself, and how many have each open."""
        self._in_ram: dict[ObjectState, float] = {}
        """Objects whose file in RAM was given, the latest last: time.monotonic() of the last open or close of each."""
        self._brought_bytes = -1
        """What had been fetched when one from SSD was opened last."""
        self._limiter = trio.CapacityLimiter(_OPENS_MAX)
        self.on_sealed: Callable[[ObjectState], None] = lambda state: None
        """Told of each object that is whole from now on."""
        self.on_lost: Callable[[ObjectState | None], None] = lambda state: None
        """Told of an object whose sealed file turned out damaged; None if it is not in use."""
        self.on_dropped: Callable[[], None] = lambda: None
        """Told that a file in RAM was given up: what lingers of it would hold its memory."""
        self.reads_count: Callable[[], int] = lambda: 0
        """How often the kernel has asked us for bytes."""
        self.sealed_count = 0
        cache.saver.on_saved = self.note
        cache.on_full = self._make_room
        cache.on_whole = lambda state: self.on_sealed(state)
        cache.filler.on_lost = self.lost

    @property
    def given(self) -> list[str]:
        """cache_id of each object that the kernel reads by itself now: to evict them would free nothing."""
        return [state.object.cache_id for state in self._given]

    @property
    def expects_fetches(self) -> bool:
        """Whether something is likely to be fetched: something was since a file on SSD was given, or none was yet."""
        return self._cache.counters.brought_bytes != self._brought_bytes

    @staticmethod
    def wants(obj: ObjectId) -> bool:
        """Whether an object is worth a file of its own to the kernel: small ones are in its cache after one read."""
        return obj.size > SMALL_FILE_BYTES

    # -- sealing

    def note(self, state: ObjectState) -> None:
        """Something of an object was written to SSD, or is known to stand there: it may be complete."""
        if self._open_sealed is None or state.whole or not self.wants(state.object):
            return
        if state not in self._coming:
            state.users += 1
        self._coming[state] = time.monotonic()
        self._some.set()

    def lost(self, state: ObjectState) -> None:
        """The SSD tier dropped an object that may have been whole, for it was damaged."""
        self._cache.note_unsaved(state.object, state.source)
        self.on_lost(state)

    def lost_object(self, cache_id: str) -> None:
        """As `lost`, of whatever is known of an object."""
        self.on_lost(None)
        for state in self._cache.states(cache_id):
            self.lost(state)

    async def scrub(self) -> None:
        """Check what is sealed against its checksums for ever, slowly: reads by the kernel itself do not."""
        after = ""
        await trio.sleep(_SCRUB_AFTER_S)
        while True:
            await trio.sleep(_SCRUB_PAUSE_S)
            try:
                found = await self._pool.call("scrub", after=after, priority=Priority.BACKGROUND, timeout_s=math.inf)
            except MfsError as error:
                logger.info("what is sealed is not checked now: %s", error)
                await trio.sleep(_SCRUBBED_S)
                continue
            after = found["cache_id"]
            if found["bad"]:
                self.lost_object(after)
            await trio.sleep(found["checked_bytes"] / _SCRUB_RATE if after else _SCRUBBED_S)

    async def run(self) -> None:
        """Seal what is complete and quiet, one after the other, until cancelled."""
        try:
            while True:
                await self._some.wait()
                seen_count = self.reads_count()
                await trio.sleep(_LOOK_S)
                now = time.monotonic()
                is_loading = self._pool.inflight("origin") or self.reads_count() > seen_count
                patience_s = _PATIENCE_S if is_loading else _QUIET_S
                for state in [state for state, at in self._coming.items() if at <= now - patience_s]:
                    del self._coming[state]
                    try:
                        await self.seal(state)
                    finally:
                        self._cache.close(state)
                if not self._coming:
                    self._some = trio.Event()
        finally:
            for state in self._coming:
                self._cache.close(state)
            self._coming.clear()

    async def seal(self, state: ObjectState, *, may_read: bool = True) -> bool:
        """Seal an object if SSD has all of it. Returns whether it is sealed; never raises, but says why it is not.

        may_read: also where that takes a reading of it all; one object at a time then, since the disk is one.
        Cancellation: the worker goes on.
        """
        if self._open_sealed is None or not self.wants(state.object):
            return False
        await self._cache.learned_ssd(state)
        if not may_read:
            return await self._seal(state, may_read=False)
        async with self._sealing:
            return await self._seal(state, may_read=True)

    async def _seal(self, state: ObjectState, *, may_read: bool) -> bool:
        if state.whole or not state.complete_on_ssd:
            return state.whole
        priority = Priority.BACKGROUND if may_read else Priority.DEMAND
        try:
            # No deadline, which would kill a worker that does all it can: one that hangs is found by its silence.
            found = await self._pool.call(
                "seal", obj=state.wire, may_read=may_read, priority=priority, timeout_s=math.inf
            )
            if not found["sealed"]:
                if not found["needs_reading"]:
                    self._cache.relearn_ssd(state)
                return False
            if state.whole:  # by another who asked
                return True
            state.whole = True
            if given := state.given_whole:
                await self._pool.call(
                    "fill_page_cache", obj=state.wire, chunks=given, priority=priority, timeout_s=math.inf
                )
        except MfsError as error:
            logger.info("%s is not sealed, or not in the page cache: %s", state.object.path, error)
            if not state.whole:
                return False
        self.sealed_count += 1
        for chunk in state.chunks.values():
            self._cache.slots.demote_if_done(chunk)
        self.on_sealed(state)
        return True

    # -- giving

    async def open(self, state: ObjectState) -> FileIO | None:
        """A file that is the object; None if there is none now, or its disk does not say so soon. Never raises."""
        open_sealed = self._open_sealed
        if open_sealed is None or all(chunk.keep for chunk in state.chunks.values()):
            found = self._open_in_ram(state)
            if found is not None or open_sealed is None:
                return found
        await self._cache.learned_ssd(state)
        if not state.whole and state.complete_on_ssd and state not in self._coming:
            if not state.given_whole:  # else its pages are better than its file
                with trio.move_on_after(_OPEN_S):
                    await self.seal(state, may_read=False)
            self.note(state)
        if not state.whole:
            return None

        def opened() -> FileIO | None:
            fd = open_sealed(state.object)
            return None if fd is None else FileIO(fd)

        with trio.move_on_after(_OPEN_S):
            try:  # as a file, which closes itself should nobody take it any more
                found = await trio.to_thread.run_sync(opened, abandon_on_cancel=True, limiter=self._limiter)
            except OSError as error:
                logger.warning("%s: its file cannot be opened (%s); it is read through us", state.object.path, error)
                return None
            if found is None:
                state.whole = False
                self._cache.relearn_ssd(state)
            elif not state.whole:  # dropped meanwhile, perhaps for damage
                found.close()
                return None
            return found
        return None

    @staticmethod
    def is_whole(state: ObjectState) -> bool:
        """Whether there is such a file, as far as is known."""
        return state.whole or (state.ram is not None and state.ram.given)

    def _open_in_ram(self, state: ObjectState) -> FileIO | None:
        if not state.complete_in_ram:  # then no room is to be made either
            return None
        try:
            fd = self._cache.slots.give_whole(state)
            if fd is None and self._make_room():  # others may have used half of RAM up
                fd = self._cache.slots.give_whole(state)
        except OSError as error:
            logger.warning("%s: its file in RAM cannot be opened (%s); it is read through us", state.object.path, error)
            return None
        return None if fd is None else FileIO(fd)

    def _make_room(self, *, idle_s: float = 0.0) -> bool:
        """Give up the file in RAM that was given least recently, of those that nobody has had open for so long."""
        until = time.monotonic() - idle_s
        for state, closed_at in list(self._in_ram.items()):
            if state.ram is None or not state.ram.given:  # somebody evicted it
                del self._in_ram[state]
            elif state not in self._given and closed_at <= until and self._cache.drop_whole(state):
                del self._in_ram[state]
                self.on_dropped()
                return True
        return False

    def give(self, state: ObjectState) -> None:
        """The kernel reads an object by itself, once more."""
        if state.ram is not None and state.ram.given:
            self._note_in_ram(state)
        else:
            self._make_way()
            if state.whole:
                self.follower.begin(state)
        if state not in self._given:
            self._cache.note_read_past(state)
        self._given[state] = self._given.get(state, 0) + 1
        self._cache.note_whole_use(state)

    def _make_way(self) -> None:
        """What is kept ready for fetches is memory that the machine has at hand: whoever reads past us finds it, and no
        other, which the host of a virtual machine would have to bring first, at 1 to 2 CPU seconds a GB of his.
        """
        self._brought_bytes = self._cache.counters.brought_bytes
        if not self._pool.inflight("origin"):
            self._cache.slots.cool_down()

    def take_back(self, state: ObjectState) -> None:
        """It is open once less."""
        self._given[state] -= 1
        if self._given[state]:
            return
        del self._given[state]
        self.follower.end(state)
        if state in self._in_ram:
            self._note_in_ram(state)
            self._cache.slots.wake()

    def _note_in_ram(self, state: ObjectState) -> None:
        self._in_ram.pop(state, None)
        self._in_ram[state] = time.monotonic()
