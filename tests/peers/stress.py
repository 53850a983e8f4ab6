"""Readers of a mapping that take no order a kernel could guess; run outside (`TestMount.outside`)."""

from __future__ import annotations

import mmap
import os
import random

_PAGE = 4096
_RAMP = 251  # `mfs.testing.ramp`: byte i is i mod 251, so each place looks different from its neighbours


def fault_at_random(path: str, size: int, seed: int, count: int) -> str:
    """Touch `count` pages of the mapped file at random; '' or the first difference from the ramp."""
    rng = random.Random(seed)
    fd = os.open(path, os.O_RDONLY)
    flags = mmap.MAP_PRIVATE if seed % 2 else mmap.MAP_SHARED
    with mmap.mmap(fd, 0, flags, mmap.PROT_READ) as mapped:
        os.close(fd)
        if seed % 4 == 0:
            mapped.madvise(mmap.MADV_RANDOM)
        for _ in range(count):
            start = rng.randrange(size)
            part = mapped[start : start + rng.choice((1, 64, _PAGE, 3 * _PAGE))]
            wanted = bytes((start + i) % _RAMP for i in range(len(part)))
            if part != wanted:
                return f"at {start}: {len(part)} bytes differ"
    return ""
