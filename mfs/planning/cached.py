"""What a cache directory holds already of what is going to be read. Nothing in it is changed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mfs.cache.chunk_places import ChunkPlaces
from mfs.cache.chunks import block_mask, chunk_spans
from mfs.cache.directory import root_of
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.errors import AccessError
from mfs.types import ByteRange, ObjectId


class Cached:
    """One cache directory, or none."""

    def __init__(self, directory: Path | None, *, shared: bool = False) -> None:
        """directory: need not be there yet. Raises: AccessError if it is not ours to look at."""
        is_there = directory is not None and _is_cache(directory)
        self._tier: SsdTier | None = None
        self._places: ChunkPlaces | None = None
        if directory is not None and is_there:
            real = Path(os.path.realpath(directory))
            self._tier = SsdTier(SsdConfig(real, shared=shared))
            self._places = ChunkPlaces(real, shared=shared)
        self._known: dict[str, list[int]] = {}

    def masks(self, obj: ObjectId) -> list[int]:
        """Blocks on SSD, one mask for each chunk of an object."""
        return self._masks(obj.cache_id) or [0] * obj.chunks_count

    def has_chunk(self, chunk_id: str, plain_bytes: int) -> bool:
        """Whether some file here has all of a registry's chunk."""
        if self._places is None:
            return False
        for place in self._places.find(chunk_id):
            masks = self._masks(place.cache_id)
            span = ByteRange(place.start, place.start + plain_bytes)
            if masks and all(
                index < len(masks) and not block_mask(piece.start, piece.stop) & ~masks[index]
                for index, piece in chunk_spans(span)
            ):
                return True
        return False

    def _masks(self, cache_id: str) -> list[int]:
        if self._tier is None:
            return []
        found = self._known.get(cache_id)
        if found is None:
            standing = self._tier.standing(cache_id)
            found = self._known[cache_id] = standing.masks if standing is not None else []
        return found


def _is_cache(directory: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(root_of(directory)).st_mode)
    except PermissionError as error:
        raise AccessError(
            f"cache directory {directory} cannot be looked at: {error.strerror}; ask as its owner"
        ) from None
    except OSError:
        return False
