"""One device of the server: its arena and the memory behind it, what it holds, its ring, and whose turn it is.

Memory is asked of the device when a load needs it, and goes back a moment after the last model that stood there, but
for what the operator's floor keeps. Asking and giving back are calls in threads, one at a time for each device; the
granules they are about are nobody's meanwhile (`Granules`).
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from gpuload.device.base import Arena, Device, Run, total_granules
from gpuload.errors import BusyError, DeviceError, DeviceLostError, FitError
from gpuload.moving.staging import Ring
from gpuload.server.catalog import Block, Catalog
from gpuload.server.leaving import Leaving
from gpuload.server.ram_tier import RamTier
from mfs.units import format_size

InsideCopy = tuple[Block, int, Block, int, int]
"""(to, offset in it, from, offset in it, nbytes), both blocks in one arena."""


log = logging.getLogger("gpuload.server")

MEMORY_POLL_S = 0.1
"""Between two looks whether others gave memory back."""

AGAIN_S = 5.0
"""Longest wait for memory that went to the device to be made anew."""

SHAPE_S = 300.0
"""Longest wait for memory that others' bytes have yet to leave; `leaving` has deadlines of its own."""

HOLDERS_MAX = 8
"""Processes named in a message."""


@dataclass(eq=False)
class Site:
    """Everything that is there once per device."""

    name: str
    """As requests name it: 'cpu', 'cuda:0'."""
    device: Device
    arena: Arena
    catalog: Catalog
    ring: Ring
    """Page-locked once, for all loads: who has the turn uses it; see `turns`."""
    tier: RamTier | None = None
    """Where blocks go that leave it; None: nowhere."""
    floor_count: int = 0
    """Granules whose memory is kept, whether models need it or not."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells clients whether runs of two answers are of one arena: then equal ones are equal memory."""
    turn: trio.Lock = field(default_factory=trio.Lock)
    """Held by the load that may change what stands here; see `turns`."""
    loads_count: int = 0
    """Loads at work or waiting, each once."""
    aside_count: int = 0
    """Those that have given it up until their bytes come."""
    came_back: trio.Event = field(default_factory=trio.Event)
    """Set, and made anew, when one of them has the turn again, or has ended."""
    is_frozen: bool = False
    """Its memory may be another server's by now: nothing goes back."""
    before_release: Callable[[Site, Sequence[Run]], Awaitable[None]] | None = None
    """Told of granules whose memory is about to go back."""
    _changing: trio.Lock = field(default_factory=trio.Lock)
    """Held while memory comes or goes."""
    _freed: trio.Event = field(default_factory=trio.Event)
    _dressed: threading.Condition = field(default_factory=threading.Condition)
    """Told when memory came behind what was taken without any, and when none will."""
    _given_up: set[Run] = field(default_factory=set)
    """What none will come for."""

    def __post_init__(self) -> None:
        self.catalog.on_freed = lambda: self._freed.set()
        self.leaving = Leaving(self.device, self.arena, self.tier) if self.tier is not None else None
        if self.leaving is not None:
            self.catalog.on_leaving = self.leaving.add

    async def look(self) -> None:
        """Ask the device how much memory could still be had. No checkpoint once it is known."""
        async with self._changing:
            memory = await trio.to_thread.run_sync(self.device.memory)
            self.catalog.obtainable_count = memory.free_bytes // self.arena.granule_bytes

    async def grow(self, lacking: Callable[[], int], sizes: Sequence[int] = ()) -> None:
        """Memory for as many granules more as `lacking` says once it is our turn: another's may have come meanwhile.
        They are free then. sizes: see `Granules.coming`. Raises: as `Arena.commit`; nothing changed then."""
        async with self._changing:
            await self._add(self.catalog.granules.coming(max(0, lacking()), sizes))

    async def _add(self, runs: Sequence[Run]) -> None:
        """Memory for what was to get some."""
        if not runs:
            return
        try:
            await trio.to_thread.run_sync(self.arena.commit, runs)
        except BaseException:
            self.catalog.granules.gone(runs)
            raise
        self.catalog.granules.came(runs)

    def begin_filling(self, blocks: Sequence[Block]) -> None:
        """These are about to be written, in this order: what stands where they will is copied out first. Memory that
        lacks is brought by `shape`."""
        runs = [run for block in blocks for run in block.runs]
        self._given_up.difference_update(runs)
        if self.leaving is not None and self.leaving.pending_count:
            self.leaving.prefer(granules_of([*runs, *self.catalog.granules.donors(total_granules(self._bare(blocks)))]))

    def _bare(self, blocks: Iterable[Block]) -> list[Run]:
        return [run for block in blocks for run in block.runs if self.catalog.granules.is_bare(run)]

    async def shape(self, blocks: Sequence[Block]) -> None:
        """Bring memory behind what of these, all the caller's, was taken without any: free memory in other shapes goes
        to the device for it.

        Raises: FitError if others took that memory at this very moment, and keep it;
        DeviceError, BusyError. Cancellation: safe; what has no memory then stays without.
        """
        granules, bare = self.catalog.granules, self._bare(blocks)
        if not bare:
            return
        try:
            async with self._changing:
                donors = granules.going_for(bare)
                left = deque(donors)
                try:
                    if self.before_release is not None:
                        await self.before_release(self, donors)
                    spare = await trio.to_thread.run_sync(self._shape, left, bare)
                finally:
                    granules.came(left)
                with suppress(FitError):  # it is others' by now: no load needs it
                    await self._add(granules.coming(spare))
        finally:
            with self._dressed:
                self._given_up.update(self._bare(blocks))
                self._dressed.notify_all()

    def _shape(self, donors: deque[Run], bare: Sequence[Run]) -> int:
        """How many granules more the donors had."""
        spare = 0
        for run in bare:
            trio.from_thread.check_cancelled()
            while spare < run[1]:
                spare += self._give(donors)
            self._commit_again(run)
            spare -= run[1]
            trio.from_thread.run_sync(self._dress, run)
        return spare

    def _give(self, donors: deque[Run]) -> int:
        """Give the first one back: so many granules."""
        if self.leaving is not None:
            self.leaving.wait(granules_of([donors[0]]))
        donor = donors.popleft()
        try:
            self.arena.release([donor])
        finally:
            trio.from_thread.run_sync(self.catalog.granules.gone, [donor])
        return donor[1]

    def _commit_again(self, run: Run) -> None:
        """Memory that went to the device a moment ago; it is slow to come where a client that had it dies just now."""
        deadline = time.monotonic() + AGAIN_S
        while True:
            try:
                return self.arena.commit([run])
            except FitError:
                if time.monotonic() >= deadline:
                    raise
            trio.from_thread.check_cancelled()
            time.sleep(MEMORY_POLL_S)

    def _dress(self, run: Run) -> None:
        with self._dressed:
            self.catalog.granules.dressed(run)
            self._dressed.notify_all()

    async def trim(self, *, is_exact: bool = False) -> None:
        """Give the device back what no model needs, and the floor does not keep. is_exact: of the floor's too, where
        pieces of memory are larger than what is to go."""
        async with self._changing:
            granules = self.catalog.granules
            spare = self.catalog.spare_count(self.floor_count)
            if not spare or self.is_frozen:
                return
            runs = granules.going(spare, is_exact=is_exact)
            try:
                if self.before_release is not None:
                    await self.before_release(self, runs)
                await trio.to_thread.run_sync(self._release, runs)
            except trio.Cancelled:  # before it began
                granules.came(runs)
                raise
            except DeviceLostError:
                raise
            except BusyError as error:  # something is still copied out of them: they stay
                log.warning("%s: %s", self.name, error)
                granules.came(runs)
                return
            except DeviceError as error:  # nobody uses them, whatever the device counts
                log.warning("%s: %s", self.name, error)
            granules.gone(runs)

    async def freeze(self) -> None:
        """From here on nothing goes back, and nothing is on its way."""
        self.is_frozen = True
        async with self._changing:
            pass

    async def drop_absent(self) -> None:
        """Give back what may stand behind granules that have no memory as far as we know: a server's before us."""
        async with self._changing:
            if self.arena.shared() is not None:
                await trio.to_thread.run_sync(self.arena.release, self.catalog.granules.absent_runs())

    def _release(self, runs: Sequence[Run]) -> None:
        if self.leaving is not None:
            self.leaving.wait(granules_of(runs))
        self.arena.release(runs)

    async def fill_floor(self, wait_s: float) -> None:
        """Have the memory that the floor keeps, waiting for others to give it back.

        Raises: FitError past `wait_s`; budget and floor stay what they are, and what is there is kept.
        """
        deadline = trio.current_time() + wait_s

        def lacks() -> int:
            return min(self.floor_count, self.catalog.budget_count) - self.catalog.granules.present_count

        while (lacking := lacks()) > 0:
            try:
                await self.grow(lacks)
            except FitError as error:
                if trio.current_time() >= deadline:
                    who = await self.who_holds()
                    raise FitError(
                        f"the floor of {self.name} lacks {format_size(lacking * self.arena.granule_bytes)}: {error}"
                        f"{f'; waited {wait_s:.0f} s' if wait_s else ''}; {who}",
                        shortfall_bytes=error.shortfall_bytes,
                    ) from None
                await trio.sleep(MEMORY_POLL_S)

    async def tend(self, linger_s: float) -> None:
        """Trim `linger_s` after granules became free, for ever: what is loaded next may want them."""
        while True:
            await self._freed.wait()
            await trio.sleep(linger_s)
            self._freed = trio.Event()
            await self.trim()

    async def who_holds(self) -> str:
        """For messages: what others hold of the device, and who, as far as anybody says."""

        def ask() -> str:
            memory, holders = self.device.memory(), self.device.holders()
            own = self.catalog.granules.present_count * self.arena.granule_bytes
            others = max(0, memory.total_bytes - memory.free_bytes - own)
            named = [f"{_command(h.pid)} ({h.pid}) {format_size(h.nbytes)}" for h in holders if h.pid != os.getpid()]
            who = f": {', '.join(named[:HOLDERS_MAX])}" if named else ""
            return f"others hold {format_size(others)} of {format_size(memory.total_bytes)}{who}"

        return await trio.to_thread.run_sync(ask)

    def runs(self, block: Block, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Where bytes [offset, offset + nbytes) of a block stand: (address, nbytes), in order."""
        unit, found = self.arena.granule_bytes, []
        for first, count in block.runs:
            size = count * unit
            if offset < size and nbytes:
                n = min(nbytes, size - offset)
                found.append((self.arena.address + first * unit + offset, n))
                offset, nbytes = 0, nbytes - n
            else:
                offset -= size
        return found

    def runs_to_fill(self, block: Block, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """As `runs`, once there is memory, and nothing that stood there before is copied out any more. For threads.
        Raises: BusyError, DeviceError."""
        found = self.runs(block, offset, nbytes)
        self._wait_dressed(block)
        if self.leaving is not None and self.leaving.pending_count:
            unit, begin = self.arena.granule_bytes, self.arena.address
            for address, n in found:
                self.leaving.wait(range((address - begin) // unit, -(-(address + n - begin) // unit)))
        return found

    def _wait_dressed(self, block: Block) -> None:
        if not self._bare([block]):
            return
        with self._dressed:
            self._dressed.wait_for(lambda: self._given_up.issuperset(self._bare([block])), SHAPE_S)
        if self._bare([block]):
            raise BusyError(f"memory of {self.name} did not come")

    def copy_inside(self, copies: Sequence[InsideCopy], timeout_s: float) -> None:
        """Copy from block to block, and wait for it. Blocks; holds on all blocks are the caller's.

        Raises: DeviceError, BusyError.
        """
        stream = self.device.open_stream()
        try:
            for to, to_offset, source, source_offset, nbytes in copies:
                done = 0
                for dst, room in self.runs_to_fill(to, to_offset, nbytes):
                    for src, n in self.runs(source, source_offset + done, room):
                        stream.copy_within(dst, src, n)
                        dst += n
                    done += room
            stream.record().wait(timeout_s)
        finally:
            stream.close()


def granules_of(runs: Iterable[Run]) -> Iterator[int]:
    return (granule for first, count in runs for granule in range(first, first + count))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:  # of another container, or gone
        return "a process"
