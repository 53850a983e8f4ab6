"""The conductor of the tiers: the only place that knows RAM slots, the SSD tier and the origin.

    read -> lease -> RAM hit                      the bytes where they stand in the object's file, uncopied
                  -> a fill under way              wait for that one
                  -> miss                          take a slot, have a worker fill it: SSD first, then origin;
                                                   from SSD alone, by a lane of its own, where all of it stands there
    filled -> published to all who wait -> written to SSD, holding the slot meanwhile (`saving`)

Protocol. Everything here runs on the trio thread. A chunk with a slot has its piece of the object's file in RAM
(`ram`). Workers write only into blocks of a piece that are neither valid nor in another fill. Between checkpoints the
following holds:

- a block of a chunk is valid, or in exactly one fill, or absent; `valid` only grows while the chunk has its slot, and a
  fill shrinks by what comes of it before the rest, or is asked for by itself before its order is out;
- a chunk with leases, fills or an SSD write under way keeps its slot; any other may lose it at the next checkpoint, but
  those of an object whose file was given whole to others (`ram.given`) lose theirs all together, by `drop_whole`;
- a chunk for which an origin is asked counts in `slots.coming` for its model: a model whose origin hangs holds no more
  slots than its share (see `workers.shares`). What SSD has needs no share: it stays readable however many wait for the
  origin;
- views returned by `read` are good until the caller's next checkpoint: `fuse.loop` answers before it yields;
- a fill belongs to the cache, not to the reader that caused it: a cancelled reader does not stop it, its error goes to
  those who wait for it, and the next reader starts a new one.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import trio

from mfs.cache.chunk_state import CacheCounters, Chunk, Fill, ObjectState, Reply
from mfs.cache.chunks import block_mask, chunk_spans, full_mask, mask_bytes, mask_span
from mfs.cache.filling import Filler
from mfs.cache.ram import Place, RamTier
from mfs.cache.saving import Saver
from mfs.cache.slots import Slots
from mfs.errors import MfsError, StoreError, TransientStoreError
from mfs.types import ByteRange, ObjectId
from mfs.waits import Cause, Waited, Waits
from mfs.workers.frames import Frame, object_to_wire
from mfs.workers.job import Job, Priority
from mfs.workers.pool import WorkerPool
from mfs.workers.shares import Group

logger = logging.getLogger(__name__)

_GIVEN_IDLE_S = 10.0  # after which a file given from RAM goes before chunks that are read through us
_TURN_S = 0.005  # of counting for who looks, without giving way to readers
_SLOTS_FOR_READERS = 2  # that a model's chunks brought ahead of need leave to its readers

Pieces = tuple[memoryview | bytes, ...]
"""The bytes of a range, one after the other: a view of each chunk."""


class Begun(NamedTuple):
    """What was ordered for a reader, for him to wait for."""

    since_s: float
    """time.monotonic()"""
    fills: dict[int, Fill]
    """By index of the chunk. Each may have ended before its reader has his turn."""
    whole_chunks: bool
    head: bytes | None


@dataclass(frozen=True)
class CacheConfig:
    """Bounds of the chunk cache."""

    timeout_s: float = 30.0
    """From a reader's question to its bytes or its error."""
    ssd: bool = True
    """Whether the workers have an SSD tier."""


class ChunkCache:
    """Chunks of objects in RAM, filled and saved by the workers."""

    def __init__(self, config: CacheConfig, memory: RamTier, pool: WorkerPool) -> None:
        self._config = config
        self._pool = pool
        self._states: dict[tuple[str, int], ObjectState] = {}
        self._uses: dict[str, set[int]] = {}
        self._whole_uses: dict[str, int] = {}
        """By cache_id, of what was used as a whole: the count of its chunks."""
        self.counters = CacheCounters()
        self.slots = Slots(memory)
        self.saver = Saver(pool, self.slots, self.counters, enabled=config.ssd)
        self.filler = Filler(
            pool, self.slots, self.saver, self.counters, timeout_s=config.timeout_s, drop=self._drop
        )  # fmt: skip
        self.on_full: Callable[..., bool] = lambda idle_s: False
        """Asked to `drop_whole` something that nobody has used for so long. Whether it did."""
        self.on_whole: Callable[[ObjectState], None] | None = None
        """Told of an object of which the SSD tier turns out to have a whole file."""
        self.waits = Waits()
        """Told of whatever a reader waits for here."""

    # -- objects

    def open(self, obj: ObjectId, source: int) -> ObjectState:
        """The state of an object, held until `close`. Equal objects share one."""
        key = (obj.cache_id, source)
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = ObjectState(obj, source)
            self.relearn_ssd(state)
        elif (state.object, state.object.locator) != (obj, obj.locator):
            # The same bytes by digest under another name or commit: the latest seen is the likeliest still to be there.
            state.object, state.wire = obj, object_to_wire(obj)
        state.users += 1
        return state

    def relearn_ssd(self, state: ObjectState) -> None:
        """Ask what the SSD tier has of an object."""

        def learned(result: Frame | None, error: MfsError | None) -> None:
            if result is not None:  # else every fill looks for itself, in the origin's lane
                masks = result["masks"]
                for index, chunk in state.chunks.items():
                    masks[index] |= chunk.saved
                state.ssd_masks = array("I", masks)
                is_news = result["sealed"] and not state.whole
                state.whole = result["sealed"]
                if is_news and self.on_whole is not None:
                    self.on_whole(state)
            state.ssd_known.set()

        if self._config.ssd and state.object.size:
            self._pool.submit(Job("masks", {"obj": state.wire}, learned, timeout_s=self._config.timeout_s))
        else:
            state.ssd_known.set()

    def states(self, cache_id: str) -> list[ObjectState]:
        """What is known of an object, once for each source that is used of it."""
        return [state for (known_id, _), state in self._states.items() if known_id == cache_id]

    async def learned_ssd(self, state: ObjectState) -> None:
        """Until it is known what the SSD tier has of an object; a worker that hangs costs a reader a quarter of his
        time, not his bytes.
        """
        with trio.move_on_after(self._config.timeout_s / 4):
            await state.ssd_known.wait()
        state.ssd_known.set()

    def close(self, state: ObjectState) -> None:
        """Give an object back."""
        state.users -= 1
        self._forget_if_unused(state)

    def _forget_if_unused(self, state: ObjectState) -> None:
        key = (state.object.cache_id, state.source)
        # Not another state of that name: a read that outlives its handle may bring a forgotten one back to us.
        if not state.users and not state.chunks and self._states.get(key) is state:
            del self._states[key]

    # -- reading

    def begin(
        self, state: ObjectState, span: ByteRange, *, whole_chunks: bool = False, head: bytes | None = None
    ) -> Begun:
        """Have ordered what a reader is about to wait for in `read`, as far as nothing must be waited for before that.
        No checkpoint.

        whole_chunks: fetch all of a missing chunk, because the rest will be wanted.
        head: with it the worker that brings all of `span` may have answered before `read` returns; see `filling`.
        """
        begun = Begun(time.monotonic(), {}, whole_chunks, head)
        for index, part in chunk_spans(span):
            mask = block_mask(part.start, part.stop)
            chunk = self._chunk_nowait(state, index, mask)
            if isinstance(chunk, Chunk) and mask & ~chunk.valid:
                extra = full_mask(chunk.length) if whole_chunks else 0
                reply = _reply(head, span, part)
                begun.fills[index] = self.filler.fill_for(chunk, mask, extra, Priority.DEMAND, reply)
        return begun

    async def read(self, state: ObjectState, span: ByteRange, begun: Begun | None = None) -> Pieces:
        """Bytes [span.start, span.stop) of the object, all of them.

        span: inside the object. begun: what `begin` returned for it; without, it is as if `begin` could order nothing.
        Returns views that are good until the caller's next checkpoint.
        Raises: MfsError. Cancellation: safe; the fill goes on.
        """
        parts, begun = list(chunk_spans(span)), begun or Begun(time.monotonic(), {}, False, None)
        for index, part in parts:  # who waited while he holds a slot could deadlock against another such reader
            await self._have(state, index, part, begun, _reply(begun.head, span, part))
        # no checkpoint until the caller's reply
        pieces = self._deliver(state, parts)
        if pieces is not None:
            return pieces
        copies: list[bytes] = []
        for index, part in parts:  # one was lost while another was waited for
            await self._have(state, index, part, begun)
            pieces = self._deliver(state, [(index, part)])
            assert pieces is not None  # no checkpoint since
            copies += map(bytes, pieces)
        return tuple(copies)

    def read_nowait(self, state: ObjectState, span: ByteRange) -> Pieces | None:
        """The bytes where they stand, good until the caller's next checkpoint; None if RAM lacks any of them."""
        pieces = self._deliver(state, chunk_spans(span))
        if pieces is not None:
            self.counters.ram_hit_bytes += len(span)
            self.counters.ram_hits += len(pieces)
        return pieces

    def _deliver(self, state: ObjectState, parts: Iterable[tuple[int, ByteRange]]) -> Pieces | None:
        """Parts of chunks go to a reader; None, and nothing goes, if RAM lacks any of them."""
        hits: list[tuple[Chunk, ByteRange, int]] = []
        for index, part in parts:
            chunk, mask = state.chunks.get(index), block_mask(part.start, part.stop)
            if chunk is None or mask & ~chunk.valid:
                return None
            hits.append((chunk, part, mask))
        for chunk, _, mask in hits:
            self.note_delivery(chunk, mask)
        return tuple([chunk.view(part.start, part.stop) for chunk, part, _ in hits])

    async def _have(
        self, state: ObjectState, index: int, part: ByteRange, begun: Begun, reply: Reply | None = None
    ) -> None:
        """Wait until RAM has a part of a chunk; it may lose it again at the next checkpoint."""
        chunk, mask = state.chunks.get(index), block_mask(part.start, part.stop)
        fill = begun.fills.pop(index, None)
        if chunk is not None and not mask & ~chunk.valid:
            if fill is not None:  # the answer was heard before we had our turn: the reader has waited all the same
                self.counters.ram_misses += 1
                self._note_waited(begun.since_s, fill, state, index, mask)
                return
            self.counters.ram_hit_bytes += len(part)
            self.counters.ram_hits += 1
            return
        self.counters.ram_misses += 1
        length = len(state.object.chunk_range(index))
        extra = full_mask(length) if begun.whole_chunks else 0
        self.release(await self.lease(state, index, mask, extra=extra, reply=reply))

    def note_delivery(self, chunk: Chunk, mask: int) -> None:
        """Blocks of a leased chunk go to a reader, by way of the kernel's page cache."""
        chunk.delivered |= mask
        self.note_use(chunk)
        self.slots.demote_if_done(chunk)

    def note_use(self, chunk: Chunk) -> None:
        """A leased chunk is read, perhaps where it stands."""
        self.slots.note_use(chunk)
        if chunk.saved:
            self._uses.setdefault(chunk.state.object.cache_id, set()).add(chunk.index)

    def note_whole_use(self, state: ObjectState) -> None:
        """All of an object is in use where SSD has it."""
        self._whole_uses[state.object.cache_id] = state.object.chunks_count

    def note_read_past(self, state: ObjectState) -> None:
        """Who reads an object does so past us: what RAM has of it may go first."""
        for chunk in state.chunks.values():
            self.slots.demote_if_done(chunk)

    async def lease(
        self, state: ObjectState, index: int, mask: int, *, extra: int = 0,
        priority: Priority = Priority.DEMAND, own: bool = False, reply: Reply | None = None,
    ) -> Chunk:  # fmt: skip
        """Hold a chunk with the blocks of `mask` valid; the caller must `release` it.

        extra: further blocks to bring in the same request if they are missing; not waited for by themselves.
        own: in the object's own file, if it has no slot yet.
        reply: what the worker may answer that brings the blocks.
        Raises: MfsError within `timeout_s` for DEMAND; background leases wait as long as their turn takes.
        Cancellation: safe, nothing is held then.
        """
        demand = priority is Priority.DEMAND
        deadline = trio.current_time() + self._config.timeout_s if demand else float("inf")
        since_s = time.monotonic()
        with trio.move_on_at(deadline):
            while True:
                chunk = self._chunk_nowait(state, index, mask, demand=demand, own=own)
                if not isinstance(chunk, Chunk):
                    with self._waiting(chunk, state, index, mask, demand):
                        if chunk is Cause.SSD:
                            await self.learned_ssd(state)
                        else:
                            await self.slots.wait(state.group if chunk is Cause.SHARE else None)
                    continue  # from the top: another reader may have brought this very chunk meanwhile
                chunk.leases += 1
                try:
                    if not mask & ~chunk.valid:
                        chunk.leases += 1  # the caller's; ours goes in the finally
                        return chunk
                    fill = self.filler.fill_for(chunk, mask, extra, priority, reply)
                    with self._waiting(fill, state, index, mask, demand):
                        await fill.done.wait()
                    if fill.error is not None:
                        raise self._told_slow(fill.error, state, since_s)
                finally:
                    self.release(chunk)
        error = StoreError(f"{state.object}: no answer within {self._config.timeout_s:g} s")
        raise self._told_slow(error, state, since_s)

    def _told_slow(self, error: MfsError, state: ObjectState, since_s: float) -> MfsError:
        """The error of who has waited since then: whether bytes of its origin have come meanwhile, too few in time."""
        if isinstance(error, StoreError):
            error.is_slow = self._pool.pace(state.source).trickled_s > since_s
        return error

    def _chunk_nowait(
        self, state: ObjectState, index: int, mask: int, *, demand: bool = True, own: bool = False
    ) -> Chunk | Cause:
        """A chunk with a slot, of which `mask` may be ordered; else what must be waited for first. It may lose the slot
        at the next checkpoint.

        Raises: MfsError.
        """
        if not state.ssd_known.is_set():
            return Cause.SSD
        chunk = state.chunks.get(index)
        if not self._may_lease(state, index, chunk, mask, demand):
            return Cause.SHARE
        if chunk is None:
            if demand and index in state.taken:  # the kernel has dropped it, and hardly that alone
                state.taken.clear()
            place = self._take_slot_nowait(state, index, own=own or self._goes_into_file(state), allow_loss=demand)
            if place is None:
                return Cause.SLOT
            chunk = state.chunks[index] = Chunk(state, index, place)
            self.slots.enter(chunk)
        return chunk

    @contextmanager
    def _waiting(self, on: Cause | Fill, state: ObjectState, index: int, mask: int, demand: bool) -> Iterator[None]:
        """Note how long a reader waits in here for blocks of a chunk, however it ends."""
        since_s = time.monotonic()
        try:
            yield
        finally:
            if demand:
                self._note_waited(since_s, on, state, index, mask)

    def _note_waited(self, since_s: float, on: Cause | Fill, state: ObjectState, index: int, mask: int) -> None:
        waited_s, span = time.monotonic() - since_s, mask_span(index, mask, state.object.size)
        where = state.source, state.object.path, span.start, span.stop
        cause, decode_s = (on.cause, min(on.decode_s, waited_s)) if isinstance(on, Fill) else (on, 0.0)
        waited_s -= decode_s
        self.waits.note(Waited(since_s, waited_s, cause, *where))
        if decode_s:
            self.waits.note(Waited(since_s + waited_s, decode_s, Cause.DECODE, *where))

    def _may_lease(self, state: ObjectState, index: int, chunk: Chunk | None, mask: int, demand: bool) -> bool:
        """Whether nothing new must come from the origin, or the model may have one more slot for what does."""
        if chunk is not None and (chunk.coming or not mask & ~chunk.valid):
            return True
        if not (mask & ~chunk.valid if chunk else mask) & ~state.on_ssd(index):
            return True
        return self.slots.coming.may_take(state.group, leaving=0 if demand else _SLOTS_FOR_READERS)

    def view(self, chunk: Chunk) -> memoryview:
        """The bytes of a leased chunk; only its valid blocks mean anything."""
        return chunk.view(0, chunk.length)

    def release(self, chunk: Chunk) -> None:
        """End a lease."""
        chunk.leases -= 1
        if chunk.idle:
            if not chunk.valid:
                self._drop(chunk)
            else:
                self.slots.wake()

    # -- slots

    def _goes_into_file(self, state: ObjectState) -> bool:
        """Whether new chunks of an object stand in a file of its own: where others have that, or may be given it."""
        return not self._config.ssd or (state.ram is not None and (state.ram.holders > 0 or state.ram.given))

    def _take_slot_nowait(self, state: ObjectState, index: int, *, own: bool, allow_loss: bool) -> Place | None:
        """A slot for a chunk of an object, taken from the coldest idle ones if need be; None if all are held.

        allow_loss: a chunk the SSD does not have yet may go too, if there is no other.
        """
        if (superfluous := self.slots.superfluous()) is not None:
            self._drop(superfluous)  # also where there is room: its memory is near
        while (place := self.slots.take(state, index, own=own)) is None:
            if self.on_full(idle_s=_GIVEN_IDLE_S):
                continue
            victim = self.slots.victim(self.saver.is_safe)
            if (victim is None or not self.saver.is_safe(victim)) and self.on_full(idle_s=0.0):
                continue
            if victim is None:
                return None
            if not self.saver.is_safe(victim):
                if not allow_loss:
                    self.saver.save(victim)
                    return None
                self.counters.lost_bytes += victim.length
            self._drop(victim)
        return place

    def _drop(self, chunk: Chunk) -> None:
        """Take the slot away. The chunk is idle."""
        self._count_dropped(chunk)
        if chunk.delivered == full_mask(chunk.length):
            chunk.state.taken.add(chunk.index)
        self.slots.drop(chunk)
        self._forget_if_unused(chunk.state)

    def _count_dropped(self, chunk: Chunk) -> None:
        self.counters.ram_evictions += bool(chunk.valid)
        self.counters.ram_evicted_bytes += mask_bytes(chunk.valid, chunk.length)
        self._count_waste(chunk)

    def _count_waste(self, chunk: Chunk) -> None:
        if chunk.unread:
            self.counters.wasted_bytes += mask_bytes(chunk.valid, chunk.length)

    def drop_whole(self, state: ObjectState) -> int:
        """Drop an object from RAM whose file was given to others, who go on reading it; returns the bytes freed here.

        0, and nothing dropped, if it is not given, is lent, or a chunk of it is in use.
        """
        ram = state.ram
        if ram is None or not ram.given or ram.holders or not all(chunk.idle for chunk in state.chunks.values()):
            return 0
        dropped = sum(mask_bytes(chunk.valid, chunk.length) for chunk in state.chunks.values())
        for chunk in state.chunks.values():
            self._count_dropped(chunk)
        self.slots.drop_whole(state)
        self._forget_if_unused(state)
        return dropped

    def drop_idle(self) -> None:
        """Drop all that nobody uses: the mount is another daemon's."""
        for state in list(self._states.values()):
            self._evict(state)
        self.slots.cool_down()

    # -- ahead of need

    async def bring(
        self, state: ObjectState, index: int, *, to_ssd: bool, ahead: bool = False, keep: bool = False
    ) -> bool:
        """Have a whole chunk in RAM, and on SSD if asked and possible; the door for everything that fetches ahead.

        to_ssd: return only once the SSD tier has it, if it can have it. ahead: a reader is expected; count the chunk as
        unread until one comes. keep: a person wants it in RAM.
        Returns whether SSD has all of it, or had. Raises: MfsError of the fill. Cancellation: safe.
        """
        mask = full_mask(len(state.object.chunk_range(index)))
        fresh = index not in state.chunks
        chunk = await self.lease(state, index, mask, priority=Priority.BACKGROUND, own=keep)
        try:
            if keep:
                await self._move_into_file(chunk)
                chunk.keep = True
            if ahead and fresh and not chunk.delivered and not chunk.unread:
                chunk.unread = True
                self.slots.unread.take(state.group)
                self.counters.ahead_bytes += chunk.length
            if to_ssd:
                chunk.saved &= state.on_ssd(index)
                chunk.written = 0
                await self.saver.wait_on_ssd(chunk)
            return not chunk.valid & ~(chunk.saved | chunk.written)
        finally:
            self.release(chunk)

    async def lease_in_file(self, state: ObjectState, index: int, mask: int) -> Chunk:
        """As `lease`, of a chunk that stands in its object's own file, for who has that mapped."""
        chunk = await self.lease(state, index, mask, own=True)
        try:
            await self._move_into_file(chunk)
        except BaseException:
            self.release(chunk)
            raise
        return chunk

    async def _move_into_file(self, chunk: Chunk) -> None:
        """Have a chunk that the caller has leased stand in its object's own file. Who else has leased it does not mind:
        no view of it is kept over a checkpoint, but by who has it there already.

        Raises: TransientStoreError if there is no room soon; StoreError if there is no memory.
        """
        with trio.move_on_after(self._config.timeout_s):
            while not chunk.is_own:
                if chunk.fills:
                    await chunk.fills[0].done.wait()
                elif (place := self._take_slot_nowait(chunk.state, chunk.index, own=True, allow_loss=True)) is None:
                    await self.slots.wait(None)
                else:
                    self.slots.move(chunk, place)
                    await trio.lowlevel.checkpoint()  # a loan may move many
            return
        raise TransientStoreError(f"{chunk.state.object}: no room in its file within {self._config.timeout_s:g} s")

    def leave(self, state: ObjectState) -> None:
        """Nobody is expected any more: what was brought ahead and not read was so in vain."""
        for chunk in state.chunks.values():
            self._count_waste(chunk)
            self.slots.note_read(chunk)

    # -- residency

    def resident_bytes(self, obj: ObjectId, source: int) -> int:
        """Bytes of an object that stand in RAM."""
        state = self._states.get((obj.cache_id, source))
        if state is None:
            return 0
        return sum(mask_bytes(c.valid, c.length) for c in state.chunks.values())

    def valid_masks(self, obj: ObjectId, source: int) -> dict[int, int]:
        """Blocks of an object that stand in RAM, by chunk; chunks with none may be left out."""
        state = self._states.get((obj.cache_id, source))
        return {index: chunk.valid for index, chunk in state.chunks.items()} if state is not None else {}

    async def ram_bytes_by_group(self) -> Counter[Group]:
        """Bytes in RAM of each model that has any, or had a moment ago. Gives way to readers."""
        held, turn_ends = Counter[Group](), time.monotonic() + _TURN_S
        for state in list(self._states.values()):
            for chunk in list(state.chunks.values()):
                held[state.group] += chunk.length if chunk.complete else mask_bytes(chunk.valid, chunk.length)
                if time.monotonic() > turn_ends:
                    await trio.lowlevel.checkpoint()
                    turn_ends = time.monotonic() + _TURN_S
        return held

    def evict(self, obj: ObjectId, source: int) -> int:
        """Drop an object's idle chunks from RAM; returns the bytes freed."""
        state = self._states.get((obj.cache_id, source))
        return self._evict(state) if state else 0

    def _evict(self, state: ObjectState) -> int:
        if state.ram is not None and state.ram.given:
            return self.drop_whole(state)
        freed = 0
        for chunk in list(state.chunks.values()):
            if chunk.idle:
                freed += mask_bytes(chunk.valid, chunk.length)
                self._drop(chunk)
        return freed

    def note_unsaved(self, obj: ObjectId, source: int) -> None:
        """The SSD tier dropped an object: what RAM has of it may be saved anew."""
        state = self._states.get((obj.cache_id, source))
        if state is None:
            return
        state.whole = False
        for chunk in state.chunks.values():
            chunk.saved = 0
        if state.ssd_masks:
            state.ssd_masks = array("I", bytes(state.ssd_masks.itemsize * len(state.ssd_masks)))

    def note_evicted(self, dropped: dict[str, list[int]]) -> None:
        """The SSD tier's budget dropped some chunks, by cache_id.

        They stay `saved`: to write again at once what was found cold would go round in circles. `bring` does, if asked.
        """
        for state in self._states.values():
            indexes = dropped.get(state.object.cache_id, ())
            for index in indexes if state.ssd_masks else ():
                state.ssd_masks[index] = 0
            state.whole = state.whole and not indexes

    def take_uses(self) -> dict[str, list[int]]:
        """Which SSD chunks were read since the last call."""
        uses, self._uses = self._uses, {}
        whole, self._whole_uses = self._whole_uses, {}
        return {cache_id: sorted(indexes) for cache_id, indexes in uses.items()} | {
            cache_id: list(range(count)) for cache_id, count in whole.items()
        }

    @property
    def slots_used(self) -> int:
        return len(self.slots.chunks)

    @property
    def unread_count(self) -> int:
        return self.slots.unread.count

    @property
    def leases_count(self) -> int:
        return sum(chunk.leases for chunk in self.slots.chunks)

    @property
    def fills_count(self) -> int:
        return sum(len(chunk.fills) for chunk in self.slots.chunks)


def _reply(head: bytes | None, span: ByteRange, part: ByteRange) -> Reply | None:
    """What answers with all of `span`, if that is in one chunk."""
    return None if head is None or len(part) != len(span) else Reply(head, part.start, part.stop)
