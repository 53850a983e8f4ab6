"""What has come of a fill while the rest of it is still on its way: told to the daemon block by block, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from xxhash import xxh3_64_intdigest

from mfs.cache.chunks import mask_bytes, mask_runs, run_bytes
from mfs.types import BLOCK_BYTES
from mfs.workers.frames import Frame


class Arrivals:
    """Of one fill."""

    def __init__(self, piece: memoryview, length: int, emit: Callable[[Frame], None]) -> None:
        """length: of the chunk."""
        self._piece = piece
        self._length = length
        self._emit = emit
        self._told = self._kept = 0
        self.told_bytes = 0
        """By which the answer is less than what was brought."""

    def note(self, first: int, end: int, nbytes: int) -> None:
        """So much of blocks [first, end) has come, in order, and is exact."""
        start, stop = run_bytes(first, end, self._length)
        whole = end if nbytes >= stop - start else first + nbytes // BLOCK_BYTES
        self._tell((1 << whole) - (1 << first), nbytes)

    def keep(self, first: int, end: int) -> None:
        """All of blocks [first, end) has come, and is exact: to be told where what comes after it fails."""
        self._kept |= (1 << end) - (1 << first)

    def tell_kept(self) -> None:
        """The rest is not to be had."""
        if self._kept & ~self._told:
            self._tell(self._kept, mask_bytes(self._kept, self._length))

    def _tell(self, mask: int, came_bytes: int) -> None:
        fresh = mask & ~self._told
        self._told |= fresh
        nbytes = mask_bytes(fresh, self._length)
        self.told_bytes += nbytes
        self._emit({
            "came": fresh, "came_bytes": came_bytes,
            "sums": list(block_sums(self._piece, fresh, self._length).items()),
            "ssd_bytes": 0, "shared_bytes": 0, "origin_bytes": nbytes,
        })  # fmt: skip


def block_sums(piece: memoryview, mask: int, length: int) -> Mapping[int, int]:
    """{block: checksum} of blocks of a chunk of `length` bytes."""
    sums = {}
    for first, end in mask_runs(mask):
        stop = run_bytes(first, end, length)[1]
        for block in range(first, end):
            low = block * BLOCK_BYTES
            sums[block] = xxh3_64_intdigest(piece[low : min(low + BLOCK_BYTES, stop)])
    return sums
