"""Arithmetic of chunks and blocks. Pure: ranges in, masks and spans out.

A chunk holds up to 32 blocks; a set of blocks is an int whose bit i stands for block i. The last block of an object may
be shorter than BLOCK_BYTES, the last chunk shorter than CHUNK_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator

from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange


def chunk_spans(span: ByteRange) -> Iterator[tuple[int, ByteRange]]:
    """Cut a range of an object at chunk boundaries: (chunk index, range relative to that chunk)."""
    position = span.start
    while position < span.stop:
        index, start = divmod(position, CHUNK_BYTES)
        stop = min(CHUNK_BYTES, start + span.stop - position)
        yield index, ByteRange(start, stop)
        position += stop - start


def block_mask(start: int, stop: int) -> int:
    """The blocks that bytes [start, stop) of a chunk touch; 0 for an empty range."""
    if start >= stop:
        return 0
    first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
    return (2 << last) - (1 << first)


def full_mask(length: int) -> int:
    """All blocks of a chunk that is `length` bytes long."""
    return block_mask(0, length)


def mask_runs(mask: int) -> Iterator[tuple[int, int]]:
    """Contiguous runs of set blocks as (first, last + 1), ascending."""
    first = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        first += skip
        run = (~mask & (mask + 1)).bit_length() - 1
        yield first, first + run
        mask >>= run
        first += run


def lowest(mask: int, count: int) -> int:
    """The first `count` blocks of `mask`, or all."""
    chosen = 0
    while mask and count > 0:
        chosen |= mask & -mask
        mask &= mask - 1
        count -= 1
    return chosen


def run_bytes(first: int, end: int, length: int) -> tuple[int, int]:
    """Byte range [start, stop) of blocks [first, end) in a chunk of `length` bytes."""
    return first * BLOCK_BYTES, min(end * BLOCK_BYTES, length)


def mask_bytes(mask: int, length: int) -> int:
    """How many bytes the blocks of `mask` hold in a chunk of `length` bytes."""
    return sum(stop - start for start, stop in (run_bytes(a, b, length) for a, b in mask_runs(mask)))


def mask_span(index: int, mask: int, size: int) -> ByteRange:
    """The range of an object of `size` bytes from the first to the last block of `mask` in a chunk; empty without."""
    first, end = (mask & -mask).bit_length() - 1, mask.bit_length()
    start = min(index * CHUNK_BYTES + max(first, 0) * BLOCK_BYTES, size)
    return ByteRange(start, max(start, min(index * CHUNK_BYTES + end * BLOCK_BYTES, size)))
