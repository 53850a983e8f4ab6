"""What fetches have to say beside what they bring: that they try again, which way bytes came, and what of a range is
there already while the rest is on its way. Counted until taken, but for that.

Asked by every worker, also one whose sources are folders: so nothing of HTTP is imported here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from mfs.errors import TransientStoreError

Arrived = Callable[[int], None]
"""Told how many bytes of a range have come, in order, from its start."""


class _Listeners(threading.local):
    """Of one thread."""

    tell: Callable[[TransientStoreError], None] | None = None
    watcher: Arrived | None = None
    arrived: Arrived | None = None


_told = _Listeners()


@contextlib.contextmanager
def _listening(name: str, listener: object) -> Iterator[None]:
    setattr(_told, name, listener)
    try:
        yield
    finally:
        setattr(_told, name, None)


def telling(tell: Callable[[TransientStoreError], None]) -> contextlib.AbstractContextManager[None]:
    """What is tried again by this thread meanwhile is told to `tell`, with why, before the pause."""
    return _listening("tell", tell)


def tell_retry(error: TransientStoreError) -> None:
    """Tell why something is about to be tried again, and count it. Of the process."""
    _retries.add("failed" if error.retry_after_s is None else "throttled", 1)
    if _told.tell is not None:
        _told.tell(error)


def watching(arrived: Arrived) -> contextlib.AbstractContextManager[None]:
    """What has come of the range that this thread asks a source for meanwhile is told to `arrived`, if that takes long,
    and if what has come is exact by itself: the source says so (`fetch.retry.Rest`).
    """
    return _listening("watcher", arrived)


def watcher() -> Arrived | None:
    """Who watches what this thread asks for."""
    return _told.watcher


def arriving(arrived: Arrived | None) -> contextlib.AbstractContextManager[None]:
    """What comes of the request that this thread makes meanwhile is told to `arrived`, or to nobody."""
    return _listening("arrived", arrived)


def listener() -> Arrived | None:
    """Who is told what has come of a request that this thread makes."""
    return _told.arrived


def taken_retries() -> dict[str, int]:
    """How often this process has tried again since the last call: 'throttled' where the server had asked for a pause,
    else 'failed'. Empty, and costs nothing, where it has not.
    """
    return _retries.take()


def note_way(name: str, count: int) -> None:
    """Count what `taken_ways` says."""
    _ways.add(name, count)


def taken_ways() -> dict[str, int]:
    """What came which way since the last call, where a cache is set: {cache_bytes, direct_bytes: past it, from the
    origin; cache_faults: how often it failed}. Empty, and costs nothing, where nothing came.
    """
    return _ways.take()


class _Counts:
    """Of the process, since they were last taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str, count: int) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + count

    def take(self) -> dict[str, int]:
        if not self._counts:
            return {}
        with self._lock:
            found, self._counts = self._counts, {}
        return found


_retries, _ways = _Counts(), _Counts()
