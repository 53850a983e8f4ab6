"""Which small tensors share an allocation, so that tensors that follow each other in a file are one copy. Pure.

    file   |aaaa|bb|ccccc|dddddd...     slab |aaaa|bb|ccccc|     d is large: memory of its own

A thousand small copies cost a link more than their bytes, and a thousand allocations cost as much. What shares a slab
is freed together, so only small tensors do, and slabs are no larger than the segments that torch's allocator keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpuload.moving.plan import Transfer

SMALL_BYTES = 2 << 20
"""Larger ones have memory of their own: at 55 GB/s their copies take 40 us, of which one's own price is little."""

SLAB_BYTES = 20 << 20
"""What torch's caching allocator takes at once for tensors of 1 to 10 MiB, and keeps while one of them lives."""

ALIGN_BYTES = 256
"""Where tensors begin. Sizes are multiples of it nearly always; where one is not, the next begins a copy of its own."""


class Place(NamedTuple):
    """Where in which slab a transfer stands."""

    slab: int
    offset: int


def plan_slabs(transfers: Sequence[Transfer]) -> tuple[list[Place | None], list[int]]:
    """Of each transfer its place, or None for memory of its own; and the size of each slab. A slab is one device's and
    one shard's."""
    places: list[Place | None] = []
    sizes: list[int] = []
    of: tuple[str, int] | None = None
    for t in transfers:
        if not 0 < t.nbytes <= SMALL_BYTES:
            places.append(None)
            continue
        offset = -(-sizes[-1] // ALIGN_BYTES) * ALIGN_BYTES if sizes else 0
        if of != (t.device, t.shard) or offset + t.nbytes > SLAB_BYTES:
            of, offset = (t.device, t.shard), 0
            sizes.append(0)
        places.append(Place(len(sizes) - 1, offset))
        sizes[-1] = offset + t.nbytes
    return places, sizes
