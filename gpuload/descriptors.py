"""The soft limit of open descriptors (RLIMIT_NOFILE), which is the program's and its children's: lent, and put back.

A program that we only live in must find its limit as it left it: whoever it starts inherits it, and select(2) of old
programs fails beyond 1024. So the limit is raised only where a number of descriptors would not fit, and only until they
are closed again. The kernel compares the limit with the numbers that it gives out, not with how many are open: what
stands on a number above the limit costs the program nothing.
"""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SPARE = 64
"""Left to the program's other threads while some are taken."""

_lock = threading.Lock()
_holders = 0
_soft = 0
"""The program's own limit while `_holders` is not zero."""


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """`count` descriptors may be opened inside, as far as the hard limit goes; they must be closed before it ends.

    Not raised where they fit anyway. A child that another thread starts meanwhile sees the raised limit.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        free = soft - len(os.listdir("/proc/self/fd"))
    except OSError:  # not even one for this
        free = 0
    if count + _SPARE <= free:
        yield
        return
    with _raised():
        yield


def park(sock: socket.socket) -> socket.socket:
    """The same socket, for keeping long: on a number above the soft limit if those below become scarce.

    A connection for every shard of a model must not leave the program without any. Where the hard limit has no room
    either, it stays as it is.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sock.fileno() < soft // 2 or soft == hard:
        return sock
    with _raised():
        try:
            number = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, min(_soft, hard - 1))
        except OSError:
            return sock
    parked = socket.socket(fileno=number)
    parked.settimeout(sock.gettimeout())
    sock.close()
    return parked


def may_keep_one() -> bool:
    """Whether one more descriptor, parked, can be kept long: half of the program's own stay the program's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        taken = [int(number) for number in os.listdir("/proc/self/fd")]
    except OSError:  # not even one for this
        return False
    above = sum(number >= soft for number in taken)
    return len(taken) - above < soft // 2 or above < hard - soft


@contextmanager
def _raised() -> Iterator[None]:
    global _holders, _soft
    with _lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if not _holders:
            _soft = soft
        _holders += 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            now, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if not _holders and now == hard:  # else the program has set it meanwhile: its word counts
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(_soft, hard), hard))


def is_scarce(fd: int) -> bool:
    """Whether the descriptor that was opened just now is one of the last that this process may have: the kernel gives
    out the lowest number, so as many are open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return fd >= soft - min(_SPARE, soft // 4)
