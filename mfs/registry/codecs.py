"""How a frame is stored: each codec by its number, for ever. Pure. FORMAT.md, "Codecs" and "Differences".

    0x00  RAW         the plain bytes
    0x01  ZSTD        one zstd frame (RFC 8878) of the plain bytes, with its content size; window 128 KiB at most
    0x02  PLANES      the bytes of a number apart: all first bytes, all second …; see below
    0x82  DIFFERENCE  PLANES of the differences to the same frame of another chunk

PLANES: little-endian words of 2, 4 or 8 bytes, each rotated left by one bit, so that a float's exponent fills its last
byte and the sign stands with the mantissa. Plane i is byte i of each word. The frame is `width` lengths, each u32
little-endian with 0x80000000 added where the plane is stored as one zstd frame and not as it is; then the planes; then
the bytes behind the last whole word, as they are.
DIFFERENCE: words of 1, 2, 4 or 8 bytes; each is the plain word minus the base's, modulo 2^bits, in zigzag (0, -1, 1, -2
… are 0, 1, 2, 3 …), not rotated; then as PLANES.

What is decoded comes from strangers: no length is believed before it was compared, and zstd is given exactly the room
that the frame may fill. Whether it is the right frame says its digest, see `chunk`.
decisions/0017 has the measurements behind the choice.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from mfs.errors import IntegrityError

RAW = 0x00
ZSTD = 0x01
PLANES = 0x02
DIFFERENCE = 0x82

WINDOW_BYTES_MAX = 128 << 10
"""Of a zstd frame: no more than the whole of what it can hold."""

Words = NDArray[Any]

_WORDS: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_PACKED = 0x80000000
_of_thread = threading.local()  # a zstd context serves one thread at a time


def is_known(codec: int) -> bool:
    return codec in (RAW, ZSTD, PLANES, DIFFERENCE)


def decode(codec: int, element_bytes: int, stored: memoryview, out: memoryview, base: memoryview | None) -> None:
    """Fill `out` with a frame's plain bytes. Raises: IntegrityError for what cannot be decoded to exactly that many.

    stored: may be `out` itself where the codec is RAW, and must not overlap it otherwise.
    """
    if codec == RAW and len(stored) == len(out):
        if stored is not out:
            out[:] = stored
    elif codec == ZSTD:
        out[:] = _unpacked(stored, len(out))
    elif codec == PLANES and element_bytes > 1:
        _from_planes(element_bytes, stored, out)
        words = _whole_words(element_bytes, out)
        top = words * (1 << (8 * element_bytes - 1))
        words >>= 1
        words |= top
    elif codec == DIFFERENCE and base is not None and len(base) == len(out):
        _from_planes(element_bytes, stored, out)
        words = _whole_words(element_bytes, out)
        sign = words & 1
        words >>= 1
        words ^= np.negative(sign, out=sign)
        words += _whole_words(element_bytes, base)
    else:
        raise IntegrityError(
            f"a frame of codec {codec}, elements of {element_bytes}, {len(stored)} bytes for {len(out)}"
        )


def planes_of(element_bytes: int, plain: memoryview) -> tuple[list[bytes], bytes]:
    """The planes of a frame as PLANES has them, and the bytes behind its last word."""
    words = _whole_words(element_bytes, plain)
    return _split((words << 1) | (words >> (8 * element_bytes - 1))), bytes(plain[words.nbytes :])


def planes_of_difference(element_bytes: int, plain: memoryview, base: memoryview) -> tuple[list[bytes], bytes]:
    """The planes of a frame as DIFFERENCE has them, and the bytes behind its last word."""
    words = _whole_words(element_bytes, plain) - _whole_words(element_bytes, base)
    sign = words >> (8 * element_bytes - 1)
    return _split((words << 1) ^ np.negative(sign, out=sign)), bytes(plain[words.nbytes :])


def join_planes(planes: list[bytes], packed: list[bytes | None], tail: bytes) -> bytes:
    """The frame. packed: each plane as zstd, None where it is stored as it is."""
    chosen = [plane if p is None else p for plane, p in zip(planes, packed, strict=True)]
    lengths = (len(c) | (0 if p is None else _PACKED) for c, p in zip(chosen, packed, strict=True))
    return b"".join((*(struct.pack("<I", length) for length in lengths), *chosen, tail))


def _split(words: Words) -> list[bytes]:
    columns = words.view(np.uint8).reshape(-1, words.itemsize)
    return [columns[:, i].tobytes() for i in range(words.itemsize)]


def _from_planes(width: int, stored: memoryview, out: memoryview) -> None:
    """Put planes together to words in `out`, and the tail behind them. Raises: IntegrityError."""
    count = len(out) // width
    at, planes = 4 * width, list[memoryview | bytes]()
    if len(stored) < at:
        raise IntegrityError(f"a frame of {len(stored)} bytes, too short for {width} planes")
    for length in struct.unpack_from(f"<{width}I", stored):
        is_packed, length = bool(length & _PACKED), length & ~_PACKED
        plane = stored[at : at + length]
        if len(plane) != length or not (is_packed or length == count):
            raise IntegrityError(f"a plane of {length} bytes for {count} words, of which {len(plane)} are there")
        planes.append(_unpacked(plane, count) if is_packed else plane)
        at += length
    if len(stored) - at != len(out) - count * width:
        raise IntegrityError(f"a frame with {len(stored) - at} bytes behind its planes, expected {len(out) % width}")
    out[count * width :] = stored[at:]
    words = _whole_words(width, out)
    words[:] = _plane(planes[-1])
    for lower in reversed(planes[:-1]):
        # Whole words are twice as fast as every second byte; multiplying is a third faster than shifting in numpy, and
        # an or of equal types half as dear as one of two: 31 µs instead of 44 for a frame of bf16.
        words *= 256
        words |= _plane(lower).astype(words.dtype)


def _plane(plane: memoryview | bytes) -> NDArray[np.uint8]:
    return np.frombuffer(plane, np.uint8)


def _unpacked(packed: memoryview, nbytes: int) -> bytes:
    """What a zstd frame holds, if that is `nbytes`. Raises: IntegrityError.

    A frame that states another size, or none, is refused before anything is allocated for it.
    """
    try:
        if zstandard.frame_content_size(packed) != nbytes:
            raise IntegrityError(f"a zstd frame that is not of {nbytes} bytes")
        plain: bytes = _decompressor().decompress(packed, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"a zstd frame that cannot be read: {error}") from None
    if len(plain) != nbytes:
        raise IntegrityError(f"a zstd frame of {len(plain)} bytes that promised {nbytes}")
    return plain


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor | None = getattr(_of_thread, "decompressor", None)
    if found is None:
        found = _of_thread.decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    return found


def _whole_words(width: int, data: memoryview) -> Words:
    return np.frombuffer(data, _WORDS[width], len(data) // width)
