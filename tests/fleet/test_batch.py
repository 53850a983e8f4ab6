"""Sequences that share a card: when they have their first token, and when they end, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fleet import made
from tools.fleet.simulate import Outcome, simulate


def _run(
    at_s: list[float], tokens: list[float], *, sequences: int = 8, alone_s: float = 1.0, each_s: float = 0.0
) -> Outcome:
    service = made.service(alone_s=alone_s, each_s=each_s)
    return simulate([service], made.card(sequences=sequences), made.dedicated(), made.requests(at_s, tokens=tokens))


def test_alone() -> None:
    outcome = _run([0.0], [10.0], alone_s=2.0, each_s=0.5)
    assert outcome.first_token_s.tolist() == pytest.approx([2.5])
    assert outcome.whole_s.tolist() == pytest.approx([25.0])


def test_company_slows_a_round_and_leaving_speeds_it_up() -> None:
    outcome = _run([0.0, 4.0], [10.0, 4.0], alone_s=1.0, each_s=1.0)
    # Alone until 4 s: 2 rounds of 2 s. Then rounds of 3 s: the second's 4 end at 16 s, the first has 4 left, of 2 s.
    assert outcome.whole_s.tolist() == pytest.approx([24.0, 12.0])
    assert outcome.first_token_s.tolist() == pytest.approx([2.0, 3.0])


def test_no_more_at_once_than_allowed_and_first_come_first_served() -> None:
    outcome = _run([0.0, 1.0, 2.0], [5.0, 5.0, 5.0], sequences=1)
    assert outcome.whole_s.tolist() == pytest.approx([5.0, 9.0, 13.0])


def test_two_models_take_turns() -> None:
    services = [made.service("a"), made.service("b", family=1)]
    requests = made.requests([0.0, 0.0], of=[0, 1], tokens=[3.0, 3.0])
    outcome = simulate(services, made.card(sequences=8), made.shared(is_warm=True), requests)
    # Both come from RAM in 0.5 s, one after the other: a runs a half round alone, then 2.5 rounds of 2 s with b.
    assert outcome.whole_s.tolist() == pytest.approx([0.5 + 0.5 + 5.0, 1.0 + 5.0 + 0.5])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 20)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.floats(0.0, 2.0),
)
def test_work_is_conserved(jobs: list[tuple[float, float]], sequences: int, each_s: float) -> None:
    """A card that has work does it: busy time lies between what all tokens take in company and what they take alone."""
    jobs.sort()
    outcome = _run([at for at, _ in jobs], [tokens for _, tokens in jobs], sequences=sequences, each_s=each_s)
    total = sum(tokens for _, tokens in jobs)
    alone_s = total * (1.0 + each_s)
    together_s = total * (1.0 / sequences + each_s)
    assert together_s * (1 - 1e-6) - 1e-4 <= outcome.gpu_s["busy"] <= alone_s * (1 + 1e-6) + 1e-4
    for (_, tokens), whole_s in zip(jobs, outcome.whole_s.tolist(), strict=True):
        assert whole_s >= tokens * (1.0 + each_s) * (1 - 1e-6) - 1e-4
