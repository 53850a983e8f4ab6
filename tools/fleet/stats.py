"""What seeds say together: means with confidence intervals, and differences seed by seed. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions  # type: ignore[import-untyped]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over independent runs. half_width: of its confidence interval by Student's t; nan of a single run."""

    mean: float
    half_width: float
    runs_count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Of at least one value. A mean that is not a number (nothing to measure in some run) has no interval either."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2 or not math.isfinite(mean):
        return Estimate(mean, math.nan, count)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, float(distributions.t.ppf((1 + confidence) / 2, count - 1)) * error, count)


def saving(values: Sequence[float], baseline: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """1 - value / baseline, run by run: both of a pair saw the same requests, so most of their noise is common."""
    return estimate([1 - value / base for value, base in zip(values, baseline, strict=True)], confidence)
