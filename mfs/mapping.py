"""What Python has no words for: files mapped without keeping a descriptor of them (`mmap.mmap` keeps one, and shows
nothing behind the end), and their parts given back and taken (fallocate(2)).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

_MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 14, 15, 22, 23
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def punch_hole(fd: int, start: int, nbytes: int) -> None:
    """Give a part of a file back to its file system; it reads as zeros, and the size stays. Raises: OSError."""
    _fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, start, nbytes)


def allocate(fd: int, start: int, nbytes: int) -> None:
    """Take what a part of a file needs, without a change of its size. Raises: OSError."""
    _fallocate(fd, _FALLOC_FL_KEEP_SIZE, start, nbytes)


def _fallocate(fd: int, mode: int, start: int, nbytes: int) -> None:
    if _libc.fallocate(fd, mode, start, nbytes):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def map_file(fd: int, nbytes: int, *, start: int = 0, writable: bool = False, huge: bool = True) -> memoryview:
    """`nbytes` > 0 of a file from `start`, a page's beginning. Shared; unmapped with the last view of it.

    huge: whether memory that is touched here first should be huge pages, as far as the file allows.
    Nobody may touch pages that lie wholly behind the end of the file. Raises: OSError.
    """
    view = memoryview(_map(fd, nbytes, start, writable=writable, huge=huge)).cast("B")
    return view if writable else view.toreadonly()


def _map(fd: int, nbytes: int, start: int, *, writable: bool, huge: bool) -> ctypes.Array[ctypes.c_ubyte]:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = _libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, fd, start)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"mmap of {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
    _libc.madvise(address, nbytes, _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE)
    held = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(held, _libc.munmap, address, nbytes).atexit = False
    return held


def read_in(fd: int, start: int, nbytes: int) -> None:
    """Have the kernel read `nbytes` > 0 of a file into its page cache, in pages as large as it makes them. Others run
    meanwhile: `mmap.madvise` holds the interpreter's lock for as long as the disk takes. Raises: OSError.
    """
    held = _map(fd, nbytes, start, writable=False, huge=True)
    if _libc.madvise(ctypes.addressof(held), nbytes, _MADV_POPULATE_READ):
        raise OSError(ctypes.get_errno(), f"{nbytes} bytes cannot be read in: {os.strerror(ctypes.get_errno())}")


def address_of(view: memoryview) -> int:
    """Where what `map_file` gave, the whole of it, begins in this process."""
    held = view.obj
    assert isinstance(held, ctypes.Array)
    return ctypes.addressof(held)


def populate(view: memoryview) -> None:
    """Have the memory behind a writable mapping, whose bytes mean nothing yet. Raises: OSError."""
    address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
    if not _libc.madvise(address, len(view), _MADV_POPULATE_WRITE):
        return
    if ctypes.get_errno() != errno.EINVAL:  # else Linux before 5.14
        raise OSError(ctypes.get_errno(), f"no memory for {len(view)} bytes: {os.strerror(ctypes.get_errno())}")
    view[:] = bytes(len(view))
