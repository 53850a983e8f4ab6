"""Length-prefixed JSON frames between the daemon and its workers; both ends use this module.

A frame is a 4-byte little-endian length and that many bytes of JSON. Bulk bytes never travel here: they go into slots.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from mfs.types import ObjectId

Frame = dict[str, Any]
FRAME_BYTES_MAX = 16 << 20
"""A page of a listing is about 100 KB; anything near this limit is a bug."""


def encode(frame: Frame) -> bytes:
    """One frame as bytes."""
    body = json.dumps(frame, separators=(",", ":")).encode()
    return struct.pack("<I", len(body)) + body


class Decoder:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add received bytes, yield the frames now complete. Raises ValueError on a frame that is too long."""
        self._buffer += data
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from("<I", self._buffer)
            if length > FRAME_BYTES_MAX:
                raise ValueError(f"frame of {length} bytes: expected at most {FRAME_BYTES_MAX}")
            if len(self._buffer) < 4 + length:
                return
            body = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            yield json.loads(body)


def object_to_wire(obj: ObjectId) -> list[Any]:
    """An ObjectId as a JSON list."""
    return [obj.source, obj.path, obj.size, obj.version, obj.digest, obj.locator]


def object_from_wire(fields: list[Any]) -> ObjectId:
    """Inverse of `object_to_wire`."""
    return ObjectId(*fields)
