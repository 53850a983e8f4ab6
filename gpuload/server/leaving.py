"""Blocks on their way from one device to the RAM tier, beside the load that needs their room.

Whoever evicts takes the granules at once and begins to read its own first bytes. Copies out of the device have a copy
engine of their own, so they run beside the copies in, and begin earlier: what is copied out first is what is written
first. Who writes into a granule waits until what stood there is out (`wait`); granules are given back to the device no
earlier either. What cannot be copied is dropped, and nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import trio

from gpuload.device.base import Arena, Device, Event
from gpuload.errors import BusyError, DeviceError, DeviceLostError
from gpuload.moving.pool import Range
from gpuload.server.catalog import Block
from gpuload.server.ram_tier import Kept, RamTier

log = logging.getLogger("gpuload.server")

COPY_BYTES = 16 << 20
"""Of one copy at most: a granule's writer waits for this at least."""

QUEUED_MAX = 4
"""Copies that the device has ahead."""

STEP_S = 60.0
"""Longest wait for one copy; beyond it the device hangs."""


@dataclass(eq=False)
class _Way:
    """One block's way out."""

    kept: Kept
    left: int = 0
    """Copies that are not done."""


@dataclass(frozen=True, eq=False)
class _Copy:
    way: _Way
    granules: Sequence[int]
    moves: Sequence[tuple[int, int, int]]
    """(to the host, from the device, nbytes)."""


@dataclass(eq=False)
class Leaving:
    """What leaves one device. `add` and `prefer` on the loop; `wait` from any thread."""

    device: Device
    arena: Arena
    tier: RamTier
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _queue: deque[_Copy] = field(default_factory=deque)
    _pending: dict[int, int] = field(default_factory=dict)
    """Granule -> copies out of it that are not done."""
    is_held_elsewhere: Callable[[Sequence[Range]], bool] = lambda ranges: False
    """Whether all of these bytes are page-locked in a mount's RAM: then they are not held twice."""
    _there_is_some: trio.Event = field(default_factory=trio.Event)

    def add(self, block: Block) -> None:
        """Copy a complete block out, whose last hold is gone, if the tier has room for it. Its granules may be taken
        by others from now on."""
        if self.is_held_elsewhere(block.lenders):
            return
        kept = self.tier.admit(block.digest, block.nbytes, block.pieces)
        if kept is None:
            return
        way = _Way(kept)
        copies = list(self._cut(way, block))
        way.left = len(copies)
        with self._changed:
            for copy in copies:
                for granule in copy.granules:
                    self._pending[granule] = self._pending.get(granule, 0) + 1
            self._queue.extend(copies)
        self._there_is_some.set()

    def _cut(self, way: _Way, block: Block) -> Iterable[_Copy]:
        unit, done = self.arena.granule_bytes, 0
        for first, count in block.runs:
            end = min(block.nbytes, done + count * unit)
            begin = done
            while done < end:
                n = min(COPY_BYTES, end - done)
                at = first * unit + done - begin
                host, moves = self.arena.address + at, []
                for address, size in self.tier.runs(way.kept, done, n):
                    moves.append((address, host, size))
                    host += size
                yield _Copy(way, range(at // unit, -(-(at + n) // unit)), moves)
                done += n

    def prefer(self, granules: Iterable[int]) -> None:
        """Copy these out first, in this order: somebody is about to write there."""
        order = {granule: i for i, granule in enumerate(granules)}
        with self._changed:
            last = len(order)
            self._queue = deque(sorted(self._queue, key=lambda copy: min(order.get(g, last) for g in copy.granules)))

    @property
    def pending_count(self) -> int:
        """Granules that are being copied out of."""
        return len(self._pending)

    def wait(self, granules: Iterable[int]) -> None:
        """Block until nothing is copied out of these granules any more. Raises: BusyError."""
        if not self._pending:
            return
        wanted = set(granules)
        with self._changed:
            if not self._changed.wait_for(lambda: self._pending.keys().isdisjoint(wanted), 2 * STEP_S):
                raise BusyError(f"what leaves {self.device.name} did not leave in {2 * STEP_S:.0f} s")

    async def run(self) -> None:
        """Copy what is added, for ever. Raises: DeviceLostError."""
        while True:
            await self._there_is_some.wait()
            self._there_is_some = trio.Event()
            try:
                await trio.to_thread.run_sync(self._work)
            except DeviceLostError:
                raise
            except (DeviceError, BusyError) as error:
                log.warning("%s: what was evicted is not kept in RAM: %s", self.device.name, error)

    def _work(self) -> None:
        under_way: deque[_Copy] = deque()
        events: deque[Event | None] = deque()
        try:
            with closing(self.device.open_stream()) as stream:
                while True:
                    trio.from_thread.check_cancelled()
                    copy = self._next() if len(under_way) < QUEUED_MAX else None
                    if copy is not None:
                        events.append(None)
                        under_way.append(copy)
                        for to, source, nbytes in copy.moves:
                            stream.copy_out(to, source, nbytes)
                        events[-1] = stream.record()
                    elif under_way:
                        event = events[0]
                        assert event is not None
                        event.wait(STEP_S)
                        events.popleft()
                        self._done(under_way.popleft())
                    else:
                        return
        except BaseException:  # the stream has ended: nothing is copied any more
            while (copy := self._next()) is not None:
                under_way.append(copy)
            for copy in under_way:
                self._open(copy)
            for way in dict.fromkeys(copy.way for copy in under_way):
                trio.from_thread.run_sync(self.tier.drop, way.kept)
            raise

    def _next(self) -> _Copy | None:
        with self._changed:
            return self._queue.popleft() if self._queue else None

    def _open(self, copy: _Copy) -> None:
        """Its granules may be written."""
        with self._changed:
            for granule in copy.granules:
                self._pending[granule] -= 1
                if not self._pending[granule]:
                    del self._pending[granule]
            self._changed.notify_all()

    def _done(self, copy: _Copy) -> None:
        """It is there; the block is kept once all of it is."""
        self._open(copy)
        copy.way.left -= 1
        if not copy.way.left:
            trio.from_thread.run_sync(self.tier.complete, copy.way.kept)
