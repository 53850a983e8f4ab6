"""Families of metrics as plain values: name, kind, help, samples. Pure.

Names follow OpenMetrics: base units last (`_seconds`, `_bytes`), counters without the `_total` that their samples get.
Labels are bounded: what they may be is written here in the code, but for the names of models, devices and sources, and
of models only so many (`tally`, and gpuload's own). A file's name is never a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mfs.durations import Durations

ByLabels = Mapping[Any, float]
"""Values by those of the labels, tuples of as many texts (`Any`: a mapping is not covariant in its keys)."""
Kind = Literal["counter", "gauge", "histogram", "info"]
Values = tuple[str, ...]
"""Of the labels, in their order."""
_UNITS = ("seconds", "bytes", "ratio")


class Distribution(NamedTuple):
    """Durations as they were at one moment."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float

    @classmethod
    def of(cls, durations: Durations) -> Distribution:
        """A copy."""
        return cls(durations.bounds_s, tuple(durations.counts), durations.sum_s)


class Text(NamedTuple):
    """A scrape's answer."""

    content_type: str
    body: bytes


Sample = float | Distribution


@dataclass(frozen=True)
class Family:
    """Samples of one meaning."""

    name: str
    kind: Kind
    help: str
    labels: Values
    samples: Mapping[Values, Sample]

    @property
    def unit(self) -> str:
        """'' for what only is counted."""
        last = self.name.rpartition("_")[2]
        return last if last in _UNITS else ""


class Families:
    """Gathers families."""

    def __init__(self) -> None:
        self.found: list[Family] = []

    def counter(self, name: str, help: str, value: float | ByLabels, labels: Sequence[str] = ()) -> None:
        """Something that only grows. value: by the labels' values, or one alone."""
        self._add(name, "counter", help, value, labels)

    def gauge(self, name: str, help: str, value: float | ByLabels, labels: Sequence[str] = ()) -> None:
        """Something as it is now."""
        self._add(name, "gauge", help, value, labels)

    def histogram(self, name: str, help: str, durations: Mapping[Any, Durations], labels: Sequence[str]) -> None:
        """How long something took; copied."""
        samples = {values: Distribution.of(each) for values, each in durations.items()}
        self.found.append(Family(name, "histogram", help, tuple(labels), samples))

    def info(self, name: str, help: str, facts: Mapping[str, str]) -> None:
        """What is always so. The sample's name gets `_info`."""
        self.found.append(Family(name, "info", help, tuple(facts), {tuple(facts.values()): 1.0}))

    def _add(self, name: str, kind: Kind, help: str, value: float | ByLabels, labels: Sequence[str]) -> None:
        samples: dict[Values, Sample] = dict(value) if isinstance(value, Mapping) else {(): value}
        self.found.append(Family(name, kind, help, tuple(labels), samples))
