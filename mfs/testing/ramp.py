"""Content in which every offset mistake shows: byte i is i mod 251, a prime that divides no block size."""

from __future__ import annotations

import numpy as np

_PERIOD = 251


def ramp(nbytes: int, start: int = 0) -> bytes:
    """Bytes [start, start + nbytes) of the endless ramp."""
    phase = start % _PERIOD
    repeats = -(-(phase + nbytes) // _PERIOD)
    return np.tile(np.arange(_PERIOD, dtype=np.uint8), repeats)[phase : phase + nbytes].tobytes()
