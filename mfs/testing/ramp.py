"""Content in which every offset mistake shows: byte i is i mod 251, a prime that divides no block size."""

from __future__ import annotations

_ROUND = bytes(range(251))


def ramp(nbytes: int, start: int = 0) -> bytes:
    """Bytes [start, start + nbytes) of the endless ramp."""
    phase = start % len(_ROUND)
    return (_ROUND * -(-(phase + nbytes) // len(_ROUND)))[phase : phase + nbytes]
