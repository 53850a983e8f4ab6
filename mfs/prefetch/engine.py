"""Turns access patterns into orders to the cache: headers at open, the next bytes of a run, then whole files and
shards.

Three kinds of work, in this order: what a reader's run will want next, the files whose weights are being taken, the
shards beside them. Each order enters the cache by the same door as a read, at lower priority. Orders under way are
bounded, and so are the RAM slots of what was fetched ahead and not read yet; beyond that, whole files go on to the SSD
tier alone. Both bounds are shared among models (`workers.shares`): one that hangs stops nobody else's reading ahead.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from mfs.cache.chunk_cache import ChunkCache
from mfs.cache.chunk_state import ObjectState
from mfs.cache.chunks import block_mask, full_mask
from mfs.errors import ChangedError, MfsError
from mfs.prefetch.pattern import AccessPattern
from mfs.safetensors import header_bytes_needed
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange, ObjectId
from mfs.workers.pool import WorkerPool
from mfs.workers.shares import Group, Shares

logger = logging.getLogger(__name__)

_HEADER_SUFFIX = ".safetensors"
_HEAD_BYTES = BLOCK_BYTES  # first request for a file: the length field, and most headers whole
_LINGER_S = 10.0  # a loader may close and reopen between tensors
_URGENT_MAX = 256
_AHEAD_BYTES_MAX = 64 << 20  # of a tensor asked for at each read: more would be queued over and over
_PAUSE_S = 5.0
_HEADER_STORED_MAX = 1 << 20  # longer tables are left to the kernel's own reading

Siblings = Callable[[ObjectState], Sequence[tuple[ObjectId, int]]]
"""The other shards of an object's model, nearest first, as (object, source)."""


@dataclass(frozen=True)
class PrefetchConfig:
    """Bounds of fetching ahead."""

    orders_max: int
    """Chunks fetched ahead at once for one model; for all together four times that at most."""
    ssd: bool
    """Whether whole files may go on to SSD once RAM is full of chunks nobody has read yet."""


class _Track:
    """One object that is open, was lately, or is being streamed."""

    __slots__ = ("cursor", "dead", "handles", "header_bytes", "heading", "left_at", "passed_on",
                 "pattern", "paused_until", "staged", "state", "streaming", "under_way")  # fmt: skip

    def __init__(self, state: ObjectState) -> None:
        self.state = state
        self.pattern = AccessPattern(state.object.size)
        self.handles = 0
        self.left_at = 0.0
        self.streaming = False
        self.cursor = 0
        """Chunks before it were brought to RAM, or are on their way."""
        self.staged = 0
        """Chunks before it were brought to SSD, where RAM had no room."""
        self.passed_on = False
        self.heading: trio.Event | None = None
        """Set once the header is in RAM or could not be had."""
        self.header_bytes = 0
        self.paused_until = 0.0
        self.dead = False
        self.under_way = 0

    @property
    def finished(self) -> bool:
        return self.dead or self.cursor >= self.state.object.chunks_count


class Prefetcher:
    """Fetches ahead for all objects of a mount."""

    def __init__(self, config: PrefetchConfig, cache: ChunkCache, pool: WorkerPool, siblings: Siblings) -> None:
        self._config = config
        self._cache = cache
        self._pool = pool
        self._siblings = siblings
        self._tracks: dict[ObjectState, _Track] = {}
        self._streams: dict[_Track, None] = {}
        """Tracks being streamed and not finished, in the order they began."""
        self._urgent: dict[Group, OrderedDict[tuple[_Track, int], None]] = {}
        """Chunks that runs will want next, by model."""
        self._orders = Shares(2 * config.orders_max)
        """Under way. Those that go to RAM count in the cache's `unread` meanwhile, as they will once they are there."""
        self._nursery: trio.Nursery | None = None
        self._some = trio.Event()
        """Set while there are tracks."""

    # -- what readers tell

    def opened(self, state: ObjectState) -> None:
        """A handle was opened: its header comes with it."""
        track = self._track(state)
        track.handles += 1
        if track.heading is None and self._nursery is not None and state.object.path.endswith(_HEADER_SUFFIX):
            track.heading = trio.Event()
            self._nursery.start_soon(self._fetch_header, track)

    def closed(self, state: ObjectState) -> None:
        """A handle was closed."""
        track = self._tracks.get(state)
        if track is not None:  # else the mount is ending, and all was given back
            track.handles -= 1
            track.left_at = time.monotonic()

    def has_header(self, state: ObjectState) -> bool:
        """Whether an opened file has a header of which we know what it is."""
        track = self._tracks.get(state)
        return track is not None and track.heading is not None

    async def header(self, state: ObjectState) -> bytes | None:
        """The whole blocks holding the header of an opened safetensors file; None if it has none or it is not to be
        had.

        Cancellation: safe.
        """
        track = self._tracks.get(state)
        if track is None or track.heading is None:
            return None
        await track.heading.wait()
        if not 0 < track.header_bytes <= _HEADER_STORED_MAX:
            return None
        stop = min(-(-track.header_bytes // BLOCK_BYTES) * BLOCK_BYTES, state.object.size)
        try:
            return b"".join(await self._cache.read(state, ByteRange(0, stop)))
        except MfsError:  # the reader will hear of it
            return None

    def note(self, state: ObjectState, span: ByteRange) -> bool:
        """A reader asked for this range. Returns whether missing chunks should be fetched whole."""
        track = self._track(state)
        ahead = track.pattern.note(span)
        if track.streaming:
            stop = min(track.pattern.tensor_stop(span.stop - 1), span.stop + _AHEAD_BYTES_MAX)
            ahead = ByteRange(span.stop, max(span.stop, stop))
        elif track.pattern.taking_weights and not track.dead:
            self._stream(track)
        if ahead is not None:
            self._want(track, ahead)
        return track.streaming or (ahead is not None and len(ahead) >= CHUNK_BYTES // 2)

    def handles_count(self, obj: ObjectId) -> int:
        """Open handles on an object version."""
        return sum(track.handles for track in self._tracks.values() if track.state.object == obj)

    def handles_by_group(self) -> Counter[Group]:
        """Open handles of each model that has any."""
        held = Counter[Group]()
        for state, track in self._tracks.items():
            if track.handles:
                held[state.group] += track.handles
        return held

    @property
    def active_count(self) -> int:
        """Objects being streamed."""
        return len(self._streams)

    @property
    def queued_bytes(self) -> int:
        """What is meant to be fetched and is not yet."""
        chunks = sum(track.state.object.chunks_count - track.cursor for track in self._streams)
        return (chunks + sum(map(len, self._urgent.values()))) * CHUNK_BYTES

    # -- deciding

    def _track(self, state: ObjectState) -> _Track:
        track = self._tracks.get(state)
        if track is None:
            track = self._tracks[state] = _Track(state)
            self._some.set()
            state.users += 1
        return track

    def _want(self, track: _Track, span: ByteRange) -> None:
        urgent = self._urgent.setdefault(track.state.group, OrderedDict())
        for index in range(span.start // CHUNK_BYTES, -(-span.stop // CHUNK_BYTES)):
            if not self._is_there(track, index):
                urgent[track, index] = None
        while len(urgent) > _URGENT_MAX:
            urgent.popitem(last=False)
        self._go()

    def _stream(self, track: _Track) -> None:
        if not track.streaming:
            track.streaming = True
            self._streams[track] = None
            logger.info("streaming %s ahead of its readers", track.state.object.path)
            self._go()

    @staticmethod
    def _is_there(track: _Track, index: int) -> bool:
        """Whether RAM has a chunk, or the kernel."""
        chunk = track.state.chunks.get(index)
        return chunk.valid == full_mask(chunk.length) if chunk is not None else index in track.state.taken

    def _next(self) -> tuple[_Track, int, bool] | None:
        """(track, chunk, to SSD alone) of the next order; None if there is nothing to do now."""
        now = time.monotonic()
        for group, urgent in list(self._urgent.items()):
            while urgent and self._orders.may_take(group) and not self._ram_is_full(group):
                (track, index), _ = urgent.popitem(last=False)
                if not track.dead and track.paused_until <= now and not self._is_there(track, index):
                    return track, index, False
            if not urgent:
                del self._urgent[group]
        while streams := list(self._streams):
            for track in streams:
                may_go = track.paused_until <= now and self._orders.may_take(track.state.group)
                if may_go and not self._abandoned(track, now):
                    order = self._next_of(track)
                    if order is not None:
                        return order
            if streams == list(self._streams):  # else one ended and its sibling began: look again
                break
        return None

    def _ram_is_full(self, group: Group) -> bool:
        return not self._cache.slots.unread.may_take(group)

    def _next_of(self, track: _Track) -> tuple[_Track, int, bool] | None:
        """The stream's next chunk that is wanted. When all of it is there or on SSD, the next shard's stream begins."""
        if not self._ram_is_full(track.state.group):
            while not track.finished:
                index = track.cursor
                track.cursor += 1
                if not self._is_there(track, index):
                    return track, index, False
            del self._streams[track]
            self._begin_sibling(track)
        elif self._config.ssd and track.state.ssd_masks:
            # `cursor` waits for readers to take what is in RAM; what is still at the origin goes on to SSD meanwhile.
            track.staged = max(track.staged, track.cursor)
            while track.staged < track.state.object.chunks_count and not track.dead:
                index = track.staged
                track.staged += 1
                whole = full_mask(len(track.state.object.chunk_range(index)))
                if track.state.on_ssd(index) != whole and not self._is_there(track, index):
                    return track, index, True
            self._begin_sibling(track)
        return None

    def _begin_sibling(self, track: _Track) -> None:
        if not track.dead and not track.passed_on:
            track.passed_on = True
            self._stream_sibling(track)

    def _abandoned(self, track: _Track, now: float) -> bool:
        """Whether nobody has the model open any more: no handle on any of its shards for a while."""
        folder = track.state.object.path.rpartition("/")[0]
        return not any(
            t.handles or now - t.left_at < _LINGER_S
            for t in self._tracks.values()
            if t.state.source == track.state.source and t.state.object.path.rpartition("/")[0] == folder
        )

    # -- doing

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch ahead until cancelled; all objects are given back then."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._housekeeping)
                task_status.started()
        finally:
            self._nursery = None
            for track in list(self._tracks.values()):
                self._drop(track)

    def _go(self) -> None:
        """Begin all orders that there is room for."""
        while self._nursery is not None and (order := self._next()) is not None:
            track, index, ssd_alone = order
            track.under_way += 1
            self._orders.take(track.state.group)
            if not ssd_alone:
                self._cache.slots.unread.take(track.state.group)
            self._nursery.start_soon(self._bring, track, index, ssd_alone)

    async def _bring(self, track: _Track, index: int, ssd_alone: bool) -> None:
        group = track.state.group
        try:
            await self._cache.bring(track.state, index, to_ssd=ssd_alone, ahead=not ssd_alone)
        except ChangedError:
            track.dead = True
        except MfsError as error:
            logger.info("fetching ahead pauses: %s", error)
            track.paused_until = time.monotonic() + _PAUSE_S
        finally:
            track.under_way -= 1
            self._orders.give(group)
            if not ssd_alone:
                self._cache.slots.unread.give(group)
        self._go()

    def _stream_sibling(self, track: _Track) -> None:
        """A shard is on its way: go on with the next one that is not."""
        for obj, source in self._siblings(track.state):
            state = self._cache.open(obj, source)
            neighbour = self._track(state)
            self._cache.close(state)  # the track holds it now
            if not neighbour.streaming and not neighbour.dead:
                self._stream(neighbour)
                return

    async def _fetch_header(self, track: _Track) -> None:
        """The header's blocks into RAM, then the tensor table into the pattern."""
        state, heading = track.state, track.heading
        assert heading is not None
        try:
            if state.object.size <= 8:
                return
            first = min(_HEAD_BYTES, state.object.size)
            chunk = await self._cache.lease(state, 0, block_mask(0, first))
            try:
                needed = header_bytes_needed(self._cache.view(chunk)[:8])
            finally:
                self._cache.release(chunk)
            if needed > min(CHUNK_BYTES, state.object.size):
                return
            chunk = await self._cache.lease(state, 0, block_mask(0, needed))
            chunk.looks += 1
            try:
                track.header_bytes = needed
                heading.set()
                found = await self._pool.call("tensor_boundaries", piece=chunk.piece, file_bytes=state.object.size)
            finally:
                chunk.looks -= 1
                self._cache.slots.give_left(chunk)
                self._cache.release(chunk)
            track.pattern.set_table(array("Q", found["boundaries"]))
        except MfsError as error:  # a foreign file with this suffix, or a read that its reader will hear of
            logger.info("no tensor table of %s: %s", state.object.path, error)
        finally:
            heading.set()

    async def _housekeeping(self) -> None:
        """Wake paused streams, forget objects nobody uses."""
        while True:
            await self._some.wait()
            await trio.sleep(1)
            now = time.monotonic()
            for track in list(self._tracks.values()):
                idle = not track.handles and not track.under_way and now - track.left_at > _LINGER_S
                if idle and (track.finished or not track.streaming or self._abandoned(track, now)):
                    self._drop(track)
            self._go()
            if not self._tracks:
                self._some = trio.Event()

    def _drop(self, track: _Track) -> None:
        self._streams.pop(track, None)
        urgent = self._urgent.get(track.state.group, OrderedDict())
        for key in [key for key in urgent if key[0] is track]:
            del urgent[key]
        if self._tracks.pop(track.state, None) is not None:
            self._cache.leave(track.state)
            self._cache.close(track.state)
