"""What readers do to the mount and what it costs, for whoever is watching: `mfs watch`. Nothing is kept otherwise.

A record is a plain dict, ready for JSON. `op` says which:

    open    file, handle, size
    read    file, handle, start, stop, waited_s; error where it failed
    close   file, handle
    fetch   file, start, stop, origin_bytes, ssd_bytes, ahead: a fill that ended well; `ahead` where no reader waited

All have at_s, seconds of the machine's monotonic clock. A read is what the kernel asked for: page faults and read-ahead
arrive here, a read that the page cache answers does not. What goes through the pool path does not either.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mfs.types import BLOCK_BYTES, ByteRange

Record = dict[str, Any]

RECORDS_MAX = 100_000
"""Of one watcher that does not keep up, some 50 MB; what comes after is counted and dropped."""


class Watcher:
    """One who watches: takes the records that came since it last did."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque()
        self.dropped_count = 0

    def note(self, record: Record) -> None:
        if len(self._records) < RECORDS_MAX:
            self._records.append(record)
        else:
            self.dropped_count += 1

    def take(self, count_max: int) -> list[Record]:
        """The oldest records, at most so many."""
        return [self._records.popleft() for _ in range(min(count_max, len(self._records)))]


class OpLog:
    """Where the mount's parts tell what happens. They ask `watched` first: telling costs, asking does not."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: of the sources by number, '' for one that is the root."""
        self._names = names
        self._watchers: list[Watcher] = []
        self._handles = itertools.count(1)
        self.watched = False

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """Records are kept for a new watcher while this is open."""
        watcher = Watcher()
        self._watchers.append(watcher)
        self.watched = True
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)
            self.watched = bool(self._watchers)

    def next_handle(self) -> int:
        return next(self._handles)

    def note(self, op: str, source: int, path: str, **details: Any) -> None:
        """Tell all watchers. path: inside the source."""
        file = "/".join(filter(None, (self._names[source], path)))
        record = {"at_s": time.monotonic(), "op": op, "file": file, **details}
        for watcher in self._watchers:
            watcher.note(record)

    def note_fetch(
        self, source: int, path: str, chunk: ByteRange, mask: int, origin_bytes: int, ssd_bytes: int, ahead: bool
    ) -> None:
        """A fill brought the blocks of `mask` into a chunk of a file."""
        first, last = (mask & -mask).bit_length() - 1, mask.bit_length()
        start, stop = chunk.start + first * BLOCK_BYTES, min(chunk.start + last * BLOCK_BYTES, chunk.stop)
        self.note(
            "fetch", source, path, start=start, stop=stop, origin_bytes=origin_bytes, ssd_bytes=ssd_bytes, ahead=ahead
        )
