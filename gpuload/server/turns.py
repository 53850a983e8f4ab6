"""A load's turn at its devices, which it gives up while its bytes do not come.

Who has a device's turn decides: who goes, who gets room, who has a name; and has the device's ring. While a file or a
client that commits gives nothing there is nothing to decide, and whoever waits is not to wait for that: the load steps
aside. It keeps the ring that its readers hold, the device gets another one, and the next load has its turn. What the
one aside has reserved stays its own. Before it decides anything more it takes its turn again, and looks anew at what
others have decided meanwhile.

Without room beside one that stands aside a load does as it would have done: it waits until that one has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import trio

from gpuload.errors import BusyError, DeviceError, one_error
from gpuload.moving.source import Loan, Source
from gpuload.moving.staging import Ring
from gpuload.server.client_files import ClientFiles
from gpuload.server.site import Site

T = TypeVar("T")

log = logging.getLogger("gpuload.server")

WAITING_MAX = 64
"""Loads that may wait for a device; one more is refused."""

WAIT_S = 900.0
"""Longest wait for a turn."""

STALL_S = 1.0
"""No call on its files came back for so long: they stand still."""

ASIDE_MAX = 2
"""Loads of one device that stand aside: each has a ring."""


class Watch:
    """For how long nothing came back of what was asked of a load's files. Entered around each call, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way, self._since_s = 0, 0.0

    @property
    def stalled_s(self) -> float:
        """Since the last call came back, if one is under way."""
        with self._lock:
            return time.monotonic() - self._since_s if self._under_way else 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._under_way:
                self._since_s = time.monotonic()
            self._under_way += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._under_way -= 1
            self._since_s = time.monotonic()


class WatchedSource:
    """A source whose calls are watched."""

    def __init__(self, source: Source, watch: Watch) -> None:
        self._source, self.watch = source, watch

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        """See `Source.borrow`."""
        with self.watch:
            return self._source.borrow(shard, start, stop)

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        """See `Source.read_into`."""
        with self.watch:
            self._source.read_into(shard, start, views)

    def interrupt(self) -> None:
        """See `Source.interrupt`."""
        self._source.interrupt()

    def close(self) -> None:
        """See `Source.close`."""
        self._source.close()


class Turns:
    """Of one load, at all its devices: held, or not. All of it by one task."""

    def __init__(self, sites: Sequence[Site]) -> None:
        """sites: in the server's order, so that two loads never wait for each other's turns."""
        self._sites = sites
        self.watch = Watch()
        """Of all calls on the load's files."""
        self.was_aside = False
        """Since it began: others may have decided something."""
        self._is_counted = self._is_held = self._is_aside = False
        self._stays = False
        """There is no ring more for others."""
        self._until_s = trio.current_time() + WAIT_S

    async def take(self) -> None:
        """Raises: BusyError if too many wait, or past WAIT_S; none is held then."""
        self._be_counted()
        taken: list[Site] = []
        try:
            with trio.move_on_at(self._until_s):
                for site in self._sites:
                    await site.turn.acquire()
                    taken.append(site)
                self._is_held = True
                self._come_back()
        finally:
            if not self._is_held:
                for site in taken:
                    site.turn.release()
        if not self._is_held:
            names = ", ".join(site.name for site in self._sites)
            raise BusyError(f"{names} was busy for {WAIT_S:.0f} s; nothing was changed")

    def end(self) -> None:
        """Of the load, however it ends."""
        self._let_go()
        if self._is_counted:
            self._is_counted = False
            for site in self._sites:
                site.loads_count -= 1

    def _be_counted(self) -> None:
        """Once. Raises: BusyError."""
        if self._is_counted:
            return
        for site in self._sites:
            if site.loads_count > WAITING_MAX:
                raise BusyError(f"{site.loads_count} loads wait for {site.name} already; try later")
        self._is_counted = True
        for site in self._sites:
            site.loads_count += 1

    def _let_go(self) -> None:
        self._come_back()
        if self._is_held:
            self._is_held = False
            for site in self._sites:
                site.turn.release()

    async def wait_for_room(self) -> bool:
        """Let go, and wait until one who stands aside at these devices has ended; False if there is none, or past
        WAIT_S. For who has no room beside them, and has the turn again then."""
        aside = next((site for site in self._sites if site.aside_count), None)
        if aside is None:
            return False
        ended = aside.came_back
        self._let_go()
        with trio.move_on_at(self._until_s):
            await ended.wait()
        if not ended.is_set():
            return False
        await self.take()
        return True

    async def call(self, files: ClientFiles, work: Callable[[], T]) -> T:
        """As `files.call`; the turn is held afterwards, as with `beside`."""

        async def one(_: Mapping[str, Ring]) -> T:
            with self.watch:
                return await files.call(work)

        return await self.beside(one)

    async def beside(self, work: Callable[[Mapping[str, Ring]], Awaitable[T]]) -> T:
        """Run `work`, all of whose calls on files are watched, with a ring for each device, by name: beside other loads
        while those calls give nothing. The turn is held afterwards; `was_aside` says whether it was all the time.

        Raises: as `work`, and as `take`: then what `work` gave is lost.
        """
        found: list[T] = []
        rings = {site.name: site.ring for site in self._sites}
        done = trio.Event()

        async def run() -> None:
            try:
                found.append(await work(rings))
            finally:
                done.set()

        async def watch() -> None:
            while not done.is_set():
                with trio.move_on_after(STALL_S / 4):
                    await done.wait()
                if self._is_held and self.watch.stalled_s > STALL_S and self._may_step_aside():
                    await self._step_aside()

        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run)
                    with trio.CancelScope(shield=True):  # a call that hangs is waited for when a load is cancelled too
                        await watch()
        finally:
            for site in self._sites:
                if rings[site.name] is not site.ring:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(rings[site.name].close)
        if not self._is_held:
            self._until_s = trio.current_time() + WAIT_S
            await self.take()
        return found[0]

    def _may_step_aside(self) -> bool:
        is_waited_for = any(site.turn.statistics().tasks_waiting for site in self._sites)
        return is_waited_for and not self._stays and all(site.aside_count < ASIDE_MAX for site in self._sites)

    async def _step_aside(self) -> None:
        made: dict[Site, Ring] = {}
        try:
            for site in self._sites:
                made[site] = Ring(site.device, buffer_bytes=site.ring.buffer_bytes, count=site.ring.count)
                await trio.to_thread.run_sync(made[site].grow)
        except BaseException as error:
            for ring in made.values():
                ring.close()
            if not isinstance(error, (DeviceError, OSError, MemoryError)):
                raise
            self._stays = True  # page-locking is slow: not to be tried four times a second
            log.warning("a load whose bytes do not come keeps the others waiting: %s", error)
            return
        for site, ring in made.items():
            site.ring = ring
            site.aside_count += 1
        self._let_go()
        self._is_aside = self.was_aside = True
        log.info("a load on %s waits for its bytes, others go on", ", ".join(site.name for site in self._sites))

    def _come_back(self) -> None:
        if self._is_aside:
            self._is_aside = False
            for site in self._sites:
                site.aside_count -= 1
                site.came_back.set()
                site.came_back = trio.Event()
