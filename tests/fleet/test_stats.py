"""Means and intervals over seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tools.fleet.stats import estimate, saving


def test_an_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of two degrees at 97.5 %


def test_of_one_run_no_interval_is_known() -> None:
    assert math.isnan(estimate([1.0]).half_width)
    assert math.isnan(estimate([1.0, math.nan]).half_width)


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(1)
    covered = [found.low <= 5 <= found.high for found in (estimate(rng.normal(5, 2, 6).tolist()) for _ in range(2000))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_pairs_lose_the_noise_they_share() -> None:
    base = [10.0, 20.0, 40.0]
    found = saving([6.0, 12.0, 24.0], base)
    assert found.mean == pytest.approx(0.4)
    assert found.half_width == pytest.approx(0.0, abs=1e-9)
