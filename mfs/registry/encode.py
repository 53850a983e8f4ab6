"""From plain bytes to the object that is stored: each frame by the codec that makes it smallest. Pure.

FORMAT.md, "Chunks", "Codecs", "Differences"; why these levels and no others: decisions/0017.
"""

from __future__ import annotations

import threading
from enum import Enum
from typing import NamedTuple

import zstandard

from mfs.registry import codecs
from mfs.registry.chunk import DEPTH_MAX, FRAME_BYTES, Frame, Table, assemble, chunk_id, digests_of
from mfs.registry.codecs import DIFFERENCE, PLANES, RAW, ZSTD


class Effort(Enum):
    """What storing may cost, `--compress`. Reading costs the same after `FAST` and `SMALL`."""

    FAST = "fast"
    SMALL = "small"
    """One or two per cent less of float32, texts and integers, nothing of bf16, at a tenth of the speed."""
    NONE = "none"


class Base(NamedTuple):
    """Another chunk of as many plain bytes, to which this one may be stored as a difference."""

    id: str
    depth: int
    """Differences that it stands on itself, less than DEPTH_MAX."""
    data: memoryview
    bases: tuple[str, ...] = ()
    """Ids of all chunks that it stands on itself, over all steps."""


class Encoded(NamedTuple):
    """A chunk as it is to be stored."""

    table: Table
    body: bytes
    alone_bytes: int
    """How long it would be without a base; equal to the body where it has none."""


_GAIN = 0.98
"""A frame or plane is compressed if that makes it at most this much of what it was: reading it raw costs nothing."""
_BASE_GAIN = 0.95
"""A chunk is a difference if that makes it at most this much of what it is alone: reading it costs another request."""

_ENTROPY = zstandard.ZstdCompressionParameters.from_level(
    1,
    source_size=FRAME_BYTES,
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    min_match=7,
    write_content_size=1,
)
"""zstd as little more than its Huffman stage. Planes of floats hold no repeats, and the short ones that a larger table
finds cost more than they save: exponents of bf16 come to 0.664 of the whole instead of 0.687 at level 1, and are
decoded twice as fast."""
_LEVELS = {Effort.FAST: 3, Effort.SMALL: 9}
_of_thread = threading.local()


def encode_chunk(
    plain: memoryview, element_bytes: int, effort: Effort = Effort.FAST, base: Base | None = None
) -> Encoded:
    """The object for a chunk that holds `plain`.

    element_bytes: 1, 2, 4 or 8, as `cutting` says. base: used where it makes the object smaller.
    """
    digests = digests_of(plain)
    frames = [plain[start : start + FRAME_BYTES] for start in range(0, len(plain), FRAME_BYTES)]
    alone = [_alone(frame, element_bytes, effort) for frame in frames]
    chosen, base_used = alone, None
    if base is not None and effort is not Effort.NONE and base.depth < DEPTH_MAX:
        of_base = (base.data[start : start + FRAME_BYTES] for start in range(0, len(plain), FRAME_BYTES))
        differing = [_difference(f, b, element_bytes, effort) for f, b in zip(frames, of_base, strict=True)]
        smaller = [min(pair, key=_stored_bytes) for pair in zip(alone, differing, strict=True)]
        if sum(map(_stored_bytes, smaller)) <= _BASE_GAIN * sum(map(_stored_bytes, alone)):
            chosen, base_used = smaller, base
    table = Table(
        chunk_id(len(plain), digests), len(plain), element_bytes,
        base_used.depth + 1 if base_used else 0, base_used.id if base_used else None,
        tuple(Frame(d, len(stored), codec) for d, (codec, stored) in zip(digests, chosen, strict=True)),
    )  # fmt: skip
    body = assemble(table, [stored for _, stored in chosen])
    saved = sum(map(_stored_bytes, alone)) - sum(map(_stored_bytes, chosen))
    return Encoded(table, body, len(body) + saved)


_Stored = tuple[int, "bytes | memoryview"]


def _stored_bytes(stored: _Stored) -> int:
    return len(stored[1])


def _alone(frame: memoryview, width: int, effort: Effort) -> _Stored:
    tries: list[_Stored] = []
    if effort is not Effort.NONE:
        if width > 1:
            tries.append((PLANES, _packed(*codecs.planes_of(width, frame), effort)))
        if width == 1 or effort is Effort.SMALL:
            tries += ((ZSTD, _entropy(frame)), (ZSTD, _level(frame, effort)))
    best = min(tries, key=_stored_bytes, default=(RAW, frame))
    return best if _stored_bytes(best) <= _GAIN * len(frame) else (RAW, frame)


def _difference(frame: memoryview, base: memoryview, width: int, effort: Effort) -> _Stored:
    found = (DIFFERENCE, _packed(*codecs.planes_of_difference(width, frame, base), effort))
    return found if _stored_bytes(found) <= len(frame) else (RAW, frame)


def _packed(planes: list[bytes], tail: bytes, effort: Effort) -> bytes:
    packed: list[bytes | None] = []
    for plane in planes:
        best = _entropy(plane)
        if effort is Effort.SMALL or len(best) < len(plane) // 4:  # mostly one value: here repeats are what counts
            best = min(best, _level(plane, effort), key=len)
        packed.append(best if len(best) <= _GAIN * len(plane) else None)
    return codecs.join_planes(planes, packed, tail)


def _entropy(data: bytes | memoryview) -> bytes:
    found: bytes = _compressor("entropy").compress(data)
    return found


def _level(data: bytes | memoryview, effort: Effort) -> bytes:
    found: bytes = _compressor(effort).compress(data)
    return found


def _compressor(kind: Effort | str) -> zstandard.ZstdCompressor:
    """A zstd context serves one thread at a time."""
    made: dict[Effort | str, zstandard.ZstdCompressor] = _of_thread.__dict__.setdefault("compressors", {})
    if kind not in made:
        parameters = _ENTROPY if not isinstance(kind, Effort) else zstandard.ZstdCompressionParameters.from_level(
            _LEVELS[kind], source_size=FRAME_BYTES, window_log=17, write_content_size=1
        )  # fmt: skip
        made[kind] = zstandard.ZstdCompressor(compression_params=parameters)
    return made[kind]
