"""An HTTP proxy in front of one server that counts what passes, request by request, and can lie about the time.

In this process, a thread for each connection. Good for origins whose own logs say too little (Swift), and for clocks.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from email.utils import formatdate
from types import TracebackType
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit


class Passed(NamedTuple):
    """One request and its answer."""

    method: str
    target: str
    """Path and query, as they stood in the request."""
    status: int
    sent_bytes: int
    """Of the answer's body."""


class Relay:
    """Listens at `url`, upstream's address with the relay in its place, while it is open."""

    def __init__(self, upstream: str) -> None:
        """upstream: 'http://host:port/path/'."""
        parts = urlsplit(upstream)
        assert parts.hostname is not None
        assert parts.port is not None
        self._upstream = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = parts._replace(netloc=f"127.0.0.1:{self._listener.getsockname()[1]}").geturl()
        self.passed: list[Passed] = []
        """In the order of their ends."""
        self.clock_shift_s: float | None = None
        """How far the time that answers say is ahead of ours; None: as upstream says."""
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True, name="relay").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True, name="relay connection").start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server:
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            try:
                with client.makefile("rb") as asked, server.makefile("rb") as answered:
                    while self._pass_one(asked, server, answered, client):
                        pass
            except (OSError, ValueError):  # either side went away
                pass
            finally:
                with self._lock:
                    self._open -= {client, server}

    def _pass_one(self, asked: BinaryIO, server: socket.socket, answered: BinaryIO, client: socket.socket) -> bool:
        head = _head(asked)
        if not head:
            return False
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        server.sendall(head)
        _copy(asked, server, _length(head) or 0)
        answer = _head(answered)
        if not answer:
            return False
        if self.clock_shift_s is not None:
            lines = [line for line in answer.split(b"\r\n") if not line.lower().startswith(b"date:")]
            lines.insert(1, b"Date: " + formatdate(time.time() + self.clock_shift_s, usegmt=True).encode())
            answer = b"\r\n".join(lines)
        client.sendall(answer)
        status = int(answer.split(b" ", 2)[1])
        has_body = method != "HEAD" and status not in (204, 304)
        length = _length(answer) if has_body else 0
        if length is None and b"chunked" in answer.lower():
            sent = _copy_chunks(answered, client)
        else:
            sent = _copy(answered, client, length)
        with self._lock:
            self.passed.append(Passed(method, target, status, sent))
        return length is not None or b"chunked" in answer.lower()


def _head(stream: BinaryIO) -> bytes:
    """Up to the empty line and with it; b'' at the end of the connection."""
    lines = []
    while line := stream.readline():
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    return b""


def _length(head: bytes) -> int | None:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return None


def _copy(stream: BinaryIO, to: socket.socket, length: int | None) -> int:
    """`length` bytes, or all there are; how many."""
    done = 0
    while length is None or done < length:
        piece = stream.read1(1 << 20 if length is None else min(1 << 20, length - done))  # type: ignore[attr-defined]
        if not piece:
            break
        to.sendall(piece)
        done += len(piece)
    return done


def _copy_chunks(stream: BinaryIO, to: socket.socket) -> int:
    done = 0
    while True:
        line = stream.readline()
        to.sendall(line)
        size = int(line.split(b";")[0], 16)
        done += _copy(stream, to, size)
        to.sendall(stream.readline())
        if not size:
            return done
