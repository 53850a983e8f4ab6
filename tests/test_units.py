"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfs.units import exact_size, format_duration, format_size, parse_duration, parse_size

SIZES = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("64M", 64 << 20), ("500G", 500 << 30), ("1.5T", 3 << 39), ("32g", 32 << 30),
        ("32GiB", 32 << 30), ("32 Gi", 32 << 30), (" 1k ", 1024), ("12B", 12), ("0.5K", 512),
        ("8191.999999999999999999P", (1 << 63) - 1),
    ],
)  # fmt: skip
def test_sizes_are_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1e9", "1,5G", "5X", "1.5", "3iB", "1.G", "٣G", "0x10", "nan", "1 0G", "1G 2M"]
)
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_decimal_spelling_is_ambiguous() -> None:
    with pytest.raises(ValueError, match="ambiguous size: '500GB'; write 500G"):
        parse_size("500GB")


def test_too_large() -> None:
    with pytest.raises(ValueError, match="too large"):
        parse_size("8192P")


@given(SIZES)
def test_exact_sizes_come_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size


@given(SIZES)
def test_rounded_sizes_are_short_and_near(size: int) -> None:
    text = format_size(size)
    number, unit = text.split()
    factor = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit]
    assert unit == "T" or len(text) <= 6
    assert abs(float(number) * factor - size) <= 0.051 * factor if "." in number else 0.51 * factor


@given(st.text())
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_duration):
        try:
            assert parse(text) >= 0
        except ValueError:
            pass


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5m", 300), ("1.5h", 5400), ("250ms", 0.25), ("1d", 86400), ("7", 7), ("0", 0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-1s", "inf", "1w", "1m30s", "9999d", "1M"])
def test_other_texts_are_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.7, "1m"),
        (200, "3m 20s"),
        (7500, "2h 5m"),
        (7230, "2h"),
        (363600, "4d 5h"),
        (-5, "0s"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
