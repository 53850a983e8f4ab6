"""What a worker can do: each public method of `Jobs` is one operation the pool can ask for, run in a worker thread.

Arguments and results are plain values (see `frames`); bytes go straight into the RAM tier: `piece` is a chunk's
part of its object's file, mapped for the length of the operation. `emit` sends intermediate frames.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from typing import Any

from mfs.cache import page_cache, sealing
from mfs.cache.chunks import full_mask, mask_bytes, mask_runs, run_bytes
from mfs.cache.directory import open_own, root_of
from mfs.cache.heat import strip
from mfs.cache.model_sums import ModelSums
from mfs.cache.residency import ResidencyTables
from mfs.cache.ssd import SsdTier
from mfs.errors import MfsError, StoreError
from mfs.fetch.told import telling, watching
from mfs.mapping import populate
from mfs.safetensors import parse_header
from mfs.sources.base import Moved, Source
from mfs.types import CHUNK_BYTES, ByteRange, ObjectId
from mfs.workers.arrivals import Arrivals, block_sums
from mfs.workers.frames import Frame, object_from_wire
from mfs.workers.replies import Replies
from mfs.workers.tier import Parts, Tier

logger = logging.getLogger(__name__)

Emit = Callable[[Frame], None]
_PAGE_ENTRIES = 1000  # entries per frame of a listing: a fraction of a millisecond on the daemon's loop
_RECONCILE_S = 3600


class Jobs:
    """The operations of one worker process. Thread-safe: several run at once."""

    def __init__(self, sources: Sequence[Source], tier: Tier, replies: Replies) -> None:
        self._sources = sources
        self._tier = tier
        self._replies = replies
        self._sums = ModelSums()

    @property
    def identities(self) -> list[str]:
        """The identity of each source, as ObjectIds carry it."""
        return [source.identity for source in self._sources]

    # -- data

    def fill(self, *, source: int, obj: list[Any], index: int, mask: int, piece: memoryview, deadline_s: float,
             replies: Mapping[bytes, tuple[int, int]], emit: Emit) -> Frame:  # fmt: skip
        """Bring blocks `mask` of a chunk into its piece: from SSD what verifies there, the rest from the origin.

        replies: readers of parts of the piece that are there then; see `replies`.
        Result: {sums: {block: checksum}, ssd_bytes, origin_bytes, shared_bytes: from other files on SSD, requests,
        decode_s: seconds spent on unpacking, resident: mask that came from SSD, lost: whether the chunk turned out bad
        and SSD has nothing of it any more}. Where that takes long, or fails in the middle, frames of `Arrivals` before
        it: blocks that count already, whatever becomes of the others. The result has no bytes of those, but their sums.
        """
        wanted = object_from_wire(obj)
        length = len(wanted.chunk_range(index))
        resident, lost, sums = self._read_ssd(wanted, index, mask, piece)
        missing = mask & ~resident
        moved, arrivals = Moved(), Arrivals(piece, length, emit)
        try:
            for first, end in mask_runs(missing):
                start, stop = run_bytes(first, end, length)
                base = index * CHUNK_BYTES
                span = ByteRange(base + start, base + stop)
                with watching(partial(arrivals.note, first, end)):
                    cost = self._sources[source].get_range(wanted, span, out=piece[start:stop], deadline_s=deadline_s)
                moved += cost or Moved(len(span), 0, 1)
                if cost is None:
                    arrivals.keep(first, end)
        except MfsError:
            arrivals.tell_kept()
            raise
        self._replies.write(replies, piece)
        sums.update(block_sums(piece, missing, length))
        return {
            "sums": list(sums.items()),
            "resident": 0 if lost else resident,
            "lost": lost,
            "ssd_bytes": mask_bytes(resident, length),
            "origin_bytes": moved.origin_bytes - arrivals.told_bytes,
            "shared_bytes": moved.shared_bytes,
            "requests": moved.requests,
            "decode_s": moved.decode_s,
        }

    def load(self, *, source: int, obj: list[Any], index: int, mask: int, piece: memoryview,
             replies: Mapping[bytes, tuple[int, int]], emit: Emit) -> Frame:  # fmt: skip
        """Bring blocks `mask` of a chunk into its piece from SSD alone.

        replies: as of `fill`, left to the daemon where a block is not there.
        Result: as of `fill`, with {missing: blocks that are not there}; the piece's bytes of those are undefined.
        """
        wanted = object_from_wire(obj)
        resident, lost, sums = self._read_ssd(wanted, index, mask, piece)
        if resident == mask:
            self._replies.write(replies, piece)
        return {
            "sums": list(sums.items()),
            "resident": 0 if lost else resident,
            "lost": lost,
            "ssd_bytes": mask_bytes(resident, len(wanted.chunk_range(index))),
            "origin_bytes": 0,
            "shared_bytes": 0,
            "requests": 0,
            "missing": mask & ~resident,
        }

    def warm(self, *, mask: int, piece: memoryview, emit: Emit) -> Frame:
        """Have the memory of a piece whose bytes mean nothing."""
        try:
            populate(piece)
        except OSError as error:
            raise StoreError(f"RAM tier: {error}") from error
        return {}

    def _read_ssd(self, obj: ObjectId, index: int, mask: int, view: memoryview) -> tuple[int, bool, dict[int, int]]:
        """Blocks that SSD had, whether the chunk turned out bad and nothing of it is left there, {block: checksum}."""
        parts = self._tier.get()
        if parts is None or not parts[1].mask(obj.cache_id, index) & mask:  # to look into the files costs 40 us
            return 0, False, {}
        resident, sums = parts[0].read_into(obj, index, mask, view)
        return resident, self._correct_table(parts, obj, index, mask, resident), sums

    @staticmethod
    def _correct_table(parts: Parts, obj: ObjectId, index: int, mask: int, resident: int) -> bool:
        """A block the table promises and the file lacks must not count against the budget for ever, nor the reverse.

        Returns whether nothing is left of a chunk where the table promised something.
        """
        tier, tables = parts
        if tables.mask(obj.cache_id, index) & mask == resident:
            return False
        try:
            if tier.header(obj.cache_id) is None:
                tables.learn(tier, obj.cache_id)  # with it went all its chunks
                return True
            return not tables.learn_chunk(tier, obj, index)
        except OSError as error:  # somebody removed the cache under us; what is being read must not suffer for it
            logger.warning("cache: the residency tables cannot be written (%s)", error)
            return not tier.mask(obj.cache_id, index)

    def persist(self, *, obj: list[Any], index: int, sums: list[list[int]], piece: memoryview, emit: Emit) -> Frame:
        """Write blocks of a piece to the SSD tier.

        Result: {bytes, full, away}; full: the disk has no room; away: there is no tier now. Nothing is written then.
        """
        target = object_from_wire(obj)
        parts = self._tier.get()
        if parts is None:
            return {"bytes": 0, "full": False, "away": True}
        tier, tables = parts
        blocks = {int(block): int(checksum) for block, checksum in sums}
        try:
            tier.write(target, index, blocks, piece)
            mask = tables.learn_chunk(tier, target, index)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return {"bytes": 0, "full": True, "away": False}
            self._tier.doubt()
            raise StoreError(f"cache: {target} chunk {index} cannot be written: {error}") from error
        return {"bytes": mask_bytes(mask, len(target.chunk_range(index))), "full": False, "away": False}

    def tensor_boundaries(self, *, piece: memoryview, file_bytes: int, emit: Emit) -> Frame:
        """{boundaries} of the safetensors file whose first chunk this is: where data starts, then each tensor's
        end.

        Raises: IntegrityError if the header is none.
        """
        header = parse_header(piece, file_bytes)
        return {"boundaries": [header.data_start, *(tensor.stop for tensor in header.tensors)]}

    # -- listings

    def list_directory(self, *, source: int, path: str, deadline_s: float, emit: Emit) -> Frame:
        """List a directory; entries come in intermediate frames {page: [directory, [entry, ...]]}.

        A frame {waiting: error} says why the origin is asked again.
        """
        with telling(lambda error: emit({"waiting": str(error)})):
            for directory, entries in self._sources[source].list(path, deadline_s=deadline_s):
                for first in range(0, max(1, len(entries)), _PAGE_ENTRIES):
                    emit({"page": [directory, [list(entry) for entry in entries[first : first + _PAGE_ENTRIES]]]})
        return {}

    # -- the SSD tier

    def touch(self, *, uses: dict[str, list[int]], emit: Emit) -> Frame:
        """Note that chunks were used: {cache_id: [index, ...]}."""
        parts = self._tier.get()
        if parts is not None:
            for cache_id, indexes in uses.items():
                parts[1].touch(cache_id, indexes)
        return {}

    def usage(self, *, emit: Emit) -> Frame:
        """What `Usage` has, and free_disk_bytes, of the SSD tier."""
        tier, tables = self._ssd()
        usage = tables.usage()
        disk = os.statvfs(tier.config.directory)
        return {
            **asdict(usage),
            "free_disk_bytes": disk.f_bavail * disk.f_frsize,
        }

    def enforce_budget(self, *, budget_bytes: int, target_bytes: int, spare: Sequence[str] = (), emit: Emit) -> Frame:
        """Above the budget, evict down to the target: least recently used chunks, and sealed objects whole.

        spare: cache_ids that are left alone.
        Result: {evicted_bytes, used_bytes, dropped: {cache_id: [chunk, ...]}}.
        One process at a time evicts from a directory; another finds the lock taken and leaves the work to it.
        """
        parts = self._tier.get()
        if parts is None:
            return {"evicted_bytes": 0, "used_bytes": 0, "dropped": {}}
        tier, tables = parts
        fd = open_own(root_of(tier.config.directory) / "evict.lock", os.O_RDWR | os.O_CREAT, shared=tier.config.shared)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _reconcile_if_due(fd, tier, tables)
            used = tables.usage().used_bytes
            evicted, dropped = 0, dict[str, list[int]]()
            if used > budget_bytes:
                for cache_id, index, row, _ in tables.victims(used - target_bytes, frozenset(spare)):
                    if evicted >= used - target_bytes:
                        break
                    for chunk, nbytes in tables.drop(tier, cache_id, row, index):
                        evicted += nbytes
                        dropped.setdefault(cache_id, []).append(chunk)
                used = tables.usage().used_bytes
            return {"evicted_bytes": evicted, "used_bytes": used, "dropped": dropped}
        except BlockingIOError:
            return {"evicted_bytes": 0, "used_bytes": tables.usage().used_bytes, "dropped": {}}
        finally:
            os.close(fd)

    def residency(self, *, objects: list[list[Any]], emit: Emit) -> Frame:
        """{rows: [[ssd_bytes, pinned], ...]} in the order asked."""
        parts = self._tier.get()
        if parts is None:
            return {"rows": [[0, False] for _ in objects]}
        ids = [object_from_wire(obj).cache_id for obj in objects]
        return {"rows": [[parts[1].resident_bytes(i), parts[1].pinned(i)] for i in ids]}

    def models(self, *, emit: Emit) -> Frame:
        """{rows} of what each model has on SSD, see `cache.model_sums`."""
        parts = self._tier.get()
        return {"rows": self._sums.rows(parts[1], parts[0]) if parts is not None else []}

    def heat(self, *, objects: list[list[Any]], emit: Emit) -> Frame:
        """{rows: [[strip, ssd_bytes, pinned], ...]} in the order asked, see `cache.heat`."""
        parts, rows = self._tier.get(), list[list[Any]]()
        for obj in map(object_from_wire, objects):
            if parts is None:
                rows.append([strip(b"", obj.size), 0, False])
                continue
            tables = parts[1]
            masks = tables.masks(obj.cache_id)
            rows.append(
                [strip(masks.tobytes(), obj.size), tables.resident_bytes(obj.cache_id), tables.pinned(obj.cache_id)]
            )
        return {"rows": rows}

    def masks(self, *, obj: list[Any], emit: Emit) -> Frame:
        """{masks: [blocks on SSD, ...], one per chunk, all zero for an unknown object; sealed}."""
        wanted = object_from_wire(obj)
        tier, tables = self._ssd()
        found = [int(mask) for mask in tables.masks(wanted.cache_id)]
        sealed = any(found) and sealing.is_sealed(tier, wanted)
        return {"masks": found or [0] * wanted.chunks_count, "sealed": sealed}

    def seal(self, *, obj: list[Any], may_read: bool, emit: Emit) -> Frame:
        """Seal an object, if all of it is there; may_read: also where it has to be read and verified before.

        Result: {sealed, needs_reading}. What is read takes as long as it takes: to be asked without a time limit.
        """
        wanted = object_from_wire(obj)
        tier, tables = self._ssd()
        is_sealed = sealing.seal(tier, wanted, may_read=may_read)
        if is_sealed is not None:
            tables.learn(tier, wanted.cache_id)
        return {"sealed": bool(is_sealed), "needs_reading": is_sealed is None}

    def fill_page_cache(self, *, obj: list[Any], chunks: Sequence[int], emit: Emit) -> Frame:
        """Read chunks of a sealed object into the page cache, as far as half of the free memory goes. {bytes}"""
        return {"bytes": page_cache.fill(self._ssd()[0], object_from_wire(obj), chunks)}

    def page_cache_front(self, *, obj: list[Any], first: int, filled: int, emit: Emit) -> Frame:
        """{front} of a sealed object, see `page_cache.front`."""
        return {"front": page_cache.front(self._ssd()[0], object_from_wire(obj), first, filled)}

    def scrub(self, *, after: str, emit: Emit) -> Frame:
        """Verify the sealed object that comes after a cache_id ('' for the first); a bad one is removed.

        Result: {cache_id, checked_bytes, bad}; cache_id is '' after the last. Reads all of the object once, likewise.
        """
        tier, tables = self._ssd()
        cache_id = tables.sealed_after(after)
        if cache_id is None:
            return {"cache_id": "", "checked_bytes": 0, "bad": False}
        checked, bad = sealing.scrub(tier, cache_id)
        if bad:
            tables.learn(tier, cache_id)
        return {"cache_id": cache_id, "checked_bytes": checked, "bad": bad}

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
        standing = tier.standing(wanted.cache_id)
        masks = standing.masks if standing is not None else [0] * wanted.chunks_count
        return {"chunks": [i for i, mask in enumerate(masks) if mask != full_mask(len(wanted.chunk_range(i)))]}

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
            tables.drop(tier, cache_id, row, None)
            freed += resident - tables.resident_bytes(cache_id)
            kept += tables.protected(cache_id)
        return {"ssd_bytes": freed, "kept_pinned_count": kept}

    def verify(self, *, obj: list[Any], emit: Emit) -> Frame:
        """Re-read what the SSD tier holds of an object; bad blocks are dropped, a sealed object with one as a whole.
        What that is, its files say, and the tables, by which it counts: a worker may have died before it told them.

        Result: {checked_bytes, bad: [[chunk, reason]]}. Where the source stated a sha256 and all of the object is here,
        that is checked too. Intermediate frames {checked_bytes}.
        """
        target = object_from_wire(obj)
        tier, tables = self._ssd()
        scratch = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        checked, bad, whole = 0, [], bool(target.digest and target.digest.startswith("sha256:"))
        sha256 = hashlib.sha256()
        standing = tier.standing(target.cache_id)
        promises = zip_longest(map(int, tables.masks(target.cache_id)), standing.masks if standing else (), fillvalue=0)
        for index, promised in enumerate(mask | other for mask, other in promises):
            length = len(target.chunk_range(index))
            whole = whole and promised == full_mask(length)
            if not promised:
                continue
            good, _ = tier.read_into(target, index, promised, scratch)
            checked += mask_bytes(good, length)
            if good != promised:
                bad.append([index, f"blocks {promised & ~good:#x} are missing or fail their checksums"])
                tables.learn(tier, target.cache_id)
                whole = False
                if tier.header(target.cache_id) is None:  # gone with all its chunks
                    break
            elif whole:
                sha256.update(scratch[:length])
            emit({"checked_bytes": checked})
        if whole and target.size and f"sha256:{sha256.hexdigest()}" != target.digest:
            bad.append([-1, f"the object's sha256 is {sha256.hexdigest()}, expected {target.digest}"])
            tier.remove(target.cache_id)  # whatever protects it
            tables.learn(tier, target.cache_id)
        return {"checked_bytes": checked, "bad": bad}

    # -- the mount

    def stat_path(self, *, path: str, emit: Emit) -> Frame:
        """os.stat of a path, asked from here because the daemon must never touch its own mount. {st_dev}"""
        try:
            return {"st_dev": os.stat(path).st_dev}
        except OSError as error:
            raise StoreError(f"{path} does not answer: {error}") from error

    def _ssd(self) -> Parts:
        return self._tier.require()


def _reconcile_if_due(lock_fd: int, tier: SsdTier, tables: ResidencyTables) -> None:
    """Once an hour for all who share a directory: the lock file is empty at first, then its mtime tells."""
    status = os.fstat(lock_fd)
    if not status.st_size or time.time() - status.st_mtime > _RECONCILE_S:
        tables.reconcile(tier)
        os.pwrite(lock_fd, b"1", 0)
