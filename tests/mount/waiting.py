"""Readers that wait together, for tests of what a model that hangs does to others: see `tests.mount.touching`."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tests.mount.touching import mapped_privately

_background = ThreadPoolExecutor(1)
_begun: list[Future[list[str]]] = []
_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def read_together(paths: list[str]) -> list[str]:
    """What each file holds (sha256), or the errno name of a read that failed; a thread for each."""
    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(_read, paths))


def map_together(paths: list[str]) -> list[str]:
    """As `read_together`, through mappings: a failed read ends the process with SIGBUS."""
    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(_map, paths))


def begin(how: Callable[[list[str]], list[str]], paths: list[str]) -> None:
    """Let it happen in threads of this process, which goes on taking calls; `end` has the result."""
    _begun.append(_background.submit(how, paths))


def end() -> list[str]:
    return _begun.pop().result()


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def stat_together(paths: list[str]) -> list[str]:
    """The size of each, or the errno name; a thread for each."""
    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(_stat, paths))


def _stat(path: str) -> str:
    try:
        return str(os.stat(path).st_size)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    try:
        parts, offset = [], 0
        while part := os.pread(fd, 1 << 20, offset):
            parts.append(part)
            offset += len(part)
        return digest_of(b"".join(parts))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(fd)


def _map(path: str) -> str:
    with mapped_privately(path) as (address, size):
        copy = ctypes.create_string_buffer(size)
        _libc.memcpy(copy, address, size)  # ctypes lets go of the GIL: a fault that waits stops only this thread
        return digest_of(copy.raw)
