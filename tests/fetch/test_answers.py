"""Answers to a range as other people's servers give them, byte for byte: which are taken, which are refused."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import pytest

from mfs.errors import ChangedError, IntegrityError, MfsError, StoreError
from mfs.fetch.transport import Transport
from mfs.testing import ramp
from mfs.types import ByteRange

SIZE = 1000
WHOLE = ramp(SIZE)
PACKED = gzip.compress(WHOLE, mtime=0)

Answering = Callable[[str, bytes], str]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """`answering(head, body)` is the URL of a server that gives every request this answer and hangs up."""
    servers: list[tuple[socket.socket, threading.Thread]] = []

    def start(head: str, body: bytes) -> str:
        server = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.recv(65536)
                    client.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)

        thread = threading.Thread(target=serve)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.getsockname()[1]}/w.bin"

    yield start
    for server, thread in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)


def get(url: str, start: int, stop: int) -> bytes:
    out = bytearray(stop - start)
    transport = Transport()
    try:
        transport.read_range(
            url, ByteRange(start, stop), out=memoryview(out), size=SIZE, deadline_s=time.monotonic() + 10
        )
    finally:
        transport.close()
    return bytes(out)


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


PART = "Content-Length: 10\nContent-Range: bytes 5-14/1000"


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (f"HTTP/1.1 200 OK\n{PART}", WHOLE[5:15]),
        ("HTTP/1.1 200 OK\nContent-Length: 1000\nContent-Range: bytes 0-999/1000", WHOLE),
        ("HTTP/1.1 206 x\nContent-Length: 10\nContent-Range: Bytes 5-14/1000", WHOLE[5:15]),
        ("HTTP/1.1 206 x\nContent-Length: 10\ncontent-range: BYTES 5-14/*", WHOLE[5:15]),
        (f"HTTP/1.1 206 x\n{PART}\nTransfer-Encoding: identity", WHOLE[5:15]),
        ("HTTP/1.1 206 x\nContent-Length: 10\nContent-Range: bytes=5-14/1000", WHOLE[5:15]),
        ("HTTP/1.1 200 OK\nContent-Length: 1000\nContent-Encoding: gzip", WHOLE),
        *(
            (f"HTTP/1.1 206 x\n{PART}\nContent-Encoding: {coding}", WHOLE[5:15])
            for coding in ("gzip", "aws-chunked", "identity", "aws-chunked,gzip", "br", "UTF-8", "")
        ),
        ("HTTP/1.1 206 x\nTransfer-Encoding: chunked\nContent-Range: bytes 5-14/1000\nContent-Encoding: gzip",
         chunked(WHOLE[5:15])),
    ],
)  # fmt: skip
def test_what_says_the_range_and_has_its_length_is_taken_as_it_comes(
    answering: Answering, head: str, body: bytes
) -> None:
    assert get(answering(head, body), 5, 15) == WHOLE[5:15]


@pytest.mark.parametrize(
    ("head", "body", "error", "text"),
    [
        ("200 OK\nContent-Length: 10\nContent-Range: bytes 6-15/1000", WHOLE[6:16], IntegrityError, "bytes 6-15"),
        ("200 OK\nContent-Length: 10\nContent-Range: bytes 5-14/1001", WHOLE[5:15], ChangedError, "now has 1001"),
        ("200 OK\nContent-Length: 1000\nContent-Range: bytes 5-14/1000", WHOLE, IntegrityError, "body of 1000"),
        ("200 OK\nContent-Length: 10\nContent-Range: lines 5-14/1000", WHOLE[5:15], IntegrityError, "lines"),
        (f"206 x\nContent-Length: 10\nContent-Range: bytes {'9' * 5000}-9/9", b"x" * 10, IntegrityError, "999"),
        (f"200 OK\nContent-Length: {len(PACKED)}\nContent-Encoding: gzip", PACKED, IntegrityError, "gzip encoding"),
        ("206 x\nTransfer-Encoding: chunked\nContent-Range: bytes 5-14/1000\nContent-Encoding: gzip",
         chunked(gzip.compress(WHOLE[5:15], mtime=0)), IntegrityError, "more than the 10 bytes"),
        (f"206 x\nTransfer-Encoding: gzip, chunked\n{PART}", WHOLE[5:15], IntegrityError, "encoding 'gzip, ch"),
        ("200 OK\nTransfer-Encoding: chunked\nContent-Encoding: gzip", chunked(PACKED), IntegrityError, "in gzip"),
    ],
)  # fmt: skip
def test_what_was_changed_on_the_way_is_refused(
    answering: Answering, head: str, body: bytes, error: type[MfsError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        get(answering(f"HTTP/1.1 {head}", body), 5, 15)
    assert type(caught.value) is error


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZIP"])
def test_documents_are_unpacked_and_what_only_claims_to_be_packed_is_left(answering: Answering, encoding: str) -> None:
    document = b'{"files": []}'
    packed = zlib.compress(document) if encoding == "deflate" else gzip.compress(document, mtime=0)
    transport = Transport()
    for body in (packed, document):
        url = answering(f"HTTP/1.1 200 OK\nContent-Length: {len(body)}\nContent-Encoding: {encoding}", body)
        assert transport.request(url, deadline_s=time.monotonic() + 10).body == document
    transport.close()


def test_a_document_unpacks_to_no_more_than_is_allowed_for_it(answering: Answering) -> None:
    packed = gzip.compress(bytes(1 << 20), mtime=0)
    url = answering(f"HTTP/1.1 200 OK\nContent-Length: {len(packed)}\nContent-Encoding: gzip", packed)
    transport = Transport()
    with pytest.raises(StoreError, match="longer than the 1000000 bytes"):
        transport.request(url, body_bytes_max=1_000_000, deadline_s=time.monotonic() + 10)
    transport.close()


def test_headers_are_looked_at_before_the_body_is_taken(answering: Answering) -> None:
    url = answering(f"HTTP/1.1 206 x\n{PART}\nETag: other", b"")
    out = bytearray(10)
    transport = Transport()

    def check(headers: object) -> None:
        raise ChangedError("another version")

    with pytest.raises(ChangedError, match="another version"):
        transport.read_range(url, ByteRange(5, 15), out=memoryview(out), size=SIZE, check=check,
                             deadline_s=time.monotonic() + 10)  # fmt: skip
    assert bytes(out) == bytes(10)
    transport.close()
