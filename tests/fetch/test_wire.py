"""One socket: heads read in one look are what http.client makes of them; long bodies in whatever portions they come."""

from __future__ import annotations

import http.client
import itertools
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from mfs.fetch.wire import Wire, read_head
from mfs.testing import ramp

BODY = ramp(4 << 20)
PLAIN = [
    "HTTP/1.1 206 Partial Content\r\nServer: nginx/1.22.1\r\nContent-Length: 10\r\nConnection: keep-alive\r\n"
    'ETag: "66-1"\r\nContent-Range: bytes 5-14/1000\r\n\r\n',
    "HTTP/1.1 200 OK\r\ncontent-length:10\r\nX-Empty:\r\nx-twice: a\r\nX-Twice:\t b \r\n\r\n",
]
OTHERS = [
    "HTTP/1.1 206 x\r\nContent-Length: 10\r\nConnection: close\r\n\r\n",
    "HTTP/1.1 206 x\r\nTransfer-Encoding: chunked\r\nContent-Length: 10\r\n\r\n",
    "HTTP/1.1 206 x\r\nContent-Range: bytes 5-14/1000\r\n\r\n",
    "HTTP/1.1 206 x\r\nContent-Length: ten\r\n\r\n",
    "HTTP/1.1 206 x\r\nContent-Length: -10\r\n\r\n",
    f"HTTP/1.1 206 x\r\nContent-Length: {'1' * 5000}\r\n\r\n",
    "HTTP/1.1 206 x\r\nContent-Length: 10\r\nX-Folded: a\r\n b\r\n\r\n",
    "HTTP/1.1 206 x\r\nContent-Length: 10\r\nX-Name : a\r\n\r\n",
    "HTTP/1.1 206 x\r\nContent-Length: 10\r\nX-Text: \xe9\r\n\r\n",
    "HTTP/1.1 206 x\nContent-Length: 10\n\n",
    "HTTP/1.1 206\r\nContent-Length: 10\r\n\r\n",
    "HTTP/1.0 206 x\r\nContent-Length: 10\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 206 x\r\nContent-Length: 10\r\n\r\n",
    "HTTP/1.1 404 Not Found\r\nContent-Length: 10\r\n\r\n",
]


@pytest.fixture
def pair() -> Iterator[tuple[Wire, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    wire = Wire(ours, time.monotonic() + 20)
    with theirs:
        yield wire, theirs
    wire.close()


def said(response: http.client.HTTPResponse) -> tuple[object, ...]:
    return (response.version, response.status, response.reason, response.headers.items(), response.length,
            response.chunked, response.will_close, response.headers["etag"])  # fmt: skip


@pytest.mark.parametrize("head", PLAIN + OTHERS)
def test_a_head_is_what_http_client_makes_of_it(
    pair: tuple[Wire, socket.socket], monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    wire, server = pair
    server.sendall(head.encode("latin-1") + b"0123456789")
    expected = http.client.HTTPResponse(wire, method="GET")  # type: ignore[arg-type]
    expected.begin()
    if head in PLAIN:
        monkeypatch.delattr(http.client.HTTPResponse, "begin")
    again, other = socket.socketpair()
    with again, other:
        other.sendall(head.encode("latin-1") + b"0123456789")
        found = read_head(Wire(again, time.monotonic() + 20), "GET")
        assert said(found) == said(expected)
        assert found.fp.peek().endswith(b"0123456789") == expected.fp.peek().endswith(b"0123456789")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_comes_before_the_answer_is_no_answer(pair: tuple[Wire, socket.socket], method: str) -> None:
    wire, server = pair
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nContent-Length: 3\r\n\r\n"
    server.sendall(hints + b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + PLAIN[0].encode())
    found = read_head(wire, method)
    assert (found.status, found.headers["ETag"], found.headers["Link"]) == (206, '"66-1"', None)
    if method == "GET":
        server.sendall(b"0123456789")
        assert found.read() == b"0123456789"


def test_a_head_in_two_parts_is_read_to_its_end(pair: tuple[Wire, socket.socket]) -> None:
    wire, server = pair
    head = PLAIN[0].encode()
    server.sendall(head[:40])
    rest = threading.Timer(0.05, server.sendall, [head[40:] + b"0123456789"])
    rest.start()
    assert read_head(wire, "GET").read() == b"0123456789"
    rest.join()


@pytest.mark.parametrize("cuts", [[0, len(BODY)], [0, 1, 3 << 20, len(BODY) - 1000, len(BODY)]])
def test_a_long_body_comes_whole_in_whatever_portions(pair: tuple[Wire, socket.socket], cuts: list[int]) -> None:
    wire, server = pair

    def send() -> None:
        for start, stop in itertools.pairwise(cuts):
            server.sendall(BODY[start:stop])
            time.sleep(0.05)

    sender = threading.Thread(target=send)
    sender.start()
    out = bytearray(len(BODY))
    assert wire.receive_all(memoryview(out)) == len(BODY)
    assert out == BODY
    sender.join()


@pytest.mark.parametrize("nbytes", [100, (2 << 20) + 100, len(BODY) - 100])
def test_a_long_body_that_ends_early_is_as_long_as_it_was(pair: tuple[Wire, socket.socket], nbytes: int) -> None:
    wire, server = pair

    def send() -> None:
        server.sendall(BODY[:nbytes])
        server.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    out = bytearray(len(BODY))
    assert wire.receive_all(memoryview(out)) == nbytes
    assert out[:nbytes] == BODY[:nbytes]
    sender.join()
