"""Which chunks stand on SSD and when they were last used: memory-mapped tables that tools read without the daemon.

Tables are hints that decide what to evict and what to show; whether a chunk is there is decided by its file. A crash
loses at most some last-use times; tables that do not open are rebuilt from the chunk files' headers.

Below <cache>/v1/index/, three mmap-ninja numpy arrays. They grow under an exclusive lock on `lock` and never shrink; rows
are written in place by any process. Structure:

    meta     uint64 (4,)       [objects used, chunk rows used, generation, reserved]
    objects  uint64 (rows, 8)  [cache_id digits 0-15, 16-31, 32-39, first chunk row, chunks count, size in bytes, pinned,
                               reserved]
    chunks   uint32 (rows, 2)  [blocks present, last use in seconds since the epoch]; an object's rows are consecutive

Rows of an object with nothing resident are given to the next object with as many chunks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmap_ninja.numpy as ninja
import numpy as np
from numpy.typing import NDArray

from mfs.cache.ssd import HEADER_BYTES, SsdConfig, SsdTier
from mfs.errors import NotFoundError
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ObjectId

logger = logging.getLogger(__name__)

_OBJECT_ROWS_STEP = 1024
_CHUNK_ROWS_STEP = 64 << 10


@dataclass(frozen=True)
class ObjectResidency:
    """What the SSD tier holds of one object."""

    cache_id: str
    source: str
    """'' when no chunk file is left to say."""
    path: str
    version: str
    digest: str | None
    size: int
    """Bytes of the whole object."""
    ssd_bytes: int
    last_used_at: float
    """Seconds since the epoch; 0 if never."""
    pinned: bool


@dataclass(frozen=True)
class Usage:
    """Totals over the SSD tier."""

    used_bytes: int
    objects_count: int


class ResidencyTables:
    """The tables of one cache directory, shared with other processes; thread-safe under the GIL."""

    def __init__(self, cache_directory: Path, *, writable: bool) -> None:
        """Open the tables; a writer creates or rebuilds them. Raises NotFoundError for a reader where there are none."""
        self._directory = cache_directory / "v1" / "index"
        self._cache_directory = cache_directory
        self._mode = "r+" if writable else "r"
        if not writable and not self._directory.is_dir():
            raise NotFoundError(f"{cache_directory} holds no mfs cache; name the directory given as --cache-dir")
        if writable:
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self._open_or_rebuild()
        else:
            self._map()

    # -- rows

    def find(self, cache_id: str) -> int | None:
        """The object's row, None if it has none."""
        self._remap_if_grown()
        used = int(self._meta[0])
        a, b, c = _id_words(cache_id)
        rows = self._objects[:used]
        hits = np.flatnonzero((rows[:, 0] == a) & (rows[:, 1] == b) & (rows[:, 2] == c))
        return int(hits[0]) if len(hits) else None

    def register(self, obj: ObjectId) -> int:
        """The object's row, made if there is none yet."""
        row = self.find(obj.cache_id)
        if row is None:
            with self._lock():
                row = self.find(obj.cache_id)
                if row is None:
                    row = self._add(obj.cache_id, obj.chunks_count, obj.size)
        return row

    def set_mask(self, row: int, index: int, mask: int) -> None:
        """Say which blocks of a chunk stand on SSD, and that it was used now."""
        chunk = int(self._objects[row, 3]) + index
        self._chunks[chunk] = (mask, int(time.time()))

    def masks(self, cache_id: str) -> NDArray[np.uint32]:
        """Copy of the blocks-present masks of all chunks of an object; empty if it is not known."""
        row = self.find(cache_id)
        if row is None:
            return np.zeros(0, np.uint32)
        first, count = int(self._objects[row, 3]), int(self._objects[row, 4])
        return np.array(self._chunks[first : first + count, 0])

    def touch(self, cache_id: str, indexes: list[int]) -> None:
        """Note a use of chunks now."""
        row = self.find(cache_id)
        if row is not None:
            first = int(self._objects[row, 3])
            self._chunks[[first + i for i in indexes if i < int(self._objects[row, 4])], 1] = int(time.time())

    def set_pinned(self, obj: ObjectId, pinned: bool) -> None:
        """Protect an object from SSD eviction, or stop to."""
        self._objects[self.register(obj), 6] = int(pinned)

    def pinned(self, cache_id: str) -> bool:
        row = self.find(cache_id)
        return row is not None and bool(self._objects[row, 6])

    # -- whole tables

    def usage(self) -> Usage:
        """Bytes and objects on SSD, file headers included."""
        sizes, _ = self._sizes()
        return Usage(int(sizes.sum()), int((self._per_object(sizes) > 0).sum()))

    def resident_bytes(self, cache_id: str) -> int:
        """Bytes of one object on SSD, without headers."""
        row = self.find(cache_id)
        if row is None:
            return 0
        return int(self._row_bytes(row))

    def victims(self, bytes_wanted: int) -> Iterator[tuple[str, int, int, int]]:
        """Unpinned chunks, least recently used first, until `bytes_wanted` are reached: (cache_id, index, row, bytes)."""
        sizes, owners = self._sizes()
        candidates = np.flatnonzero((sizes > 0) & (owners >= 0))
        candidates = candidates[self._objects[owners[candidates], 6] == 0]
        order = candidates[np.argsort(self._chunks[candidates, 1], kind="stable")]
        for chunk in order:
            if bytes_wanted <= 0:
                return
            row = int(owners[chunk])
            bytes_wanted -= int(sizes[chunk])
            yield self._cache_id(row), int(chunk) - int(self._objects[row, 3]), row, int(sizes[chunk])

    def objects(self, tier: SsdTier) -> Iterator[ObjectResidency]:
        """All objects with something resident or pinned, with the names their chunk files carry."""
        self._remap_if_grown()
        sizes, _ = self._sizes()
        per_object = self._per_object(sizes)
        for row in np.flatnonzero((per_object > 0) | (self._objects[: int(self._meta[0]), 6] > 0)):
            cache_id = self._cache_id(int(row))
            first, count = int(self._objects[row, 3]), int(self._objects[row, 4])
            present = np.flatnonzero(self._chunks[first : first + count, 0])
            header = tier.header(cache_id, int(present[0])) if len(present) else None
            source, path, _, version, digest = _identity(header.identity if header else "")
            yield ObjectResidency(
                cache_id, source, path, version, digest,
                size=int(self._objects[row, 5]),
                ssd_bytes=self._row_bytes(int(row)),
                last_used_at=float(self._chunks[first : first + count, 1].max(initial=0)),
                pinned=bool(self._objects[row, 6]),
            )  # fmt: skip

    def _row_bytes(self, row: int) -> int:
        first, count, size = (int(v) for v in self._objects[row, 3:6])
        masks = self._chunks[first : first + count, 0]
        total = int(np.bitwise_count(masks).sum()) * BLOCK_BYTES
        return total - self._tail_padding(masks, count, size)

    @staticmethod
    def _tail_padding(masks: NDArray[np.uint32], count: int, size: int) -> int:
        """How much shorter than a block the object's last block is, if it is present."""
        tail_bytes = size - (count - 1) * CHUNK_BYTES
        last_block = (tail_bytes - 1) // BLOCK_BYTES
        return (last_block + 1) * BLOCK_BYTES - tail_bytes if count and int(masks[-1]) >> last_block & 1 else 0

    def _sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Per chunk row: bytes on disk (0 if absent) and the object's row (-1 if none)."""
        self._remap_if_grown()
        used_objects, used_chunks = int(self._meta[0]), int(self._meta[1])
        masks = np.array(self._chunks[:used_chunks, 0])
        sizes = np.bitwise_count(masks).astype(np.int64) * BLOCK_BYTES
        sizes[masks > 0] += HEADER_BYTES
        owners = np.full(used_chunks, -1, np.int64)
        rows = self._objects[:used_objects].astype(np.int64)
        counts = rows[:, 4]
        live = np.flatnonzero(counts > 0)
        owners[_ranges(rows[live, 3], counts[live])] = np.repeat(live, counts[live])
        last = rows[live, 3] + counts[live] - 1
        tail_bytes = rows[live, 5] - (counts[live] - 1) * CHUNK_BYTES
        last_block = (tail_bytes - 1) // BLOCK_BYTES
        present = (masks[last] >> last_block.astype(np.uint32)) & 1
        sizes[last] -= present * ((last_block + 1) * BLOCK_BYTES - tail_bytes)
        return sizes, owners

    def _per_object(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = self._objects[: int(self._meta[0])].astype(np.int64)
        edges = np.concatenate([[0], np.cumsum(sizes)])
        totals: NDArray[np.int64] = edges[rows[:, 3] + rows[:, 4]] - edges[rows[:, 3]]
        return totals

    # -- files

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time may grow or rebuild the tables. Held for milliseconds, freed by the kernel on death."""
        fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _map(self) -> None:
        self._meta = ninja.open_existing(self._directory / "meta", mode=self._mode)
        self._objects = ninja.open_existing(self._directory / "objects", mode=self._mode)
        self._chunks = ninja.open_existing(self._directory / "chunks", mode=self._mode)
        if self._meta.shape != (4,) or self._meta[0] > len(self._objects) or self._meta[1] > len(self._chunks):
            raise ValueError("the tables do not fit together")

    def _remap_if_grown(self) -> None:
        if int(self._meta[0]) > len(self._objects) or int(self._meta[1]) > len(self._chunks):
            self._objects = ninja.open_existing(self._directory / "objects", mode=self._mode)
            self._chunks = ninja.open_existing(self._directory / "chunks", mode=self._mode)

    def _open_or_rebuild(self) -> None:
        existed = (self._directory / "meta").exists()
        try:
            self._map()
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            if existed:
                logger.warning("cache: index of %s is damaged (%s); rebuilding it", self._cache_directory, error)
        for name in ("meta", "objects", "chunks"):
            shutil.rmtree(self._directory / name, ignore_errors=True)
        ninja.from_ndarray(self._directory / "objects", np.zeros((_OBJECT_ROWS_STEP, 8), np.uint64))
        ninja.from_ndarray(self._directory / "chunks", np.zeros((_CHUNK_ROWS_STEP, 2), np.uint32))
        ninja.from_ndarray(self._directory / "meta", np.zeros(4, np.uint64))
        self._map()
        for header in SsdTier(SsdConfig(self._cache_directory)).walk():
            row = self.find(header.cache_id)
            if row is None:
                row = self._add(header.cache_id, -(-header.object_bytes // CHUNK_BYTES), header.object_bytes)
            self.set_mask(row, header.index, header.mask)

    def _add(self, cache_id: str, chunks_count: int, size: int) -> int:
        """A row for a new object; the lock is held."""
        row = self._reusable(chunks_count)
        if row is None:
            row, first = int(self._meta[0]), int(self._meta[1])
            self._grow("objects", row + 1, _OBJECT_ROWS_STEP)
            self._grow("chunks", first + chunks_count, _CHUNK_ROWS_STEP)
        else:
            first = int(self._objects[row, 3])
        self._objects[row] = (*_id_words(cache_id), first, chunks_count, size, 0, 0)
        self._meta[1] = max(int(self._meta[1]), first + chunks_count)
        self._meta[0] = max(int(self._meta[0]), row + 1)
        return row

    def _reusable(self, chunks_count: int) -> int | None:
        """An unpinned row with as many chunks and nothing resident."""
        rows = self._objects[: int(self._meta[0])]
        for row in np.flatnonzero((rows[:, 4] == chunks_count) & (rows[:, 6] == 0)):
            first = int(rows[row, 3])
            if not self._chunks[first : first + chunks_count, 0].any():
                return int(row)
        return None

    def _grow(self, name: str, rows_wanted: int, step: int) -> None:
        table: Any = getattr(self, f"_{name}")
        missing = rows_wanted - len(table)
        if missing > 0:
            # extend_dir appends to the file and then rewrites the shape, so it must start from a file of that shape.
            count = -(-missing // step) * step
            path = self._directory / name
            os.truncate(path / "data.ninja", table.nbytes)
            ninja.extend_dir(path, np.zeros((count, table.shape[1]), table.dtype))
            setattr(self, f"_{name}", ninja.open_existing(path, mode=self._mode))

    def _cache_id(self, row: int) -> str:
        a, b, c = (int(v) for v in self._objects[row, :3])
        return f"{a:016x}{b:016x}{c:08x}"


def scan(cache_directory: Path) -> Iterator[ObjectResidency]:
    """What the SSD tier below `cache_directory` holds, read from the tables alone: no daemon is asked.

    Raises: NotFoundError if no cache stands there.
    """
    tables = ResidencyTables(cache_directory, writable=False)
    yield from tables.objects(SsdTier(SsdConfig(cache_directory)))


def _id_words(cache_id: str) -> tuple[int, int, int]:
    return int(cache_id[:16], 16), int(cache_id[16:32], 16), int(cache_id[32:], 16)


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """concatenate(arange(s, s + c) for s, c in zip(starts, counts)), vectorised."""
    if not len(starts):
        return np.zeros(0, np.int64)
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)


def _identity(text: str) -> tuple[str, str, int, str, str | None]:
    try:
        source, path, size, version, digest = json.loads(text)
    except ValueError:  # cut off, or no file left
        return "", text, 0, "", None
    return source, path, size, version, digest
