"""What a driver runs and what a wheel needs, as tables: NVIDIA's rules, and outages that were."""

from __future__ import annotations

import pytest

from gpuload import compat
from gpuload.compat import Runs

V = compat.Version


@pytest.mark.parametrize(
    ("toolkit", "driver", "runs"),
    [
        ((12, 4), (12, 4), Runs.ALL),
        ((11, 8), (12, 4), Runs.ALL),  # backward compatible over majors
        ((12, 9), (13, 0), Runs.ALL),
        ((10, 2), (11, 0), Runs.ALL),
        ((12, 6), (12, 2), Runs.NO_JIT),  # minor version compatibility
        ((11, 8), (11, 0), Runs.NO_JIT),
        ((13, 2), (13, 0), Runs.NO_JIT),
        ((13, 0), (12, 9), Runs.NO),  # "the NVIDIA driver on your system is too old"
        ((12, 1), (11, 8), Runs.NO),
        ((10, 2), (10, 1), Runs.NO),  # before CUDA 11 there was no such promise
    ],
)
def test_toolkits_on_drivers(toolkit: V, driver: V, runs: Runs) -> None:
    assert compat.toolkit_on_driver(toolkit, driver) is runs


@pytest.mark.parametrize(
    ("built", "card", "can_jit", "by"),
    [
        (["sm_80", "sm_90"], (8, 0), True, "sm_80"),
        (["sm_80", "sm_90"], (8, 6), True, "sm_80"),  # same major, later minor
        (["sm_80", "sm_86"], (8, 9), True, "sm_86"),  # the nearest
        (["sm_86"], (8, 0), True, ""),  # an earlier minor
        (["sm_80", "sm_90"], (10, 0), True, ""),  # "no kernel image is available": B200 and torch for Hopper
        (["sm_80", "sm_90"], (12, 0), True, ""),
        (["sm_90", "compute_90"], (12, 0), True, "compute_90"),
        (["sm_90", "compute_90"], (12, 0), False, ""),  # PTX of a toolkit newer than the driver
        (["sm_90", "compute_90"], (9, 0), False, "sm_90"),
        (["compute_90"], (8, 0), True, ""),  # PTX is for what it was made for, and later
        (["sm_90a"], (9, 0), True, "sm_90a"),
        (["sm_90a", "compute_90a"], (10, 0), True, ""),  # of one architecture alone
        (["sm_100f"], (10, 3), True, "sm_100f"),  # of a family
        (["sm_100f"], (12, 0), True, ""),
        (["sm_100", "sm_120"], (12, 1), True, "sm_120"),
        (["sm_75"], (7, 0), True, ""),  # V100 and a wheel of CUDA 13
        ([], (8, 0), True, ""),
    ],
)
def test_kernels_on_cards(built: list[str], card: V, can_jit: bool, by: str) -> None:
    reach = compat.kernels_on_card(built, card, can_jit=can_jit)
    assert (reach.runs, reach.by) == (bool(by), by)
    assert reach.runs or reach.reason


def test_why_not_is_said() -> None:
    assert "none of them is for 10.0" in compat.kernels_on_card(["sm_80"], (10, 0)).reason
    assert "older than what made it" in compat.kernels_on_card(["compute_90"], (12, 0), can_jit=False).reason
    assert "minutes" in compat.kernels_on_card(["compute_90"], (12, 0)).reason


@pytest.mark.parametrize(
    ("toolkit", "said"),
    [((11, 8), "driver 450.80.02 or newer"), ((12, 1), "driver 525.60.13 or newer"),
     ((13, 0), "driver 580.65.06 or newer"), ((14, 0), "a driver of CUDA 14.0 or newer")],
)  # fmt: skip
def test_the_least_driver(toolkit: V, said: str) -> None:
    assert compat.driver_for(toolkit) == said


@pytest.mark.parametrize(
    ("card", "span"),
    [((7, 0), ((9, 0), (12, 9))), ((8, 0), ((11, 0), None)), ((9, 0), ((11, 8), None)), ((12, 0), ((12, 8), None)),
     ((3, 5), None)],
)  # fmt: skip
def test_toolkits_for_cards(card: V, span: tuple[V, V | None] | None) -> None:
    assert compat.toolkits_for(card) == span


def test_numbers_and_texts() -> None:
    assert [compat.of_driver(number) for number in (12040, 13000, 11080)] == [(12, 4), (13, 0), (11, 8)]
    assert [compat.parse_version(text) for text in ("12.6", "12.6.3", "", "x")] == [(12, 6), (12, 6), None, None]
    assert compat.name_of((9, 0)).startswith("Hopper")
    assert compat.name_of((3, 0)) == ""
    assert all(first <= (last or first) for _, _, first, last in compat.CARDS)
