"""MessagePack frames between the daemon and its workers; both ends use this module.

Bulk bytes never travel here: they go into the RAM tier. JSON took a tenth of the daemon's time and half of a worker's
Python.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import msgpack

from mfs.types import ObjectId

Frame = dict[str, Any]
FRAME_BYTES_MAX = 16 << 20
"""A page of a listing is about 100 KB; anything near this limit is a bug."""
_TEXT = "surrogatepass"  # what a source calls a version may be any text


def encode(frame: Frame) -> bytes:
    """One frame as bytes. Raises: ValueError or OverflowError for what no frame can hold (integers beyond 64 bits)."""
    packed: bytes = msgpack.packb(frame, unicode_errors=_TEXT)
    return packed


class Decoder:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=FRAME_BYTES_MAX, strict_map_key=False, unicode_errors=_TEXT)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add received bytes, yield the frames now complete. Raises: ValueError on bytes that are no frame of ours."""
        try:
            self._unpacker.feed(data)
            for frame in self._unpacker:
                if not isinstance(frame, dict):
                    raise ValueError(f"not a frame: {str(frame)[:100]}")
                yield frame
        except msgpack.exceptions.BufferFull:
            raise ValueError(f"frame of more than {FRAME_BYTES_MAX} bytes") from None


def object_to_wire(obj: ObjectId) -> list[Any]:
    """An ObjectId as a list."""
    return [obj.source, obj.path, obj.size, obj.version, obj.digest, obj.locator]


def object_from_wire(fields: list[Any]) -> ObjectId:
    """Inverse of `object_to_wire`."""
    return _object(*fields)


@functools.lru_cache(maxsize=256)  # comes with each order; its cache_id is a hash
def _object(*fields: Any) -> ObjectId:
    return ObjectId(*fields)
