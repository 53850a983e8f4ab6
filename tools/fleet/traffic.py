"""Who asks when for how much: requests of all services in the order of time, drawn from a seed. Pure.

The same seed gives the same requests whatever serves them, so that systems are compared on common random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mfs.errors import UsageError

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
KINDS = ("poisson", "diurnal", "bursty")
REQUESTS_MAX = 50_000_000
"""More would not fit into memory beside what is kept of each."""

_QUIET_SHARE = 0.1
"""Rate between bursts, of the mean rate."""


@dataclass(frozen=True)
class Requests:
    """Arrays of one length, sorted by `at_s`. Tokens need not be whole: the closed forms want any distribution."""

    at_s: Floats
    """Seconds since the beginning."""
    service: Whole
    context_tokens: Floats
    generated_tokens: Floats
    duration_s: float
    """What the arrivals were drawn over; the last one comes sooner."""

    def __len__(self) -> int:
        return len(self.at_s)


@dataclass(frozen=True)
class Traffic:
    """How requests are drawn. Which services get how many is said beside it, by rates."""

    kind: str = "poisson"
    burstiness: float = 5.0
    """bursty: rate within a burst over the mean rate (1: Poisson). Between bursts a tenth of the mean rate is left."""
    burst_s: float = 120.0
    """bursty: mean length of a burst; lengths are exponential (a Markov-modulated Poisson process of two states)."""
    swing: float = 0.9
    """diurnal: the rate goes between 1 - swing and 1 + swing of its mean, as a sine."""
    period_s: float = 86_400.0
    """diurnal."""
    together: bool = False
    """All services have their bursts or peaks at the same moments; else each its own, peaks spread over the period."""
    context_tokens: float = 1000.0
    generated_tokens: float = 200.0
    tokens_cv: float = 1.0
    """Standard deviation over mean of both, log-normal; 0: every request alike."""

    def __post_init__(self) -> None:
        for given, is_right, expected in (
            (self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)} as kind of traffic"),
            (self.burstiness, 1 <= self.burstiness <= 1000, "a burstiness from 1 to 1000"),
            (self.burst_s, 0 < self.burst_s < math.inf, "bursts longer than 0 s"),
            (self.swing, 0 <= self.swing <= 1, "a swing from 0 to 1"),
            (self.period_s, 0 < self.period_s < math.inf, "a period longer than 0 s"),
            (self.context_tokens, 0 <= self.context_tokens < math.inf, "no less than 0 context tokens"),
            (self.generated_tokens, 0 < self.generated_tokens < math.inf, "more than 0 generated tokens"),
            (self.tokens_cv, 0 <= self.tokens_cv <= 10, "a coefficient of variation from 0 to 10"),
        ):
            if not is_right:
                raise UsageError(f"traffic: expected {expected}, got {given!r}")


def popularity(count: int, exponent: float) -> list[float]:
    """Shares of `count` services that add up to 1, by Zipf's law; exponent 0: all alike."""
    weights = [(rank + 1) ** -exponent for rank in range(count)]
    total = sum(weights)
    return [weight / total for weight in weights]


def draw(traffic: Traffic, rates_per_s: Sequence[float], duration_s: float, seed: int) -> Requests:
    """Requests of services whose mean rates are given, over `duration_s`. Raises: UsageError if they are too many."""
    expected = sum(rates_per_s) * duration_s
    if expected > REQUESTS_MAX:
        raise UsageError(f"traffic: expected at most {REQUESTS_MAX:,} requests, got some {expected:,.0f}: draw fewer")
    common, *own = np.random.SeedSequence(seed).spawn(len(rates_per_s) + 1)
    times = []
    for index, (rate, sequence) in enumerate(zip(rates_per_s, own, strict=True)):
        rng = np.random.default_rng(sequence)
        phase = 0.0 if traffic.together else index / len(rates_per_s)
        moments = np.random.default_rng(common) if traffic.together else rng
        times.append(_arrivals(traffic, rate, duration_s, phase, moments, rng))
    service = np.repeat(np.arange(len(times)), [len(each) for each in times])
    at_s = np.concatenate([*times, np.empty(0)])
    order = np.argsort(at_s, kind="stable")
    rng = np.random.default_rng(common.spawn(1)[0])
    return Requests(at_s[order], service[order], *draw_tokens(traffic, len(at_s), rng), duration_s)


def draw_tokens(traffic: Traffic, count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Context and generated tokens of `count` requests, each at least 1 unless all are alike."""
    sigma = math.sqrt(math.log(1 + traffic.tokens_cv**2))
    drawn = []
    for mean in (traffic.context_tokens, traffic.generated_tokens):
        if sigma and mean:
            drawn.append(np.maximum(1.0, rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)))
        else:
            drawn.append(np.full(count, mean))
    return drawn[0], drawn[1]


def _arrivals(
    traffic: Traffic,
    rate: float,
    duration_s: float,
    phase: float,
    moments: np.random.Generator,
    rng: np.random.Generator,
) -> Floats:
    """moments: draws when bursts are; rng: everything else."""
    if traffic.kind == "diurnal":
        return _diurnal(traffic, rate, duration_s, phase, rng)
    if traffic.kind == "bursty" and traffic.burstiness > 1:
        return _bursty(traffic, rate, duration_s, moments, rng)
    return np.sort(rng.uniform(0, duration_s, rng.poisson(rate * duration_s)))


def _diurnal(traffic: Traffic, rate: float, duration_s: float, phase: float, rng: np.random.Generator) -> Floats:
    """By thinning: candidates at the highest rate, of which each stays with the probability of its moment."""
    top = rate * (1 + traffic.swing)
    at_s = np.sort(rng.uniform(0, duration_s, rng.poisson(top * duration_s)))
    wave = 1 + traffic.swing * np.sin(2 * np.pi * (at_s / traffic.period_s + phase))
    kept: Floats = at_s[rng.uniform(0, 1 + traffic.swing, len(at_s)) < wave]
    return kept


def _bursty(
    traffic: Traffic, rate: float, duration_s: float, moments: np.random.Generator, rng: np.random.Generator
) -> Floats:
    """A chain of bursts and quiet times, begun in its stationary state; a Poisson process within each."""
    burst_share = (1 - _QUIET_SHARE) / (traffic.burstiness - _QUIET_SHARE)
    quiet_s = traffic.burst_s * (1 - burst_share) / burst_share
    in_burst = bool(moments.uniform() < burst_share)
    begins, ends, bursts, now_s = [], [], [], 0.0
    while now_s < duration_s:
        until_s = now_s + moments.exponential(traffic.burst_s if in_burst else quiet_s)
        begins.append(now_s)
        ends.append(min(until_s, duration_s))
        bursts.append(in_burst)
        now_s, in_burst = until_s, not in_burst
    lengths = np.subtract(ends, begins)
    counts = rng.poisson(lengths * rate * np.where(bursts, traffic.burstiness, _QUIET_SHARE))
    spread = rng.uniform(0, 1, counts.sum())
    return np.sort(np.repeat(begins, counts) + spread * np.repeat(lengths, counts))
