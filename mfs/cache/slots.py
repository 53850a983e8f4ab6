"""Who has a slot, who loses his, and who waits for one. Knows neither workers nor files; belongs to the trio thread.

Whoever waits needs one of two things: a slot, or a larger part of what his model may have on its way from its origin.
The first are woken by every slot that may be had; the second only when their model may take one more: of a model that
hangs there may be hundreds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import trio

from mfs.cache.chunk_state import Chunk
from mfs.cache.chunks import full_mask
from mfs.cache.ram import SlotMemory
from mfs.workers.shares import Group, Shares

_CLEAN_SEARCH_COUNT = 64  # how far from the cold end to look for a slot that costs nothing to lose


class Slots:
    """Chunks in their slots, coldest first, and how slots are shared among models."""

    def __init__(self, memory: SlotMemory) -> None:
        self._memory = memory
        self._waiters: dict[Group | None, trio.Event] = {}
        """By model: who waits for its share. None: who waits for a slot and needs nothing else."""
        count = memory.slots_count
        self.chunks: OrderedDict[Chunk, None] = OrderedDict()
        self.coming = Shares(count * 3 // 4, hard=count)
        """Slots of chunks for which an origin is asked."""
        self.unread = Shares(count, hard=count)
        """Slots of chunks brought ahead of need that nobody has read yet, and of those that `prefetch` has ordered."""
        memory.on_more = self.wake

    def take(self) -> int | None:
        """A free slot, if there is one."""
        return self._memory.free.popleft() if self._memory.free else None

    def enter(self, chunk: Chunk) -> None:
        """A chunk has got a slot: it is the warmest."""
        self.chunks[chunk] = None

    def drop(self, chunk: Chunk) -> None:
        """Take an idle chunk's slot away."""
        del chunk.state.chunks[chunk.index]
        del self.chunks[chunk]
        self.note_read(chunk)
        self._memory.free.append(chunk.slot)
        self.wake()

    def victim(self, is_safe: Callable[[Chunk], bool]) -> Chunk | None:
        """The coldest idle chunk that may safely go; where none is near, the coldest idle one; None if all are held."""
        unsafe: Chunk | None = None
        looked = 0
        for chunk in self.chunks:
            if not chunk.idle:
                continue
            if is_safe(chunk):
                return chunk
            unsafe = unsafe or chunk
            looked += 1
            if looked >= _CLEAN_SEARCH_COUNT:
                break
        return unsafe

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
        if chunk.delivered == full_mask(chunk.length) and chunk.saved == chunk.delivered and not chunk.keep:
            self.chunks.move_to_end(chunk, last=False)

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
        await self._waiters.setdefault(group, trio.Event()).wait()

    def wake(self) -> None:
        """Have those look again who may take a slot now."""
        for group in [g for g in self._waiters if g is None or self.coming.may_take(g)]:
            self._waiters.pop(group).set()
