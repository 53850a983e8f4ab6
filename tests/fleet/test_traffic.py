"""Drawn traffic: its rates, its bursts, and that a seed is all there is to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfs.errors import UsageError
from tools.fleet.traffic import KINDS, Requests, Traffic, draw, popularity


def _dispersion(requests: Requests, window_s: float) -> float:
    """Variance over mean of counts in windows: 1 for Poisson."""
    counts = np.bincount((requests.at_s // window_s).astype(int))
    return float(counts.var() / counts.mean())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.floats(0, 2), min_size=1, max_size=5), st.integers(0, 2**40), st.booleans())
def test_requests_are_sorted_within_their_time_and_follow_from_the_seed(
    kind: str, rates: list[float], seed: int, together: bool
) -> None:
    traffic = Traffic(kind, period_s=300, burst_s=20, together=together)
    one, other = (draw(traffic, rates, 200.0, seed) for _ in range(2))
    assert (np.diff(one.at_s) >= 0).all()
    assert not len(one) or (one.at_s[0] >= 0 and one.at_s[-1] <= 200)
    assert set(one.service.tolist()) <= set(range(len(rates)))
    assert one.context_tokens.min(initial=1) >= 1
    assert one.generated_tokens.min(initial=1) >= 1
    for name in ("at_s", "service", "context_tokens", "generated_tokens"):
        assert (getattr(one, name) == getattr(other, name)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_rate_is_what_was_asked_for(kind: str) -> None:
    # Many short bursts and whole periods: the law of large numbers leaves some percent.
    traffic = Traffic(kind, burst_s=10, period_s=500, tokens_cv=0.5)
    requests = draw(traffic, [1.0, 3.0], 20_000.0, 1)
    for service, rate in ((0, 1.0), (1, 3.0)):
        assert (requests.service == service).sum() == pytest.approx(rate * 20_000, rel=0.1)
    assert requests.context_tokens.mean() == pytest.approx(1000, rel=0.05)
    assert requests.generated_tokens.mean() == pytest.approx(200, rel=0.05)


def test_bursts_are_bursts() -> None:
    poisson = draw(Traffic("poisson"), [2.0], 20_000.0, 3)
    bursty = draw(Traffic("bursty", burstiness=8, burst_s=60), [2.0], 20_000.0, 3)
    assert _dispersion(poisson, 30) == pytest.approx(1, abs=0.3)
    assert _dispersion(bursty, 30) > 20


def test_a_day_has_its_peak_where_it_should() -> None:
    requests = draw(Traffic("diurnal", swing=1, period_s=1000), [5.0], 1000.0, 4)
    assert (requests.at_s < 500).mean() > 0.75


@pytest.mark.parametrize("kind", ["diurnal", "bursty"])
def test_services_peak_together_or_not(kind: str) -> None:
    together, apart = (
        draw(Traffic(kind, burstiness=8, burst_s=60, period_s=5000, together=each), [1.0] * 4, 5000.0, 5)
        for each in (True, False)
    )
    assert _dispersion(together, 60) > 2 * _dispersion(apart, 60)


def test_popularity() -> None:
    assert popularity(4, 0) == [0.25] * 4
    assert popularity(2, 1) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"kind": "steady"}, "one of poisson, diurnal, bursty"), ({"burstiness": 0.5}, "burstiness from 1"),
        ({"burst_s": 0.0}, "bursts longer"), ({"swing": 1.5}, "swing"), ({"tokens_cv": float("nan")}, "variation"),
        ({"generated_tokens": 0.0}, "generated"),
    ],
)  # fmt: skip
def test_traffic_that_has_no_meaning(given_: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Traffic(**given_)  # type: ignore[arg-type]


def test_too_much_traffic_is_refused_before_it_is_drawn() -> None:
    with pytest.raises(UsageError, match="at most 50,000,000 requests, got some 1,000,000,000"):
        draw(Traffic(), [1000.0], 1e6, 1)
