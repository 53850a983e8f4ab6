"""How the time of a load divides: many waits that overlap become stretches that follow on each other. Pure.

The rule: an instant goes to the cause that most wait for then; of several with as many, to the one that stands first in
the order given; to `idle` where nobody waits. So the parts add up to the whole, however many wait at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

STEPS_COUNT = 128
"""Of a strip, at most; at least half of them once a load is longer than that many of the finest."""
_FINEST_S = 1 / 1024
_UNDIVIDED_MAX = 1024


class Interval(NamedTuple):
    """[start_s, stop_s) and what was waited for; seconds of the monotonic clock."""

    start_s: float
    stop_s: float
    cause: str


def divide(
    waits: Iterable[Interval], start_s: float, stop_s: float, *, order: Sequence[str], idle: str
) -> list[Interval]:
    """[start_s, stop_s) as stretches without gaps, each with its one cause; neighbours differ.

    waits: in any order; what of them lies outside is left away, and so is a cause that `order` does not name.
    """
    rank = {cause: number for number, cause in enumerate(order)}
    edges: list[tuple[float, int, int]] = []
    for begin, end, cause in waits:
        begin, end = max(begin, start_s), min(end, stop_s)
        if begin < end and cause in rank:
            edges += ((begin, 1, rank[cause]), (end, -1, rank[cause]))
    edges.sort()
    counts = [0] * len(order)
    found: list[Interval] = []
    reached, now = start_s, idle
    for at, change, number in edges:
        counts[number] += change
        most = max(counts)
        then = order[counts.index(most)] if most else idle
        if then != now:
            if at > reached:
                _append(found, Interval(reached, at, now))
                reached = at
            now = then
    if stop_s > reached:
        _append(found, Interval(reached, stop_s, now))
    return found


def _append(found: list[Interval], stretch: Interval) -> None:
    if found and found[-1].cause == stretch.cause:
        found[-1] = found[-1]._replace(stop_s=stretch.stop_s)
    else:
        found.append(stretch)


class Strip:
    """A load's time line in a bounded number of steps, which become longer as it goes on."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._seconds = array("d", bytes(8 * STEPS_COUNT * len(self._names)))
        self.step_s = _FINEST_S

    def add(self, stretch: Interval, origin_s: float) -> None:
        """Note a stretch. origin_s: where the strip begins, on the same clock."""
        start_s, stop_s = stretch.start_s - origin_s, stretch.stop_s - origin_s
        while stop_s > STEPS_COUNT * self.step_s:
            self._widen()
        number, width = self._numbers[stretch.cause], len(self._names)
        step = int(start_s / self.step_s)
        while start_s < stop_s and step < STEPS_COUNT:
            end_s = min(stop_s, (step + 1) * self.step_s)
            self._seconds[step * width + number] += max(0.0, end_s - start_s)
            start_s, step = end_s, step + 1

    def _widen(self) -> None:
        width, half = len(self._names), STEPS_COUNT // 2
        old = self._seconds
        self._seconds = array("d", bytes(8 * len(old)))
        for step in range(half):
            for number in range(width):
                first = 2 * step * width + number
                self._seconds[step * width + number] = old[first] + old[first + width]
        self.step_s *= 2

    def copy(self) -> Strip:
        """One that may be added to without changing this one."""
        other = Strip(self._names)
        other._seconds, other.step_s = self._seconds[:], self.step_s
        return other

    def causes(self) -> list[str]:
        """What most of each step went to, up to the last step that has any."""
        width = len(self._names)
        steps = [list(self._seconds[first : first + width]) for first in range(0, len(self._seconds), width)]
        while steps and not any(steps[-1]):
            steps.pop()
        return [self._names[seconds.index(max(seconds))] for seconds in steps]


class Ledger:
    """Keeps what the time of one load went to, while it goes on; bounded. Belongs to one thread.

    Waits are told when they end. Of those that may still overlap with others a bounded number is kept; one that reaches
    back beyond what is divided already counts from there on.
    """

    def __init__(self, began_s: float, *, order: Sequence[str], idle: str) -> None:
        self.began_s = began_s
        self.until_s = began_s
        """Up to here the time is divided."""
        self.phases = dict.fromkeys((*order, idle), 0.0)
        self._order, self._idle = tuple(order), idle
        self._waits: list[Interval] = []
        self._strip = Strip((*order, idle))

    def add(self, start_s: float, stop_s: float, cause: str) -> None:
        """A wait has ended. cause: one of the order."""
        self._waits.append(Interval(start_s, stop_s, cause))
        if len(self._waits) >= _UNDIVIDED_MAX:  # the older half: 1.3 ms, once in 512 waits
            self._divide(self._waits[_UNDIVIDED_MAX // 2].stop_s)

    def close(self, stop_s: float) -> None:
        """Nothing comes any more; it ended at `stop_s`."""
        self._divide(stop_s)
        self._waits = []

    def _divide(self, until_s: float) -> None:
        until_s = max(until_s, self.until_s)
        for stretch in divide(self._waits, self.until_s, until_s, order=self._order, idle=self._idle):
            self.phases[stretch.cause] += stretch.stop_s - stretch.start_s
            self._strip.add(stretch, self.began_s)
        self.until_s = until_s
        self._waits = [wait for wait in self._waits if wait.stop_s > until_s]

    def look(self, stop_s: float) -> tuple[dict[str, float], float, list[str]]:
        """(seconds by phase, seconds of a step, what each step went to), as if it ended at `stop_s`."""
        rest = divide(self._waits, self.until_s, stop_s, order=self._order, idle=self._idle)
        phases, strip = dict(self.phases), self._strip.copy()
        for stretch in rest:
            phases[stretch.cause] += stretch.stop_s - stretch.start_s
            strip.add(stretch, self.began_s)
        return phases, strip.step_s, strip.causes()
