"""What the reads of one object say about the next ones. Pure: no I/O, no clock.

Readers that map weights fault in an order that looks random by offset; the tensor table says what a fault is part of.
The rule: fetch ahead no more than was already consumed; once a large tensor was taken whole, the rest of each tensor
that is touched; once weights are being taken, the file. Kept per object, not per handle: loaders share one descriptor
among processes, or open many.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence

from mfs.types import ByteRange

_MIB = 1 << 20
WEIGHTS_BYTES_MIN = 16 * _MIB
"""Fewer bytes than this are never taken for a load: four kernel read-arounds touch as much by accident."""
WEIGHTS_BYTES_MAX = 32 * _MIB
"""However large the file: until then the link runs at the speed of the reader's own faults."""
WEIGHTS_SHARE = 0.05
BURST_BYTES = 4 * _MIB
"""What one page fault alone reads, by the kernel's read-around (`fuse.kernel.READ_AHEAD_KB`): no sign of a run."""
_TENSORS_TAKEN_MIN = 2
_TAKEN_SHARE = 0.9
_RUNS_MAX = 16  # sequential runs followed at once; a reader with more is random
_RUN_SLACK_BYTES = 2 * _MIB  # the kernel's own read-ahead arrives a little out of order
_AHEAD_BYTES_MAX = 64 * _MIB


class AccessPattern:
    """The reads of one object of `size` bytes so far."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._boundaries: Sequence[int] = ()
        self._seen: list[int] = []
        self._taken_count = 0
        self._takes_whole = False
        """Whether a tensor too large to be read by accident was taken whole."""
        self._data_bytes = 0
        self._runs: deque[list[int]] = deque(maxlen=_RUNS_MAX)
        """[next offset, bytes consumed, offset already asked for]; the latest first."""

    def set_table(self, boundaries: Sequence[int]) -> None:
        """Tensor i has bytes [boundaries[i], boundaries[i + 1]); boundaries[0] is where data starts."""
        self._boundaries = boundaries
        self._seen = [0] * (len(boundaries) - 1)

    @property
    def taking_weights(self) -> bool:
        """Whether this looks like a load of the file, not a look at some of it."""
        wanted = max(WEIGHTS_BYTES_MIN, min(WEIGHTS_BYTES_MAX, int(self._size * WEIGHTS_SHARE)))
        if self._data_bytes < wanted:
            return False
        return not self._boundaries or self._taken_count >= _TENSORS_TAKEN_MIN

    def note(self, span: ByteRange) -> ByteRange | None:
        """A read happened. Returns what to fetch ahead of the run it belongs to, or None.

        The kernel caches what it read, so a byte is hardly ever asked for twice and plain counting is good enough.
        """
        self._count(span)
        run = next((r for r in self._runs if abs(span.start - r[0]) <= _RUN_SLACK_BYTES), None)
        if run is None:
            run = [span.stop, 0, span.stop]
            self._runs.appendleft(run)
        run[0] = max(run[0], span.stop)
        run[1] += len(span)
        ahead_bytes = _AHEAD_BYTES_MAX if self._takes_whole else min(max(0, run[1] - BURST_BYTES), _AHEAD_BYTES_MAX)
        ahead_stop = min(run[0] + ahead_bytes, self.tensor_stop(span.stop - 1))
        start = max(run[0], run[2])
        if ahead_stop <= start:
            return None
        run[2] = ahead_stop
        return ByteRange(start, ahead_stop)

    def tensor_stop(self, offset: int) -> int:
        """Where the tensor holding `offset` ends; the file's end where no table says."""
        if not self._boundaries:
            return self._size
        index = bisect.bisect_right(self._boundaries, offset)
        return self._boundaries[index] if index < len(self._boundaries) else self._size

    def _count(self, span: ByteRange) -> None:
        bounds = self._boundaries
        if not bounds:
            self._data_bytes += len(span)
            return
        index = max(0, bisect.bisect_right(bounds, span.start) - 1)
        while index < len(self._seen) and bounds[index] < span.stop:
            overlap = min(span.stop, bounds[index + 1]) - max(span.start, bounds[index])
            if overlap > 0:
                self._data_bytes += overlap
                self._note_tensor(index, overlap)
            index += 1

    def _note_tensor(self, index: int, nbytes: int) -> None:
        size = self._boundaries[index + 1] - self._boundaries[index]
        was_taken = self._seen[index] >= size * _TAKEN_SHARE
        self._seen[index] += nbytes
        if not was_taken and self._seen[index] >= size * _TAKEN_SHARE:
            self._taken_count += 1
            self._takes_whole = self._takes_whole or size > BURST_BYTES
