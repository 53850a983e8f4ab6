"""Sealing: a complete object that is on the disk as it was checked, so that readers may have its file itself.

Blocks are checked when they come, and what was written since in this very era (`eras`) stands as it was written: such
an object is sealed without being read. Of any other, what the records do not vouch for is read and verified first.
What happens to the disk afterwards is found by `mfs verify`, the scrub, and reads through the daemon: no reader past
us looks. So what is sealed is forced to the disk before, and counts only while its file is the one that was sealed.
`sidecar` has the rules.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import replace

from mfs.cache import eras, sidecar
from mfs.cache.chunks import full_mask, mask_bytes
from mfs.cache.object_files import DamagedError
from mfs.cache.sidecar import Record
from mfs.cache.ssd import SsdTier
from mfs.types import CHUNK_BYTES, ObjectId

logger = logging.getLogger(__name__)

_SHA256 = "sha256:"
_REST, _REST_MAX_S = 3, 1.0
"""Of the time that a scrub takes, how often as much it leaves the disk to readers after each chunk."""


def seal(tier: SsdTier, obj: ObjectId, *, may_read: bool = True) -> bool | None:
    """Seal an object; False if it is not complete, or not any more when that is done.

    may_read: verify what the records do not vouch for; else None, and nothing was done, where there is any of that.
    Leaves the page cache alone. A block that fails is dropped, and so is an object that cannot be forced to the disk.
    """
    with tier.dropping_bad(obj.cache_id), tier.files.reading(obj.cache_id, obj.size) as found:
        before = _stamp(found.data)
        if found.header.sealed == before:
            return True
        records = list[Record]()
        for index, record in enumerate(found.records()):
            if record is None or record.mask != full_mask(found.header.chunk_bytes(index)):
                return False
            records.append(record)
        doubtful = _doubtful(found.data, records)
        if doubtful and not may_read:
            return None
        scratch = memoryview(mmap.mmap(-1, CHUNK_BYTES)) if doubtful else None
        for index in doubtful:
            assert scratch is not None
            good, _ = tier.read_verified(found, index, records[index].mask, scratch)
            if good != records[index].mask:
                return False
        try:
            os.fsync(found.data)  # not fdatasync, which may leave the file's time behind
        except (
            OSError
        ) as error:  # what the kernel could not write it has forgotten: asked again it would say all is well
            raise DamagedError(f"it cannot be forced to the disk ({error})") from error
        with tier.files.changing(obj.cache_id, None) as now:
            # Promised bytes do not change: the same records and the same file are the same bytes.
            if _stamp(now.data) != before or list(now.records()) != records:
                return False
            try:
                os.pwrite(now.sums, sidecar.encode_header(replace(now.header, sealed=before)), 0)
                os.fdatasync(now.sums)
            except OSError as error:
                logger.warning("cache: %s cannot be sealed (%s)", found.path, error)
                return False
            return True
    return False


def _doubtful(data: int, records: Sequence[Record]) -> Sequence[int]:
    """The chunks that have to be read: not written in this era, or all where somebody wrote to the file after us."""
    now = eras.written(data)
    # Whoever writes asks for the time afterwards, so the last of these is the time of the last write, if it was ours.
    if now.era == eras.UNKNOWN or max(record.written.mtime_ns for record in records) != now.mtime_ns:
        return range(len(records))
    return [index for index, record in enumerate(records) if record.written.era != now.era]


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

    Also against the sha256 that its source states, if it does. Returns (bytes that verified, whether it was bad).
    """
    checked = 0
    scratch = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    with tier.dropping_bad(cache_id) as dropped, tier.files.reading(cache_id) as found:
        digest = found.header.digest or ""
        sha256 = hashlib.sha256() if digest.startswith(_SHA256) and found.header.sealed else None
        for index in range(found.header.chunks_count if found.header.sealed else 0):
            length, since_s = found.header.chunk_bytes(index), time.monotonic()
            try:
                good, _ = tier.read_verified(found, index, full_mask(length), scratch)
            except OSError as error:  # its readers would get no bytes either
                raise DamagedError(f"chunk {index} cannot be read ({error})") from error
            checked += mask_bytes(good, length)
            if good != full_mask(length):
                raise DamagedError(f"chunk {index} lacks blocks {full_mask(length) & ~good:#x}")
            if sha256 is not None:
                sha256.update(scratch[:length])
            time.sleep(min(_REST * (time.monotonic() - since_s), _REST_MAX_S))
        if sha256 is not None and sha256.hexdigest() != digest.removeprefix(_SHA256):
            raise DamagedError(f"its sha256 is {sha256.hexdigest()}, expected {digest.removeprefix(_SHA256)}")
    return checked, bool(dropped)


def _stamp(fd: int) -> tuple[int, int]:
    """What the header of a sealed object says of its data file."""
    status = os.fstat(fd)
    return status.st_ino, status.st_mtime_ns
