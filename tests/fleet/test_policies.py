"""Who goes and where to, policy by policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.fleet.policies import DRAINS, EVICTIONS, EVICTS, FREE, PLACEMENTS, Candidate, Resident, home_gpus

_OLD = Resident(last_used_s=1.0, uses_count=9, rate_per_s=2.0, reload_s=1.0, freed_bytes=100)
_RARE = Resident(last_used_s=5.0, uses_count=1, rate_per_s=3.0, reload_s=1.0, freed_bytes=100)
_CHEAP = Resident(last_used_s=9.0, uses_count=8, rate_per_s=0.5, reload_s=1.0, freed_bytes=100)


@pytest.mark.parametrize(("name", "first"), [("lru", _OLD), ("lfu", _RARE), ("cost", _CHEAP)])
def test_who_goes_first(name: str, first: Resident) -> None:
    assert min((_CHEAP, _RARE, _OLD), key=EVICTIONS[name]) is first


def test_what_is_soon_back_and_gives_much_goes_first_by_cost() -> None:
    small = Resident(1.0, 1, 1.0, reload_s=1.0, freed_bytes=10)
    assert min((small, small._replace(freed_bytes=100)), key=EVICTIONS["cost"]).freed_bytes == 100
    assert min((small, small._replace(reload_s=0.1)), key=EVICTIONS["cost"]).reload_s == 0.1


@pytest.mark.parametrize(("name", "gpu"), [("static", 0), ("first-fit", 0), ("least-loaded", 1), ("popularity", 2)])
def test_where_to(name: str, gpu: int) -> None:
    candidates = [
        Candidate(EVICTS, 0, 5, 1.0, victims_rate=3.0, residents_rate=4.0, plan=None),
        Candidate(EVICTS, 1, 0, 1.0, victims_rate=2.0, residents_rate=4.0, plan=None),
        Candidate(EVICTS, 2, 4, 1.0, victims_rate=0.1, residents_rate=4.0, plan=None),
    ]
    assert min(candidates, key=PLACEMENTS[name]).gpu == gpu


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_a_better_step_comes_before_any_policy(name: str) -> None:
    worst = Candidate(FREE, 9, 99, 99.0, 99.0, 99.0, None)
    assert min(Candidate(DRAINS, 0, 0, 0.0, 0.0, 0.0, None), worst, key=PLACEMENTS[name]) is worst


FLOATS = st.floats(0, 1e6)


@given(
    st.sampled_from(sorted(PLACEMENTS)), st.integers(FREE, DRAINS), st.integers(FREE, DRAINS), st.integers(0, 9),
    FLOATS, FLOATS, FLOATS,
)  # fmt: skip
def test_what_is_hoped_of_a_card_is_no_worse_than_what_is_found(
    name: str, step: int, hoped_step: int, running: int, load_s: float, lost: float, there: float
) -> None:
    """Why `Choice.best` may leave out cards whose hope does not beat the best: it would find nothing better."""
    found = Candidate(max(step, hoped_step), 3, running, load_s, lost, there, None)
    hoped = Candidate(min(step, hoped_step), 3, running, load_s, 0.0, 0.0, None)
    assert PLACEMENTS[name](hoped) <= PLACEMENTS[name](found)


@given(st.integers(1, 60), st.integers(1, 60))
def test_homes_cover_every_card_and_are_shared_only_where_they_must_be(services: int, gpus: int) -> None:
    homes = [set(home_gpus(service, services, gpus)) for service in range(services)]
    assert all(homes)
    assert set().union(*homes) == set(range(gpus))
    if gpus >= services:
        assert sum(map(len, homes)) == gpus
