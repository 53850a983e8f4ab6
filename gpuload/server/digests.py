"""What bytes are, by content. The only identity the server knows: never names, paths or headers.

A digest is remembered for a file's (device, inode, size, mtime, ctime) as it was before the bytes were read, and only
if the file had been left alone for `settled_s` by then: within one tick of its clock a file system cannot tell two
writes apart (git calls such an entry racily clean). A remembered digest lets a load skip reading; bytes that are moved
are hashed again on the way, so a wrong entry cannot put wrong bytes under a right name.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from blake3 import blake3

from gpuload.plan import Piece

Digest = bytes
FileKey = tuple[int, int, int, int, int]
Geometry = tuple[int, int, int, int]
"""(start, row_bytes, rows_count, pitch_bytes) of a piece in its file."""

ENTRIES_MAX = 1_000_000
"""Digests remembered, some 200 MB; at 4 MiB a piece that is 4 TB of weights."""

SETTLED_S = 2.0
"""The coarsest clock in use: FAT's, and some network file systems'."""


def digest_views(views: Iterable[memoryview]) -> Digest:
    hasher = blake3()
    for view in views:
        hasher.update(view)
    return hasher.digest()


def digest_block(parts: Iterable[tuple[int, int, Digest]]) -> Digest:
    """A block's own digest from its (offset, nbytes, digest) pieces."""
    hasher = blake3()
    for offset, nbytes, digest in parts:
        hasher.update(b"%d:%d:" % (offset, nbytes))
        hasher.update(digest)
    return hasher.digest()


def geometry(piece: Piece) -> Geometry:
    return (piece.start, piece.row_bytes, piece.rows_count, piece.pitch_bytes)


def file_key(fd: int) -> FileKey:
    s = os.fstat(fd)
    return (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)


class DigestCache:
    """Digests of pieces by file and place, least recently used files dropped first."""

    def __init__(self, *, entries_max: int = ENTRIES_MAX, settled_s: float = SETTLED_S) -> None:
        self._entries_max = entries_max
        self._settled_ns = int(settled_s * 1e9)
        self._files: OrderedDict[FileKey, dict[Geometry, Digest]] = OrderedDict()
        self.entries_count = 0

    def find(self, key: FileKey) -> dict[Geometry, Digest]:
        """What is known of this file; read only."""
        if key in self._files:
            self._files.move_to_end(key)
        return self._files.get(key, {})

    def add(self, key: FileKey, read_at_ns: int, found: Sequence[tuple[Geometry, Digest]]) -> None:
        """Remember digests of bytes that were read after `read_at_ns` (time.time_ns()), if the file had settled."""
        if read_at_ns - max(key[3], key[4]) < self._settled_ns:
            return
        known = self._files.setdefault(key, {})
        self.entries_count -= len(known)
        known.update(found)
        self.entries_count += len(known)
        while self.entries_count > self._entries_max:
            _, dropped = self._files.popitem(last=False)
            self.entries_count -= len(dropped)

    def forget(self, key: FileKey) -> None:
        self.entries_count -= len(self._files.pop(key, {}))


def now_ns() -> int:
    """The clock files are stamped with."""
    return time.time_ns()
