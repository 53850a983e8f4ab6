"""What is to become a blob of a registry: what it is made of, and its digest."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mfs.sources.base import Source
from mfs.types import ByteRange, ObjectId

_READ_S = 120.0
_HASHED_BYTES = 4 << 20

Advance = Callable[[int], object]
"""Told how many bytes more were done."""


@dataclass(frozen=True)
class Blob:
    """What becomes a blob: pieces of memory and whole files, one after another."""

    pieces: tuple[bytes | ObjectId, ...]
    nbytes: int
    digest: str
    path: str
    """What it is called in messages."""

    def read(self, source: Source, start: int, stop: int) -> bytearray:
        """Bytes [start, stop). Raises: ChangedError if a file is another one by now; as `Source.get_range`."""
        out = memoryview(bytearray(stop - start))
        at = 0
        for piece in self.pieces:
            nbytes = piece.size if isinstance(piece, ObjectId) else len(piece)
            low, high = max(start, at), min(stop, at + nbytes)
            if low < high:
                part = out[low - start : high - start]
                if isinstance(piece, ObjectId):
                    span = ByteRange(low - at, high - at)
                    source.get_range(piece, span, out=part, deadline_s=time.monotonic() + _READ_S)
                else:
                    part[:] = piece[low - at : high - at]
            at += nbytes
        found = out.obj
        assert isinstance(found, bytearray)
        return found


def blob_of(
    pieces: Sequence[bytes | ObjectId], source: Source, path: str, advance: Advance = lambda count: None
) -> Blob:
    """Read everything once and give it its digest. Memory: some MiB. Raises: as `Blob.read`."""
    nbytes = sum(piece.size if isinstance(piece, ObjectId) else len(piece) for piece in pieces)
    unnamed = Blob(tuple(pieces), nbytes, "", path)
    sha256 = hashlib.sha256()
    for start in range(0, nbytes, _HASHED_BYTES):
        piece = unnamed.read(source, start, min(start + _HASHED_BYTES, nbytes))
        sha256.update(piece)
        advance(len(piece))
    return Blob(unnamed.pieces, nbytes, f"sha256:{sha256.hexdigest()}", path)
