"""The number of every model that is served, and who waits for another one. Trio thread only.

A server counts what it publishes, over all names: whatever becomes of a name, its later content has the higher number.
The count goes on with the estate. A server that begins without one begins anew, so a number alone means nothing to
another server; content digests do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from gpuload.errors import BusyError
from gpuload.server.catalog import Model
from gpuload.server.estate import Counters
from mfs.errors import ChangedError, UsageError

WAITERS_MAX = 256
"""Who waits holds a connection, of which there are four times as many. Users who may only attach get half of them."""

WAIT_MAX_S = 3600.0
"""Longest wait that may be asked for; whoever wants more asks again."""


@dataclass(frozen=True)
class Wanted:
    """What somebody waits for: content that came after `after`, or that is not `unlike`."""

    after: int
    """A generation of this server; 0: any."""
    unlike: str = ""
    """The digest of what he has: other content serves, whatever its number. Empty: the number alone counts."""

    def is_met_by(self, model: Model | None) -> bool:
        if model is None:
            return False
        return model.generation > self.after or (self.unlike != "" and model.digest != self.unlike)


class Generations:
    """What was given out so far, and a bounded number of waiters."""

    def __init__(self, counters: Counters | None = None) -> None:
        """counters: of the estate, with the number that was given out last."""
        self._counters = counters if counters is not None else Counters()
        self.waiting_count = 0
        self._strangers_count = 0
        self._is_hushed = False
        self._lot = trio.lowlevel.ParkingLot()

    @property
    def last(self) -> int:
        return self._counters.last_generation

    def publish(self, model: Model) -> None:
        """Serve `model` under its name and a number of its own, and wake who waits."""
        self._counters.last_generation += 1
        model.generation = self.last
        model.publish()
        self._lot.unpark_all()

    def hush(self, is_hushed: bool) -> None:
        """While it is so waits end at once, as those whose time is over: their clients ask again. For a server that
        gives its place, which would wait for them."""
        self._is_hushed = is_hushed
        self._lot.unpark_all()

    async def wait(self, wanted: Wanted, timeout_s: float, find: Callable[[], Model | None], *, is_ours: bool) -> bool:
        """Until what `find` finds is what is wanted; False if `timeout_s` passes before, or by `hush`.

        is_ours: whether the server's own user asks, or root.
        Raises: UsageError, BusyError if too many wait; ChangedError if `after` was never given out here.
        Cancellation: safe.
        """
        if not 0 <= timeout_s <= WAIT_MAX_S:
            raise UsageError(f"a wait of {timeout_s} s: expected 0 to {WAIT_MAX_S:.0f}")
        if wanted.after > self.last:
            if not wanted.unlike:
                raise ChangedError(
                    f"generation {wanted.after} is not this server's, which has given out {self.last}: it was started"
                    " anew since; look at `gpuload status`"
                )
            wanted = Wanted(self.last, wanted.unlike)  # of a server before this one
        with self._place(is_ours), trio.move_on_after(timeout_s):
            while not self._is_hushed and not wanted.is_met_by(find()):
                await self._lot.park()
        return wanted.is_met_by(find())

    @contextmanager
    def _place(self, is_ours: bool) -> Iterator[None]:
        if self.waiting_count >= WAITERS_MAX or (not is_ours and self._strangers_count >= WAITERS_MAX // 2):
            raise BusyError(f"{self.waiting_count} programs wait for a generation already; ask `status` now and then")
        self.waiting_count += 1
        self._strangers_count += not is_ours
        try:
            yield
        finally:
            self.waiting_count -= 1
            self._strangers_count -= not is_ours
