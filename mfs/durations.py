"""How long things took: counts by upper bounds, and the sum. Pure; costs a read a fraction of a microsecond."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Durations:
    """Counts durations. Belongs to one thread."""

    __slots__ = ("bounds_s", "counts", "sum_s")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        """bounds_s: ascending; a duration counts at the first that it does not exceed."""
        self.bounds_s = tuple(bounds_s)
        self.counts = [0] * (len(self.bounds_s) + 1)
        """By bound; the last is of what exceeds all."""
        self.sum_s = 0.0

    def note(self, seconds: float) -> None:
        """Something took so long."""
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """Of all."""
        return sum(self.counts)
