"""Connecting to a daemon's door. Blocks; standard library only, so that it is quick to import."""

from __future__ import annotations

import errno
import math
import socket
import struct
from pathlib import Path

_NO_WAIT = struct.pack("ll", 0, 0)


def connect(sock: socket.socket, path: Path, timeout_s: float) -> None:
    """Connect a Unix socket, waiting for a place in the listener's queue; its timeout is `timeout_s` afterwards.

    A socket with a timeout of its own does not wait there: hundreds of clients at once would be told EAGAIN by a daemon
    that is well. So the kernel waits for us (unix(7) with SO_SNDTIMEO of socket(7)).
    Raises: TimeoutError if no place was free in time; OSError.
    """
    seconds = math.floor(timeout_s)
    micros = min(999_999, math.ceil((timeout_s - seconds) * 1e6))
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, micros))
    try:
        sock.connect(str(path))
    except BlockingIOError:
        raise TimeoutError(errno.ETIMEDOUT, f"too many others wait to be let in, for {timeout_s:g} s already") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _NO_WAIT)
    sock.settimeout(timeout_s)
