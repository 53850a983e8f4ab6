"""Which granules of an arena have memory behind them, and which of those are free. Pure.

Every free granule serves any block, because whoever maps a block lays its granules side by side in its own addresses.
So there is no fragmentation to collect: an allocation fails only when the arena is full. Long runs are preferred all
the same, since each run is one mapping in every client.

    absent ──coming──> (on its way) ──came──> free ──take──> taken
       ^──────gone──── (on its way) <──going───┘ ^────put─────┘

What is on its way belongs to whoever asks the device for its memory, or gives it back, in a thread.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from gpuload.device.base import Run


class Granules:
    """Granules 0..count-1."""

    def __init__(self, count: int, *, present_count: int | None = None) -> None:
        """present_count: of how many, the first ones, there is memory already; None: of all."""
        present = count if present_count is None else present_count
        self.count = count
        self.taken_count = 0
        self._free = RunSet(count, [(0, present)])
        self._absent = RunSet(count, [(present, count - present)])

    @property
    def free_count(self) -> int:
        """With memory, and nobody's."""
        return self._free.members_count

    @property
    def absent_count(self) -> int:
        """Without memory."""
        return self._absent.members_count

    @property
    def present_count(self) -> int:
        """With memory, or on their way: what the device counts as ours."""
        return self.count - self.absent_count

    def take(self, wanted: int) -> list[Run]:
        """Take `wanted` free granules. Raises: ValueError if fewer are free; the catalog asks before."""
        taken = self._free.take(wanted)
        self.taken_count += wanted
        return taken

    def claim(self, runs: Iterable[Run]) -> None:
        """Exactly these, absent so far, are there and taken. Raises: ValueError if one of them is not absent."""
        self.taken_count += self._absent.remove(runs)

    def absent_runs(self) -> list[Run]:
        """Without memory."""
        return self._absent.runs()

    def put(self, runs: Iterable[Run]) -> None:
        """Give back what `take` gave. Raises: ValueError if any of it is free already."""
        self.taken_count -= self._free.put(runs)

    def coming(self, wanted: int) -> list[Run]:
        """Absent granules that are to get memory; `came`, or `gone` if they got none, says how that ended."""
        return self._absent.take(wanted)

    def came(self, runs: Iterable[Run]) -> None:
        """They have memory: free from now on."""
        self._free.put(runs)

    def going(self, wanted: int) -> list[Run]:
        """Free granules whose memory is to be given back; `gone` says that it was."""
        return self._free.take(wanted)

    def gone(self, runs: Iterable[Run]) -> None:
        """They have no memory."""
        self._absent.put(runs)


class RunSet:
    """Some of the numbers 0..count-1, kept as runs."""

    def __init__(self, count: int, runs: Iterable[Run] = ()) -> None:
        self._count = count
        self.members_count = 0
        self._runs: list[Run] = []  # sorted, never touching each other
        self.put(run for run in runs if run[1])

    def take(self, wanted: int) -> list[Run]:
        """Take `wanted` members out: the shortest run that has them, else the longest runs there are.

        Raises: ValueError if there are fewer.
        """
        if wanted > self.members_count:
            raise ValueError(f"{wanted} granules wanted, {self.members_count} free")
        taken: list[Run] = []
        while wanted:
            fitting = [run for run in self._runs if run[1] >= wanted]
            first, count = min(fitting, key=lambda r: r[1]) if fitting else max(self._runs, key=lambda r: r[1])
            used = min(count, wanted)
            at = bisect.bisect_left(self._runs, (first, count))
            self._runs[at : at + 1] = [(first + used, count - used)] if count > used else []
            taken.append((first, used))
            wanted -= used
            self.members_count -= used
        return sorted(taken)

    def runs(self) -> list[Run]:
        return list(self._runs)

    def remove(self, runs: Iterable[Run]) -> int:
        """Take exactly these out, and say how many that were. Raises: ValueError if one of them is no member."""
        removed = 0
        for first, count in runs:
            at = bisect.bisect_right(self._runs, (first, self._count)) - 1
            begin, size = self._runs[at] if at >= 0 else (0, 0)
            if count < 1 or not begin <= first <= first + count <= begin + size:
                raise ValueError(f"granules [{first}, {first + count}) are not there")
            rest = [(begin, first - begin), (first + count, begin + size - first - count)]
            self._runs[at : at + 1] = [run for run in rest if run[1]]
            removed += count
        self.members_count -= removed
        return removed

    def put(self, runs: Iterable[Run]) -> int:
        """Take in what is no member, and say how many that were. Raises: ValueError if any of it is one."""
        added = 0
        for first, count in runs:
            at = bisect.bisect_left(self._runs, (first, 0))
            before = self._runs[at - 1] if at else (0, 0)
            after = self._runs[at] if at < len(self._runs) else (self._count, 0)
            if (at and before[0] + before[1] > first) or first + count > after[0] or first < 0:
                raise ValueError(f"granules [{first}, {first + count}) are not taken")
            begin, stop, low, high = first, first + count, at, at
            if at and before[0] + before[1] == first:
                begin, low = before[0], at - 1
            if at < len(self._runs) and after[0] == stop:
                stop, high = after[0] + after[1], at + 1
            self._runs[low:high] = [(begin, stop - begin)]
            added += count
        self.members_count += added
        return added
