"""Who has a slot, who loses his, and who waits for one. Knows no workers; belongs to the trio thread.

Whoever waits needs one of two things: a slot, or a larger part of what his model may have on its way from its origin.
The first are woken by every slot that may be had; the second only when their model may take one more: of a model that
hangs there may be hundreds.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import trio

from mfs.cache.chunk_state import Chunk, ObjectState
from mfs.cache.chunks import full_mask
from mfs.cache.ram import Place, RamFile, RamTier, write
from mfs.errors import StoreError, TransientStoreError
from mfs.types import CHUNK_BYTES
from mfs.workers.shares import Group, Shares

_HELD_LOOK_S = 0.5  # between two looks whether readers elsewhere have let go of memory that is not ours any more
_CLEAN_SEARCH_COUNT = 64  # how far from the cold end to look for a slot that costs nothing to lose


class Slots:
    """Chunks in their slots, coldest first, and how slots are shared among models."""

    def __init__(self, memory: RamTier) -> None:
        self._memory = memory
        self._waiters: dict[Group | None, trio.Event] = {}
        """By model: who waits for its share. None: who waits for a slot and needs nothing else."""
        self._given_count = 0
        """Slots of files that were given to others."""
        count = memory.slots_count
        self.chunks: OrderedDict[Chunk, None] = OrderedDict()
        self.coming = Shares(count * 3 // 4, hard=count)
        """Slots of chunks for which an origin is asked."""
        self.unread = Shares(count, hard=count)
        """Slots of chunks brought ahead of need that nobody has read yet, and of those that `prefetch` has ordered."""

    def take(self, state: ObjectState, index: int, *, own: bool) -> Place | None:
        """A free slot for a chunk of an object, if there is one; own: in the object's own file.

        Raises: StoreError if the file cannot be had.
        """
        if not self._memory.has_room(state.ram if own else self._memory.common):
            return None
        return self._memory.take(self._file(state), index * CHUNK_BYTES) if own else self._memory.take_common()

    def _file(self, state: ObjectState) -> RamFile:
        if state.ram is None:
            state.ram = self._memory.open(state.object.size)
        return state.ram

    def enter(self, chunk: Chunk) -> None:
        """A chunk has got a slot: it is the warmest."""
        self.chunks[chunk] = None

    def drop(self, chunk: Chunk) -> None:
        """Take an idle chunk's slot away."""
        self._memory.give(chunk.place, is_clean=chunk.is_clean)
        self._forget(chunk)
        self._close_if_unused(chunk.state)
        self.wake()

    def move(self, chunk: Chunk, place: Place) -> None:
        """Have a chunk that nobody fills stand in its object's own file, at a slot that was taken there. Copies: a
        millisecond. Who reads it now, or saves it, reads on where it stood.

        Raises: StoreError if there is no memory for it; then it stands where it stood, and the slot is free again.
        """
        try:
            write(place, chunk.view(0, chunk.length))
        except StoreError:
            self._memory.give(place)
            raise
        chunk.left.append((chunk.place, chunk.is_clean))
        chunk.place, chunk.is_clean = place, True
        self.give_left(chunk)

    def give_left(self, chunk: Chunk) -> None:
        """Free the slots where a chunk stood before, once no worker has them any more."""
        if chunk.left and chunk.saving is None and not chunk.looks:
            for place, is_clean in chunk.left:
                self._memory.give(place, is_clean=is_clean)
            chunk.left.clear()
            self.wake()

    def cool_down(self) -> None:
        """Give memory without a user back."""
        self._memory.cool_down()

    def give_whole(self, state: ObjectState) -> int | None:
        """A descriptor to read an object's file by, the caller's, if RAM has all of it and it may be given to others.

        From then on nothing of it is dropped but by `drop_whole`. None where it is not whole, or where files so given
        would take more than half of the slots. Raises: OSError.
        """
        ram = state.ram
        if ram is None or not state.complete_in_ram:
            return None
        if not ram.given and self._given_count + ram.slots_count > self._memory.slots_count // 2:
            return None
        fd = self._memory.lend(ram)
        if not ram.given:
            ram.given = True
            self._given_count += ram.slots_count
        return fd

    def drop_whole(self, state: ObjectState) -> None:
        """Take the slots of all chunks of an idle object away whose file was given to others: those go on reading."""
        assert state.ram is not None
        self._given_count -= state.ram.slots_count
        self._memory.give_whole(state.ram)
        for chunk in list(state.chunks.values()):
            self._forget(chunk)
        self._close_if_unused(state)
        self.wake()

    def _forget(self, chunk: Chunk) -> None:
        del chunk.state.chunks[chunk.index]
        del self.chunks[chunk]
        self.note_read(chunk)

    def _close_if_unused(self, state: ObjectState) -> None:
        if state.ram is not None and self._memory.close_if_unused(state.ram):
            state.ram = None

    def hold(self, state: ObjectState) -> int:
        """Keep an object's file for who maps it: a descriptor to read it by, the caller's to close, until `unhold`.

        Raises: StoreError if it cannot be had, TransientStoreError if there are too many.
        """
        file = self._file(state)
        try:
            self._memory.hold(file)
        except TransientStoreError:
            self._close_if_unused(state)
            raise
        try:
            return self._memory.lend(file)
        except OSError as error:
            self.unhold(state)
            raise StoreError(f"RAM tier: {state.object} cannot be lent: {error}") from error

    def unhold(self, state: ObjectState) -> None:
        """End a `hold`."""
        assert state.ram is not None
        self._memory.unhold(state.ram)
        self._close_if_unused(state)

    def victim(self, is_safe: Callable[[Chunk], bool]) -> Chunk | None:
        """The coldest idle chunk that may safely go; where none is near, the coldest idle one; None if all are held."""
        unsafe: Chunk | None = None
        looked = 0
        for chunk in self.chunks:
            if not chunk.idle or chunk.place.file.given:
                continue
            if is_safe(chunk):
                return chunk
            unsafe = unsafe or chunk
            looked += 1
            if looked >= _CLEAN_SEARCH_COUNT:
                break
        return unsafe

    def superfluous(self) -> Chunk | None:
        """The chunk that has a slot and needs none, by `demote_if_done`, if there is one; the last read first."""
        first = next(iter(self.chunks), None)
        if first is None or not first.idle or not self._is_done(first):
            return None
        file = first.place.file
        return None if file.given or file.holders else first

    # -- use

    def note_use(self, chunk: Chunk) -> None:
        """A leased chunk is read."""
        self.note_read(chunk)
        self.chunks.move_to_end(chunk)

    def note_read(self, chunk: Chunk) -> None:
        """A chunk brought ahead of need does not count as such any more."""
        if chunk.unread:
            chunk.unread = False
            self.unread.give(chunk.state.group)

    def demote_if_done(self, chunk: Chunk) -> None:
        """A chunk the kernel has whole and the SSD has too is the first to lose its slot: one copy in RAM is enough."""
        if self._is_done(chunk):
            self.chunks.move_to_end(chunk, last=False)

    @staticmethod
    def _is_done(chunk: Chunk) -> bool:
        everything = full_mask(chunk.length)
        has_kernel = chunk.delivered == everything or chunk.state.whole
        return has_kernel and chunk.saved == everything and not chunk.keep

    # -- what comes from an origin

    def begin_coming(self, chunk: Chunk) -> None:
        """An origin is asked for some of a chunk: it counts against its model's share."""
        if not chunk.coming:
            chunk.coming = True
            self.coming.take(chunk.state.group)

    def end_coming(self, chunk: Chunk) -> None:
        if chunk.coming:
            chunk.coming = False
            self.coming.give(chunk.state.group)

    # -- waiting

    async def wait(self, group: Group | None) -> None:
        """Until it is worth another look. group: for its share; None: for a slot alone."""
        with trio.move_on_after(_HELD_LOOK_S if self._memory.held_bytes else math.inf):
            await self._waiters.setdefault(group, trio.Event()).wait()

    def wake(self) -> None:
        """Have those look again who may take a slot now."""
        for group in [g for g in self._waiters if g is None or self.coming.may_take(g)]:
            self._waiters.pop(group).set()
