"""Small files ahead of their readers: configurations, code and tokenizers are on SSD before a new revision shows.

A server reads them while it holds everybody up (Triton reads config.pbtxt under one lock for all models), and opens
weights later. What is small is told by size and name alone. Bounded: so many files and bytes for one publication, and
so many over the life of a mount for directories that somebody merely looks into; beyond that they come when read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import trio

from mfs.cache.chunk_cache import ChunkCache
from mfs.errors import AccessError, IntegrityError, MfsError, StoreError
from mfs.several import for_each
from mfs.tree.listing import Listing, merged
from mfs.types import SMALL_FILE_BYTES, EntryKind, ObjectId
from mfs.workers.frames import object_to_wire
from mfs.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_WEIGHTS = (
    b".safetensors", b".gguf", b".bin", b".onnx", b".onnx_data", b".data", b".pt", b".pth", b".ckpt", b".h5", b".npy",
    b".npz", b".msgpack", b".tflite", b".pb", b".plan", b".engine",
)  # fmt: skip
"""Weights stay where they are until they are read, however small."""

_BATCH = 500  # objects in one question to a worker

Wanted = tuple[ObjectId, int]
"""(object, number of its source)."""


@dataclass(frozen=True)
class SmallFilesConfig:
    """Bounds of what is brought before anybody asks."""

    parallel: int = 8
    """Files at once: fewer than the connections, which readers use too."""
    publication_count_max: int = 2_000
    publication_bytes_max: int = 256 << 20
    """For one model in one refresh. A repository has tens of small files; more than this is something else."""
    unasked_count_max: int = 10_000
    unasked_bytes_max: int = 512 << 20
    """For all directories that are listed for the first time, while the mount lives."""


def is_small(name: bytes, size: int) -> bool:
    """Whether a file is brought before anybody asks for it."""
    return 0 < size <= SMALL_FILE_BYTES and not is_weights(name)


def is_weights(name: bytes) -> bool:
    """Whether a file holds weights, by its name."""
    return name.lower().endswith(_WEIGHTS)


def small_files(new: Listing, old: Listing | None) -> Iterator[int]:
    """The places in a listing of the small files that an older one does not have in this version."""
    for place, index in merged(old, new) if old is not None else ((-1, index) for index in range(len(new))):
        if (
            index >= 0
            and new.kinds[index] == EntryKind.FILE
            and is_small(new.names.raw(index), new.sizes[index])
            and (old is None or place < 0 or not old.is_same_version(place, new, index))
        ):
            yield index


class SmallFiles:
    """Brings small files to the SSD tier."""

    def __init__(self, config: SmallFilesConfig, cache: ChunkCache, pool: WorkerPool) -> None:
        self._config = config
        self._cache = cache
        self._pool = pool
        self.has_allowance = True
        """Whether anything may still be brought that nobody asked for."""
        self._unasked_count = 0
        self._unasked_bytes = 0

    async def bring_for_publication(self, wanted: Iterable[Wanted], *, timeout_s: float) -> None:
        """Have these files on SSD, as many as the bounds allow.

        Raises: MfsError if one cannot be had now but perhaps later. One that nobody will be able to read is logged.
        """
        config, coming = self._config, iter(wanted)
        first = list(islice(coming, config.publication_count_max))
        missing = await self._missing(first)
        within = _within(missing, config.publication_count_max, config.publication_bytes_max)
        if len(within) < len(missing) or next(coming, None) is not None:
            logger.warning("of the small files of one model that are new, %d are brought before it shows; the others, "
                           "beyond %d files and %d bytes, come when they are read",
                           len(within), config.publication_count_max, config.publication_bytes_max)  # fmt: skip
        errors: list[MfsError] = []
        waiting = list(reversed(within))
        with trio.move_on_after(timeout_s) as scope:
            await self._bring_each(waiting, errors)
        for error in errors:
            if not isinstance(error, AccessError | IntegrityError):
                raise error
            logger.warning("published, though not all of it can be read: %s", error)
        if scope.cancelled_caught:
            raise StoreError(f"{waiting[-1][0]} was not here within {timeout_s:g} s, the first of {len(waiting)}")

    async def bring_unasked(self, wanted: Sequence[Wanted]) -> None:
        """Bring files of which nobody knows whether they will be read, while there is some allowance left."""
        missing = await self._missing(wanted)
        config = self._config
        within = _within(
            missing, config.unasked_count_max - self._unasked_count, config.unasked_bytes_max - self._unasked_bytes
        )
        self._unasked_count += len(within)
        self._unasked_bytes += sum(obj.size for obj, _ in within)
        if len(within) < len(missing):
            self.has_allowance = False
            logger.info("%d small files were brought ahead of need; from now on they come when they are read, but for "
                        "those of new revisions", self._unasked_count)  # fmt: skip
        errors: list[MfsError] = []
        await self._bring_each(list(reversed(within)), errors)
        for error in errors[:1]:
            logger.info("%d small files come when they are read: %s", len(errors), error)

    async def _missing(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Those the SSD tier does not have."""
        missing: list[Wanted] = []
        for first in range(0, len(wanted), _BATCH):
            part = wanted[first : first + _BATCH]
            rows = (await self._pool.call("residency", objects=[object_to_wire(obj) for obj, _ in part]))["rows"]
            missing += [item for item, (ssd_bytes, _) in zip(part, rows, strict=True) if ssd_bytes < item[0].size]
        return missing

    async def _bring_each(self, waiting: list[Wanted], errors: list[MfsError]) -> None:
        """Bring files, the last first; each leaves `waiting` when it is here or failed."""

        async def bring(item: Wanted) -> None:
            try:
                await self._bring(*item)
            except MfsError as error:
                errors.append(error)
            waiting.remove(item)

        await for_each(waiting[::-1], bring, at_once=self._config.parallel)

    async def _bring(self, obj: ObjectId, source: int) -> None:
        state = self._cache.open(obj, source)
        try:
            await self._cache.bring(state, 0, to_ssd=True)
            chunk = state.chunks.get(0)
            if state.users == 1 and chunk is not None and chunk.saved == chunk.valid and not chunk.keep:
                self._cache.evict(obj, source)  # the SSD has it; of a slot it would fill a thousandth
        finally:
            self._cache.close(state)


def _within(wanted: Sequence[Wanted], count: int, size: int) -> list[Wanted]:
    """As many from the front as fit."""
    found: list[Wanted] = []
    for obj, source in wanted[: max(0, count)]:
        size -= obj.size
        if size < 0:
            break
        found.append((obj, source))
    return found
