"""The simulation against queueing theory: Erlang, Pollaczek and Khinchine, processor sharing.

Each figure is the mean of independent runs; theory has to lie in its interval of 99.9 %, and the interval has to be so
narrow that a fault of some percent would not. Seeds are fixed: what passes once passes always.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.fleet import closed_forms, made
from tools.fleet.simulate import simulate
from tools.fleet.stats import Estimate, estimate
from tools.fleet.traffic import Floats

Draw = Callable[[np.random.Generator, int], Floats]
RUNS = 24
CONFIDENCE = 0.999


def _exponential(rng: np.random.Generator, count: int) -> Floats:
    return rng.exponential(1.0, count)


def _fixed(_rng: np.random.Generator, count: int) -> Floats:
    return np.ones(count)


def _two_kinds(rng: np.random.Generator, count: int) -> Floats:
    """Mean 1, variance 1.5: many short ones and a few long ones."""
    return np.where(rng.uniform(size=count) < 0.9, 0.5, 5.5)


def _times(arrivals: float, gpus: int, draw: Draw, *, count: int, sharing: bool = False) -> tuple[Estimate, Estimate]:
    """Mean wait before the first work, and mean time in the system, a fifth of each run left out at its beginning."""
    service = made.service(alone_s=0.0, each_s=1.0) if sharing else made.service()
    card = made.card(sequences=10**9 if sharing else 1)
    waits, wholes = [], []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        at_s = np.cumsum(rng.exponential(1 / arrivals, count))
        tokens = draw(rng, count)
        requests = made.requests(at_s.tolist(), tokens=tokens.tolist())
        outcome = simulate([service], card, made.dedicated(gpus), requests)
        settled = count // 5
        wholes.append(float(outcome.whole_s[settled:].mean()))
        waits.append(float((outcome.whole_s - tokens)[settled:].mean()))
    return estimate(waits, CONFIDENCE), estimate(wholes, CONFIDENCE)


def _agree(found: Estimate, expected: float, within: float) -> None:
    assert found.low <= expected <= found.high
    assert found.half_width <= within * expected


@pytest.mark.parametrize(("arrivals", "servers", "within"), [(0.6, 1, 0.15), (2.1, 3, 0.2), (8.0, 10, 0.2)])
def test_mmc(arrivals: float, servers: int, within: float) -> None:
    wait, _whole = _times(arrivals, servers, _exponential, count=2500)
    _agree(wait, closed_forms.mmc_wait_s(arrivals, 1.0, servers), within)


@pytest.mark.parametrize("arrivals", [0.5, 0.7])
def test_md1(arrivals: float) -> None:
    wait, _whole = _times(arrivals, 1, _fixed, count=2500)
    _agree(wait, closed_forms.mg1_wait_s(arrivals, 1.0, 0.0), 0.1)


def test_mg1() -> None:
    wait, _whole = _times(0.5, 1, _two_kinds, count=2500)
    _agree(wait, closed_forms.mg1_wait_s(0.5, 1.0, 0.9 * 0.25 + 0.1 * 5.5**2 - 1), 0.2)


@pytest.mark.parametrize("draw", [_exponential, _fixed, _two_kinds])
def test_a_shared_batch_does_not_care_how_work_is_distributed(draw: Draw) -> None:
    _wait, whole = _times(0.6, 1, draw, count=2500, sharing=True)
    _agree(whole, closed_forms.mg1_sharing_s(0.6, 1.0), 0.15)


def test_the_closed_forms_agree_where_they_meet() -> None:
    assert closed_forms.mmc_wait_s(0.5, 1.0, 1) == pytest.approx(closed_forms.mg1_wait_s(0.5, 1.0, 1.0))
    assert closed_forms.mg1_wait_s(0.5, 1.0, 1.0) + 1 == pytest.approx(closed_forms.mg1_sharing_s(0.5, 1.0))
    assert closed_forms.mmc_wait_s(3.0, 1.0, 4) == pytest.approx(0.509, abs=0.001)  # 4 servers, 3 erlangs: C = 0.509
