"""The SSD tier: one sparse file per object with its checksums beside it, verified block by block whenever it is read.

`sidecar` has the format and its rules, `object_files` opens what they are about; here is what is done with them. What
is bad is dropped with a warning and costs a fetch: a block by itself where it can be, the object where its files are
not what they must be, or are sealed. A chunk that is evicted while it is read is a miss like any other.

Space that a removed object's readers still hold is counted by nobody, nor are blocks of which a killed writer wrote no
record, until the chunk is written or dropped.

Runs in worker processes; thread-safe; several processes may share a directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from mfs.cache import eras, sidecar
from mfs.cache.chunks import full_mask, mask_runs, run_bytes
from mfs.cache.eras import Written
from mfs.cache.object_files import (
    ALIGN_BYTES,
    FOREIGN,
    DamagedError,
    GoneError,
    ObjectFiles,
    OpenObject,
    is_direct,
    punch,
)
from mfs.cache.sidecar import Header, Record
from mfs.types import CHUNK_BYTES, ObjectId

logger = logging.getLogger(__name__)

_ATTEMPTS_MAX = 5
_FOLDERS = [f"{number:02x}" for number in range(256)]


@dataclass(frozen=True)
class SsdConfig:
    """Where the SSD tier stands."""

    directory: Path
    fsync: bool = False
    """fdatasync before each record. Off by default: checksums make torn bytes a miss, and the origin has them. What is
    sealed is forced to the disk always."""
    shared: bool = False
    """Files of other users are read too; see `directory`."""


@dataclass(frozen=True)
class Standing:
    """What stands of one object."""

    header: Header
    masks: list[int]
    """Blocks present, one mask per chunk."""


class SsdTier:
    """The objects below one cache directory."""

    def __init__(self, config: SsdConfig) -> None:
        self.config = config
        self.files = ObjectFiles(config.directory, shared=config.shared)
        self._can_punch = True

    # -- reading

    def read_into(self, obj: ObjectId, index: int, mask: int, slot: memoryview) -> tuple[int, dict[int, int]]:
        """Bring those blocks of `mask` that stand here and verify into `slot` at their own offsets.

        slot: a whole slot, page-aligned. Returns (blocks brought, {block: checksum}); bytes of other blocks are
        undefined. What fails a check is dropped and logged; this never raises for cache trouble.
        """
        return self.read_blocks(obj.cache_id, obj.size, index, mask, slot)

    def read_blocks(
        self, cache_id: str, object_bytes: int, index: int, mask: int, slot: memoryview
    ) -> tuple[int, dict[int, int]]:
        """`read_into` of an object of which no more is known than its name here and its size."""
        with self.dropping_bad(cache_id), self.files.reading(cache_id, object_bytes) as found:
            return self.read_verified(found, index, mask, slot)
        return 0, {}

    def read_verified(self, found: OpenObject, index: int, mask: int, slot: memoryview) -> tuple[int, dict[int, int]]:
        """`read_into` of an object that is open. Raises: OSError, DamagedError."""
        record = found.record(index)
        if record is None:
            self.withdraw(found, index, None, 0)
            return 0, {}
        length, start = found.header.chunk_bytes(index), index * CHUNK_BYTES
        wanted, good, sums = mask & record.mask, 0, dict[int, int]()
        for first, end in mask_runs(wanted):
            low, high = run_bytes(first, end, length)
            os.preadv(found.data, [slot[low : _up(high)]], start + low)
            for block in range(first, end):
                low, high = run_bytes(block, block + 1, length)
                if xxh3_64_intdigest(slot[low:high]) == record.sums[block]:
                    good |= 1 << block
                    sums[block] = record.sums[block]
        if good != wanted:
            self.withdraw(found, index, record, wanted & ~good)
        return good, sums

    def withdraw(self, found: OpenObject, index: int, seen: Record | None, bad: int) -> None:
        """Take back the promise of blocks that fail, unless it is another one by now: then it was evicted meanwhile.

        seen: the record they fail, None if it does not verify itself. Raises: DamagedError for a sealed object.
        """
        try:
            with self.files.changing(found.header.cache_id, index) as now:
                record = now.record(index)
                if not os.path.samestat(os.fstat(now.sums), os.fstat(found.sums)) or (
                    record is not None and (seen is None or record.raw != seen.raw)
                ):
                    return
                why = f"blocks {bad:#x} fail their checksums"
                if record is None:
                    why, bad = "its record does not verify", full_mask(found.header.chunk_bytes(index))
                if now.header.sealed:
                    raise DamagedError(f"chunk {index}: {why}")
                logger.warning("cache: %s chunk %d dropped: %s", now.path, index, why)
                now.put_record(index, _without(index, record, bad, sidecar.UNWRITTEN))
                self._punch(now, index, bad)
        except (FileNotFoundError, GoneError):
            pass
        except OSError as error:
            logger.warning("cache: %s chunk %d: bad blocks %#x cannot be dropped (%s)", found.path, index, bad, error)

    @contextlib.contextmanager
    def dropping_bad(self, cache_id: str) -> Iterator[list[str]]:
        """Goes on after what goes wrong inside: an object that is not what it must be is removed, others are missed.

        Yields a list that will hold why it was removed, if it was.
        """
        dropped: list[str] = []
        try:
            yield dropped
        except (FileNotFoundError, GoneError):
            pass
        except DamagedError as error:
            dropped.append(str(error))
        except OSError as error:
            if error.errno in FOREIGN:
                dropped.append(f"it is no file of ours ({error.strerror})")
            else:
                path = self.files.path(cache_id)
                logger.warning("cache: %s cannot be read (%s); fetching from the origin", path, error)
        for why in dropped:
            self._drop(cache_id, why)

    def _drop(self, cache_id: str, why: str) -> None:
        logger.warning("cache: %s dropped: %s", self.files.path(cache_id), why)
        self.files.remove(cache_id)

    # -- what stands

    def header(self, cache_id: str) -> Header | None:
        """The header of an object's sidecar, None if no sound object stands there."""
        with contextlib.suppress(OSError, DamagedError), self.files.reading(cache_id) as found:
            return found.header
        return None

    def mask(self, cache_id: str, index: int) -> int:
        """The blocks of a chunk that are promised."""
        with contextlib.suppress(OSError, DamagedError), self.files.reading(cache_id) as found:
            if index < found.header.chunks_count:
                record = found.record(index)
                return record.mask if record is not None else 0
        return 0

    def standing(self, cache_id: str) -> Standing | None:
        """All that is promised of an object, None if no sound one stands there."""
        with contextlib.suppress(OSError, DamagedError), self.files.reading(cache_id) as found:
            return Standing(found.header, [record.mask if record else 0 for record in found.records()])
        return None

    def walk(self, prefix: str) -> Iterator[Standing]:
        """All objects whose cache_id starts with two digits; what else stands there goes, and what has no sidecar."""
        for cache_id in self.files.ids(prefix):
            with self.dropping_bad(cache_id), self.files.reading(cache_id):
                pass
            found = self.standing(cache_id)
            if found is not None:
                yield found

    def walk_all(self) -> Iterator[Standing]:
        """All objects."""
        for prefix in _FOLDERS:
            yield from self.walk(prefix)

    # -- writing

    def write(self, obj: ObjectId, index: int, sums: dict[int, int], slot: memoryview) -> int:
        """Write the blocks named in `sums` (block -> checksum) from `slot`, keeping what stands already.

        slot: a whole slot, page-aligned. Blocks that stand with the same checksum are not written again; to a sealed
        object nothing is. Returns the mask of blocks that stand afterwards. Raises OSError (ENOSPC, EIO ...); what
        stood stands then.
        """
        for _ in range(_ATTEMPTS_MAX):  # each time somebody else removed it in between
            try:
                with self.files.changing(obj.cache_id, index) as found:
                    found.check(obj.cache_id, obj.size)
                    return self._write(found, index, sums, slot)
            except FileNotFoundError:
                self.files.create(obj)
            except GoneError:
                pass
            except DamagedError as error:
                self._drop(obj.cache_id, str(error))
            except OSError as error:
                if error.errno not in FOREIGN:
                    raise
                self._drop(obj.cache_id, f"it is no file of ours ({error.strerror})")
        raise OSError(errno.EAGAIN, f"{self.files.path(obj.cache_id)} is removed again and again")

    def _write(self, found: OpenObject, index: int, sums: dict[int, int], slot: memoryview) -> int:
        length = found.header.chunk_bytes(index)
        if found.header.sealed:
            return full_mask(length)
        record = found.record(index) or Record(0, (), sidecar.NOTHING)
        new = {b: s for b, s in sums.items() if not (record.mask >> b & 1 and record.sums[b] == s)}
        if not new:
            return record.mask
        mask = sum(1 << block for block in new)
        if record.mask & mask:  # under another checksum: they must not count while they are written
            found.put_record(index, _without(index, record, mask, record.written))
        try:
            for first, end in mask_runs(mask):
                low, high = run_bytes(first, end, length)
                _write_aligned(found.data, slot[low:high], index * CHUNK_BYTES + low)
            if self.config.fsync or not is_direct(found.data):
                os.fdatasync(found.data)
            kept = {b: s for b, s in enumerate(record.sums) if record.mask >> b & 1}
            written = eras.written(found.data)
            if kept.keys() - new.keys() and record.written.era != written.era:
                written = written._replace(era=eras.UNKNOWN)
            found.put_record(index, sidecar.encode_record(index, kept | new, written))
        except OSError:
            with contextlib.suppress(OSError):  # no record promises them now
                self._punch(found, index, mask)
            raise
        return record.mask | mask

    # -- removing

    def drop_chunk(self, cache_id: str, index: int) -> bool:
        """Drop one chunk and give its space back; returns whether the whole object went with it.

        So it does where it is sealed, or the file system cannot punch holes.
        """
        try:
            with self.files.changing(cache_id, index) as found:
                if not found.header.sealed and self._can_punch:
                    found.put_record(index, sidecar.NOTHING)
                    self._punch(found, index, full_mask(found.header.chunk_bytes(index)))
                    return False
        except (OSError, GoneError, DamagedError):
            pass
        self.remove(cache_id)
        return True

    def _punch(self, found: OpenObject, index: int, mask: int) -> None:
        """Give the space of blocks back that no record promises."""
        for first, end in mask_runs(mask) if self._can_punch else ():
            low, high = run_bytes(first, end, found.header.chunk_bytes(index))
            try:
                punch(found.data, index * CHUNK_BYTES + low, high - low)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                self._can_punch = False
                logger.warning("cache: %s: no holes can be punched here; evicting whole files", found.path)
                return

    def remove(self, cache_id: str) -> bool:
        """Remove an object; False if there was none."""
        return self.files.remove(cache_id)

    def remove_if_empty(self, cache_id: str) -> bool:
        """Remove an object of which nothing is left; returns whether it was one."""
        return self.files.remove(cache_id, only_empty=True)

    def sweep(self) -> None:
        """Remove what is no object: halves that a kill left, and what others put there."""
        for prefix in _FOLDERS:
            self.files.ids(prefix)


def _write_aligned(fd: int, data: memoryview, position: int) -> None:
    """Write at an aligned position: what is no whole page at the end goes through the page cache."""
    whole = len(data) if not is_direct(fd) else len(data) // ALIGN_BYTES * ALIGN_BYTES
    _write_all(fd, data[:whole], position)
    if whole < len(data):
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        _write_all(fd, data[whole:], position + whole)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _write_all(fd: int, data: memoryview, position: int) -> None:
    written = os.pwrite(fd, data, position) if len(data) else 0
    if written != len(data):  # a regular file writes short only when the disk is full
        raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes could be written")


def _without(index: int, record: Record | None, mask: int, written: Written) -> bytes:
    """A record without some blocks; without all if it does not verify."""
    sums = record.sums if record is not None else ()
    left = {b: s for b, s in enumerate(sums) if record is not None and record.mask & ~mask & 1 << b}
    return sidecar.encode_record(index, left, written)


def _up(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
