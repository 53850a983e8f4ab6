"""Time divides by the majority of those who wait, and adds up, whatever overlaps."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfs.phases import STEPS_COUNT, Interval, Ledger, Strip, divide

ORDER, IDLE = ("a", "b", "c"), "idle"
SPAN = 40
waits = st.lists(
    st.tuples(st.integers(-5, SPAN + 5), st.integers(0, 20), st.sampled_from(ORDER)).map(
        lambda one: Interval(one[0], one[0] + one[1], one[2])
    ),
    max_size=30,
)


def divided_by_hand(given: list[Interval]) -> list[str]:
    """Second by second: what most wait for, the first of several."""
    found = []
    for second in range(SPAN):
        counts = Counter(wait.cause for wait in given if wait.start_s <= second < wait.stop_s)
        most = max(counts.values(), default=0)
        found.append(next((cause for cause in ORDER if most and counts[cause] == most), IDLE))
    return found


@given(waits)
def test_each_instant_goes_to_what_most_wait_for(given: list[Interval]) -> None:
    found = divide(given, 0, SPAN, order=ORDER, idle=IDLE)
    assert [cause for start, stop, cause in found for _ in range(int(start), int(stop))] == divided_by_hand(given)
    assert all(one.stop_s == two.start_s and one.cause != two.cause for one, two in pairwise(found))


@given(waits)
def test_a_ledger_says_the_same_whenever_it_is_asked(given: list[Interval]) -> None:
    ledger = Ledger(0, order=ORDER, idle=IDLE)
    for wait in sorted(given, key=lambda wait: wait.stop_s):
        ledger.add(*wait)
    looked, _, _ = ledger.look(SPAN)
    ledger.close(SPAN)
    by_hand = Counter(divided_by_hand(given))
    assert looked == ledger.phases == {cause: float(by_hand[cause]) for cause in (*ORDER, IDLE)}


def test_a_ledger_keeps_a_bounded_number_of_waits_and_its_sum() -> None:
    ledger = Ledger(100.0, order=ORDER, idle=IDLE)
    for number in range(20_000):
        at_s = 100.0 + number * 0.01
        ledger.add(at_s, at_s + 0.004, ORDER[number % 3])
    assert len(ledger._waits) <= 1024
    phases, step_s, steps = ledger.look(310.0)
    assert sum(phases.values()) == pytest.approx(210.0)
    for cause in ORDER:
        assert phases[cause] == pytest.approx(20_000 * 0.004 / 3, rel=0.01)
    assert STEPS_COUNT // 2 <= len(steps) <= STEPS_COUNT
    assert (len(steps) - 1) * step_s < 210.0 <= len(steps) * step_s


def test_a_wait_that_reaches_back_beyond_what_is_divided_counts_from_there_on() -> None:
    ledger = Ledger(0.0, order=ORDER, idle=IDLE)
    for number in range(3000):
        ledger.add(number, number + 1, "b")
    assert ledger.until_s > 0
    ledger.add(0.0, 4000.0, "a")
    ledger.close(4000.0)
    assert sum(ledger.phases.values()) == pytest.approx(4000.0)
    assert ledger.phases["a"] >= 1000
    assert ledger.phases["b"] >= ledger.until_s - 4000 + 1000


def test_a_strip_shows_the_order_of_things_at_any_length() -> None:
    for seconds in (0.01, 1.0, 3000.0):
        strip = Strip(("a", "b"))
        strip.add(Interval(50.0, 50.0 + seconds / 4, "a"), 50.0)
        strip.add(Interval(50.0 + seconds / 4, 50.0 + seconds, "b"), 50.0)
        steps = strip.causes()
        assert steps == sorted(steps)
        assert steps.count("a") == pytest.approx(len(steps) / 4, abs=1)
