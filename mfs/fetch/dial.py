"""Connecting to a host by whichever of its addresses answers.

`socket.create_connection` waits for one address until its time is up before it tries the next: where IPv6 is resolved
but goes nowhere, or one of several balancers is dead, each new connection would cost that. Source: RFC 8305 §4, §5.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

NEXT_S = 0.25
"""Silence after which the next address is tried beside those before it; what RFC 8305 §8 recommends."""

_Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """A connected socket, in blocking mode. `timeout_s` is for all addresses together, once the name is resolved.

    Raises: TimeoutError; OSError, the last one where every address refuses or the name is not known.
    """
    addresses = _alternating(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    until_s = time.monotonic() + timeout_s
    error = OSError(f"{host} has no address")
    poll, trying = select.poll(), dict[int, socket.socket]()
    try:
        while addresses or trying:
            if addresses:
                try:
                    sock = _begin(addresses.pop(0))
                except OSError as e:
                    error = e
                    continue
                trying[sock.fileno()] = sock
                poll.register(sock, select.POLLOUT)
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out")
            for fd, _ in poll.poll(1000 * (min(left_s, NEXT_S) if addresses else left_s)):
                poll.unregister(fd)
                sock = trying.pop(fd)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    sock.setblocking(True)
                    return sock
                sock.close()
                error = OSError(code, os.strerror(code))
        raise error
    finally:
        for sock in trying.values():
            sock.close()


def _alternating(found: Sequence[_Address]) -> list[_Address]:
    """In the system's order, but families in turn: one that leads nowhere costs one silence, not one an address."""
    first = [address for address in found if address[0] == found[0][0]]
    others = [address for address in found if address[0] != found[0][0]]
    return [address for address in chain.from_iterable(zip_longest(first, others)) if address]


def _begin(address: _Address) -> socket.socket:
    """A socket that is connecting, or has. Raises: OSError."""
    family, kind, protocol, _, where = address
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    code = sock.connect_ex(where)
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, os.strerror(code))
    return sock
