"""Where bytes come from: a file range into a buffer that the caller owns. No CUDA, no torch, no plan.

`Source` is all that the pipeline knows. `FileSource` reads any file with pread, for the reasons measured in
decisions/0001-source.md. `pool.PoolSource` is the mount's pool path (files of the daemon's RAM tier through passed
descriptors), which can also lend its bytes where they stand.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Protocol

from gpuload.moving.shards import Shard, from_os_error
from mfs.errors import ChangedError

IOVECS_MAX = 512
"""Buffers per preadv; the kernel takes 1024."""


class Loan(Protocol):
    """Bytes of a source in place. They stay what they are until `release`, which any thread may call, once or often."""

    @property
    def runs(self) -> Sequence[tuple[int, int]]:
        """(address, nbytes) in this process, in the order of the file; nobody may write there."""
        ...

    def release(self) -> None:
        """Never raises."""
        ...


class Source(Protocol):
    """Thread-safe; blocks. Exact or an error: a short read is never returned."""

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        """Bytes [start, stop) of shard `shard` in place, or None where they cannot be had so: then `read_into` does.

        Raises: as `read_into`. Closing the source ends its loans.
        """
        ...

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        """Fill `views`, one after the other, with the bytes of shard `shard` from `start` on.

        views: writable, contiguous uint8; their bytes are undefined after an exception.
        Raises: ChangedError if the file ended early; StoreError otherwise.
        """
        ...

    def interrupt(self) -> None:
        """Have calls that are under way, and later ones, fail soon where that is possible. From any thread."""
        ...

    def close(self) -> None:
        """Give up what was opened. No call may be under way."""
        ...


class FileSource:
    """Open files, read with preadv through the page cache. Does not own the descriptors."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = tuple(shards)

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        return None

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        with self._shards[shard].opened() as fd:
            for at in range(0, len(views), IOVECS_MAX):
                group = views[at : at + IOVECS_MAX]
                _read_exactly(fd, self._shards[shard].path, start, group)
                start += sum(len(v) for v in group)

    def interrupt(self) -> None:
        return None  # the kernel cannot be told

    def close(self) -> None:
        return None


def _read_exactly(fd: int, path: str, start: int, views: Sequence[memoryview]) -> None:
    waiting = [v for v in views if len(v)]
    while waiting:
        try:
            got = os.preadv(fd, waiting, start)
        except OSError as error:
            raise from_os_error(error, path) from None
        if not got:
            raise ChangedError(f"{path} ends at byte {start}, inside a tensor: it was cut short while it was read")
        start += got
        while waiting and got >= len(waiting[0]):
            got -= len(waiting.pop(0))
        if got:
            waiting[0] = waiting[0][got:]


def copy_out(runs: Sequence[tuple[int, int]], views: Sequence[memoryview]) -> None:
    """Copy runs of memory, one after the other, into views of the same length in all. Gives up the GIL meanwhile."""
    waiting = list(runs)
    for view in views:
        at = ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0
        left = len(view)
        while left:
            address, room = waiting[0]
            n = min(room, left)
            ctypes.memmove(at, address, n)
            at, left = at + n, left - n
            if n == room:
                waiting.pop(0)
            else:
                waiting[0] = (address + n, room - n)
