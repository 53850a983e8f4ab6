"""HTTP/1.1 for bulk bytes: a range GET goes from the socket into the caller's memory, copied by nobody in between.

Knows nothing of S3, hubs or registries: redirects, status codes and credentials are its callers' business. All errors
of sockets, TLS and HTTP become ours here. Nothing is retried, except once when a kept-alive connection proves dead.

Why the standard library: 3.4-3.9 GB/s at 0.23-0.33 CPU s/GB over loopback (two shared cores, nginx, 8 MiB ranges),
where requests, httpx and aiohttp needed 3 to 9 times the CPU.
"""

from __future__ import annotations

import functools
import http.client
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from mfs.errors import AccessError, ChangedError, IntegrityError, MfsError, StoreError, TransientStoreError
from mfs.fetch.connections import Connection, ConnectionPool, Origin
from mfs.fetch.environment import CaBundle, Proxy, proxy_for
from mfs.fetch.told import Arrived, listener
from mfs.fetch.wire import TunnelRefusedError, read_head
from mfs.tracing.requests import Request
from mfs.types import ByteRange

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12

ERROR_BODY_BYTES = 4096
"""At most this much of an error's body is read: enough for S3's XML."""

WHOLE_BYTES_MAX = 8 << 20
"""A server that answers a range with the whole object is forgiven up to this size (Hubs do so for small files); the
rest is thrown away. Beyond it, each range would cost the object."""

ERROR_BODY_S = 2.0
"""Longest wait for an error's body: docker-registry announces the whole blob with a 416 and sends 33 bytes."""

_SENT_BYTES = 256 << 10
"""Of a body, between two looks at the deadline."""

_CONTENT_RANGE = re.compile(r"bytes[=\s]\s*(\d{1,20})-(\d{1,20})/(\d{1,20}|\*)", re.ASCII | re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/?#]*@")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]")
_USER_AGENT = "mfs/0.1"

_CODINGS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})
"""Content codings that change the length of a body. Others (identity, aws-chunked, a charset) are only said."""


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
    authority: str = ""
    """What Host says, where that is not `origin`'s name."""

    def through(self, cache: Origin) -> Target:
        """The same address in absolute form, for a cache to ask for it. Source: RFC 9112 §3.2.2."""
        host = str(self.origin).partition("://")[2]
        return Target(cache, f"{self.origin}{self.request_target}", f"{self.shown} through {cache}", host)


@functools.lru_cache(maxsize=256)  # a file's address comes with each of its ranges, several times
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


def without_userinfo(url: str) -> str:
    """The URL without user and password, which no request of ours sends: what is left may be kept and shown."""
    return _USERINFO.sub("", url)


class Tally:
    """How many requests were sent while somebody counted."""

    def __init__(self) -> None:
        self.requests_count = 0
        self._lock = threading.Lock()

    def note(self) -> None:
        with self._lock:
            self.requests_count += 1


_tallies: list[Tally] = []


@contextmanager
def counting() -> Iterator[Tally]:
    """Count the requests of all transports of this process, for who wants to know what something costs an origin."""
    tally = Tally()
    _tallies.append(tally)
    try:
        yield tally
    finally:
        _tallies.remove(tally)


class Transport:
    """A pool of connections and the two requests made over them. Thread-safe; construction does no I/O."""

    def __init__(
        self, *, connections_max: int = 32, ca_bundle: CaBundle | None = None, uses_proxy: bool = True
    ) -> None:
        """connections_max: per origin; callers beyond it wait inside their deadline.
        ca_bundle: certificates to trust as well; None for what the environment names.
        uses_proxy: that the environment names.
        """
        self._connections_max = connections_max
        self._ca_bundle = ca_bundle
        self._pool = ConnectionPool(connections_max, ca_bundle, uses_proxy=uses_proxy)

    def past_proxies(self) -> Transport:
        """Another one, with as many connections and the same trust, for what is on this network."""
        return Transport(connections_max=self._connections_max, ca_bundle=self._ca_bundle, uses_proxy=False)

    def request(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: Buffer | None = None,
        body_bytes_max: int = 64 << 20,
        deadline_s: float,
    ) -> Reply:
        """Make a request whose answer fits in memory, whatever its status; redirects are not followed.

        body: what is sent, with its length; the caller says its type. Such a request is never sent twice: who sends
            something asks what of it came.
        body_bytes_max: of the answer.
        A body that is gzip, and says so, is unpacked: some servers compress documents whether or not one asks.
        Raises: StoreError if the body is longer than body_bytes_max; TransientStoreError on reset, timeout, bad HTTP.
        """
        target = parse_target(url)
        with _traced(method, target) as trace:
            return self._request(target, method, trace, headers or {}, body, body_bytes_max, deadline_s)

    def _request(
        self, target: Target, method: str, trace: Request, headers: Mapping[str, str], body: Buffer | None,
        body_bytes_max: int, deadline_s: float,
    ) -> Reply:  # fmt: skip
        try:
            connection, response = self._exchange(method, target, trace.headers(headers), deadline_s, body)
        except Exception as e:
            raise self._translate(e, target, deadline_s) from e
        trace.status = response.status
        try:
            if response.status >= 400 and method != "HEAD":
                return self._finish_error(connection, response, deadline_s)
            answer = response.read(body_bytes_max + 1)
            if len(answer) > body_bytes_max:
                raise StoreError(f"{target.shown}: the answer is longer than the {body_bytes_max} bytes allowed for it")
            if response.length:  # http.client counts down what a Content-Length promised
                raise TransientStoreError(f"{target.shown}: the answer ended {response.length} bytes early")
            answer = _unpacked(answer, response, body_bytes_max, target)
        except BaseException as e:
            self._pool.drop(connection)
            raise self._translate(e, target, deadline_s) from e
        self._release(connection, response)
        return Reply(response.status, response.headers, answer)

    def read_range(
        self,
        url: str,
        span: ByteRange,
        *,
        out: memoryview,
        size: int,
        headers: Mapping[str, str] | None = None,
        name: str | None = None,
        check: Callable[[http.client.HTTPMessage], None] | None = None,
        through: Origin | None = None,
        deadline_s: float,
    ) -> Reply:
        """Fill `out` with bytes [span.start, span.stop) of an object of `size` bytes.

        A Content-Encoding says what the stored bytes are: they are taken as they come, if length and range are right.
        name: what error messages call the object where its URL would say little (a signed address, say).
        check: looks at the headers of a 200 or 206 before its body is read; what it raises ends the request.
        through: a cache to ask for the URL, instead of its own host.
        Returns the 206 (or 200, where the answer is the whole object and that is small) after `out` was filled; any
        other status comes back with the start of its body, `out` untouched, for the caller to make sense of.
        Raises: IntegrityError for an answer with other bytes than asked for; ChangedError if the object has another
            size; StoreError if the server does not do ranges; TransientStoreError on reset, timeout, early end, with
            what of `out` is filled all the same.
        Source: RFC 9110 §14.2 Range, §15.3.7 206.
        """
        if len(out) != len(span):
            raise ValueError(f"out has {len(out)} bytes for a range of {len(span)}")
        if not span:
            return Reply(206, http.client.HTTPMessage(), b"")
        target = parse_target(url)
        if name:
            target = target._replace(shown=f"{name} at {target.origin}")
        if through:
            target = target.through(through)
        wanted = {**(headers or {}), "Range": f"bytes={span.start}-{span.stop - 1}"}
        with _traced("GET", target) as trace:
            # A cache that fails is made good by the origin, from the start.
            tell = None if through else listener()
            return self._read_range(target, span, trace, wanted, out, size, check, tell, deadline_s)

    def _read_range(
        self, target: Target, span: ByteRange, trace: Request, headers: Mapping[str, str], out: memoryview, size: int,
        check: Callable[[http.client.HTTPMessage], None] | None, tell: Arrived | None, deadline_s: float,
    ) -> Reply:  # fmt: skip
        try:
            connection, response = self._exchange("GET", target, trace.headers(headers), deadline_s)
        except Exception as e:
            raise self._translate(e, target, deadline_s) from e
        trace.status = response.status
        is_filling = False
        try:
            if response.status not in (200, 206):
                return self._finish_error(connection, response, deadline_s)
            if check:
                check(response.headers)
            if _is_whole(response, span, size, target) and len(span) != size:
                _cut(response, span, out, size, target)
                filled = len(out)
            else:
                is_filling = response.length is not None  # else nothing says yet that these are the bytes
                filled = _fill(connection, response, out, tell)
            if filled < len(out):
                raise _early_end(response, filled, f"bytes {span.start}-{span.stop - 1}", target)
        except BaseException as e:
            self._pool.drop(connection)
            error = self._translate(e, target, deadline_s)
            if is_filling and isinstance(error, TransientStoreError):
                error.received_bytes = len(out) - (response.length or 0)
            raise error from e
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

    def keeps(self, url: str) -> bool:
        """Whether a connection to where `url` leads is open and idle: its server keeps them after an answer."""
        return self._pool.counts(parse_target(url).origin)[1] > 0

    def close(self) -> None:
        """Close all connections; requests under way in other threads end with StoreError."""
        self._pool.close()

    def _exchange(
        self,
        method: str,
        target: Target,
        headers: Mapping[str, str],
        deadline_s: float,
        body: Buffer | None = None,
    ) -> tuple[Connection, http.client.HTTPResponse]:
        """Send a request and read the head of its answer."""
        connection = self._pool.take(target.origin, deadline_s)
        try:
            return connection, _send(connection, method, target, headers, body)
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self._pool.drop(connection)
            if not connection.is_reused or self._pool.is_closed or body is not None:
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


def _traced(method: str, target: Target) -> Request:
    return Request(method, target.shown, target.origin.host, target.origin.port)


def translate(error: Exception, target: Target) -> MfsError:
    """Our error for one of sockets, TLS or HTTP; the cause's text is kept, nothing of the URL's secrets is."""
    proxy = None if target.authority else proxy_for(*target.origin)
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
        f"Host: {target.authority or str(origin).partition('://')[2]}",
        f"User-Agent: {_USER_AGENT}",
        "Accept-Encoding: identity",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    if proxy and origin.scheme == "http":  # else the proxy sees only a tunnel
        lines[0] = f"{method} {origin}{target.request_target} HTTP/1.1"
        if proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
    if " " in target.request_target or _UNSAFE.search("".join(lines)):
        raise StoreError(f"{target.shown!r}: spaces or control characters in a URL or header; they must be encoded")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _send(
    connection: Connection, method: str, target: Target, headers: Mapping[str, str], body: Buffer | None = None
) -> http.client.HTTPResponse:
    for tally in _tallies:
        tally.note()
    view = memoryview(b"" if body is None else body).cast("B")
    if body is not None:
        headers = {**headers, "Content-Length": str(len(view))}
    connection.wire.sendall(_request_message(method, target, headers, connection.proxy))
    try:
        for start in range(0, len(view), _SENT_BYTES):
            connection.wire.sendall(view[start : start + _SENT_BYTES])
    except (BrokenPipeError, ConnectionResetError):
        # A server that has refused early has answered already, and closed: that answer says more than the pipe.
        try:
            return read_head(connection.wire, method)
        except (OSError, http.client.HTTPException):
            raise ConnectionResetError("the connection ended while the request was sent") from None
    return read_head(connection.wire, method)


def _is_whole(response: http.client.HTTPResponse, span: ByteRange, size: int, target: Target) -> bool:
    """Whether the body is the whole object, and not the range asked for. Some servers say 200 to a range they send.

    Raises: as `Transport.read_range`, if the answer's head promises anything else.
    """
    asked = f"bytes {span.start}-{span.stop - 1} of {size}"
    length = response.length
    transfer = response.headers.get("Transfer-Encoding", "").strip().lower() or "identity"
    if transfer != ("chunked" if response.chunked else "identity"):
        raise IntegrityError(f"{target.shown}: asked for {asked}, got them in transfer encoding {transfer!r}")
    content_range = response.headers.get("Content-Range", "").strip()
    if response.status == 206 or content_range:
        match = _CONTENT_RANGE.fullmatch(content_range)
        if not match:
            raise IntegrityError(f"{target.shown}: asked for {asked}, got Content-Range {content_range!r}")
        start, last, total = match.groups()
        if total != "*" and int(total) != size:
            raise ChangedError(f"{target.shown}: expected {size} bytes, the object now has {total}")
        stated = (int(start), int(last) + 1)
        if stated == (span.start, span.stop):
            if length is not None and length != len(span):
                raise IntegrityError(f"{target.shown}: asked for {asked}, got a body of {length} bytes"
                                     f"{_packed_on_the_way(response)}")  # fmt: skip
            return False
        if response.status == 206 or stated != (0, size):
            raise IntegrityError(f"{target.shown}: asked for {asked}, got Content-Range {content_range!r}")
    if len(span) != size and size > WHOLE_BYTES_MAX:
        raise StoreError(f"{target.shown}: no range support: asked for {asked}, got status 200 with all of it")
    if length is not None and length != size:
        if why := _packed_on_the_way(response):
            raise IntegrityError(f"{target.shown}: expected {size} bytes, got a body of {length} bytes{why}")
        raise ChangedError(f"{target.shown}: expected {size} bytes, the object now has {length}")
    return True


def _codings_of(response: http.client.HTTPResponse) -> set[str]:
    said = ",".join(response.headers.get_all("Content-Encoding", []))
    return {token.strip().lower() for token in said.split(",")} & _CODINGS


def _packed_on_the_way(response: http.client.HTTPResponse) -> str:
    """Ends a message about a wrong length: why it may be wrong, if the answer says so."""
    codings = ", ".join(sorted(_codings_of(response)))
    return f": sent in {codings} encoding; the server or a proxy compresses on the way, which must not be" * bool(
        codings
    )


def _early_end(response: http.client.HTTPResponse, filled: int, what: str, target: Target) -> MfsError:
    """The error for a body that ended too early: for good if it was compressed and came whole, else it may pass."""
    text = f"{target.shown}: the body of {what} ended after {filled} bytes"
    if response.chunked and (why := _packed_on_the_way(response)):
        return IntegrityError(text + why)
    return TransientStoreError(text)


def _unpacked(body: bytes, response: http.client.HTTPResponse, bytes_max: int, target: Target) -> bytes:
    """The document that came as gzip or deflate; what only claims to be stays as it is."""
    if not body or not _codings_of(response) & {"gzip", "x-gzip", "deflate"}:
        return body
    unpacker = zlib.decompressobj(wbits=47)  # either format, by its first bytes
    try:
        found = unpacker.decompress(body, bytes_max + 1)
    except zlib.error:
        return body
    if len(found) > bytes_max:
        raise StoreError(f"{target.shown}: the answer is longer than the {bytes_max} bytes allowed for it")
    if not unpacker.eof:
        raise TransientStoreError(f"{target.shown}: the compressed answer ended early")
    return found


def _cut(response: http.client.HTTPResponse, span: ByteRange, out: memoryview, size: int, target: Target) -> None:
    """Read the whole object, small as it is, and keep the span."""
    body = response.read(size + 1)
    if len(body) > size:
        raise ChangedError(f"{target.shown}: expected {size} bytes, the object now has more")
    if len(body) < size:
        raise _early_end(response, len(body), f"{size} bytes", target)
    if response.length == 0:
        response.close()
    out[:] = body[span.start : span.stop]


def _fill(connection: Connection, response: http.client.HTTPResponse, out: memoryview, tell: Arrived | None) -> int:
    """Read the body into `out`; the bytes read. The response is closed afterwards if the body was `out` exactly.

    tell: what has come, while that takes long, of a body of which the head says that it is `out`.
    """
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
    response.length -= filled
    if filled:
        try:
            connection.wire.receive_all(out[filled:], tell=tell and (lambda nbytes: tell(filled + nbytes)))
        finally:
            response.length -= connection.wire.filled
    if not response.length:
        response.close()
    return len(out) - response.length
