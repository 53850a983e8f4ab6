"""When and where a file's bytes were written: what lets them count without being read again.

What write(2) has taken stands in the file for whoever reads it, whichever of our processes die, as long as the machine
runs and the file system stays mounted. After a power cut, or on a disk that was away, that ends: what had not been
forced to it may be gone. So an *era* is one life of one file: of the kernel (its boot id), of the mount of its file
system (an id that no other mount gets while the kernel runs, Linux 6.8), and of the inode.

Source: statx(2), random(4).
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_128_digest

UNKNOWN = bytes(16)
"""No era: what was written then counts only once it was read and verified."""
_AT_EMPTY_PATH = 0x1000
_STATX_INO, _STATX_MNT_ID_UNIQUE = 0x100, 0x4000
_STATX = struct.Struct("<I28xQ104xQ104x")
"""Of struct statx: mask, inode, id of the mount."""


class Written(NamedTuple):
    """What a file says of the last write to it."""

    era: bytes
    """16 bytes, UNKNOWN where the kernel does not tell one mount from the next."""
    mtime_ns: int


def written(fd: int) -> Written:
    """What the file says now; any later write, whoever's, makes it say another time. Raises: OSError."""
    return Written(_era(fd), os.fstat(fd).st_mtime_ns)


def _era(fd: int) -> bytes:
    boot, statx = _boot_id(), _statx()
    found = ctypes.create_string_buffer(_STATX.size)
    if not boot or statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_INO | _STATX_MNT_ID_UNIQUE, found):
        return UNKNOWN
    mask, inode, mount = _STATX.unpack(found.raw)
    if not mask & _STATX_MNT_ID_UNIQUE:
        return UNKNOWN
    return xxh3_128_digest(boot + struct.pack("<QQ", mount, inode))


@functools.cache
def _boot_id() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b""


@functools.cache
def _statx() -> Any:
    """statx(3), None where the C library has none."""
    found = getattr(ctypes.CDLL(None), "statx", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
    return found
