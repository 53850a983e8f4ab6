"""Samples of a run, ratios of samples of the same round, and the goals they are held against. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """What a figure should reach; exactly one of the two."""

    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is None or value <= self.at_most

    def __str__(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True)
class Row:
    """One line of the results: a figure for each round."""

    title: str
    values: tuple[float, ...]
    unit: str = ""
    goal: Goal | None = None
    note: str = ""
    column: str = ""
    """Rows of one title stand side by side where they have one."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        return self.goal.is_met(self.median) if self.goal else None


@dataclass
class Results:
    """What was measured: samples by name, one per round, in the order of rounds."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """What could not be measured, and why: one line each."""

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def row(
        self, name: str, title: str, unit: str = "", goal: Goal | None = None, note: str = "", *, column: str = ""
    ) -> list[Row]:
        """The samples as they are; no row without samples."""
        values = self.samples.get(name)
        return [Row(title, tuple(values), unit, goal, note, column)] if values else []

    def ratio(
        self, above: str, below: Sequence[str], title: str, goal: Goal, note: str = "", *, less_is_better: bool = False
    ) -> list[Row]:
        """`above` over the best of `below`, round by round: a neighbour's noise hits both sides of a round alike.

        less_is_better: the best of `below` over `above`.
        """
        present = [self.samples[name] for name in below if name in self.samples]
        if above not in self.samples or not present:
            return []
        turns = list(zip(self.samples[above], *present, strict=False))
        if less_is_better:
            values = tuple(min(others) / value for value, *others in turns)
        else:
            values = tuple(value / max(others) for value, *others in turns)
        return [Row(title, values, "×", goal, note)]
