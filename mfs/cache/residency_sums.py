"""Arithmetic over `residency`'s tables: bytes by chunk and by object, and whose a chunk row is. Columns stand there.

Vectorised, because a large cache has a million chunk rows and each question is about all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfs.cache.sidecar import HEADER_BYTES, RECORD_BYTES
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, SMALL_FILE_BYTES

_BITS_OF_BYTE = np.array([byte.bit_count() for byte in range(256)], np.int64)


@dataclass(frozen=True)
class Snapshot:
    """The used rows of both tables at one instant."""

    rows: NDArray[np.int64]
    chunks: NDArray[np.uint32]

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Per chunk row: bytes on disk, 0 if absent."""
        masks = self.chunks[:, 0]
        sizes = blocks_count(masks) * BLOCK_BYTES
        live = self.rows[self.rows[:, 4] > 0]
        last = live[:, 3] + live[:, 4] - 1
        tail_bytes = live[:, 5] - (live[:, 4] - 1) * CHUNK_BYTES
        last_block = (tail_bytes - 1) // BLOCK_BYTES
        present = (masks[last] >> last_block.astype(np.uint32)) & 1
        sizes[last] -= present * ((last_block + 1) * BLOCK_BYTES - tail_bytes)
        return sizes

    @property
    def sidecars(self) -> NDArray[np.int64]:
        """Per object row: bytes on disk of its sidecar, if it has one, in pages of which all are there."""
        return (1 + -(-self.rows[:, 4] * RECORD_BYTES // HEADER_BYTES)) * HEADER_BYTES

    def owners(self) -> NDArray[np.int64]:
        """Per chunk row: its object's row, -1 if none."""
        owners = np.full(len(self.chunks), -1, np.int64)
        live = np.flatnonzero(self.rows[:, 4] > 0)
        owners[_ranges(self.rows[live, 3], self.rows[live, 4])] = np.repeat(live, self.rows[live, 4])
        return owners

    def per_object(self) -> NDArray[np.int64]:
        """Per object row: bytes on disk, without its sidecar."""
        edges = np.concatenate([[0], np.cumsum(self.sizes)])
        totals: NDArray[np.int64] = edges[self.rows[:, 3] + self.rows[:, 4]] - edges[self.rows[:, 3]]
        return totals

    def last_uses(self) -> NDArray[np.int64]:
        """Per object row: when the chunk was used that was used last, in seconds since the epoch; 0 if none was."""
        last = np.zeros(len(self.rows), np.int64)
        live = np.flatnonzero(self.rows[:, 4] > 0)
        if len(live):
            starts = self.rows[live, 3]
            edges = np.stack([starts, starts + self.rows[live, 4]], axis=1).ravel()
            uses = np.append(self.chunks[:, 1], np.uint32(0)).astype(np.int64)  # an edge may be the end
            last[live] = np.maximum.reduceat(uses, edges)[::2]
        return last

    def coldest(self, evictable: NDArray[np.bool_], sealed: NDArray[np.bool_]) -> Iterator[tuple[int, int | None, int]]:
        """What to evict, coldest first: (object row, index of its chunk or None for all of it, bytes).

        evictable, sealed: per object row. A sealed object goes whole, and is as warm as its warmest chunk. Small files
        go last, as long as they are a quarter of everything at most.
        """
        owners, uses, sizes = self.owners(), self.chunks[:, 1].copy(), self.sizes.copy()
        chunks = np.flatnonzero((sizes > 0) & (owners >= 0))
        chunks = chunks[evictable[owners[chunks]]]
        is_small = self.rows[owners, 5] <= SMALL_FILE_BYTES
        if sizes[chunks[is_small[chunks]]].sum() * 4 > sizes.sum():
            is_small[:] = False
        whole = sealed[owners]
        of_sealed = chunks[whole[chunks]]
        rows, heads, head_of = np.unique(owners[of_sealed], return_index=True, return_inverse=True)
        warmest = np.zeros(len(rows), np.uint32)
        np.maximum.at(warmest, head_of, uses[of_sealed])
        heads = of_sealed[heads]  # of each sealed object the first chunk stands for all
        uses[heads], sizes[heads] = warmest, self.per_object()[rows]
        chunks = np.concatenate([chunks[~whole[chunks]], heads])
        for chunk in chunks[np.lexsort((uses[chunks], is_small[chunks]))]:
            row = int(owners[chunk])
            yield row, None if whole[chunk] else int(chunk - self.rows[row, 3]), int(sizes[chunk])


def blocks_count(masks: NDArray[np.uint32]) -> NDArray[np.int64]:
    """How many bits are set in each mask. Not np.bitwise_count: Triton's own Python has numpy 1.26."""
    counts: NDArray[np.int64] = _BITS_OF_BYTE[np.ascontiguousarray(masks).view(np.uint8)].reshape(-1, 4).sum(axis=1)
    return counts


def bytes_of(masks: NDArray[np.uint32], count: int, size: int) -> int:
    """Bytes of an object that its chunks' masks stand for."""
    total = int(blocks_count(masks).sum()) * BLOCK_BYTES
    tail_bytes = size - (count - 1) * CHUNK_BYTES
    last_block = (tail_bytes - 1) // BLOCK_BYTES
    if count and int(masks[-1]) >> last_block & 1:  # the object's last block is shorter than the others
        total -= (last_block + 1) * BLOCK_BYTES - tail_bytes
    return total


def id_of(row: NDArray[Any]) -> str:
    """The cache_id that an object row begins with."""
    a, b, c = (int(v) % 2**64 for v in row[:3])
    return f"{a:016x}{b:016x}{c:08x}"


def id_words(cache_id: str) -> tuple[int, int, int]:
    """A cache_id as an object row begins with it."""
    return int(cache_id[:16], 16), int(cache_id[16:32], 16), int(cache_id[32:], 16)


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """concatenate(arange(s, s + c) for s, c in zip(starts, counts)), vectorised."""
    if not len(starts):
        return np.zeros(0, np.int64)
    ends = np.cumsum(counts)
    rows: NDArray[np.int64] = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
    return rows
