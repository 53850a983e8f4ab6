"""Calls on the files that clients bring. Each request with files has a thread of its own for them; none is the loop's.

A file may stand on a file system that never answers, and then no call on it returns, not even close(2): FUSE asks its
daemon there too. Whoever brought it waits; his connection may end, his call goes on alone. How many such requests there
may be is bounded by the rule of shares, so that only those are refused who have that many already.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

import trio

from gpuload.errors import BusyError
from gpuload.wire import close_all
from mfs.errors import StoreError

T = TypeVar("T")
C = TypeVar("C", bound="Closes")


class Closes(Protocol):
    def close(self) -> None: ...


REQUESTS_MAX = 256
"""With files, under way or stuck. A thread that is stuck holds some ten KB."""

CALL_S = 120.0
"""Longest wait for one call. A mount whose origin is away gives its own error long before."""

CLOSE_S = 0.25
"""How long an answer waits until the request's files are closed: whoever is told that a model is loaded may unmount."""


class Shares:
    """Places for whoever asks, by the rule of shares: who holds as many as are left gets no more. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._held: Counter[int] = Counter()
        self._changed = threading.Condition()

    def take(self, who: int, *, timeout_s: float = 0.0) -> bool:
        """Whether there was a place within `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._held[who] < self._free, timeout_s):
                return False
            self._free -= 1
            self._held[who] += 1
            return True

    def put(self, who: int) -> None:
        with self._changed:
            self._free += 1
            self._held[who] -= 1
            self._held += Counter()  # keeps who holds any
            self._changed.notify_all()

    @property
    def taken_count(self) -> int:
        with self._changed:
            return self._held.total()


class ClientFiles:
    """The descriptors of one request, and its calls on them: one at a time, in threads, in order."""

    def __init__(self, shares: Shares, who: int) -> None:
        """who: the client's process. Raises: BusyError if its share of such requests is stuck or at work."""
        if not shares.take(who):
            raise BusyError(
                f"too many requests with files are under way for process {who}: their file systems may hang; try later"
            )
        self.fds: list[int] = []
        self.who = who
        self._shares = shares
        self._limiter = trio.CapacityLimiter(1)
        self._at_work = threading.Lock()
        self._token = trio.lowlevel.current_trio_token()
        self._closed = trio.Event()

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread. Raises: StoreError past CALL_S, and what it raises.

        Cancellation: at once; `work` goes on alone, and what it returns is lost.
        """

        def alone() -> T:
            with self._at_work:
                return work()

        with trio.move_on_after(CALL_S):
            return await trio.to_thread.run_sync(alone, limiter=self._limiter, abandon_on_cancel=True)
        raise StoreError(f"a file did not answer for {CALL_S:.0f} s: its file system hangs")

    async def open(self, make: Callable[[], C]) -> C:
        """As `call`; what comes when nobody waits for it any more is closed."""
        made: list[C] = []
        is_wanted = True
        lock = threading.Lock()

        def make_one() -> C:
            one = make()
            with lock:
                made.append(one)
                if is_wanted:
                    return one
            one.close()
            return one

        try:
            return await self.call(make_one)
        except BaseException:
            with lock:
                is_wanted = False
            for one in made:
                one.close()
            raise

    async def close(self) -> None:
        """Close them as soon as no call is under way, however long that takes; returns after CLOSE_S at the latest."""

        def close() -> None:
            with self._at_work:
                close_all(self.fds)

        trio.lowlevel.start_thread_soon(close, lambda _: self._tell_closed())
        with trio.move_on_after(CLOSE_S):
            await self._closed.wait()

    def _tell_closed(self) -> None:
        def tell() -> None:
            self._shares.put(self.who)
            self._closed.set()

        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(tell)
