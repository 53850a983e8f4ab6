"""Which parts of a file are there, as a short text: one digit for each stretch of it. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import pairwise

from mfs.types import BLOCK_BYTES, CHUNK_BYTES

STRIP_COLUMNS_MAX = 96
"""Digits of a strip: what fits beside a name on a page, and in a row of a terminal."""
_BLOCKS_PER_CHUNK = CHUNK_BYTES // BLOCK_BYTES


def strip(masks: bytes, size: int, columns_max: int = STRIP_COLUMNS_MAX) -> str:
    """A digit for each of equal stretches of a file: '0' nothing of it, '9' all, else how many eighths, 1 to 8.

    masks: of its chunks in order, 32 bits each, the lowest first. size: bytes of the file; '' for an empty one.
    """
    blocks_count = -(-size // BLOCK_BYTES)
    columns = min(columns_max, blocks_count)
    present = int.from_bytes(masks, "little") & ((1 << blocks_count) - 1)
    edges = [blocks_count * column // columns for column in range(columns + 1)] if columns else [0]
    digits = []
    for first, end in pairwise(edges):
        here = ((present >> first) & ((1 << (end - first)) - 1)).bit_count()
        digits.append(_digit(here, end - first))
    return "".join(digits)


def _digit(part: int, whole: int) -> str:
    if not part:
        return "0"
    return "9" if part == whole else str(min(8, max(1, round(9 * part / whole))))


def masks_of(chunks: Mapping[int, int], chunks_count: int) -> bytes:
    """Masks in order, of chunks of which only some are known. chunks: index -> blocks present."""
    masks = array("I", bytes(4 * chunks_count))
    for index, mask in chunks.items():
        masks[index] = mask
    return masks.tobytes()
