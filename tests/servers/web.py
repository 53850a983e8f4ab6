"""What the stdlib HTTP servers beside it share: one handler that answers ranges exactly, and how to serve with it."""

from __future__ import annotations

import http.server
import os
import re
import threading
from pathlib import Path
from typing import ClassVar

Headers = list[tuple[str, str]]

_SENDFILE_BYTES = 4 << 20


class UnsatisfiableRangeError(Exception):
    """The Range header begins beyond the end of the file."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open byte range that a Range header asks of `size` bytes, or None where it is absent or not one range.

    Source: RFC 9110 §14.1.2; a header that is not understood is ignored.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or not (match[1] or match[2]):
        return None
    if match[1]:
        start = int(match[1])
        stop = min(int(match[2]) + 1, size) if match[2] else size
    else:
        start, stop = max(0, size - int(match[2])), size
    if start >= stop:
        raise UnsatisfiableRangeError
    return start, stop


class Handler(http.server.BaseHTTPRequestHandler):
    """HTTP/1.1 with keep-alive; subclasses write `do_GET`, which answers HEAD too."""

    protocol_version = "HTTP/1.1"
    # Head and body leave in separate packets: without this the second waits 40 ms for the client's delayed ACK.
    disable_nagle_algorithm: ClassVar[bool] = True

    def do_GET(self) -> None:
        raise NotImplementedError

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Errors reach stderr as tracebacks; requests are counted by the subclasses."""

    def answer(self, status: int, body: bytes = b"", headers: Headers | None = None) -> None:
        """Send a whole answer."""
        self.head(status, [("Content-Length", str(len(body))), *(headers or [])])
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: Headers) -> None:
        """Send the status line and headers; the body is the caller's."""
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def answer_file(self, path: Path, headers: Headers) -> int:
        """Send a file, or the range of it that was asked for, and return the number of body bytes sent."""
        size = path.stat().st_size
        try:
            span = parse_range(self.headers.get("Range"), size)
        except UnsatisfiableRangeError:
            self.answer(416, b"", [("Content-Range", f"bytes */{size}")])
            return 0
        start, stop = span or (0, size)
        facts = [*headers, ("Accept-Ranges", "bytes"), ("Content-Length", str(stop - start))]
        if span:
            facts.append(("Content-Range", f"bytes {start}-{stop - 1}/{size}"))
        self.head(206 if span else 200, facts)
        if self.command == "HEAD":
            return 0
        with path.open("rb") as file:
            offset = start
            while offset < stop:
                sent = os.sendfile(self.connection.fileno(), file.fileno(), offset, min(stop - offset, _SENDFILE_BYTES))
                if sent == 0:
                    raise ConnectionAbortedError(f"{path} became shorter while it was sent")
                offset += sent
        return stop - start


class Server(http.server.ThreadingHTTPServer):
    """Threads that end with the process; a client that leaves is no news."""

    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: object, client_address: object) -> None:
        import sys

        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a client that left is no news
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def serve(handler: type[Handler], host: str, port: int) -> None:
    """Listen on host:port and answer from background threads until the process ends."""
    server = Server((host, port), handler)
    threading.Thread(target=server.serve_forever, daemon=True, name=f"{host}:{port}").start()
