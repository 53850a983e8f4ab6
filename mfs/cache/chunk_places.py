"""Where chunks of registries stand in the objects of this cache: what two models share need not come twice.

One table, <cache>/v2/chunks.index, memory-mapped by all who read; a hint, as all tables here: a row says that a file
would hold a chunk at a place, if those blocks of it are here. Whoever reads there compares with the chunk's digests.
Written anew as a whole (chunks.new, then renamed) under a lock on chunks.lock. Integers are little-endian:

     0  8s   magic b"MFSCHNK\\0"
     8  u32  format version, 1
    12  u32  objects count
    16  u64  rows count
    24  40   zeros
    64       objects: cache_id (20 bytes), when it was added in seconds since the epoch (u32), size in bytes (u64)
     …       keys (u64): the first 8 bytes of a chunk's id, as a big-endian number, ascending
     …       starts (u64): where the chunk begins in its object
     …       owners (u32): the object, by number

An object leaves when nothing of it stands here an hour after it was added, or to make room: the oldest first. A table
that cannot be read is one without rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mfs.cache.directory import open_own, root_of
from mfs.mapping import map_file

logger = logging.getLogger(__name__)

ROWS_MAX = 1 << 20
"""20 MB; of chunks of 4 MiB that is as much as 4 TB."""
OBJECTS_MAX = 1 << 16
SETTLE_S = 3600
"""How long an object may stand in the table before anything of it stands on the disk."""
CANDIDATES_MAX = 8
"""Objects that are looked at for one chunk."""

_MAGIC, _VERSION = b"MFSCHNK\0", 1
_HEADER = struct.Struct("<8sIIQ40x")
_OBJECT = np.dtype([("id", "V20"), ("added_s", "<u4"), ("size", "<u8")])


class Content(NamedTuple):
    """A file that may come to stand in the cache, and the chunks it is made of."""

    cache_id: str
    size: int
    ids: Sequence[bytes]
    """Of its chunks, 32 bytes each."""
    starts: Sequence[int]
    """Where each begins in the file."""


class Place(NamedTuple):
    """A file that holds a chunk."""

    cache_id: str
    object_bytes: int
    start: int
    """Where the chunk begins in it."""


class _Table(NamedTuple):
    objects: NDArray[Any]
    keys: NDArray[np.uint64]
    starts: NDArray[np.uint64]
    owners: NDArray[np.uint32]


_EMPTY = _Table(np.zeros(0, _OBJECT), np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint32))


class ChunkPlaces:
    """The table of one cache directory, shared with other processes. Thread-safe."""

    def __init__(self, cache_directory: Path, *, shared: bool = False) -> None:
        """Does no I/O. shared: see `directory`."""
        self._path = root_of(cache_directory) / "chunks.index"
        self._shared = shared
        self._table = _EMPTY
        self._seen: tuple[int, int] | None = None
        """(inode, modification time) of the file that is mapped."""
        self._lock = threading.Lock()

    def find(self, chunk_id: str) -> Iterator[Place]:
        """The files that hold a chunk, those added last first. chunk_id: 64 hex digits."""
        table = self._current()
        key = np.uint64(int(chunk_id[:16], 16))
        first, end = (int(np.searchsorted(table.keys, key, side)) for side in ("left", "right"))
        for row in range(end - 1, max(first, end - CANDIDATES_MAX) - 1, -1):
            owner = int(table.owners[row])
            if owner < len(table.objects):
                found = table.objects[owner]
                yield Place(found["id"].tobytes().hex(), int(found["size"]), int(table.starts[row]))

    def add(self, contents: Sequence[Content], is_here: Callable[[str], bool]) -> None:
        """Add files that the table does not have. is_here: whether anything of an object, by cache_id, is on the disk.

        Raises: OSError.
        """
        with self._locked():
            table = self._current()
            known = {row.tobytes() for row in table.objects["id"]}
            fresh = {bytes.fromhex(item.cache_id): item for item in contents if item.ids}
            new = [item for cache_id, item in fresh.items() if cache_id not in known][-OBJECTS_MAX:]
            if new:
                self._write(_with(_kept(table, is_here, sum(len(item.ids) for item in new), len(new)), new))

    def _current(self) -> _Table:
        """The table as it stands now."""
        try:
            status = os.stat(self._path, follow_symlinks=False)
            seen = status.st_ino, status.st_mtime_ns
            if seen != self._seen:
                with self._lock:
                    self._table, self._seen = self._read(), seen
        except FileNotFoundError:
            self._table, self._seen = _EMPTY, None
        except (OSError, ValueError) as error:
            logger.warning("cache: %s cannot be read (%s): what models share is fetched again", self._path, error)
            self._table, self._seen = _EMPTY, seen
        return self._table

    def _read(self) -> _Table:
        """Raises: OSError; ValueError for what is no table."""
        fd = open_own(self._path, os.O_RDONLY | os.O_NONBLOCK, shared=self._shared)
        try:
            nbytes = os.fstat(fd).st_size
            head = os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size)
            magic, version, objects_count, rows_count = _HEADER.unpack(head)
            ends = np.cumsum([_HEADER.size, objects_count * _OBJECT.itemsize, 8 * rows_count, 8 * rows_count,
                              4 * rows_count]).tolist()  # fmt: skip
            if (magic, version, nbytes) != (_MAGIC, _VERSION, ends[-1]) or objects_count > OBJECTS_MAX:
                raise ValueError("it is no table of this format")
            view = map_file(fd, nbytes, huge=False)
        finally:
            os.close(fd)
        kinds: tuple[np.dtype[Any], ...] = (_OBJECT, np.dtype("<u8"), np.dtype("<u8"), np.dtype("<u4"))
        return _Table(*(np.frombuffer(view[start:stop], kind)
                        for start, stop, kind in zip(ends, ends[1:], kinds, strict=False)))  # fmt: skip

    def _write(self, table: _Table) -> None:
        new = self._path.with_suffix(".new")
        new.unlink(missing_ok=True)
        fd = open_own(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, shared=self._shared)
        with open(fd, "wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, len(table.objects), len(table.keys)))
            for part in table:
                file.write(np.ascontiguousarray(part).data.cast("B") if len(part) else b"")
        new.rename(self._path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time writes the table; freed on death."""
        fd = open_own(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, shared=self._shared)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _kept(table: _Table, is_here: Callable[[str], bool], rows_coming: int, objects_coming: int) -> _Table:
    """What stays of a table to which so much is to be added."""
    now = time.time()
    stays = np.array([
        row["added_s"] > now - SETTLE_S or is_here(row["id"].tobytes().hex()) for row in table.objects
    ], bool)  # fmt: skip
    counts = np.bincount(table.owners, minlength=len(table.objects))
    rows, objects = rows_coming, objects_coming
    for number in range(len(table.objects) - 1, -1, -1):  # the latest are the last
        rows += int(counts[number]) * bool(stays[number])
        objects += bool(stays[number])
        stays[number] &= rows <= ROWS_MAX and objects <= OBJECTS_MAX
    if stays.all():
        return table
    number_of = np.cumsum(stays) - 1
    wanted = stays[table.owners] if len(table.owners) else np.zeros(0, bool)
    return _Table(table.objects[stays], table.keys[wanted], table.starts[wanted],
                  number_of[table.owners[wanted]].astype(np.uint32))  # fmt: skip


def _with(table: _Table, new: Sequence[Content]) -> _Table:
    """A table with further objects, behind those it has. What would be too much for it is left out."""
    objects = np.zeros(len(new), _OBJECT)
    objects["id"] = [np.void(bytes.fromhex(item.cache_id)) for item in new]
    objects["added_s"], objects["size"] = int(time.time()), [item.size for item in new]
    ids = np.frombuffer(b"".join(b"".join(item.ids) for item in new), ">u8").reshape(-1, 4)[:ROWS_MAX, 0]
    starts = np.concatenate([np.array(item.starts, np.uint64) for item in new])[:ROWS_MAX]
    owners = np.repeat(np.arange(len(new)), [len(item.ids) for item in new])[:ROWS_MAX] + len(table.objects)
    keys = np.concatenate([table.keys, ids.astype(np.uint64)])
    order = np.argsort(keys, kind="stable")  # so that of equal keys the latest object comes last
    return _Table(
        np.concatenate([table.objects, objects]), keys[order],
        np.concatenate([table.starts, starts])[order],
        np.concatenate([table.owners, owners.astype(np.uint32)])[order],
    )  # fmt: skip
