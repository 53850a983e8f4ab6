"""Loads, swaps, evictions and cards that go off: each worked out by hand. Rates: origin 1, SSD 2, RAM 10 GB/s; a new
process takes 4 s, a swap 0.5 s (made.WAY)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fleet import made
from tools.fleet.policies import EVICTIONS, PLACEMENTS
from tools.fleet.services import Service
from tools.fleet.setups import Setup
from tools.fleet.simulate import Outcome, simulate

GB = 10**9
Floats = list[float]


def _run(
    services: list[Service], setup: Setup, at_s: Floats, of: list[int], tokens: Floats | None = None, **card: int
) -> Outcome:
    kind = made.card(**{"memory_bytes": 100 * GB, "sequences": 8, **card})
    return simulate(services, kind, setup, made.requests(at_s, of, tokens))


def _service(name: str, size_gb: int = 10, **other: object) -> Service:
    return made.service(name, size_gb * GB, **other)  # type: ignore[arg-type]


def test_a_server_that_was_off_starts_from_the_origin_and_then_from_ram() -> None:
    outcome = _run([_service("a")], made.single(keep_alive_s=10.0), [0.0, 100.0], [0, 0])
    assert outcome.whole_s.tolist() == pytest.approx([4 + 10 + 1, 4 + 1 + 1])
    assert (outcome.cold_starts, outcome.swaps, outcome.cold_requests) == (2, 0, 2)
    assert outcome.moved_bytes == {"origin": 10 * GB, "ssd": 0, "ram": 10 * GB}


def test_a_card_is_paid_for_from_its_load_until_its_keep_alive_is_over() -> None:
    outcome = _run([_service("a")], made.single(keep_alive_s=10.0), [0.0, 100.0], [0, 0])
    assert outcome.gpu_s["busy"] == pytest.approx(2.0)
    assert outcome.gpu_s["loading"] == pytest.approx(14.0 + 5.0)
    assert outcome.gpu_s["idle"] == pytest.approx(10.0)  # after the first; the run ends with the second
    assert outcome.gpu_hours == pytest.approx((2 + 19 + 10) / 3600)


def test_what_comes_within_the_keep_alive_finds_the_model() -> None:
    outcome = _run([_service("a")], made.single(keep_alive_s=10.0), [0.0, 20.0, 29.0], [0, 0, 0])
    assert outcome.whole_s.tolist() == pytest.approx([15.0, 1.0, 1.0])
    assert outcome.cold_requests == 1


def test_dedicated_cards_are_paid_for_all_the_time_and_never_cold() -> None:
    services = [_service("a"), _service("b", family=1)]
    outcome = _run(services, made.dedicated(2), [0.0, 3600.0], [0, 1])
    assert outcome.gpu_hours == pytest.approx(2 * 3601 / 3600)
    assert (outcome.cold_starts, outcome.swaps, outcome.cold_requests) == (0, 0, 0)


def test_models_that_fit_beside_each_other_are_swapped_in_once() -> None:
    services = [_service("a"), _service("b", family=1)]
    outcome = _run(services, made.shared(), [0.0, 50.0, 100.0, 150.0], [0, 1, 0, 1], memory_bytes=20 * GB)
    assert outcome.swaps == 2
    assert outcome.whole_s.tolist() == pytest.approx([11.5, 11.5, 1.0, 1.0])


def test_models_that_do_not_fit_push_each_other_out() -> None:
    services = [_service("a"), _service("b", family=1)]
    outcome = _run(services, made.shared(), [0.0, 50.0, 100.0, 150.0], [0, 1, 0, 1], memory_bytes=15 * GB)
    assert outcome.swaps == 4
    assert outcome.whole_s.tolist() == pytest.approx([11.5, 11.5, 2.5, 2.5])  # back from RAM


def test_of_a_fine_tune_only_what_differs_moves_and_takes_memory() -> None:
    services = [_service("a", different=0.1), _service("b", different=0.1)]
    outcome = _run(services, made.shared(), [0.0, 50.0, 100.0], [0, 1, 0], memory_bytes=11 * GB)
    assert outcome.whole_s.tolist() == pytest.approx([11.5, 1 + 0.5 + 1.0, 1.0])
    assert outcome.moved_bytes["origin"] == 11 * GB
    swapped = _run(services, made.shared(), [0.0, 50.0, 100.0], [0, 1, 0], memory_bytes=10 * GB)
    assert swapped.whole_s.tolist() == pytest.approx([11.5, 2.5, 0.1 + 0.5 + 1.0])
    assert swapped.swaps == 3


def test_a_model_at_work_goes_when_it_has_finished_after_its_quantum() -> None:
    services = [_service("a"), _service("b", family=1)]
    outcome = _run(services, made.shared(quantum_s=30.0), [0.0, 20.0], [0, 1], [100.0, 1.0], memory_bytes=10 * GB)
    assert outcome.drains == 1
    # a is ready at 10.5 and ends at 110.5, asked to go or not; then b is loaded in 10.5 s.
    assert outcome.whole_s.tolist() == pytest.approx([110.5, 110.5 + 10.5 + 1 - 20])


def test_within_its_quantum_a_model_goes_on_taking_work() -> None:
    services = [_service("a"), _service("b", family=1)]
    at_s, of = [0.0, 20.0, 30.0], [0, 1, 0]
    outcome = _run(services, made.shared(quantum_s=30.0), at_s, of, [100.0, 1.0, 1.0], memory_bytes=10 * GB)
    assert outcome.whole_s[2] == pytest.approx(1.0)


def test_a_model_asked_to_go_takes_nothing_new() -> None:
    services = [_service("a"), _service("b", family=1)]
    at_s, of = [0.0, 20.0, 60.0], [0, 1, 0]
    outcome = _run(services, made.shared(quantum_s=30.0), at_s, of, [100.0, 50.0, 1.0], memory_bytes=10 * GB)
    b_ends_s = 110.5 + 10.5 + 50
    assert outcome.whole_s.tolist() == pytest.approx([110.5, b_ends_s - 20, b_ends_s + 1.5 + 1 - 60])


def test_a_long_line_gets_another_copy() -> None:
    at_s = [0.0] * 4 + [20.0] * 12
    setup = made.shared(2, replicas_max=2, scale_out_waiting=4)
    outcome = _run([_service("a")], setup, at_s, [0] * 16, [10.0] * 16, sequences=1)
    assert outcome.swaps == 2
    alone = _run([_service("a")], made.shared(1, replicas_max=1), at_s, [0] * 16, [10.0] * 16, sequences=1)
    assert alone.swaps == 1
    assert outcome.whole_s.max() < 0.7 * alone.whole_s.max()


def test_a_card_that_is_off_is_turned_on_sooner_than_work_is_pushed_out() -> None:
    services = [_service("a"), _service("b", family=1)]
    setup = Setup("elastic", made.WAY, 2, is_warm=False, boot_s=3.0)
    outcome = _run(services, setup, [0.0, 60.0], [0, 1], [100.0, 1.0], memory_bytes=10 * GB)
    assert outcome.whole_s.tolist() == pytest.approx([3 + 4 + 10 + 100, 3 + 4 + 10 + 1])
    assert (outcome.drains, outcome.cold_starts) == (0, 2)


def test_shared_cards_begin_with_as_many_models_as_fit() -> None:
    services = [_service(name, family=family) for family, name in enumerate("abc")]
    outcome = _run(services, made.shared(2, is_preloaded=True), [0.0, 50.0, 100.0], [0, 1, 2], memory_bytes=10 * GB)
    assert outcome.whole_s.tolist() == pytest.approx([1.0, 1.0, 11.5])
    assert outcome.swaps == 1


MODELS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 2), st.floats(0.05, 1.0)), min_size=1, max_size=6
)  # size in GB, family, what differs
ARRIVALS = st.lists(st.tuples(st.floats(0, 400), st.integers(0, 5), st.floats(0.01, 60)), max_size=25)


@settings(max_examples=80, deadline=None)
@given(
    MODELS, ARRIVALS, st.integers(1, 4), st.sampled_from(sorted(PLACEMENTS)), st.sampled_from(sorted(EVICTIONS)),
    st.booleans(), st.booleans(), st.floats(0, 100), st.integers(1, 4),
)  # fmt: skip
def test_whatever_comes_no_request_is_lost_and_sums_add_up(
    models: list[tuple[int, int, float]], arrivals: list[tuple[float, int, float]], gpus: int, placement: str,
    eviction: str, is_exclusive: bool, is_elastic: bool, keep_alive_s: float, sequences: int,
) -> None:  # fmt: skip
    """`simulate` itself holds every run against conservation, order and memory; here is what only its caller knows."""
    sizes: dict[int, tuple[int, float]] = {}
    services = []
    for number, (size_gb, family, different) in enumerate(models):
        size_gb, different = sizes.setdefault(family, (size_gb, different))  # a family has one base
        services.append(_service(str(number), size_gb, family=family, different=different))
    arrivals = sorted((at, of % len(services), tokens) for at, of, tokens in arrivals)
    setup = Setup(
        "any", made.WAY, gpus, 0 if is_elastic else gpus, is_exclusive=is_exclusive, placement=placement,
        eviction=eviction, keep_alive_s=keep_alive_s, replicas_max=2, scale_out_waiting=2, gpus_per_node=2,
        ram_bytes=50 * GB, ssd_bytes=80 * GB,
        quantum_s=5.0, is_warm=len(arrivals) % 2 == 0,
    )  # fmt: skip
    at_s, of, tokens = ([each[i] for each in arrivals] for i in range(3))
    outcome, again = (
        _run(services, setup, at_s, of, tokens, memory_bytes=40 * GB, sequences=sequences) for _ in range(2)
    )
    assert outcome.figures() == pytest.approx(again.figures(), nan_ok=True)
    assert len(outcome.whole_s) == len(arrivals)
    assert all(whole >= asked * (1 - 1e-6) - 1e-4 for whole, asked in zip(outcome.whole_s, tokens, strict=True))
    assert 0 <= outcome.gpu_hours * 3600 <= gpus * outcome.ended_s * (1 + 1e-9)
    if not is_elastic:
        assert outcome.gpu_hours * 3600 == pytest.approx(gpus * outcome.ended_s)
    assert outcome.cold_starts + outcome.swaps >= len(set(of))
