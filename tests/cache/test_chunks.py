"""Chunk arithmetic against the naive count of every byte and bit."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mfs.cache.chunks import block_mask, chunk_spans, full_mask, mask_bytes, mask_runs, run_bytes
from mfs.types import BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, ByteRange

masks = st.integers(0, 2**BLOCKS_PER_CHUNK - 1)
edges = st.sampled_from([0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, CHUNK_BYTES - 1, CHUNK_BYTES])
offsets = st.integers(0, CHUNK_BYTES) | edges
far = st.integers(0, 5 * CHUNK_BYTES) | st.builds(lambda n, e: n * CHUNK_BYTES + e, st.integers(0, 4), edges)


@given(far, far)
def test_spans_cut_a_range_at_chunk_boundaries_without_gap_or_overlap(a: int, b: int) -> None:
    span = ByteRange(min(a, b), max(a, b))
    parts = list(chunk_spans(span))
    position = span.start
    for index, part in parts:
        assert index * CHUNK_BYTES + part.start == position
        assert len(part) > 0
        assert part.stop <= CHUNK_BYTES
        position += len(part)
    assert position == span.stop
    assert len({index for index, _ in parts}) == len(parts)


@given(offsets, offsets)
def test_a_mask_has_the_blocks_that_bytes_touch(a: int, b: int) -> None:
    start, stop = min(a, b), max(a, b)
    touched = {
        block
        for block in range(BLOCKS_PER_CHUNK)
        if max(start, block * BLOCK_BYTES) < min(stop, (block + 1) * BLOCK_BYTES)
    }
    assert {block for block in range(BLOCKS_PER_CHUNK) if block_mask(start, stop) >> block & 1} == touched


@given(masks)
def test_runs_are_the_maximal_runs_of_set_bits(mask: int) -> None:
    runs = list(mask_runs(mask))
    assert sum((1 << end) - (1 << first) for first, end in runs) == mask
    assert all(first < end for first, end in runs)
    assert all(end < following for (_, end), (following, _) in itertools.pairwise(runs))


@given(st.integers(1, CHUNK_BYTES) | edges.filter(bool), masks)
def test_bytes_of_a_mask_are_the_sum_of_its_blocks(length: int, mask: int) -> None:
    mask &= full_mask(length)
    each = [run_bytes(block, block + 1, length) for block in range(BLOCKS_PER_CHUNK) if mask >> block & 1]
    assert mask_bytes(mask, length) == sum(stop - start for start, stop in each)
    assert mask_bytes(full_mask(length), length) == length
