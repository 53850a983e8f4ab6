"""An HTTP server in this process that answers what a function says: for faults no real server can be brought to."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.servers import web


class Request(NamedTuple):
    """What was asked."""

    method: str
    path: str
    """Decoded."""
    query: dict[str, str]
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = b""

    @property
    def authorization(self) -> str:
        return self.headers.get("authorization", "")


class Answer(NamedTuple):
    """What is answered."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class ScriptedServer:
    """Listens on a free port of 127.0.0.1 while used as a context; `requests` are those since it began."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        """answer: called from several threads."""
        self.requests: list[Request] = []
        requests = self.requests

        class Site(web.Handler):
            def do_GET(self, body: bytes = b"") -> None:
                url = urlsplit(self.path)
                headers = {name.lower(): value for name, value in self.headers.items()}
                query = dict(parse_qsl(url.query, keep_blank_values=True))
                request = Request(self.command, unquote(url.path), query, headers, body)
                requests.append(request)
                status, body, said = answer(request)
                self.answer(status, body, list(said))

            def do_POST(self) -> None:
                self.do_GET(self.rfile.read(int(self.headers.get("Content-Length", "0"))))

            do_PUT = do_PATCH = do_DELETE = do_POST

        self._server = web.Server(("127.0.0.1", 0), Site)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def wrap(self, context: ssl.SSLContext) -> None:
        """Speak TLS from now on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = self.url.replace("http://", "https://")

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def s3_error(status: int, code: str, more: str = "", headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """An S3 error; more: further elements of its XML."""
    return Answer(status, f"<Error><Code>{code}</Code><Message>no</Message>{more}</Error>".encode(), headers)


def s3_listing(files: Mapping[str, bytes], more: str = "<IsTruncated>false</IsTruncated>") -> Answer:
    """A page of ListObjectsV2 with these keys and `more` elements."""
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
        f"<ETag>&quot;{len(content)}&quot;</ETag><Size>{len(content)}</Size></Contents>"
        for key, content in files.items()
    )
    body = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{more}{contents}</ListBucketResult>'
    return Answer(200, body.encode(), (("Content-Type", "application/xml"),))


def s3_object(request: Request, content: bytes) -> Answer:
    """An object, or the range of it that is asked for; its ETag is its size, as in `s3_listing`."""
    etag = ("ETag", f'"{len(content)}"')
    span = web.parse_range(request.headers.get("range"), len(content))
    if span is None:
        return Answer(200, content, (etag,))
    start, stop = span
    return Answer(206, content[start:stop], (etag, ("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")))


def s3_bucket(request: Request, files: Mapping[str, bytes]) -> Answer:
    """Truthful answers of a bucket called 'b' in path style."""
    key = request.path.removeprefix("/b").removeprefix("/")
    if not key:
        prefix = request.query.get("prefix", "")
        return s3_listing({name: content for name, content in files.items() if name.startswith(prefix)})
    return s3_object(request, files[key]) if key in files else s3_error(404, "NoSuchKey")
