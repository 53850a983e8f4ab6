"""What bytes are, by content. The only identity the server knows: never names, paths or headers.

Digests of a file's pieces are remembered under its version (`versions` says which may be), as it was before the
bytes were read, and only if it had been left alone for `settled_s` by then: within one tick of its clock a file
system cannot tell two writes apart (git calls such an entry racily clean). A remembered digest lets a load skip
reading; bytes that are moved are hashed again on the way, so a wrong entry cannot put wrong bytes under a right
name.

`DigestCache` is used from threads: it reads and writes `digest_files`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from blake3 import blake3

from gpuload.moving.plan import Piece
from gpuload.server.digest_files import Digest, DigestFiles, Geometry
from gpuload.server.versions import Version, is_open_for_writing

ENTRIES_MAX = 1_000_000
"""Digests in memory, some 200 MB; at 4 MiB a piece that is 4 TB of weights."""

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


class DigestCache:
    """Digests of pieces by file and place, least recently used files dropped first. Thread-safe; may read a disk."""

    def __init__(
        self, files: DigestFiles | None = None, *, entries_max: int = ENTRIES_MAX, settled_s: float = SETTLED_S
    ) -> None:
        """files: where they outlive this process; None: nowhere."""
        self._disk = files
        self._entries_max = entries_max
        self._settled_ns = int(settled_s * 1e9)
        self._files: OrderedDict[bytes, tuple[Mapping[Geometry, Digest], object]] = OrderedDict()
        """Key -> what is known, and which file on disk it was read from or written to."""
        self._lock = threading.Lock()
        self.entries_count = 0

    def find(self, version: Version) -> Mapping[Geometry, Digest]:
        """What is known of this version."""
        if version.key is None:
            return {}
        on_disk = self._disk.which(version.key) if self._disk is not None else None
        with self._lock:
            known, seen = self._files.get(version.key, ({}, None))
            if version.key in self._files:
                self._files.move_to_end(version.key)
        if self._disk is None or on_disk in (None, seen):
            return known
        merged = {**known, **self._disk.read(version.key)}  # another process knows more by now
        self._keep(version.key, merged, on_disk)
        return merged

    def add(self, version: Version, fd: int, read_at_ns: int, found: Sequence[tuple[Geometry, Digest]]) -> bool:
        """Remember digests of bytes of `fd` that were read after `read_at_ns` (`now_ns`), if that may be done;
        whether it was.
        """
        if version.key is None:
            return False
        if version.changed_ns and (read_at_ns - version.changed_ns < self._settled_ns or is_open_for_writing(fd)):
            return False
        before = self.find(version)
        known = {**before, **dict(found)}
        if self._disk is not None and known != before:
            self._disk.write(version.key, known)
        self._keep(version.key, known, self._disk.which(version.key) if self._disk is not None else None)
        return True

    def forget(self, version: Version) -> None:
        if version.key is None:
            return
        with self._lock:
            self.entries_count -= len(self._files.pop(version.key, ({}, None))[0])
        if self._disk is not None:
            self._disk.remove(version.key)

    def _keep(self, key: bytes, known: Mapping[Geometry, Digest], on_disk: object) -> None:
        with self._lock:
            self.entries_count += len(known) - len(self._files.pop(key, ({}, None))[0])
            self._files[key] = (known, on_disk)
            while self.entries_count > self._entries_max:
                _, (dropped, _) = self._files.popitem(last=False)
                self.entries_count -= len(dropped)


def now_ns() -> int:
    """The clock files are stamped with."""
    return time.time_ns()
