"""Bytes that a client has in memory, brought in by its own hands: it is asked for a range when the range is wanted.

The client's file is one in memory with nothing in it but the table. Before a range of it is read the client is asked,
over a socket that came with it, to write that range; after it was read its pages are given back. So a commit needs no
more memory than the readers' buffers, whatever it brings, and is a load like any other: fit, digests, sharing.

    server -> client   16 bytes, two little-endian u64: the first byte wanted, one past the last
    client -> server   one byte: 0, written; 1, it could not be
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from gpuload.moving.source import FileSource, Loan
from mfs.errors import StoreError, UsageError
from mfs.mapping import punch_hole

_F_GET_SEALS = 1034
"""linux/fcntl.h; Python 3.11 has no name for it. Files in memory alone know of seals."""

WANT = struct.Struct("<QQ")

WAIT_S = 60.0
"""Longest wait for a client's bytes, over all of a commit: a card that is at work for others writes a range, a buffer
at most, in a second."""

BYTES_PER_S_MIN = 64 << 20
"""What it has given gives it that much more time: nobody is held up for long by one who gives a byte now and then."""


def check(fds: Sequence[int]) -> None:
    """Raises: UsageError unless these are what a commit brings: a file in memory and a socket."""
    kinds = [stat.S_IFMT(os.fstat(fd).st_mode) for fd in fds]
    try:
        seals = fcntl.fcntl(fds[0], _F_GET_SEALS) if kinds == [stat.S_IFREG, stat.S_IFSOCK] else -1
    except OSError:  # a file on a disk: nothing of it is to be given back
        seals = -1
    if seals < 0:
        raise UsageError("a commit brings two descriptors: a file in memory that holds the table, and a socket")


class PulledSource:
    """A FileSource whose ranges are written when asked for. One at a time: the client has two hands."""

    def __init__(self, inner: FileSource, fd: int, asked: int) -> None:
        """fd: the file. asked: the socket; both stay the caller's."""
        self._inner, self._fd = inner, fd
        self._turn = threading.Lock()
        self._socket = socket.socket(fileno=os.dup(asked))
        self._left_s = WAIT_S

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        return None

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        stop = start + sum(len(view) for view in views)
        with self._turn:
            self._ask(start, stop)
        self._inner.read_into(shard, start, views)
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:  # what it shares a page with may be wanted yet
            punch_hole(self._fd, first, last - first)

    def _ask(self, start: int, stop: int) -> None:
        began = time.monotonic()
        try:
            self._socket.settimeout(max(0.001, self._left_s))  # 0 would mean not to wait, None for ever
            self._socket.sendall(WANT.pack(start, stop))
            answer = self._socket.recv(1)
        except TimeoutError:
            raise StoreError(f"the program that commits let its bytes be waited for, {WAIT_S:.0f} s in all") from None
        except OSError:
            answer = b""
        if not answer:
            raise StoreError("the program that commits has left")
        if answer != b"\0":
            raise StoreError("the program that commits could not give its bytes")
        self._left_s -= time.monotonic() - began
        self._left_s = min(WAIT_S, self._left_s + (stop - start) / BYTES_PER_S_MIN)

    def interrupt(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
