"""What a worker can do: each public method of `Jobs` is one operation the pool can ask for, run in a worker thread.

Arguments and results are plain values (see `frames`); bytes go straight into RAM slots. `emit` sends intermediate
frames.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from xxhash import xxh3_64_intdigest

from mfs.cache.chunks import full_mask, mask_bytes, mask_runs, run_bytes
from mfs.cache.residency import ResidencyTables
from mfs.cache.ssd import SsdConfig, SsdTier, open_directory
from mfs.errors import ConfigError, StoreError
from mfs.safetensors import parse_header
from mfs.sources.base import Source
from mfs.types import CHUNK_BYTES, ByteRange, ObjectId
from mfs.workers.frames import Frame, object_from_wire

logger = logging.getLogger(__name__)

Emit = Callable[[Frame], None]
_PAGE_ENTRIES = 1000  # entries per frame of a listing: a fraction of a millisecond on the daemon's loop
_RECONCILE_S = 3600


class Jobs:
    """The operations of one worker process. Thread-safe: several run at once."""

    def __init__(self, sources: Sequence[Source], slots: memoryview, ssd: SsdConfig | None) -> None:
        """Raises ConfigError if the cache directory cannot be used."""
        self._sources = sources
        self._slots = slots
        self._directory = ssd.directory if ssd else None
        self._tier: SsdTier | None = None
        if ssd:
            open_directory(ssd.directory)
            self._tier = SsdTier(ssd)
            try:
                self._tables = ResidencyTables(ssd.directory, writable=True)
            except OSError as error:
                raise ConfigError(
                    f"cache directory {ssd.directory} cannot take its index ({error}); free disk space, or name "
                    f"another --cache-dir"
                ) from error

    @property
    def identities(self) -> list[str]:
        """The identity of each source, as ObjectIds carry it."""
        return [source.identity for source in self._sources]

    # -- data

    def fill(self, *, source: int, obj: list[Any], index: int, mask: int, slot: int, deadline_s: float,
             emit: Emit) -> Frame:  # fmt: skip
        """Bring blocks `mask` of a chunk into a slot: from SSD what verifies there, the rest from the origin.

        Result: {sums: {block: checksum}, ssd_bytes, origin_bytes, requests, resident: mask that came from SSD,
        lost: whether the chunk's file turned out bad and is gone, with all its blocks}.
        """
        wanted, view = object_from_wire(obj), self._slot(slot)
        length = len(wanted.chunk_range(index))
        resident, lost, sums = self._read_ssd(wanted, index, mask, view)
        missing = mask & ~resident
        requests = 0
        for first, end in mask_runs(missing):
            start, stop = run_bytes(first, end, length)
            base = index * CHUNK_BYTES
            span = ByteRange(base + start, base + stop)
            self._sources[source].get_range(wanted, span, out=view[start:stop], deadline_s=deadline_s)
            requests += 1
            for block in range(first, end):
                low, high = run_bytes(block, block + 1, length)
                sums[block] = xxh3_64_intdigest(view[low:high])
        return {
            "sums": list(sums.items()),
            "resident": 0 if lost else resident,
            "lost": lost,
            "ssd_bytes": mask_bytes(resident, length),
            "origin_bytes": mask_bytes(missing, length),
            "requests": requests,
        }

    def load(self, *, source: int, obj: list[Any], index: int, mask: int, slot: int, emit: Emit) -> Frame:
        """Bring blocks `mask` of a chunk into a slot from SSD alone.

        Result: as of `fill`, with {missing: blocks that are not there}; the slot's bytes of those are undefined.
        """
        wanted, view = object_from_wire(obj), self._slot(slot)
        resident, lost, sums = self._read_ssd(wanted, index, mask, view)
        return {
            "sums": list(sums.items()),
            "resident": 0 if lost else resident,
            "lost": lost,
            "ssd_bytes": mask_bytes(resident, len(wanted.chunk_range(index))),
            "origin_bytes": 0,
            "requests": 0,
            "missing": mask & ~resident,
        }

    def _read_ssd(self, obj: ObjectId, index: int, mask: int, view: memoryview) -> tuple[int, bool, dict[int, int]]:
        """Blocks that SSD had, whether the chunk's file turned out bad and is gone, {block: checksum}."""
        if self._tier is None:
            return 0, False, {}
        resident, sums = self._tier.read_into(obj, index, mask, view)
        return resident, self._correct_table(obj, index, mask, resident), sums

    def _correct_table(self, obj: ObjectId, index: int, mask: int, resident: int) -> bool:
        """A block the table promises and the file lacks must not count against the budget for ever, nor the reverse.

        Returns whether there is no file where the table promised one.
        """
        masks = self._tables.masks(obj.cache_id)
        promised = int(masks[index]) & mask if len(masks) else 0
        if promised == resident:
            return False
        header = self._tier.header(obj.cache_id, index) if self._tier else None
        try:
            self._tables.set_mask(obj, index, header.mask if header else 0)
        except OSError as error:  # somebody removed the cache under us; what is being read must not suffer for it
            logger.warning("cache: the residency tables cannot be written (%s)", error)
        return header is None

    def persist(self, *, obj: list[Any], index: int, sums: list[list[int]], slot: int, emit: Emit) -> Frame:
        """Write blocks of a slot to the SSD tier. Result: {bytes, full}; full: the disk has no room (nothing
        written).
        """
        target = object_from_wire(obj)
        tier, tables = self._ssd()
        blocks = {int(block): int(checksum) for block, checksum in sums}
        try:
            mask = tier.write(target, index, blocks, self._slot(slot))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return {"bytes": 0, "full": True}
            raise StoreError(f"cache: {target} chunk {index} cannot be written: {error}") from error
        tables.set_mask(target, index, mask)
        return {"bytes": mask_bytes(mask, len(target.chunk_range(index))), "full": False}

    def tensor_boundaries(self, *, slot: int, file_bytes: int, emit: Emit) -> Frame:
        """{boundaries} of the safetensors file whose first chunk is in a slot: where data starts, then each tensor's
        end.

        Raises: IntegrityError if the header is none.
        """
        header = parse_header(self._slot(slot), file_bytes)
        return {"boundaries": [header.data_start, *(tensor.stop for tensor in header.tensors)]}

    # -- listings

    def list_directory(self, *, source: int, path: str, deadline_s: float, emit: Emit) -> Frame:
        """List a directory; entries come in intermediate frames {page: [directory, [entry, ...]]}."""
        for directory, entries in self._sources[source].list(path, deadline_s=deadline_s):
            for first in range(0, max(1, len(entries)), _PAGE_ENTRIES):
                emit({"page": [directory, [list(entry) for entry in entries[first : first + _PAGE_ENTRIES]]]})
        return {}

    # -- the SSD tier

    def touch(self, *, uses: dict[str, list[int]], emit: Emit) -> Frame:
        """Note that chunks were used: {cache_id: [index, ...]}."""
        _, tables = self._ssd()
        for cache_id, indexes in uses.items():
            tables.touch(cache_id, indexes)
        return {}

    def usage(self, *, emit: Emit) -> Frame:
        """{used_bytes, objects_count, free_disk_bytes} of the SSD tier."""
        _, tables = self._ssd()
        usage = tables.usage()
        disk = os.statvfs(self._directory or "/")
        return {
            "used_bytes": usage.used_bytes,
            "objects_count": usage.objects_count,
            "free_disk_bytes": disk.f_bavail * disk.f_frsize,
        }

    def enforce_budget(self, *, budget_bytes: int, target_bytes: int, emit: Emit) -> Frame:
        """Above the budget, evict least recently used chunks down to the target.

        Result: {evicted_bytes, used_bytes, dropped: {cache_id: [chunk, ...]}}.
        One process at a time evicts from a directory; another finds the lock taken and leaves the work to it.
        """
        tier, tables = self._ssd()
        assert self._directory is not None
        fd = os.open(self._directory / "v1" / "evict.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _reconcile_if_due(fd, tier, tables)
            used = tables.usage().used_bytes
            evicted, dropped = 0, dict[str, list[int]]()
            if used > budget_bytes:
                for cache_id, index, row, nbytes in tables.victims(used - target_bytes):
                    if not tables.drop(tier, cache_id, row, index):
                        continue
                    evicted += nbytes
                    dropped.setdefault(cache_id, []).append(index)
            return {"evicted_bytes": evicted, "used_bytes": used - evicted, "dropped": dropped}
        except BlockingIOError:
            return {"evicted_bytes": 0, "used_bytes": tables.usage().used_bytes, "dropped": {}}
        finally:
            os.close(fd)

    def residency(self, *, objects: list[list[Any]], emit: Emit) -> Frame:
        """{rows: [[ssd_bytes, pinned], ...]} in the order asked."""
        if self._tier is None:
            return {"rows": [[0, False] for _ in objects]}
        ids = [object_from_wire(obj).cache_id for obj in objects]
        return {"rows": [[self._tables.resident_bytes(i), self._tables.pinned(i)] for i in ids]}

    def masks(self, *, obj: list[Any], emit: Emit) -> Frame:
        """{masks: [blocks on SSD, ...]}, one per chunk; all zero for an unknown object."""
        wanted = object_from_wire(obj)
        found = [int(mask) for mask in self._ssd()[1].masks(wanted.cache_id)]
        return {"masks": found or [0] * wanted.chunks_count}

    def keep(self, *, objects: list[list[Any]], until_s: int, emit: Emit) -> Frame:
        """Protect objects from SSD eviction up to a time, whoever shares the directory."""
        _, tables = self._ssd()
        for obj in objects:
            tables.keep(object_from_wire(obj), until_s)
        return {}

    def lacking(self, *, obj: list[Any], emit: Emit) -> Frame:
        """{chunks: [index, ...]} of which blocks are missing on SSD. Asks the files: the tables are only hints."""
        tier, _ = self._ssd()
        wanted = object_from_wire(obj)
        found = []
        for index in range(wanted.chunks_count):
            header = tier.header(wanted.cache_id, index)
            if header is None or header.mask != full_mask(len(wanted.chunk_range(index))):
                found.append(index)
        return {"chunks": found}

    def pin(self, *, objects: list[list[Any]], pinned: bool, emit: Emit) -> Frame:
        """Protect objects from SSD eviction, or stop to."""
        _, tables = self._ssd()
        for obj in objects:
            tables.set_pinned(object_from_wire(obj), pinned)
        return {}

    def evict(self, *, objects: list[list[Any]], emit: Emit) -> Frame:
        """Drop objects from the SSD tier unless pinned, or kept for who has them open.

        Result: {ssd_bytes, kept_pinned_count}.
        """
        tier, tables = self._ssd()
        freed = kept = 0
        for cache_id in (object_from_wire(obj).cache_id for obj in objects):
            row, resident = tables.find(cache_id), tables.resident_bytes(cache_id)
            if row is None:
                continue
            for index in tables.masks(cache_id).nonzero()[0]:
                if not tables.drop(tier, cache_id, row, int(index)):
                    break
            freed += resident - tables.resident_bytes(cache_id)
            kept += tables.protected(cache_id)
        return {"ssd_bytes": freed, "kept_pinned_count": kept}

    def verify(self, *, obj: list[Any], emit: Emit) -> Frame:
        """Re-read what the SSD tier holds of an object; bad chunks are dropped.

        Result: {checked_bytes, bad: [[chunk, reason]]}. Where the source stated a sha256 and all of the object is here,
        that is checked too. Intermediate frames {checked_bytes}.
        """
        target = object_from_wire(obj)
        tier, tables = self._ssd()
        scratch = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        checked, bad, whole = 0, [], bool(target.digest and target.digest.startswith("sha256:"))
        sha256 = hashlib.sha256()
        for index, promised in enumerate(int(mask) for mask in tables.masks(target.cache_id)):
            length = len(target.chunk_range(index))
            whole = whole and promised == full_mask(length)
            if not promised:
                continue
            good, _ = tier.read_into(target, index, promised, scratch)
            checked += mask_bytes(good, length)
            if good != promised:
                bad.append([index, f"blocks {promised & ~good:#x} are missing or fail their checksums"])
                tables.set_mask(target, index, 0)
                tier.remove(target.cache_id, index)
                whole = False
            elif whole:
                sha256.update(scratch[:length])
            emit({"checked_bytes": checked})
        if whole and target.size and f"sha256:{sha256.hexdigest()}" != target.digest:
            bad.append([-1, f"the object's sha256 is {sha256.hexdigest()}, expected {target.digest}"])
            self.evict(objects=[obj], emit=emit)
        return {"checked_bytes": checked, "bad": bad}

    # -- the mount

    def stat_path(self, *, path: str, emit: Emit) -> Frame:
        """os.stat of a path, asked from here because the daemon must never touch its own mount. {st_dev}"""
        try:
            return {"st_dev": os.stat(path).st_dev}
        except OSError as error:
            raise StoreError(f"{path} does not answer: {error}") from error

    def _slot(self, slot: int) -> memoryview:
        return self._slots[slot * CHUNK_BYTES : (slot + 1) * CHUNK_BYTES]

    def _ssd(self) -> tuple[SsdTier, ResidencyTables]:
        if self._tier is None:
            raise StoreError("this mount has no SSD cache; mount with --cache-dir to have one")
        return self._tier, self._tables


def _reconcile_if_due(lock_fd: int, tier: SsdTier, tables: ResidencyTables) -> None:
    """Once an hour for all who share a directory: the lock file is empty at first, then its mtime tells."""
    status = os.fstat(lock_fd)
    if not status.st_size or time.time() - status.st_mtime > _RECONCILE_S:
        tables.reconcile(tier)
        os.pwrite(lock_fd, b"1", 0)
