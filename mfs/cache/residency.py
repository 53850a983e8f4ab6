"""Which chunks stand on SSD and when they were last used: memory-mapped tables that tools read without the daemon.

Tables are hints that decide what to evict and what to show; whether a chunk is there its object's sidecar decides. Rows
are read from there under the lock under which files are dropped: they are right unless somebody was killed. A crash
loses at most some last-use times; tables that do not open are rebuilt from the sidecars.

Below <cache>/v2/index/, three mmap-ninja numpy arrays. They grow under an exclusive lock on `lock` and never shrink;
rows are written in place by any process. Structure:

    meta     uint64 (4,)       [objects used, chunk rows used, generation, reserved]
    objects  uint64 (rows, 8)  [cache_id digits 0-15, 16-31, 32-39, first chunk row, chunks count, size in bytes,
                               flags: 1 pinned, 2 sealed, not evicted before this time in seconds since the epoch]
    chunks   uint32 (rows, 2)  [blocks present, last use in seconds since the epoch]; an object's rows are consecutive

Pins must outlive the tables: each is also an empty file <cache>/v2/pins/<cache_id>.<size in bytes>, from which a
rebuild takes them.

Rows of an object with nothing resident are given to the next object with as many chunks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfs.cache.chunks import mask_bytes
from mfs.cache.directory import open_own, root_of
from mfs.cache.ninja import ninja
from mfs.cache.residency_sums import Snapshot, bytes_of, id_of, id_words
from mfs.cache.ssd import SsdConfig, SsdTier, Standing
from mfs.errors import NotFoundError, StoreError
from mfs.types import CHUNK_BYTES, ObjectId

logger = logging.getLogger(__name__)

_OBJECT_ROWS_STEP = 1024
_CHUNK_ROWS_STEP = 64 << 10
_LAST_ROWS_MAX = 1024
_COLUMNS = {"meta": 0, "objects": 8, "chunks": 2}  # 0: the table has one dimension
_DTYPES = {"meta": np.uint64, "objects": np.uint64, "chunks": np.uint32}
_PINNED, _SEALED = 1, 2
_NOBODY = ("", "", 0, "", None)  # the identity of what has no file


@dataclass(frozen=True)
class ObjectResidency:
    """What the SSD tier holds of one object."""

    cache_id: str
    source: str
    """'' when no file is left to say."""
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
    pinned_count: int
    """Objects, also those of which nothing is here yet."""
    pinned_bytes: int
    """Of theirs, what no eviction may take."""
    sealed_count: int
    sealed_bytes: int
    """Of objects that are whole and verified, which the kernel may read by itself."""


class ResidencyTables:
    """The tables of one cache directory, shared with other processes; thread-safe under the GIL."""

    def __init__(self, cache_directory: Path, *, writable: bool, shared: bool = False) -> None:
        """Open the tables; a writer creates or rebuilds them. shared: see `directory`.

        Raises: NotFoundError for a reader where there are none, StoreError for one where they are damaged; OSError for
            a writer whose disk is full.
        """
        self._directory = root_of(cache_directory) / "index"
        self._meta_path = str(self._directory / "meta" / "data.ninja")
        self._pins = root_of(cache_directory) / "pins"
        self._cache_directory = cache_directory
        self._mode = "r+" if writable else "r"
        self._shared = shared
        self._last_rows: dict[str, int] = {}
        """Where objects were found last; each row says whose it is."""
        if not writable and not self._directory.is_dir():
            raise NotFoundError(f"{cache_directory} holds no mfs cache; name the directory given as --cache-dir")
        if writable:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._lock():
                self._open_or_rebuild()
            return
        try:
            with self._lock(fcntl.LOCK_SH):
                self._map()
        except Exception as error:  # a damaged file makes numpy raise anything
            raise StoreError(
                f"the index of cache {cache_directory} cannot be read ({error}); the next mount with it rebuilds it"
            ) from error

    # -- rows

    def find(self, cache_id: str) -> int | None:
        """The object's row, None if it has none. Another object may get it at once, unless something is resident."""
        self._remap_if_changed()
        words = id_words(cache_id)
        rows = self._objects.view(np.ndarray)[: int(self._meta[0])]  # a memmap is slower at each step
        last = self._last_rows.get(cache_id, len(rows))
        if last < len(rows) and tuple(rows[last, :3].tolist()) == words:
            return last
        for row in np.flatnonzero(rows[:, 0] == words[0]).tolist():
            if tuple(rows[row, :3].tolist()) == words:
                if len(self._last_rows) >= _LAST_ROWS_MAX:
                    self._last_rows.clear()
                self._last_rows[cache_id] = row
                return int(row)
        return None

    def set_mask(self, obj: ObjectId, index: int, mask: int) -> None:
        """Say which blocks of a chunk stand on SSD, and that it was used now."""
        with self._lock():
            self._set_mask(obj, index, mask)

    def _set_mask(self, obj: ObjectId, index: int, mask: int) -> None:
        row = self.find(obj.cache_id)
        if row is None and not mask:
            return
        if row is None:
            row = self._add(obj.cache_id, obj.chunks_count, obj.size)
        self._chunks[int(self._objects[row, 3]) + index] = (mask, int(time.time()))

    def learn_chunk(self, tier: SsdTier, obj: ObjectId, index: int) -> int:
        """Note what the sidecar says of a chunk, and that it was used now; returns its mask."""
        with self._lock():
            mask = tier.mask(obj.cache_id, index)
            self._set_mask(obj, index, mask)
            return mask

    def learn(self, tier: SsdTier, cache_id: str) -> None:
        """Note what stands of an object. Costs a look at the whole sidecar, under the lock."""
        with self._lock():
            standing = tier.standing(cache_id)
            if standing is not None:
                self._note(standing)
                return
            row = self.find(cache_id)
            if row is not None:
                self._clear(row)

    def drop(self, tier: SsdTier, cache_id: str, row: int, index: int | None) -> list[tuple[int, int]]:
        """Drop a chunk, or with index None the object, unless it is pinned or kept by now; returns [(chunk, bytes)].

        More goes than was asked for where only whole objects can. Nothing happens if `row` is another's. In one turn
        with `keep`, so that who keeps an object and then looks at its files loses none of them.
        """
        with self._lock():
            self._remap_if_changed()
            if self._cache_id(row) != cache_id or self._is_protected(row):
                return []
            first, count, size = (int(v) for v in self._objects[row, 3:6])
            standing = self._chunks[first : first + count, 0]
            if index is None:
                tier.remove(cache_id)
            elif tier.drop_chunk(cache_id, index):
                index = None
            dropped = [
                (i, mask_bytes(int(standing[i]), min(CHUNK_BYTES, size - i * CHUNK_BYTES)))
                for i in ([index] if index is not None else map(int, np.flatnonzero(standing)))
            ]
            if index is None:
                self._clear(row)
                return dropped
            standing[index] = 0
            if not standing.any():
                tier.remove_if_empty(cache_id)
            return dropped

    def _clear(self, row: int) -> None:
        """Say that nothing stands of an object; the lock is held."""
        first, count = int(self._objects[row, 3]), int(self._objects[row, 4])
        self._chunks[first : first + count, 0] = 0
        self._objects[row, 6] = int(self._objects[row, 6]) & ~_SEALED

    def masks(self, cache_id: str) -> NDArray[np.uint32]:
        """Copy of the blocks-present masks of all chunks of an object; empty if it is not known."""
        row = self.find(cache_id)
        if row is None:
            return np.zeros(0, np.uint32)
        first, count = int(self._objects[row, 3]), int(self._objects[row, 4])
        return np.array(self._chunks[first : first + count, 0])

    def mask(self, cache_id: str, index: int) -> int:
        """The blocks of one chunk that are present; 0 for an object that is not known."""
        row = self.find(cache_id)
        if row is None or index >= int(self._objects[row, 4]):
            return 0
        return int(self._chunks[int(self._objects[row, 3]) + index, 0])

    def touch(self, cache_id: str, indexes: list[int]) -> None:
        """Note a use of chunks now."""
        row = self.find(cache_id)
        if row is not None:
            first = int(self._objects[row, 3])
            self._chunks[[first + i for i in indexes if i < int(self._objects[row, 4])], 1] = int(time.time())

    def set_pinned(self, obj: ObjectId, pinned: bool) -> None:
        """Protect an object from SSD eviction, or stop to."""
        with self._lock():
            row = self.find(obj.cache_id)
            if row is None and pinned:
                row = self._add(obj.cache_id, obj.chunks_count, obj.size)
            if row is not None:
                flags = int(self._objects[row, 6])
                self._objects[row, 6] = flags | _PINNED if pinned else flags & ~_PINNED
            pin = self._pins / f"{obj.cache_id}.{obj.size}"
            if pinned:
                self._pins.mkdir(mode=0o700, exist_ok=True)
                os.close(open_own(pin, os.O_WRONLY | os.O_CREAT, shared=self._shared))
            else:
                pin.unlink(missing_ok=True)

    def pinned(self, cache_id: str) -> bool:
        row = self.find(cache_id)
        return row is not None and bool(int(self._objects[row, 6]) & _PINNED)

    def sealed_after(self, cache_id: str) -> str | None:
        """The sealed object that comes next, None after the last. '' comes before all."""
        found = self._snapshot()
        ids = (id_of(row) for row in found.rows[found.rows[:, 6] & _SEALED > 0])
        return min((other for other in ids if other > cache_id), default=None)

    def keep(self, obj: ObjectId, until_s: int) -> None:
        """Protect an object from SSD eviction up to a time, in seconds since the epoch, or longer if it is already."""
        with self._lock():
            row = self.find(obj.cache_id)
            if row is None:
                row = self._add(obj.cache_id, obj.chunks_count, obj.size)
            self._objects[row, 7] = max(int(self._objects[row, 7]), until_s)

    def protected(self, cache_id: str) -> bool:
        """Whether an object is pinned, or kept for somebody who has it open."""
        row = self.find(cache_id)
        return row is not None and self._is_protected(row)

    def _is_protected(self, row: int) -> bool:
        return bool(int(self._objects[row, 6]) & _PINNED) or int(self._objects[row, 7]) > time.time()

    # -- whole tables

    def usage(self) -> Usage:
        """Bytes and objects on SSD, sidecars included."""
        found = self._snapshot()
        sizes, flags = found.per_object(), found.rows[:, 6]
        resident, pinned, sealed = sizes > 0, flags & _PINNED > 0, flags & _SEALED > 0
        used = found.sizes.sum() + found.sidecars[resident].sum()
        columns = (used, resident.sum(), pinned.sum(), sizes[pinned].sum(), sealed.sum(), sizes[sealed].sum())
        return Usage(*map(int, columns))

    def resident_bytes(self, cache_id: str) -> int:
        """Bytes of one object on SSD, without its sidecar."""
        row = self.find(cache_id)
        if row is None:
            return 0
        first, count, size = (int(v) for v in self._objects[row, 3:6])
        return bytes_of(self._chunks[first : first + count, 0], count, size)

    def victims(self, bytes_wanted: int, spare: Container[str] = ()) -> Iterator[tuple[str, int | None, int, int]]:
        """What to evict, unpinned and coldest first, until `bytes_wanted` are reached: (cache_id, index, row, bytes).

        spare: cache_ids that are left alone.
        A chunk each, or with index None a whole sealed object. Small files go last, see `Snapshot.coldest`: a model
        whose weights must come again loads, one whose configuration must come from an origin that hangs does not.
        """
        found = self._snapshot()
        rows = found.rows
        evictable = (rows[:, 6] & _PINNED == 0) & (rows[:, 7] <= time.time())
        for row, index, nbytes in found.coldest(evictable, rows[:, 6] & _SEALED > 0):
            if bytes_wanted <= 0:
                return
            cache_id = id_of(rows[row])
            if cache_id not in spare:
                bytes_wanted -= nbytes
                yield cache_id, index, row, nbytes

    def objects(self, tier: SsdTier) -> Iterator[ObjectResidency]:
        """All objects with something resident or pinned, with the names their sidecars carry."""
        found = self._snapshot()
        for row in np.flatnonzero((found.per_object() > 0) | (found.rows[:, 6] & _PINNED > 0)):
            cache_id = id_of(found.rows[row])
            first, count, size = (int(v) for v in found.rows[row, 3:6])
            chunks = found.chunks[first : first + count]
            header = tier.header(cache_id) if chunks[:, 0].any() else None
            source, path, _, version, digest = _identity(header.identity) if header else _NOBODY
            yield ObjectResidency(
                cache_id, source, path, version, digest,
                size=size,
                ssd_bytes=bytes_of(chunks[:, 0], count, size),
                last_used_at=float(chunks[:, 1].max(initial=0)),
                pinned=bool(found.rows[row, 6] & _PINNED),
            )  # fmt: skip

    def resident(self) -> Iterator[tuple[str, int, int, bool]]:
        """(cache_id, bytes on SSD, last use in seconds since the epoch, pinned) of objects with anything resident."""
        found = self._snapshot()
        sizes, uses = found.per_object(), found.last_uses()
        for row in np.flatnonzero(sizes > 0).tolist():
            yield id_of(found.rows[row]), int(sizes[row]), int(uses[row]), bool(found.rows[row, 6] & _PINNED)

    def name_of(self, tier: SsdTier, cache_id: str) -> tuple[str, str]:
        """(source, path inside it) that an object's sidecar carries; ('', '') if it is gone by now."""
        header = tier.header(cache_id)
        source, path, _, _, _ = _identity(header.identity) if header else _NOBODY
        return source, path

    def _snapshot(self) -> Snapshot:
        """Copies that fit together, though other threads and processes go on writing."""
        self._remap_if_changed()
        objects, chunks = self._objects, self._chunks
        rows = objects[: int(self._meta[0])].astype(np.int64)
        used_chunks = np.array(chunks[: int(self._meta[1])])  # read after the objects: an object's chunks come first
        rows[rows[:, 3] + rows[:, 4] > len(used_chunks), 3:5] = 0
        return Snapshot(rows, used_chunks)

    def reconcile(self, tier: SsdTier) -> None:
        """Make the tables say what stands there: each kill between a file and its row leaves them a little apart."""
        for prefix in (f"{number:02x}" for number in range(256)):
            standing = {found.header.cache_id: found for found in tier.walk(prefix)}
            snapshot = self._snapshot()
            rows = snapshot.rows
            known = {id_of(row): row for row in rows[rows[:, 0].view(np.uint64) >> np.uint64(56) == int(prefix, 16)]}
            for cache_id in known.keys() | standing.keys():
                row, found = known.get(cache_id), standing.get(cache_id)
                noted = snapshot.chunks[row[3] : row[3] + row[4], 0].tolist() if row is not None else []
                is_sealed = row is not None and bool(row[6] & _SEALED)
                if found is None:
                    if any(noted) or is_sealed:
                        self.learn(tier, cache_id)
                elif not any(found.masks):
                    tier.remove_if_empty(cache_id)
                    self.learn(tier, cache_id)
                elif noted != found.masks or is_sealed != (found.header.sealed is not None):
                    self.learn(tier, cache_id)  # looks again: it may just be being written

    # -- files

    @contextlib.contextmanager
    def _lock(self, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
        """One process at a time may change rows, grow or rebuild. Held for microseconds, freed on death."""
        flags = os.O_RDWR | os.O_CREAT if self._mode == "r+" else os.O_RDONLY
        fd = open_own(self._directory / "lock", flags, shared=self._shared or self._mode == "r")
        try:
            fcntl.flock(fd, kind)
            yield
        finally:
            os.close(fd)

    def _map(self) -> None:
        """Map the tables. Raises ValueError, and whatever else a damaged file makes numpy raise."""
        meta, objects, chunks = (self._open(name, columns) for name, columns in _COLUMNS.items())
        used_objects, used_chunks = int(meta[0]), int(meta[1])
        if used_objects > len(objects) or used_chunks > len(chunks):
            raise ValueError("the tables do not fit together")
        rows = objects[:used_objects].astype(np.int64)
        ends = np.sort(rows[rows[:, 4] > 0], axis=0)[:, 3]  # first chunk rows, ascending: they must not overlap
        if (
            not rows[:, :3].any(axis=1).all()
            or (rows[:, 4] != -(-rows[:, 5] // CHUNK_BYTES)).any()
            or (rows[:, 3] + rows[:, 4] > used_chunks).any()
            or rows[:, 4].sum() > used_chunks
            or (np.diff(ends) == 0).any()
        ):
            raise ValueError("its rows do not fit together")
        self._meta, self._objects, self._chunks = meta, objects, chunks
        self._inode = os.stat(self._meta_path).st_ino

    def _open(self, name: str, columns: int) -> Any:
        path = self._directory / name
        if not path.is_dir():  # opening would create it
            raise FileNotFoundError(f"{path} is missing")
        table = ninja.open_existing(path, mode="r")  # first: opened for writing, a file too short would be made longer
        if (
            table.dtype != _DTYPES[name]
            or table.shape[1:] != ((columns,) if columns else ())
            or not table.flags.c_contiguous
        ):
            raise ValueError(f"{path} has shape {table.shape} of {table.dtype}")
        return ninja.open_existing(path, mode=self._mode) if self._mode != "r" else table

    def _remap_if_changed(self) -> None:
        """Follow another process that grew or rebuilt the tables."""
        try:
            rebuilt = os.stat(self._meta_path).st_ino != self._inode
            if rebuilt:
                self._map()
        except Exception as error:  # being rebuilt at this moment: the old tables serve until it is done
            logger.debug("cache: index of %s: %s", self._cache_directory, error)
        if int(self._meta[0]) > len(self._objects):
            self._objects = ninja.open_existing(self._directory / "objects", mode=self._mode)
        if int(self._meta[1]) > len(self._chunks):
            self._chunks = ninja.open_existing(self._directory / "chunks", mode=self._mode)

    def _open_or_rebuild(self) -> None:
        existed = (self._directory / "meta").exists()
        try:
            self._map()
            return
        except Exception as error:  # a damaged file makes numpy raise anything
            if existed:
                logger.warning("cache: index of %s is damaged (%s); rebuilding it", self._cache_directory, error)
        for name in _COLUMNS:
            shutil.rmtree(self._directory / name, ignore_errors=True)
        _reserve(self._directory)
        ninja.from_ndarray(self._directory / "objects", np.zeros((_OBJECT_ROWS_STEP, 8), np.uint64))
        ninja.from_ndarray(self._directory / "chunks", np.zeros((_CHUNK_ROWS_STEP, 2), np.uint32))
        ninja.from_ndarray(self._directory / "meta", np.zeros(4, np.uint64))
        self._map()
        for standing in SsdTier(SsdConfig(self._cache_directory, shared=self._shared)).walk_all():
            self._note(standing)
        self._restore_pins()

    def _restore_pins(self) -> None:
        """Pin what the files say was pinned; the lock is held."""
        for path in self._pins.iterdir() if self._pins.is_dir() else ():
            cache_id, _, size = path.name.partition(".")
            if len(cache_id) != 40 or cache_id.strip("0123456789abcdef") or not size.isdecimal():
                continue
            row = self.find(cache_id)
            if row is None:
                row = self._add(cache_id, -(-int(size) // CHUNK_BYTES), int(size))
            self._objects[row, 6] = int(self._objects[row, 6]) | _PINNED

    def _note(self, standing: Standing) -> None:
        """Say what stands of an object; the lock is held."""
        header, masks = standing.header, np.array(standing.masks, np.uint32)
        row = self.find(header.cache_id)
        if row is None:
            if not masks.any():
                return
            row = self._add(header.cache_id, header.chunks_count, header.object_bytes)
        if int(self._objects[row, 4]) != header.chunks_count:  # a pin of another size: none of ours
            return
        first, now = int(self._objects[row, 3]), int(time.time())
        chunks = self._chunks[first : first + len(masks)]
        chunks[(chunks[:, 0] == 0) & (masks > 0), 1] = now
        chunks[:, 0] = masks
        flags = int(self._objects[row, 6])
        self._objects[row, 6] = flags | _SEALED if header.sealed else flags & ~_SEALED

    def _add(self, cache_id: str, chunks_count: int, size: int) -> int:
        """A row for a new object; the lock is held."""
        row = self._reusable(chunks_count)
        if row is None:
            row, first = int(self._meta[0]), int(self._meta[1])
            self._grow("objects", row + 1, _OBJECT_ROWS_STEP)
            self._grow("chunks", first + chunks_count, _CHUNK_ROWS_STEP)
        else:
            first = int(self._objects[row, 3])
        self._objects[row] = (*id_words(cache_id), first, chunks_count, size, 0, 0)
        self._meta[1] = max(int(self._meta[1]), first + chunks_count)
        self._meta[0] = max(int(self._meta[0]), row + 1)
        return row

    def _reusable(self, chunks_count: int) -> int | None:
        """An unpinned row with as many chunks and nothing resident."""
        rows = self._objects[: int(self._meta[0])]
        unused = (rows[:, 6] & _PINNED == 0) & (rows[:, 7] <= time.time())
        matching = np.flatnonzero((rows[:, 4] == chunks_count) & unused)
        firsts = rows[matching, 3].astype(np.int64)
        free = matching[~self._chunks[firsts[:, None] + np.arange(chunks_count), 0].any(axis=1)]
        return int(free[0]) if len(free) else None

    def _grow(self, name: str, rows_wanted: int, step: int) -> None:
        # As it stands now, not as it was mapped: a process killed while growing may have left it longer than we know.
        path = self._directory / name
        table = ninja.open_existing(path, mode=self._mode)
        missing = rows_wanted - len(table)
        if missing > 0:
            # extend_dir appends to the file and then rewrites the shape, so it must start from a file of that shape.
            count = -(-missing // step) * step
            os.truncate(path / "data.ninja", table.nbytes)
            ninja.extend_dir(path, np.zeros((count, table.shape[1]), table.dtype))
            table = ninja.open_existing(path, mode=self._mode)
        setattr(self, f"_{name}", table)

    def _cache_id(self, row: int) -> str:
        return id_of(self._objects[row])


def scan(cache_directory: Path) -> Iterator[ObjectResidency]:
    """What the SSD tier below `cache_directory` holds, read from the tables alone: no daemon is asked.

    Raises: NotFoundError if no cache stands there.
    """
    tables = ResidencyTables(cache_directory, writable=False)
    yield from tables.objects(SsdTier(SsdConfig(cache_directory, shared=True)))  # only looked at


def _reserve(directory: Path) -> None:
    """Raises OSError unless the disk has room for new tables: to write a mapping without room would be SIGBUS."""
    with tempfile.TemporaryFile(dir=directory) as file:
        os.posix_fallocate(file.fileno(), 0, _OBJECT_ROWS_STEP * 64 + _CHUNK_ROWS_STEP * 8 + (64 << 10))


def _identity(text: str) -> tuple[str, str, int, str, str | None]:
    try:
        source, path, size, version, digest = json.loads(text)
    except ValueError:  # cut off
        return "", text, 0, "", None
    return source, path, size, version, digest
