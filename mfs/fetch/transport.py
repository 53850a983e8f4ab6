"""HTTP/1.1 for bulk bytes: a range GET goes from the socket into the caller's memory, copied by nobody in between.

Knows nothing of S3, hubs or registries: redirects, status codes and credentials are its callers' business. All errors
of sockets, TLS and HTTP become ours here. Nothing is retried, except once when a kept-alive connection proves dead.

Why the standard library: 3.4-3.9 GB/s at 0.23-0.33 CPU s/GB over loopback (two shared cores, nginx, 8 MiB ranges),
where requests, httpx and aiohttp needed 3 to 9 times the CPU.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from mfs.errors import AccessError, ChangedError, IntegrityError, MfsError, StoreError, TransientStoreError
from mfs.fetch.connections import Connection, ConnectionPool, Origin
from mfs.fetch.environment import Proxy, proxy_for
from mfs.fetch.wire import TunnelRefusedError, read_head
from mfs.types import ByteRange

ERROR_BODY_BYTES = 4096
"""At most this much of an error's body is read: enough for S3's XML."""

WHOLE_BYTES_MAX = 8 << 20
"""A server that answers a range with the whole object is forgiven up to this size (Hubs do so for small files); the
rest is thrown away. Beyond it, each range would cost the object."""

ERROR_BODY_S = 2.0
"""Longest wait for an error's body: docker-registry announces the whole blob with a 416 and sends 33 bytes."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]")
_USER_AGENT = "mfs/0.1"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its body whole for small requests, cut to ERROR_BODY_BYTES for errors, empty once it went to `out`."""

    status: int
    headers: http.client.HTTPMessage
    """Looked up in any case."""
    body: bytes


class Target(NamedTuple):
    """A URL taken apart once; userinfo and fragment are left behind."""

    origin: Origin
    request_target: str
    """Path and query, percent-encoded."""
    shown: str
    """The URL without what might be secret: no userinfo, no query. For messages."""


def parse_target(url: str) -> Target:
    """Take a percent-encoded http(s) URL apart. Raises: StoreError if it is not one."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise StoreError("a URL with a bad host or port; expected http(s)://host[:port]/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StoreError(f"expected an http:// or https:// URL, got scheme {parts.scheme!r}")
    origin = Origin(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80))
    path = parts.path or "/"
    return Target(origin, f"{path}?{parts.query}" if parts.query else path, f"{origin}{path}")


class Transport:
    """A pool of connections and the two requests made over them. Thread-safe; construction does no I/O."""

    def __init__(self, *, connections_max: int = 32) -> None:
        """connections_max: per origin; callers beyond it wait inside their deadline."""
        self._pool = ConnectionPool(connections_max)

    def request(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body_bytes_max: int = 64 << 20,
        deadline_s: float,
    ) -> Reply:
        """Make a request whose answer fits in memory, whatever its status; redirects are not followed.

        Raises: StoreError if the body is longer than body_bytes_max; TransientStoreError on reset, timeout, bad HTTP.
        """
        target = parse_target(url)
        try:
            connection, response = self._exchange(method, target, headers or {}, deadline_s)
        except Exception as e:
            raise self._translate(e, target, deadline_s) from e
        try:
            if response.status >= 400 and method != "HEAD":
                return self._finish_error(connection, response, deadline_s)
            body = response.read(body_bytes_max + 1)
            if len(body) > body_bytes_max:
                raise StoreError(f"{target.shown}: the answer is longer than the {body_bytes_max} bytes allowed for it")
            if response.length:  # http.client counts down what a Content-Length promised
                raise TransientStoreError(f"{target.shown}: the answer ended {response.length} bytes early")
        except BaseException as e:
            self._pool.drop(connection)
            raise self._translate(e, target, deadline_s) from e
        self._release(connection, response)
        return Reply(response.status, response.headers, body)

    def read_range(
        self,
        url: str,
        span: ByteRange,
        *,
        out: memoryview,
        size: int,
        headers: Mapping[str, str] | None = None,
        name: str | None = None,
        deadline_s: float,
    ) -> Reply:
        """Fill `out` with bytes [span.start, span.stop) of an object of `size` bytes.

        name: what error messages call the object where its URL would say little (a signed address, say).
        Returns the 206 (or 200, where the answer is the whole object and that is small) after `out` was filled; any
        other status comes back with the start of its body, `out` untouched, for the caller to make sense of.
        Raises: IntegrityError for an answer with other bytes than asked for; ChangedError if the object has another
            size; StoreError if the server does not do ranges; TransientStoreError on reset, timeout, early end.
        Source: RFC 9110 §14.2 Range, §15.3.7 206.
        """
        if len(out) != len(span):
            raise ValueError(f"out has {len(out)} bytes for a range of {len(span)}")
        if not span:
            return Reply(206, http.client.HTTPMessage(), b"")
        target = parse_target(url)
        if name:
            target = target._replace(shown=f"{name} at {target.origin}")
        wanted = {**(headers or {}), "Range": f"bytes={span.start}-{span.stop - 1}"}
        try:
            connection, response = self._exchange("GET", target, wanted, deadline_s)
        except Exception as e:
            raise self._translate(e, target, deadline_s) from e
        try:
            if response.status not in (200, 206):
                return self._finish_error(connection, response, deadline_s)
            _check_range_answer(response, span, size, target)
            if response.status == 200 and len(span) != size:
                _cut(response, span, out, size, target)
                filled = len(out)
            else:
                filled = _fill(connection, response, out)
            if filled < len(out):
                raise TransientStoreError(
                    f"{target.shown}: the body of bytes {span.start}-{span.stop - 1} ended after {filled} bytes"
                )
        except BaseException as e:
            self._pool.drop(connection)
            raise self._translate(e, target, deadline_s) from e
        self._release(connection, response)
        return Reply(response.status, response.headers, b"")

    def preconnect(self, url: str, count: int, *, deadline_s: float) -> None:
        """Begin to open up to `count` connections, so that the first reads save the handshakes' round trips.

        Returns at once; each handshake has a thread of its own and ends by the deadline.
        A failure is not reported: the first request will meet it and say so.
        """
        target = parse_target(url)

        def open_one() -> None:
            try:
                self._pool.add_idle(target.origin, deadline_s)
            except Exception:  # whatever it was, the request that needs the connection reports it
                return

        for _ in range(count - self._pool.counts(target.origin)[1]):
            threading.Thread(target=open_one, name="preconnect", daemon=True).start()

    def close(self) -> None:
        """Close all connections; requests under way in other threads end with StoreError."""
        self._pool.close()

    def _exchange(
        self, method: str, target: Target, headers: Mapping[str, str], deadline_s: float
    ) -> tuple[Connection, http.client.HTTPResponse]:
        """Send a request and read the head of its answer."""
        connection = self._pool.take(target.origin, deadline_s)
        try:
            return connection, _send(connection, method, target, headers)
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self._pool.drop(connection)
            if not connection.is_reused or self._pool.is_closed:
                raise
        except BaseException:
            self._pool.drop(connection)
            raise
        # The server closed an idle connection just as it was used again: no fault of anyone, so once more at once.
        connection = self._pool.take(target.origin, deadline_s, fresh=True)
        try:
            return connection, _send(connection, method, target, headers)
        except BaseException:
            self._pool.drop(connection)
            raise

    def _finish_error(self, connection: Connection, response: http.client.HTTPResponse, deadline_s: float) -> Reply:
        """Read the start of an error's body and let the connection go, unless the body came whole."""
        body = b""
        try:
            connection.wire.arm(min(deadline_s, time.monotonic() + ERROR_BODY_S))
            while len(body) < ERROR_BODY_BYTES and (piece := response.read1(ERROR_BODY_BYTES - len(body))):
                body += piece
        except (OSError, http.client.HTTPException):
            pass  # the status says enough
        if response.isclosed():
            self._release(connection, response)
        else:
            self._pool.drop(connection)
        return Reply(response.status, response.headers, body)

    def _release(self, connection: Connection, response: http.client.HTTPResponse) -> None:
        if response.will_close or not response.isclosed():
            self._pool.drop(connection)
        else:
            self._pool.give(connection)

    def _translate(self, error: BaseException, target: Target, deadline_s: float) -> BaseException:
        """Our error for a foreign one; ours and those that are no Exception pass."""
        if isinstance(error, MfsError) or not isinstance(error, Exception):
            return error
        if self._pool.is_closed:
            return StoreError(f"{target.shown}: the source was closed during the request")
        if isinstance(error, TimeoutError) and time.monotonic() >= deadline_s:
            return TransientStoreError(f"{target.shown}: no complete answer before the deadline")
        return translate(error, target)


def translate(error: Exception, target: Target) -> MfsError:
    """Our error for one of sockets, TLS or HTTP; the cause's text is kept, nothing of the URL's secrets is."""
    proxy = proxy_for(*target.origin)
    via = f" through the proxy {proxy.host}:{proxy.port}" if proxy else ""
    where = f"{target.shown}{via}"
    match error:
        case ssl.SSLCertVerificationError():
            return StoreError(
                f"{where}: certificate not trusted: {error.verify_message}; for a private CA set SSL_CERT_FILE"
            )
        case ssl.SSLError() if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return StoreError(f"{where}: the server does not speak TLS; is this an http:// address?")
        case TunnelRefusedError() if error.status in (401, 403, 407):
            return AccessError(f"{where}: {error}; check the credentials in https_proxy")
        case socket.gaierror() if error.errno == socket.EAI_NONAME:
            return StoreError(f"{where}: the name {target.origin.host!r} is not known; check the host and DNS")
        case TimeoutError():
            return TransientStoreError(f"{where}: timed out: {error}")
        case OSError() | http.client.HTTPException():
            return TransientStoreError(f"{where}: {type(error).__name__}: {error}")
        case _:
            return StoreError(f"{where}: {type(error).__name__}: {error}")


def _request_message(method: str, target: Target, headers: Mapping[str, str], proxy: Proxy | None) -> bytes:
    origin = target.origin
    lines = [
        f"{method} {target.request_target} HTTP/1.1",
        f"Host: {str(origin).partition('://')[2]}",
        f"User-Agent: {_USER_AGENT}",
        "Accept-Encoding: identity",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    if proxy and origin.scheme == "http":  # else the proxy sees only a tunnel
        lines[0] = f"{method} {origin}{target.request_target} HTTP/1.1"
        if proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
    if " " in target.request_target or any(_UNSAFE.search(line) for line in lines):
        raise StoreError(f"{target.shown!r}: spaces or control characters in a URL or header; they must be encoded")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _send(connection: Connection, method: str, target: Target, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    connection.wire.sendall(_request_message(method, target, headers, connection.proxy))
    return read_head(connection.wire, method)


def _check_range_answer(response: http.client.HTTPResponse, span: ByteRange, size: int, target: Target) -> None:
    """That the answer's head promises exactly the bytes asked for."""
    asked = f"bytes {span.start}-{span.stop - 1} of {size}"
    if encoding := response.headers.get("Content-Encoding"):
        raise IntegrityError(f"{target.shown}: asked for {asked} as they are, got them in {encoding!r} encoding")
    length = response.length
    if response.status == 200:
        if len(span) != size and size > WHOLE_BYTES_MAX:
            raise StoreError(f"{target.shown}: no range support: asked for {asked}, got status 200 with all of it")
        if length is not None and length != size:
            raise ChangedError(f"{target.shown}: expected {size} bytes, the object now has {length}")
        return
    content_range = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(content_range.strip())
    if not match:
        raise IntegrityError(f"{target.shown}: asked for {asked}, got Content-Range {content_range!r}")
    start, last, total = match.groups()
    if total != "*" and int(total) != size:
        raise ChangedError(f"{target.shown}: expected {size} bytes, the object now has {total}")
    if (int(start), int(last) + 1) != (span.start, span.stop):
        raise IntegrityError(f"{target.shown}: asked for {asked}, got Content-Range {content_range!r}")
    if length is not None and length != len(span):
        raise IntegrityError(f"{target.shown}: asked for {asked}, got a body of {length} bytes")


def _cut(response: http.client.HTTPResponse, span: ByteRange, out: memoryview, size: int, target: Target) -> None:
    """Read the whole object, small as it is, and keep the span."""
    body = response.read(size + 1)
    if len(body) > size:
        raise ChangedError(f"{target.shown}: expected {size} bytes, the object now has more")
    if len(body) < size:
        raise TransientStoreError(f"{target.shown}: the body of {size} bytes ended after {len(body)} bytes")
    if response.length == 0:
        response.close()
    out[:] = body[span.start : span.stop]


def _fill(connection: Connection, response: http.client.HTTPResponse, out: memoryview) -> int:
    """Read the body into `out`; the bytes read. The response is closed afterwards if the body was `out` exactly."""
    filled = 0
    if response.length is None:  # chunked, or delimited by the end of the connection
        while filled < len(out) and (piece := response.read1(len(out) - filled)):
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        if filled == len(out) and response.read1(1):
            raise IntegrityError(f"got more than the {len(out)} bytes asked for")
        return filled
    # What came along with the head lies in the response's buffer; the first read drains it and may add one receive.
    filled = response.fp.readinto1(out)
    if filled:
        filled += connection.wire.receive_all(out[filled:])
    if filled == len(out):
        response.length = 0
        response.close()
    return filled
