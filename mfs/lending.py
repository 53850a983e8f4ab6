"""Lends what stands in RAM to local processes (the pool path): what `control.lending_door` calls Lender."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import trio

from mfs.cache.chunk_cache import ChunkCache
from mfs.cache.chunk_state import Chunk, ObjectState
from mfs.cache.chunks import block_mask, chunk_spans
from mfs.errors import ChangedError, MfsError, NotFoundError, TransientStoreError
from mfs.mount import Mount
from mfs.reader import OpenObject
from mfs.tracing.spans import parse_traceparent
from mfs.types import CHUNK_BYTES, ByteRange
from mfs.waits import Cause, Waited
from mfs.workers.shares import Group, Shares

_LEASE_BYTES_MAX = 64 << 20  # far above a staging buffer, far below what would starve readers
_SHARE = 2
"""Half of the slots at most is lent at once, by the rule of `workers.shares`: a quarter to one model. The mount's own
readers come first, and a model that hangs with what it borrowed leaves room for the others."""
_WAIT_S = 10.0
"""Longest wait for what others hold. Leases last as long as one copy, milliseconds; who holds them longer is stopped,
or stuck, and the borrower had better read the file."""
_NOTED_S = 0.0005  # a share that is there at once is no wait


class LentFile:
    """One object version a borrower has open."""

    def __init__(self, handle: OpenObject, on_close: Callable[[ObjectState], None]) -> None:
        self._on_close = on_close
        self.size = handle.size
        self.identity = handle.state.object.cache_id
        self.handle = handle

    def close(self) -> None:
        self._on_close(self.handle.state)
        self.handle.close()


class Loan:
    """Chunks held for a borrower, and what gives back his share."""

    def __init__(self, cache: ChunkCache, give: Callable[[], None]) -> None:
        self.chunks: list[Chunk] = []
        self._cache = cache
        self._give: Callable[[], None] | None = give

    def release(self) -> None:
        """Idempotent."""
        for chunk in self.chunks:
            self._cache.release(chunk)
        self.chunks = []
        give, self._give = self._give, None
        if give is not None:
            give()


class RamLender:
    """Opens and leases on behalf of borrowers."""

    def __init__(self, mount: Mount, *, wait_s: float = _WAIT_S) -> None:
        self._mount = mount
        self._wait_s = wait_s
        lendable_count = max(4, mount.memory.slots_count // _SHARE)
        self._shares = Shares(lendable_count, hard=lendable_count)
        own_count = lendable_count // 2  # what one model alone gets
        self.lease_bytes_max = min(_LEASE_BYTES_MAX, (own_count - 1) * CHUNK_BYTES)  # any range of it touches no more
        self._waiting = trio.lowlevel.ParkingLot()
        self._files_count = 0
        self._unused = trio.Event()

    async def open(self, path: str, inode: int | None, traceparent: str = "") -> tuple[LentFile, int]:
        """See Lender.open."""
        node = await self._mount.namespace.resolve(path)
        if inode is not None and inode != node.inode:
            raise ChangedError(f"{path}: the mount shows another version than the one that was opened; open it again")
        if node.object is None:
            raise NotFoundError(f"{path} is no file")
        handle = self._mount.reader.open(node)
        try:
            fd = self._mount.cache.slots.hold(handle.state)
        except BaseException:
            handle.close()
            raise
        context = parse_traceparent(traceparent)
        if context is not None:
            self._mount.loads.adopt(handle.load, context)
        if not self._files_count:
            self._unused = trio.Event()
        self._files_count += 1
        return LentFile(handle, self._note_closed), fd

    def _note_closed(self, state: ObjectState) -> None:
        self._mount.cache.slots.unhold(state)
        self._files_count -= 1
        if not self._files_count:
            self._unused.set()

    async def wait_unused(self) -> None:
        """Until nobody has a file open here."""
        if self._files_count:
            await self._unused.wait()

    async def lease(self, file: LentFile, start: int, stop: int, *, here: bool) -> tuple[Loan, list[int]]:
        """See Lender.lease."""
        load = file.handle.load
        load.waiting += 1
        try:
            loan = await self._lease(file, start, stop, here=here)
        finally:
            load.waiting -= 1
            load.last_s = time.monotonic()
        for chunk in loan.chunks:
            self._mount.cache.note_use(chunk)  # not delivered: no page cache has it, RAM's is all there is in memory
        return loan, [chunk.place.slot for chunk in sorted(loan.chunks, key=lambda chunk: chunk.index)]

    async def _lease(self, file: LentFile, start: int, stop: int, *, here: bool) -> Loan:
        cache, state, group = self._mount.cache, file.handle.state, file.handle.group
        parts = list(chunk_spans(ByteRange(start, stop)))
        wait_s, since_s = 0 if here else self._wait_s, time.monotonic()
        with trio.move_on_after(wait_s) as scope:
            while not self._take(group, len(parts)):
                await self._waiting.park()
        if (waited_s := time.monotonic() - since_s) > _NOTED_S:
            cache.waits.note(Waited(since_s, waited_s, Cause.SHARE, group[0], state.object.path, start, stop))
        if scope.cancelled_caught:
            raise TransientStoreError(f"others hold all the slots that are lent, for {wait_s:g} s already")
        loan = Loan(cache, lambda: self._give(group, len(parts)))
        is_here = all(_has(state, index, part) for index, part in parts)
        try:
            if here and not is_here:
                raise NotFoundError("RAM does not have all of it now")
            await self._bring(state, parts, loan)
        except BaseException:
            loan.release()
            raise
        file.handle.load.ram_bytes += (stop - start) * is_here
        return loan

    def _take(self, group: Group, count: int) -> bool:
        """All or nothing: two borrowers that each hold half of what both need would wait for ever."""
        for taken in range(count):
            if not self._shares.may_take(group):
                for _ in range(taken):
                    self._shares.give(group)
                return False
            self._shares.take(group)
        return True

    def _give(self, group: Group, count: int) -> None:
        for _ in range(count):
            self._shares.give(group)
        self._waiting.unpark_all()

    async def _bring(self, state: ObjectState, parts: Sequence[tuple[int, ByteRange]], loan: Loan) -> None:
        """Hold all parts for `loan`, missing ones fetched at once, and no block more than is asked for: a borrower says
        exactly what it wants, so nothing is guessed, and a tensor-parallel rank fetches its share alone.
        """
        errors: list[MfsError] = []

        async def take(index: int, mask: int) -> None:
            try:
                loan.chunks.append(await self._mount.cache.lease_in_file(state, index, mask))
            except MfsError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for index, part in parts:
                mask = block_mask(part.start, part.stop)
                if _has(state, index, part):
                    await take(index, mask)
                else:
                    nursery.start_soon(take, index, mask)
        if errors:
            raise errors[0]


def _has(state: ObjectState, index: int, part: ByteRange) -> bool:
    """Whether RAM has a part of a chunk."""
    chunk = state.chunks.get(index)
    return chunk is not None and not block_mask(part.start, part.stop) & ~chunk.valid
