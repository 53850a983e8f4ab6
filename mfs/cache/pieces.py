"""A chunk's part of a file in RAM, as a worker is sent it and sees it.

The file's descriptor travels beside the order (SCM_RIGHTS), and the worker unmaps the piece when it has answered, so
that no worker keeps memory alive that the daemon drops. Of the common file that would be in vain: it stays as long as
the daemon, and its pieces leave it by being punched out, whoever has it mapped. So each worker is sent that once and
keeps it mapped.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mfs.cache.chunks import full_mask
from mfs.errors import StoreError
from mfs.mapping import allocate, map_file


class Piece(NamedTuple):
    """A chunk's part of a file."""

    fd: int
    """-1 where it does not travel: the worker has the file."""
    start: int
    length: int
    """Of the chunk. The file has memory, or room for it, up to the end of that page."""
    stays: bool = False
    """The file is the common one."""


class Common:
    """The common file, mapped by a worker for good; piece by piece where its address space is limited (RLIMIT_AS)."""

    def __init__(self, fd: int) -> None:
        """fd: ours from now on. Raises: StoreError."""
        self.fd = fd
        self._views: tuple[memoryview, memoryview] | None = None
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            size = os.fstat(fd).st_size
            self._views = _map(fd, 0, size, huge=False), _map(fd, 0, size, huge=True)

    def view(self, start: int, nbytes: int, *, huge: bool) -> memoryview:
        """A part of it; huge: as of `map_file`. Raises: StoreError."""
        if self._views is None:
            return _map(self.fd, start, nbytes, huge=huge)
        return self._views[huge][start : start + nbytes]


@contextmanager
def mapped(piece: Piece, *, to_fill: int, common: Common | None = None) -> Iterator[memoryview]:
    """A worker's view of a piece, page-aligned: up to 4 MiB, and to the end of the page where the chunk ends earlier.
    Good until the end of the context. Closes the descriptor.

    to_fill: mask of the blocks that will be written. If those are all, the memory is taken first, in huge pages, so
    that its lack is an error and not a signal. A few are not worth a huge page each, which would be zeroed: a fault
    that brings 128 KiB would cost 2 MiB (the tmpfs has room for all slots, and more).
    common: where a piece without a descriptor is.
    Raises: StoreError.
    """
    length = piece.length
    everything = full_mask(length)
    is_whole = to_fill & everything == everything
    nbytes = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        if is_whole:
            try:
                allocate(common.fd if common is not None else piece.fd, piece.start, length)
            except OSError as error:
                raise StoreError(f"RAM tier: no memory for a chunk: {error.strerror}") from error
        if common is not None:
            view = common.view(piece.start, nbytes, huge=is_whole)
        else:
            view = _map(piece.fd, piece.start, nbytes, huge=is_whole)
    finally:
        if piece.fd >= 0:
            os.close(piece.fd)
    yield view
    if to_fill:  # who maps the whole file sees its last page too: nothing but zeros behind the end
        view[length:] = bytes(nbytes - length)


def _map(fd: int, start: int, nbytes: int, *, huge: bool) -> memoryview:
    try:
        return map_file(fd, nbytes, start=start, writable=True, huge=huge)
    except OSError as error:
        raise StoreError(f"RAM tier: a chunk cannot be mapped: {error}") from error
