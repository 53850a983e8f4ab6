"""One stored chunk: a table of frames, and the frames. Pure.

    0   4   'MFSC'
    4   1   version: 1
    5   1   bytes of an element: 1, 2, 4 or 8; what planes and differences are taken by
    6   1   depth: 0, or the steps down from here when it was written, at most DEPTH_MAX; see `walk`
    7   1   0
    8   8   plain bytes, little-endian
    16  32  the id of that other chunk, zeros where depth is 0; it has as many plain bytes
    48  16  zeros
    64  40  for each frame: blake3 of its plain bytes (32), stored bytes (4, little-endian), codec (1), zeros (3)
    …       the frames, one after the other, without a hole

A *frame* is FRAME_BYTES of plain bytes, the last may be shorter: what a reader fetches, decodes and verifies by itself.
A chunk is called by what it holds, not by how it is stored: `chunk_id`. So the table is proven by the id, each frame by
the table; stored sizes and codecs are believed only as far as what comes out has the right digest.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

from blake3 import blake3

from mfs.errors import IntegrityError
from mfs.registry import codecs
from mfs.registry.manifest import CHUNK_BYTES_MAX
from mfs.types import ByteRange

FRAME_BYTES = 128 << 10
"""Plain bytes of a frame: a block of the cache, so that a random read costs no more than elsewhere."""

DEPTH_MAX = 3
"""Differences that stand on each other: what reading one frame may cost beside it."""

T = TypeVar("T")

_MAGIC = b"MFSC"
_HEAD = struct.Struct("<4sBBBxQ32s16x")
_FRAME = struct.Struct("<32sIB3x")
HEAD_BYTES = _HEAD.size
_ID_PREFIX = b"mfs-chunk-1\0"
_WIDTHS = (1, 2, 4, 8)
NO_BASE = bytes(32)


@dataclass(frozen=True, slots=True)
class Frame:
    """One row of a chunk's table."""

    digest: bytes
    """blake3 of the plain bytes."""
    stored_bytes: int
    codec: int
    """See `codecs`."""


@dataclass(frozen=True)
class Table:
    """The head of a stored chunk."""

    id: str
    plain_bytes: int
    element_bytes: int
    depth: int
    base: str | None
    """The chunk that this one is a difference to."""
    frames: tuple[Frame, ...]

    @cached_property
    def _offsets(self) -> list[int]:
        return list(accumulate((frame.stored_bytes for frame in self.frames), initial=table_bytes(self.plain_bytes)))

    @property
    def stored_bytes(self) -> int:
        """Of the whole object."""
        return self._offsets[-1]

    def stored_range(self, first: int, end: int) -> ByteRange:
        """Where frames [first, end) stand in the object."""
        return ByteRange(self._offsets[first], self._offsets[end])

    def plain_range(self, index: int) -> ByteRange:
        """Which plain bytes of the chunk frame `index` holds."""
        return ByteRange(index * FRAME_BYTES, min((index + 1) * FRAME_BYTES, self.plain_bytes))

    def decode(self, index: int, stored: memoryview, out: memoryview, base: memoryview | None = None) -> None:
        """Bring frame `index` into `out` and verify it.

        stored: the frame as it is stored; may be `out` itself where the codec is raw.
        out: as long as the frame's plain bytes. base: the same frame of the chunk that this one is a difference to.
        Raises: IntegrityError if it cannot be decoded, or is something else.
        """
        frame = self.frames[index]
        codecs.decode(frame.codec, self.element_bytes, stored, out, base)
        if blake3(out).digest() != frame.digest:
            raise IntegrityError(f"chunk {self.id[:12]}: frame {index} holds other bytes than its id promises")


def walk(wanted_id: str, look: Callable[[str], tuple[T, str | None]]) -> Iterator[T]:
    """A chunk, and one after the other what it stands on: the one rule of which differences can be read.

    Steps are counted. What a table says of its depth is what it was when that was written: what it stands on may have
    been stored anew since, as a difference or as none.
    look: gives what is wanted of a chunk, and the id of the one below it.
    Raises: IntegrityError for a chunk that stands on itself, or on more than DEPTH_MAX others; what `look` raises.
    """
    steps: list[str] = []
    below: str | None = wanted_id
    while below is not None:
        if below in steps:
            raise IntegrityError(f"chunk {wanted_id[:12]}: stands on itself: {steps[-1][:12]} is a difference to "
                                 f"{below[:12]}; push it again")  # fmt: skip
        if len(steps) > DEPTH_MAX:
            raise IntegrityError(f"chunk {wanted_id[:12]}: stands on more than {DEPTH_MAX} others; push it again")
        steps.append(below)
        found, below = look(below)
        yield found


def frames_count(plain_bytes: int) -> int:
    return -(-plain_bytes // FRAME_BYTES)


def table_bytes(plain_bytes: int) -> int:
    """How long the table of a chunk is: bytes to read before any frame."""
    return _HEAD.size + _FRAME.size * frames_count(plain_bytes)


def chunk_id(plain_bytes: int, digests: Sequence[bytes]) -> str:
    """What a chunk of these frames is called. digests: blake3 of each frame's plain bytes."""
    return blake3(_ID_PREFIX + plain_bytes.to_bytes(8, "little") + b"".join(digests)).hexdigest()


def digests_of(plain: memoryview) -> list[bytes]:
    """The digest of each frame of a chunk."""
    return [blake3(plain[start : start + FRAME_BYTES]).digest() for start in range(0, len(plain), FRAME_BYTES)]


def parse_table(head: bytes | memoryview, wanted_id: str, plain_bytes: int) -> Table:
    """Read a chunk's table. head: its first `table_bytes(plain_bytes)` bytes, or more.

    Raises: IntegrityError if it is not the table of this chunk.
    """
    where = f"chunk {wanted_id[:12]}"
    need = table_bytes(plain_bytes)
    if len(head) < need or not 0 < plain_bytes <= CHUNK_BYTES_MAX:
        raise IntegrityError(f"{where}: {len(head)} bytes, its table has {need}")
    magic, version, width, depth, stated, base = _HEAD.unpack_from(head)
    if magic != _MAGIC or version != 1:
        raise IntegrityError(f"{where}: begins with {bytes(head[:5])!r}, expected {_MAGIC!r} and version 1")
    if stated != plain_bytes or width not in _WIDTHS or depth > DEPTH_MAX or (depth == 0) != (base == NO_BASE):
        raise IntegrityError(f"{where}: its table says {stated} plain bytes, elements of {width}, depth {depth}; "
                             f"expected {plain_bytes} bytes, one of {_WIDTHS}, at most {DEPTH_MAX}")  # fmt: skip
    rows = _FRAME.iter_unpack(bytes(head[_HEAD.size : need]))
    frames = tuple(Frame(digest, stored, codec) for digest, stored, codec in rows)
    if chunk_id(plain_bytes, [frame.digest for frame in frames]) != wanted_id:
        raise IntegrityError(f"{where}: its table is of another chunk: it was changed where it lies")
    if any(not 0 < frame.stored_bytes <= FRAME_BYTES or not codecs.is_known(frame.codec) for frame in frames):
        raise IntegrityError(f"{where}: a frame is longer than {FRAME_BYTES} bytes, or of a codec that is not known")
    return Table(wanted_id, plain_bytes, width, depth, base.hex() if depth else None, frames)


def stated_bytes(head: bytes | memoryview, wanted_id: str) -> int:
    """Plain bytes as an object says them itself; `parse_table` proves it. head: its first HEAD_BYTES bytes.

    Raises: IntegrityError if it is too short to be a chunk, or says what none has.
    """
    stated = int(_HEAD.unpack_from(head)[4]) if len(head) >= HEAD_BYTES else 0
    if not 0 < stated <= CHUNK_BYTES_MAX:
        raise IntegrityError(f"chunk {wanted_id[:12]}: {len(head)} bytes that are no chunk's head")
    return stated


def assemble(table: Table, frames: Sequence[bytes | memoryview]) -> bytes:
    """The object that is stored. frames: as `table` says they are stored."""
    base = bytes.fromhex(table.base) if table.base else NO_BASE
    head = _HEAD.pack(_MAGIC, 1, table.element_bytes, table.depth, table.plain_bytes, base)
    rows = (_FRAME.pack(frame.digest, frame.stored_bytes, frame.codec) for frame in table.frames)
    return b"".join((head, *rows, *frames))
