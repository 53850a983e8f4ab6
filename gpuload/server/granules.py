"""Which granules of an arena are free. Pure.

Every free granule serves any block, because whoever maps a block lays its granules side by side in its own addresses.
So there is no fragmentation to collect: an allocation fails only when the arena is full. Long runs are preferred all
the same, since each run is one mapping in every client.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from gpuload.device.base import Run


class Granules:
    """Granules 0..count-1, each free or taken."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free_count = count
        self._free: list[Run] = [(0, count)] if count else []  # sorted, never touching each other

    def take(self, wanted: int) -> list[Run]:
        """Take `wanted` granules: the shortest run that has them, else the longest runs there are.

        Raises: ValueError if fewer are free; the catalog asks before.
        """
        if wanted > self.free_count:
            raise ValueError(f"{wanted} granules wanted, {self.free_count} free")
        taken: list[Run] = []
        while wanted:
            fitting = [run for run in self._free if run[1] >= wanted]
            first, count = min(fitting, key=lambda r: r[1]) if fitting else max(self._free, key=lambda r: r[1])
            used = min(count, wanted)
            at = bisect.bisect_left(self._free, (first, count))
            self._free[at : at + 1] = [(first + used, count - used)] if count > used else []
            taken.append((first, used))
            wanted -= used
            self.free_count -= used
        return sorted(taken)

    def claim(self, runs: Iterable[Run]) -> None:
        """Take exactly these. Raises: ValueError if any of it is taken, or not there."""
        for first, count in runs:
            at = bisect.bisect_right(self._free, (first, self.count)) - 1
            begin, size = self._free[at] if at >= 0 else (0, 0)
            if count < 1 or not begin <= first <= first + count <= begin + size:
                raise ValueError(f"granules [{first}, {first + count}) are not free")
            rest = [(begin, first - begin), (first + count, begin + size - first - count)]
            self._free[at : at + 1] = [run for run in rest if run[1]]
            self.free_count -= count

    def put(self, runs: Iterable[Run]) -> None:
        """Give back what `take` gave. Raises: ValueError if any of it is free already."""
        for first, count in runs:
            at = bisect.bisect_left(self._free, (first, 0))
            before = self._free[at - 1] if at else (0, 0)
            after = self._free[at] if at < len(self._free) else (self.count, 0)
            if (at and before[0] + before[1] > first) or first + count > after[0] or first < 0:
                raise ValueError(f"granules [{first}, {first + count}) are not taken")
            begin, stop, low, high = first, first + count, at, at
            if at and before[0] + before[1] == first:
                begin, low = before[0], at - 1
            if at < len(self._free) and after[0] == stop:
                stop, high = after[0] + after[1], at + 1
            self._free[low:high] = [(begin, stop - begin)]
            self.free_count += count
