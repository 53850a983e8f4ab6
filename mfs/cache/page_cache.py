"""The kernel's page cache of sealed files: filled for readers who do not ask us.

Our writes go past it, and the kernel's own read-ahead waits for who reads. sendfile(2) to /dev/null fills it in large
folios for 0.02 CPU s/GB; advice (WILLNEED) would make pages of 4 KiB, at ten times the price.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from mfs import limits
from mfs.cache.sealing import open_sealed
from mfs.cache.ssd import SsdTier
from mfs.types import CHUNK_BYTES, ObjectId


def fill(tier: SsdTier, obj: ObjectId, chunks: Sequence[int]) -> int:
    """Bring chunks of a sealed object into the page cache, in their order, as far as half of the free memory goes.

    Returns the bytes that stand there now, 0 if it is not sealed. Raises: OSError.
    """
    fd = open_sealed(tier, obj)
    if fd is None:
        return 0
    done, room = 0, limits.available().free_bytes // 2
    try:
        with open(os.devnull, "wb", buffering=0) as sink:
            for index in chunks[: room // CHUNK_BYTES]:
                span = obj.chunk_range(index)
                fill_range(fd, span.start, span.stop, sink.fileno())
                done += len(span)
        return done
    finally:
        os.close(fd)


def fill_range(fd: int, start: int, stop: int, sink: int) -> None:
    """Bring bytes [start, stop) of a file into the page cache. sink: /dev/null. Raises: OSError."""
    while start < stop:
        sent = os.sendfile(sink, fd, start, stop - start)
        if not sent:  # it was cut: no file of ours, then
            return
        start += sent
