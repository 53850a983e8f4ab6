"""Sealing: a complete object verified as it stands on the disk, so that readers may have its file itself.

What is read past us is verified here, by `mfs verify` and by the scrub, no more at each read: so what is sealed is
forced to the disk first, and counts only while its file is the one that was verified. `sidecar` has the rules.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import replace

from xxhash import xxh3_64_intdigest

from mfs import limits
from mfs.cache import sidecar
from mfs.cache.chunks import full_mask, mask_bytes, run_bytes
from mfs.cache.object_files import DamagedError, OpenObject
from mfs.cache.sidecar import Record
from mfs.cache.ssd import SsdTier
from mfs.types import BLOCKS_PER_CHUNK, CHUNK_BYTES, ObjectId


def seal(tier: SsdTier, obj: ObjectId) -> bool:
    """Verify an object and seal it; False if it is not complete, or not any more when that is done.

    Leaves it in the page cache, in large folios, for who reads it past us, unless it would take more than half of the
    memory that is free. A block that fails is dropped.
    """
    with tier.dropping_bad(obj.cache_id), tier.files.reading(obj.cache_id, obj.size, direct=False) as found:
        before = _stamp(found.data)
        if found.header.sealed == before:
            return True
        records = list(found.records())

        def is_complete(index: int, record: Record | None) -> bool:
            return record is not None and record.mask == full_mask(found.header.chunk_bytes(index))

        if not all(is_complete(index, record) for index, record in enumerate(records)):
            return False
        stays = found.header.object_bytes <= limits.available().free_bytes // 2
        with open(os.devnull, "wb", buffering=0) as sink:
            for index, record in enumerate(records):
                assert record is not None
                bad = _verify(found, index, record, sink.fileno())
                if not stays:
                    os.posix_fadvise(found.data, index * CHUNK_BYTES, CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
                if bad:
                    tier.withdraw(found, index, record, bad)
                    return False
        os.fsync(found.data)  # not fdatasync, which may leave the file's time behind
        with tier.files.changing(obj.cache_id, None) as now:
            # Promised bytes do not change: the same records and the same file are the same bytes.
            if _stamp(now.data) != before or list(now.records()) != records:
                return False
            os.pwrite(now.sums, sidecar.encode_header(replace(now.header, sealed=before)), 0)
            os.fdatasync(now.sums)
            return True
    return False


def _verify(found: OpenObject, index: int, record: Record, sink: int) -> int:
    """The blocks of a complete chunk that fail, read through the page cache."""
    start, length = index * CHUNK_BYTES, found.header.chunk_bytes(index)
    position = start
    while position < start + length:  # advice (WILLNEED) would make small folios, at ten times the price
        sent = os.sendfile(sink, found.data, position, start + length - position)
        if not sent:
            raise DamagedError("its data became shorter")
        position += sent
    bad = 0
    with mmap.mmap(found.data, length, prot=mmap.PROT_READ, offset=start) as mapped, memoryview(mapped) as view:
        for block in range(BLOCKS_PER_CHUNK):
            if record.mask >> block & 1:
                low, high = run_bytes(block, block + 1, length)
                bad |= (xxh3_64_intdigest(view[low:high]) != record.sums[block]) << block
    return bad


def is_sealed(tier: SsdTier, obj: ObjectId) -> bool:
    """Whether there is a sealed file that is the object."""
    fd = open_sealed(tier, obj)
    if fd is None:
        return False
    os.close(fd)
    return True


def open_sealed(tier: SsdTier, obj: ObjectId) -> int | None:
    """A descriptor for reading a sealed object, which the caller closes; None if it is not sealed.

    It stays good whatever becomes of the object: what is sealed is only ever unlinked.
    """
    with tier.dropping_bad(obj.cache_id), tier.files.reading(obj.cache_id, obj.size, direct=False) as found:
        if found.header.sealed == _stamp(found.data):
            return os.dup(found.data)
    return None


def scrub(tier: SsdTier, cache_id: str) -> tuple[int, bool]:
    """Verify a sealed object as it stands on the disk, leaving the page cache alone; a bad one is removed.

    Returns (bytes that verified, whether it was bad).
    """
    checked = 0
    scratch = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    with tier.dropping_bad(cache_id) as dropped, tier.files.reading(cache_id) as found:
        for index in range(found.header.chunks_count if found.header.sealed else 0):
            length = found.header.chunk_bytes(index)
            try:
                good, _ = tier.read_verified(found, index, full_mask(length), scratch)
            except OSError as error:  # its readers would get no bytes either
                raise DamagedError(f"chunk {index} cannot be read ({error})") from error
            checked += mask_bytes(good, length)
            if good != full_mask(length):
                raise DamagedError(f"chunk {index} lacks blocks {full_mask(length) & ~good:#x}")
    return checked, bool(dropped)


def _stamp(fd: int) -> tuple[int, int]:
    """What the header of a sealed object says of its data file."""
    status = os.fstat(fd)
    return status.st_ino, status.st_mtime_ns
