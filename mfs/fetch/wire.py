"""One connected socket that keeps to a deadline at every single receive.

Python's socket timeouts are per call, so a server that drips one byte a second never times out. Here each receive gets
what is left of the deadline, and no more than the stall limit.
"""

from __future__ import annotations

import http.client
import io
import math
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mfs.fetch.dial import dial
from mfs.fetch.environment import Proxy

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12

STALL_S = 10.0
"""Longest silence on a connection before it is given up and the request tried on another."""

CONNECT_S = 5.0
"""Longest wait for a connection to stand; a SYN lost three times has cost 7 s."""


TELL_S = 0.5
"""Who is told what has come of a range is told no oftener. A plain socket's receive comes back with a part of what it
waits for when the stall limit has passed, so of those he hears that often."""


def patience_s(deadline_s: float, limit_s: float) -> float:
    """How long one wait may take: at most `limit_s`, and a third of what is left so that another attempt fits in.

    Raises: TimeoutError when the deadline has passed.
    """
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("deadline passed")
    return min(left_s, max(1.0, min(limit_s, left_s / 3)))


class Wire:
    """A socket, plain or TLS, with the few methods that http.client asks of one.

    Used by one thread at a time, except for `abort`. Plain sockets stay in blocking mode with SO_RCVTIMEO, so that a
    receive is one system call and MSG_WAITALL can fill a whole range in one go without waking Python in between.
    """

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._sock = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._deadline_s = deadline_s
        self._armed_until_s = -math.inf
        self._stall_s = 0.0
        self.has_ended = False
        """Whether the peer has said that nothing more will come."""
        self.filled = 0
        """Bytes of the last `receive_all`, also where it raised."""
        if not self._is_tls:
            sock.settimeout(None)
        self.arm(deadline_s)

    def arm(self, deadline_s: float) -> None:
        """Set the deadline of all that follows. Raises: TimeoutError when it has passed."""
        self._deadline_s = deadline_s
        self._stall_s = patience_s(deadline_s, STALL_S)
        self._set_timeout(self._stall_s)

    def _set_timeout(self, timeout_s: float) -> None:
        if self._is_tls:
            self._sock.settimeout(timeout_s)
            return
        timeval = struct.pack("@ll", int(timeout_s), max(1000, int(timeout_s % 1 * 1e6)))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def receive(self, view: Buffer, *, flags: int = 0) -> int:
        """Receive some bytes into `view`; 0 means that the peer closed. Raises: TimeoutError, OSError."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("deadline passed")
        if left_s < self._stall_s:
            self._stall_s = left_s
            self._set_timeout(left_s)
        try:
            count = self._sock.recv_into(view, 0, flags)
        except BlockingIOError:
            raise TimeoutError(f"silent for {self._stall_s:.1f} s") from None
        if not count:
            self.has_ended = True
        return count

    def receive_all(self, view: memoryview, *, tell: Callable[[int], None] | None = None) -> int:
        """Receive until `view` is full or the peer closes; the bytes received. Raises: TimeoutError, OSError.

        tell: called with the bytes received so far, where all of them take long.
        """
        flags = 0 if self._is_tls else socket.MSG_WAITALL
        self.filled = 0
        due_s = time.monotonic() + TELL_S if tell is not None else math.inf
        while self.filled < len(view):
            count = self.receive(view[self.filled :], flags=flags)
            if not count:
                break
            self.filled += count
            if tell is not None and self.filled < len(view) and (now_s := time.monotonic()) > due_s:
                tell(self.filled)
                due_s = now_s + TELL_S
        return self.filled

    def is_quiet(self) -> bool:
        """Whether an idle connection is still open: nothing may come from a server that owes us nothing."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    def abort(self) -> None:
        """Wake whoever waits on this socket, from any thread; the owner closes it."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not connected any more, which is what was asked for

    # What http.client uses.

    def sendall(self, data: Buffer) -> None:
        if self._deadline_s <= time.monotonic():
            raise TimeoutError("deadline passed")
        try:
            self._sock.sendall(data)
        except BlockingIOError:
            raise TimeoutError(f"request not taken within {self._stall_s:.1f} s") from None

    def makefile(self, mode: str = "rb", buffering: int = -1) -> io.BufferedReader:
        """A reader for one response; closing it leaves the socket open for the next one."""
        return io.BufferedReader(_ResponseStream(self))

    def close(self) -> None:
        self._sock.close()


class _ResponseStream(io.RawIOBase):
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        return self._wire.receive(buffer)


def connect(
    scheme: str, host: str, port: int, *, proxy: Proxy | None, trust: ssl.SSLContext | None, deadline_s: float
) -> Wire:
    """Connect to an origin, through a proxy's CONNECT where TLS has to pass one.

    Name resolution is the system's and keeps to its own timeouts (resolv.conf), not to the deadline.
    Raises: TimeoutError, OSError, ssl.SSLError, http.client.HTTPException.
    """
    address = (proxy.host, proxy.port) if proxy else (host, port)
    sock = dial(*address, patience_s(deadline_s, CONNECT_S))
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if scheme != "https":
            return Wire(sock, deadline_s)
        if proxy:
            _open_tunnel(Wire(sock, deadline_s), host, port, proxy)
        assert trust is not None
        sock.settimeout(patience_s(deadline_s, CONNECT_S))
        return Wire(trust.wrap_socket(sock, server_hostname=host), deadline_s)
    except BaseException:
        sock.close()
        raise


class TunnelRefusedError(OSError):
    """The proxy answered CONNECT with something other than 2xx."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"the proxy answered CONNECT with {status} {reason}")
        self.status = status


def _open_tunnel(wire: Wire, host: str, port: int, proxy: Proxy) -> None:
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    wire.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    response = read_head(wire, "CONNECT")
    if not 200 <= response.status < 300:
        raise TunnelRefusedError(response.status, response.reason)


_PLAIN_HEAD = re.compile(rb"HTTP/1\.1 (20[06]) ([ -~]*)\r\n((?:[!-9;-~]+:[\t -~]*\r\n)+)\r\n")
_FIELD = re.compile(r"([^:]+):[\t ]*([^\r]*)\r\n")
_LENGTH = re.compile(r"[0-9]{1,18}")
_INTERIM = frozenset(range(100, 200)) - {101}
"""Statuses after which the answer is still to come, unasked too; http.client knows 100 alone. 101 ends HTTP.
Source: RFC 9110 §15.2."""


def _begin_plainly(response: http.client.HTTPResponse) -> bool:
    """What `begin` does, for the head that nearly every range has: 200 or 206, a length, nothing unusual, and here at
    once. Else nothing, and False: then http.client makes of it what it can. Its parser is made for mail, and takes a
    third of a range's Python.
    """
    head = _PLAIN_HEAD.match(response.fp.peek())
    if head is None:
        return False
    fields = _FIELD.findall(head[3].decode("ascii"))
    message = http.client.HTTPMessage()
    for name, value in fields:
        message.set_raw(name, value)
    length, connection = message.get("Content-Length", ""), message.get("Connection", "keep-alive")
    if not _LENGTH.fullmatch(length) or connection.lower() != "keep-alive" or "Transfer-Encoding" in message:
        return False
    response.fp.read(head.end())
    response.version, response.status = 11, int(head[1])
    response.reason = head[2].decode("ascii").strip()
    response.headers = response.msg = message
    response.chunked, response.will_close, response.length = False, False, int(length)
    return True


def read_head(wire: Wire, method: str) -> http.client.HTTPResponse:
    """Read status and headers of the answer to a `method` request.

    http.client takes the end of the connection for the end of the headers, and would believe half of them.
    Raises: ConnectionError if the connection ends within them, TimeoutError, OSError, http.client.HTTPException.
    """
    response = http.client.HTTPResponse(wire, method=method)  # type: ignore[arg-type]  # enough of a socket
    if method != "GET" or not _begin_plainly(response):
        response.begin()
        while response.status in _INTERIM:
            response.headers = None  # type: ignore[assignment]  # begins anew only without
            response.begin()
    if wire.has_ended:
        raise ConnectionResetError("the connection ended within the headers of the answer")
    return response
