"""Strips: what of a file is there, at a glance."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfs.cache.heat import STRIP_COLUMNS_MAX, masks_of, strip
from mfs.types import BLOCK_BYTES, CHUNK_BYTES

FULL = 0xFFFFFFFF


class TestStrip:
    def test_an_empty_file_has_none(self) -> None:
        assert strip(b"", 0) == ""

    @pytest.mark.parametrize("size", [1, BLOCK_BYTES, BLOCK_BYTES + 1, CHUNK_BYTES, 10 * CHUNK_BYTES + 3])
    def test_nothing_and_everything(self, size: int) -> None:
        chunks = -(-size // CHUNK_BYTES)
        blocks = -(-size // BLOCK_BYTES)
        columns = min(blocks, STRIP_COLUMNS_MAX)
        assert strip(b"", size) == "0" * columns
        assert strip(masks_of(dict.fromkeys(range(chunks), FULL), chunks), size) == "9" * columns

    def test_a_part_stands_where_it_is(self) -> None:
        found = strip(masks_of({3: FULL}, 10), 10 * CHUNK_BYTES, 10)
        assert found == "0009000000"
        assert strip(masks_of({0: 1}, 1), CHUNK_BYTES, 4) == "1000"
        assert strip(masks_of({0: FULL ^ 1}, 1), CHUNK_BYTES, 4) == "8999"

    @given(st.lists(st.integers(0, FULL), min_size=1, max_size=40), st.integers(1, CHUNK_BYTES), st.integers(1, 96))
    def test_a_digit_is_never_more_than_it_says(self, masks: list[int], tail: int, columns: int) -> None:
        size = (len(masks) - 1) * CHUNK_BYTES + tail
        blocks = -(-size // BLOCK_BYTES)
        found = strip(masks_of(dict(enumerate(masks)), len(masks)), size, columns)
        bits = "".join(f"{mask:032b}"[::-1] for mask in masks)[:blocks]
        assert len(found) == min(columns, blocks)
        for column, digit in enumerate(found):
            here = bits[blocks * column // len(found) : blocks * (column + 1) // len(found)]
            assert (digit == "0") == ("1" not in here)
            assert (digit == "9") == ("0" not in here)
