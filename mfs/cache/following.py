"""Reading ahead of who reads a whole file past us, in order.

The kernel's own read-ahead does not begin before a reader has copied what he has, and is as long as the disk's setting.
We see no reads of such a file, but where its page cache stands: a reader who goes through it from where it began to be
cached moves that *front*. As much as he has taken is read ahead of him, up to two windows of 64 MiB. How far he is in
what we have filled the kernel does not tell; so of each window the last chunk is left out, and when it is there all the
same, he has come by.

Who reads at several places at once keeps the disk busy by himself: then nothing is read ahead. A file is followed until
it is closed, all there, or has not moved for a while.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from functools import partial

import trio

from mfs.cache.chunk_state import ObjectState
from mfs.errors import MfsError
from mfs.several import for_each
from mfs.workers.job import Priority
from mfs.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_FILES_MAX = 4
_LOOK_S, _LOOK_MAX_S = 0.02, 0.5
_STILL_S = 10.0
_LEAST_CHUNKS = 4
"""That a reader must have taken first. A look at a header is less, also where the disk's read-ahead is 8 MiB."""
_GAP_CHUNKS = 4
"""Left to the reader and the kernel's read-ahead where nothing is filled yet: side by side both would wait."""
_WINDOW_CHUNKS, _WINDOWS = 16, 2
_AT_ONCE = 2  # orders for one window


class Follower:
    """Follows readers of whole files. On the trio thread."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._followed: dict[ObjectState, trio.CancelScope | None] = {}
        """None: opened, and not looked at yet."""
        self._some: trio.Event | None = None
        """Set where some of them were not; None while nobody is followed."""
        self.filled_bytes = 0
        """Read ahead so far."""

    async def run(self) -> None:
        """Follow, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                self._some = trio.Event()
                await self._some.wait()
                await trio.sleep(_LOOK_S)  # who only looks at a header is gone by then, and cost no task
                for state, scope in self._followed.items():
                    if scope is None:
                        self._followed[state] = scope = trio.CancelScope()
                        nursery.start_soon(self._follow, state, scope)

    def begin(self, state: ObjectState) -> None:
        """Somebody has opened a file that is on SSD. As many as may be are followed, others not."""
        if self._some is not None and state not in self._followed and len(self._followed) < _FILES_MAX:
            self._followed[state] = None
            self._some.set()

    def end(self, state: ObjectState) -> None:
        """Nobody has it open any more: the next who opens it is followed anew, however soon he comes. What is on order
        is still brought: a window.
        """
        scope = self._followed.pop(state, None)
        if scope is not None:
            scope.cancel()

    async def _follow(self, state: ObjectState, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self._keep_ahead(state)
        except MfsError as error:
            logger.info("%s is not read ahead: %s", state.object.path, error)
        finally:
            if self._followed.get(state) is scope:
                del self._followed[state]

    async def _keep_ahead(self, state: ObjectState) -> None:
        count, course = state.object.chunks_count, Course()
        pause_s, moved_s = _LOOK_S, time.monotonic()
        while True:
            found = await self._pool.call(
                "page_cache_front", obj=state.wire, first=course.front, filled=course.filled,
                priority=Priority.BACKGROUND,
            )  # fmt: skip
            if found["front"] is None or found["front"][0] >= count:
                return
            if course.note(*found["front"]):
                pause_s, moved_s = _LOOK_S, time.monotonic()
            elif time.monotonic() > moved_s + _STILL_S:
                return
            else:
                pause_s = min(1.5 * pause_s, _LOOK_MAX_S)
            while window := course.next_window(count):
                await for_each(
                    [window[place::_AT_ONCE] for place in range(_AT_ONCE)], partial(self._fill, state), at_once=_AT_ONCE
                )
            await trio.sleep(pause_s)

    async def _fill(self, state: ObjectState, chunks: range) -> None:
        if chunks:
            found = await self._pool.call(
                "fill_page_cache", obj=state.wire, chunks=list(chunks), priority=Priority.BACKGROUND, timeout_s=math.inf
            )
            self.filled_bytes += found["bytes"]


class Course:
    """How one reader goes through one file, and what is to be read ahead of him. Pure."""

    def __init__(self) -> None:
        self.front = 0
        """The first chunk that is not there whole."""
        self.filled = 0
        """The first chunk that was never ordered."""
        self._began: int | None = None
        self._due = 0
        """Where the front must come before more is ordered."""
        self._left_out: deque[int] = deque()

    def note(self, front: int, is_alone: bool) -> bool:
        """Where the front is now, and whether nobody reads behind it. Returns whether it has moved."""
        has_moved = front != self.front or self._began is None
        if self._began is None:
            self._began, self._due = front, front + _LEAST_CHUNKS
        self.front = front
        while self._left_out and self._left_out[0] < front:
            self._left_out.popleft()
        if has_moved and not is_alone:  # he, or they, read at several places: the disk is busy
            self._due = front + _LEAST_CHUNKS
        return has_moved

    def next_window(self, count: int) -> range:
        """The next chunks to order, none if enough is. count: of the file's chunks."""
        if self._began is None or self.front < self._due:
            return range(0)
        window = min(self.front - self._began, _WINDOW_CHUNKS)
        start = self.filled if self.filled > self.front else self.front + _GAP_CHUNKS
        if start >= count or start + window > self.front + _GAP_CHUNKS + _WINDOWS * window:
            self._due = self._left_out[0] + 1 if self._left_out else count
            return range(0)
        self.filled = min(start + window, count)
        self._left_out.append(self.filled - 1)
        return range(start, self.filled - 1)
