"""How a bound is shared: what one may have alone, what is left for the next, and what nobody can take away."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfs.workers.shares import Group, Shares, group_of_directory, group_of_file


def take_all(shares: Shares, group: Group, *, leaving: int = 0) -> int:
    count = 0
    while shares.may_take(group, leaving=leaving):
        shares.take(group)
        count += 1
    return count


def test_each_that_comes_gets_half_of_what_is_left_and_then_one() -> None:
    shares = Shares(32)
    assert [take_all(shares, (0, f"m{n}")) for n in range(8)] == [16, 8, 4, 2, 1, 1, 1, 1]


def test_what_is_less_urgent_leaves_room_for_what_is_more() -> None:
    shares = Shares(32)
    assert take_all(shares, (0, "m"), leaving=4) == 14
    assert take_all(shares, (0, "m")) == 2
    assert take_all(shares, (0, "h"), leaving=4) == 6


def test_a_source_full_of_models_leaves_room_for_another_source() -> None:
    shares = Shares(48, hard=64)
    assert sum(take_all(shares, (0, f"m{n}")) for n in range(1000)) == 56
    assert take_all(shares, (1, "m")) >= 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.sampled_from("abc"))), st.integers(1, 20))
def test_what_is_given_back_is_free_again_and_the_bound_holds(steps: list[tuple[bool, int, str]], total: int) -> None:
    shares = Shares(total)
    held: list[Group] = []
    for takes, source, model in steps:
        group = (source, model)
        if takes and shares.may_take(group):
            shares.take(group)
            held.append(group)
        elif not takes and group in held:
            shares.give(group)
            held.remove(group)
        assert shares.count == len(held) <= 2 * total
        assert shares.held(group) == held.count(group)
    for group in held:
        shares.give(group)
    assert shares.count == 0
    assert take_all(shares, (0, "a")) == (total + 1) // 2


@pytest.mark.parametrize(
    ("path", "model"), [("w.bin", ""), ("m/w.bin", "m"), ("m/1/w.bin", "m"), ("org/name/w.bin", "org")]
)
def test_a_model_is_a_directory_in_its_sources_root(path: str, model: str) -> None:
    assert group_of_file(3, path) == (3, model)
    assert group_of_directory(3, path.rpartition("/")[0]) == (3, model)
