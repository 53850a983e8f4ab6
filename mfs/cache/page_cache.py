"""The kernel's page cache of sealed files: what of it is there, and filling it for readers who do not ask us.

Our writes go past it, and the kernel's own read-ahead waits for who reads. A mapping with MADV_HUGEPAGE is filled by
pieces of 2 MiB in folios of that size, whatever the disk's read-ahead is set to, and by half of one beyond what was
asked for. Advice (WILLNEED) would make pages of 4 KiB, at ten times the price.

Source: cachestat(2), Linux 6.5; do_sync_mmap_readahead in mm/filemap.c; MADV_POPULATE_READ in madvise(2), Linux 5.14.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from mfs import limits
from mfs.cache.sealing import open_sealed
from mfs.cache.ssd import SsdTier
from mfs.mapping import read_in
from mfs.types import CHUNK_BYTES, ByteRange, ObjectId

logger = logging.getLogger(__name__)

_SYS_CACHESTAT = 451  # the same on all architectures
_RANGE, _FOUND = struct.Struct("<QQ"), struct.Struct("<Q32x")
_READ_AHEAD_CHUNKS = 4  # that may be the kernel's own read-ahead of who is at the front
_AFTER_CHUNKS = 8


def fill(tier: SsdTier, obj: ObjectId, chunks: Sequence[int]) -> int:
    """Bring chunks of a sealed object into the page cache, in their order, as far as half of the free memory goes.

    Returns the bytes that were brought, or stood there; 0 if it is not sealed. Raises: OSError.
    """
    fd = open_sealed(tier, obj)
    if fd is None:
        return 0
    done, room_bytes = 0, limits.available().free_bytes // 2
    try:
        for index in chunks[: room_bytes // CHUNK_BYTES]:
            span = obj.chunk_range(index)
            read_in(fd, span.start, len(span))
            done += len(span)
        return done
    finally:
        os.close(fd)


class Front(NamedTuple):
    """How far an object stands in the page cache without a gap."""

    chunk: int
    """The first that is not there whole; the count of chunks if all are."""
    is_alone: bool
    """Whether there is nothing of what follows after a gap."""


def front(tier: SsdTier, obj: ObjectId, first: int, filled: int) -> Front | None:
    """The front of a sealed object, from chunk `first` on. filled: what is before this chunk tells nothing of readers.

    None if it is not sealed, or the kernel does not say. Raises: OSError.
    """
    fd = open_sealed(tier, obj)
    if fd is None:
        return None
    try:
        count, at = obj.chunks_count, first
        while at < count and _cached_pages(fd, span := obj.chunk_range(at)) * mmap.PAGESIZE >= len(span):
            at += 1
        gap = max(at + _READ_AHEAD_CHUNKS, filled)
        after = range(gap, min(gap + _AFTER_CHUNKS, count))
        return Front(at, not any(_cached_pages(fd, obj.chunk_range(index)) for index in after))
    except NotImplementedError as error:
        _say(str(error))
        return None
    finally:
        os.close(fd)


def _cached_pages(fd: int, span: ByteRange) -> int:
    """Pages of a range that stand in the page cache. Raises: NotImplementedError where the kernel cannot tell."""
    found = ctypes.create_string_buffer(_FOUND.size)
    if _syscall()(_SYS_CACHESTAT, fd, _RANGE.pack(span.start, len(span)), found, 0):
        raise NotImplementedError(os.strerror(ctypes.get_errno()))
    (pages,) = _FOUND.unpack(found.raw)
    return int(pages)


@functools.cache
def _syscall() -> Any:
    return ctypes.CDLL(None, use_errno=True).syscall


@functools.cache
def _say(why: str) -> None:
    logger.info("who reads whole files by the kernel is not read ahead of: cachestat: %s", why)
