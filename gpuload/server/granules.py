"""Which granules of an arena have memory behind them, and which of those are free. Pure.

Free memory of any shape serves any block, so there is no fragmentation to collect: an allocation fails only when the
arena is full. In host memory (`Granules`) whoever maps a block lays its granules side by side in its own addresses;
long runs are preferred all the same, since each is one mapping in every client. A card's memory comes in `Pieces`.

    absent ──coming──> (on its way) ──came──> free ──take──> taken
       ^──────gone──── (on its way) <──going───┘ ^────put─────┘

What is on its way belongs to whoever asks the device for its memory, or gives it back, in a thread.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence

from gpuload.device.base import Run, total_granules

PIECE_COUNT = 8
"""Granules of a piece that is made for no block: of a floor, that is."""


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

    @property
    def bare_count(self) -> int:
        """Taken, and without memory yet: see `Pieces`, here and below."""
        return 0

    def is_bare(self, run: Run) -> bool:
        """Whether it has no memory yet. From any thread."""
        return False

    def donors(self, wanted: int) -> list[Run]:
        """Free memory, as much as is wanted by what is bare or a little more; small pieces first, so that none stay for
        ever."""
        return []

    def going_for(self, bare: Sequence[Run]) -> list[Run]:
        """The donors for these, on their way: each is `gone`, or `came` back."""
        return []

    def dressed(self, run: Run) -> None:
        """What was bare has memory."""

    def take(self, wanted: int) -> list[Run]:
        """Take `wanted` free granules. Raises: ValueError if fewer are free; the catalog asks before."""
        return self.take_all([wanted])[0]

    def take_all(self, sizes: Sequence[int]) -> list[list[Run]]:
        """The same for several blocks."""
        taken = [self._free.take(size) for size in sizes]
        self.taken_count += sum(sizes)
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

    def unmatched(self, sizes: Sequence[int], leaving: Iterable[Run]) -> list[int]:
        """Of blocks of these sizes, those for which no memory of that shape is free, or will be once `leaving` is."""
        return []

    def coming(self, wanted: int, sizes: Sequence[int] = ()) -> list[Run]:
        """Absent granules that are to get memory; `came`, or `gone` if they got none, says how that ended. sizes: as
        `unmatched` has them."""
        return self._absent.take(wanted)

    def came(self, runs: Iterable[Run]) -> None:
        """They have memory: free from now on."""
        self._free.put(runs)

    def going(self, wanted: int, *, is_exact: bool = False) -> list[Run]:
        """Free granules whose memory is to be given back; `gone` says that it was. Pieces go whole: no more than
        `wanted`, or, if that is to be exact, no fewer."""
        return self._free.take(wanted)

    def gone(self, runs: Iterable[Run]) -> None:
        """They have no memory."""
        self._absent.put(runs)


class Pieces(Granules):
    """Granules whose memory comes in pieces: each is made, taken, mapped, handed out and given back as one.

    A block takes a free piece of its very size. If there is none, it takes numbers without memory (it is *bare*), and
    free pieces of as many granules are held back for it, until they have gone and its own has come:

        absent ──take──> bare ──dressed──> taken         donors: free ──going_for──> (on its way) ──gone──> absent

    Numbers are addresses here, of which there are several for each granule of memory: so a piece finds a run of them.
    Should it find none, a block is several pieces.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count, present_count=0)
        self._free_pieces: dict[int, list[int]] = {}
        """Size -> where those of that size begin."""
        self._free_total = 0
        self._bare: dict[Run, bool] = {}
        """And whether free memory is held back for it still."""
        self._bare_total = self._held_back = 0

    @property
    def free_count(self) -> int:
        return self._free_total - self._held_back

    @property
    def present_count(self) -> int:
        return self.count - self.absent_count - self._bare_total

    @property
    def bare_count(self) -> int:
        return self._bare_total

    def take_all(self, sizes: Sequence[int]) -> list[list[Run]]:
        if sum(sizes) > self.free_count:
            raise ValueError(f"{sum(sizes)} granules wanted, {self.free_count} free")
        fitting = [self._pop(size) if self._free_pieces.get(size) else None for size in sizes]  # before any is a donor
        taken = []
        for size, run in zip(sizes, fitting, strict=True):
            if run is not None:
                taken.append([run])
                continue
            runs = self._absent.take(size)
            self._bare |= dict.fromkeys(runs, True)
            self._bare_total += size
            self._held_back += size
            taken.append(runs)
        self.taken_count += sum(sizes)
        return taken

    def put(self, runs: Iterable[Run]) -> None:
        for run in runs:
            self.taken_count -= run[1]
            if run in self._bare:
                self._held_back -= run[1] if self._bare.pop(run) else 0
                self._bare_total -= run[1]
                self._absent.put([run])
            else:
                self._push(run)

    def unmatched(self, sizes: Sequence[int], leaving: Iterable[Run]) -> list[int]:
        there = Counter({size: len(firsts) for size, firsts in self._free_pieces.items()})
        there.update(count for _, count in leaving)
        there.subtract(sizes)
        return [size for size, count in there.items() for _ in range(-count)]

    def coming(self, wanted: int, sizes: Sequence[int] = ()) -> list[Run]:
        runs: list[Run] = []
        for size in sorted(sizes, reverse=True):
            if size <= wanted:
                runs += self._absent.take(size)
                wanted -= size
        while wanted:
            runs += self._absent.take(min(wanted, PIECE_COUNT))
            wanted -= min(wanted, PIECE_COUNT)
        return runs

    def came(self, runs: Iterable[Run]) -> None:
        for run in runs:
            self._push(run)

    def going(self, wanted: int, *, is_exact: bool = False) -> list[Run]:
        runs: list[Run] = []
        for size in sorted(self._free_pieces, reverse=True):
            while size <= wanted and size in self._free_pieces:
                runs.append(self._pop(size))
                wanted -= size
        if wanted and is_exact:
            runs.append(self._pop(min(size for size in self._free_pieces if size > wanted)))
        return runs

    def is_bare(self, run: Run) -> bool:
        return run in self._bare

    def donors(self, wanted: int) -> list[Run]:
        found: list[Run] = []
        for size in sorted(self._free_pieces):
            for first in reversed(self._free_pieces[size]):
                if wanted <= 0:
                    return found
                found.append((first, size))
                wanted -= size
        return found

    def going_for(self, bare: Sequence[Run]) -> list[Run]:
        self._bare |= dict.fromkeys(bare, False)
        wanted = total_granules(bare)
        self._held_back -= wanted
        return [self._pop(size) for _, size in self.donors(wanted)]

    def dressed(self, run: Run) -> None:
        del self._bare[run]
        self._bare_total -= run[1]

    def _push(self, run: Run) -> None:
        first, size = run
        self._free_pieces.setdefault(size, []).append(first)
        self._free_total += size

    def _pop(self, size: int) -> Run:
        firsts = self._free_pieces[size]
        first = firsts.pop()
        if not firsts:
            del self._free_pieces[size]
        self._free_total -= size
        return first, size


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
