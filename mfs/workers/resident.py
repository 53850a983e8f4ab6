"""Chunks of registries that this node's SSD has in some file: read from there instead of fetched once more.

Blocks are verified by their checksums as ever; that they are the chunk is for the asker to see (`registry.frames`).
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mfs.cache.chunk_places import ChunkPlaces, Content, Place
from mfs.cache.chunks import block_mask, chunk_spans
from mfs.types import CHUNK_BYTES, ByteRange
from mfs.workers.tier import Parts, Tier

logger = logging.getLogger(__name__)

_SLOTS_COUNT = 4  # kept


class NodeChunks:
    """What one worker knows of them; see `registry.resident.Resident`. Thread-safe."""

    def __init__(self, tier: Tier, places: ChunkPlaces) -> None:
        self._tier = tier
        self._places = places
        self._slots: list[memoryview] = []

    def may_have(self, chunk_id: str) -> bool:
        """Whether a file that has anything here would hold a chunk."""
        parts = self._tier.get()
        if parts is None:
            return False
        return any(parts[1].find(place.cache_id) is not None for place in self._places.find(chunk_id))

    def read(self, chunk_id: str, span: ByteRange, out: memoryview) -> bool:
        """Fill `out` with plain bytes of a chunk; False if no file here has all of them."""
        parts = self._tier.get()
        if parts is None:
            return False
        return any(self._read_at(parts, place, span, out) for place in self._places.find(chunk_id))

    def note(self, contents: Sequence[Content]) -> None:
        """Remember what files are made of."""
        parts = self._tier.get()
        if parts is None:
            return
        tables = parts[1]
        try:
            self._places.add(contents, lambda cache_id: bool(tables.masks(cache_id).any()))
        except OSError as error:  # a cache may lose
            logger.warning("cache: what models share cannot be noted (%s): it will be fetched again", error)

    def _read_at(self, parts: Parts, place: Place, span: ByteRange, out: memoryview) -> bool:
        tier, tables = parts
        wanted = ByteRange(place.start + span.start, place.start + span.stop)
        if wanted.stop > place.object_bytes:
            return False
        masks = tables.masks(place.cache_id)
        pieces = list(chunk_spans(wanted))
        if len(masks) <= pieces[-1][0] or any(block_mask(p.start, p.stop) & ~int(masks[i]) for i, p in pieces):
            return False
        filled = 0
        with self._slot() as slot:
            for index, piece in pieces:
                mask = block_mask(piece.start, piece.stop)
                if tier.read_blocks(place.cache_id, place.object_bytes, index, mask, slot)[0] != mask:
                    return False
                out[filled : filled + len(piece)] = slot[piece.start : piece.stop]
                filled += len(piece)
        tables.touch(place.cache_id, [index for index, _ in pieces])
        return True

    @contextmanager
    def _slot(self) -> Iterator[memoryview]:
        try:
            slot = self._slots.pop()
        except IndexError:
            slot = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        try:
            yield slot
        finally:
            if len(self._slots) < _SLOTS_COUNT:
                self._slots.append(slot)
