"""The transport against servers that lie and networks that fail, at exact bytes."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mfs.errors import (
    AccessError,
    ChangedError,
    ConfigError,
    IntegrityError,
    MfsError,
    StoreError,
    TransientStoreError,
)
from mfs.fetch import transport as transport_module
from mfs.fetch.connections import IDLE_S
from mfs.fetch.environment import proxy_for
from mfs.fetch.transport import ERROR_BODY_BYTES, Transport, parse_target
from mfs.testing import ramp
from mfs.types import ByteRange
from tests.servers.chaos import ChaosProxy
from tests.servers.liar import LiarServer, Lie
from tests.servers.nginx import NginxServer

SIZE = 1 << 20


@pytest.fixture
def transport() -> Iterator[Transport]:
    transport = Transport(connections_max=8)
    yield transport
    transport.close()


@pytest.fixture(scope="module")
def file(nginx: NginxServer) -> Path:
    folder = nginx.files / "transport"
    folder.mkdir()
    (folder / "w.bin").write_bytes(ramp(SIZE))
    return folder / "w.bin"


def get(transport: Transport, url: str, start: int, stop: int, *, size: int = SIZE, timeout_s: float = 20) -> bytes:
    """A range that must succeed in filling its buffer."""
    out = bytearray(b"\xee" * (stop - start))
    deadline_s = time.monotonic() + timeout_s
    reply = transport.read_range(url, ByteRange(start, stop), out=memoryview(out), size=size, deadline_s=deadline_s)
    assert reply.status in (200, 206)
    return bytes(out)


@pytest.fixture
def lying(liar: LiarServer) -> LiarServer:
    (liar.files / "w.bin").write_bytes(ramp(SIZE))
    return liar


@pytest.mark.parametrize(
    ("lie", "error", "text"),
    [
        (Lie.LONG_LENGTH, IntegrityError, "a body of 1010 bytes"),
        (Lie.SHORT_LENGTH, IntegrityError, "a body of 990 bytes"),
        (Lie.NO_LENGTH, TransientStoreError, "ended after 700 bytes"),
        (Lie.TRUNCATED, TransientStoreError, "ended after 700 bytes"),
        (Lie.OTHER_RANGE, IntegrityError, "bytes 101-1100/"),
        (Lie.SHORT_RANGE, IntegrityError, "bytes 100-599/"),
        (Lie.OTHER_TOTAL, ChangedError, "expected 1048576 bytes, the object now has 1048577"),
        (Lie.NO_CONTENT_RANGE, IntegrityError, "Content-Range ''"),
        (Lie.GROWN, ChangedError, "the object now has 2097152"),
        (Lie.HANG_UP, TransientStoreError, "RemoteDisconnected"),
        (Lie.NOT_HTTP, TransientStoreError, "BadStatusLine"),
        (Lie.ENDLESS_HEADERS, TransientStoreError, "headers"),
    ],
)
def test_lies_are_errors_that_say_what_was_expected(
    lying: LiarServer, transport: Transport, lie: Lie, error: type[MfsError], text: str
) -> None:
    lying.lie(lie, after_bytes=700)
    with pytest.raises(error) as caught:
        get(transport, lying.url + "w.bin", 100, 1100)
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert "w.bin" in str(caught.value)
    lying.tell_truth()
    assert get(transport, lying.url + "w.bin", 100, 1100) == ramp(1000, 100)


@pytest.mark.parametrize(("lie", "received_bytes"), [(Lie.TRUNCATED, 700), (Lie.NO_LENGTH, 0), (Lie.IGNORES_RANGE, 0)])
def test_what_came_before_it_broke_off_counts_where_it_must_be_what_was_asked_for(
    lying: LiarServer, transport: Transport, chaos: Callable[[str], ChaosProxy], lie: Lie, received_bytes: int
) -> None:
    lying.lie(lie, after_bytes=700)
    proxy = chaos(lying.url)
    if lie is Lie.IGNORES_RANGE:
        proxy.set(truncate_after_bytes=5000)
    out = bytearray(1000)
    with pytest.raises(TransientStoreError) as caught:
        transport.read_range(f"{proxy.url}w.bin", ByteRange(100, 1100), out=memoryview(out), size=SIZE,
                             deadline_s=time.monotonic() + 20)  # fmt: skip
    assert caught.value.received_bytes == received_bytes
    assert out[:received_bytes] == ramp(received_bytes, 100)


def test_a_range_answered_with_a_small_object_is_cut_out_of_it_and_of_a_large_one_is_an_error(
    lying: LiarServer, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying.lie(Lie.IGNORES_RANGE)
    for start, stop in [(0, 1), (100, 1100), (SIZE - 7, SIZE), (1, SIZE), (0, SIZE)]:
        assert get(transport, lying.url + "w.bin", start, stop) == ramp(SIZE)[start:stop]
    with pytest.raises(ChangedError, match="now has 1048576"):
        get(transport, lying.url + "w.bin", 100, 1100, size=SIZE - 1)
    monkeypatch.setattr(transport_module, "WHOLE_BYTES_MAX", SIZE - 1)
    with pytest.raises(StoreError, match="no range support"):
        get(transport, lying.url + "w.bin", 100, 1100)


@pytest.mark.parametrize("lie", [Lie.SILENCE, Lie.DRIP])
def test_silence_and_drips_end_at_the_deadline(lying: LiarServer, transport: Transport, lie: Lie) -> None:
    lying.lie(lie, interval_s=0.02)
    with pytest.raises(TransientStoreError, match="deadline"):  # the drip alone would take six hours
        get(transport, lying.url + "w.bin", 0, SIZE, timeout_s=0.4)


def test_an_error_body_is_cut_and_its_lying_length_does_not_hang(transport: Transport) -> None:
    """As Debian's docker-registry does: a 416 that announces the whole blob and sends 33 bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closing = threading.Event()

        def serve() -> None:
            for body in (b"x" * 33, b"y" * 100_000):
                client, _ = server.accept()
                with client:
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 416 No\r\nContent-Length: 90000000\r\n\r\n" + body)
                    closing.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/blob"
        try:
            reply = transport.request(url, deadline_s=time.monotonic() + 0.5)
            assert (reply.status, reply.body) == (416, b"x" * 33)
            closing.set()
            reply = transport.request(url, deadline_s=time.monotonic() + 20)
            assert (reply.status, reply.body) == (416, b"y" * ERROR_BODY_BYTES)
        finally:
            closing.set()
            thread.join(20)


def test_a_reset_in_the_body_is_transient_and_leaves_no_connection(
    nginx: NginxServer, file: Path, transport: Transport, chaos: Callable[[str], ChaosProxy]
) -> None:
    proxy = chaos(nginx.url)
    url = f"{proxy.url}transport/w.bin"
    assert get(transport, url, 0, SIZE) == ramp(SIZE)
    for weather in ({"reset_after_bytes": 300_000}, {"truncate_after_bytes": 300_000}):
        proxy.set(**weather, faults_count=1)
        with pytest.raises(TransientStoreError):
            get(transport, url, 0, SIZE)
        assert transport._pool.counts(parse_target(url).origin) == (0, 0)
        assert get(transport, url, 0, SIZE) == ramp(SIZE)
    proxy.set(reset_after_bytes=10, faults_count=1)  # inside the head, on a connection kept alive: tried again at once
    assert get(transport, url, 0, SIZE) == ramp(SIZE)


def test_a_stall_in_the_body_ends_at_the_deadline(
    nginx: NginxServer, file: Path, transport: Transport, chaos: Callable[[str], ChaosProxy]
) -> None:
    proxy = chaos(nginx.url)
    proxy.set(stall_after_bytes=300_000)
    with pytest.raises(TransientStoreError, match="deadline"):
        get(transport, f"{proxy.url}transport/w.bin", 0, SIZE, timeout_s=0.4)


@pytest.mark.parametrize("request_kind", ["range", "small"])
def test_connections_that_died_while_idle_cost_nothing(
    nginx: NginxServer, file: Path, transport: Transport, request_kind: str
) -> None:
    url = f"{nginx.url}transport/w.bin"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: get(transport, url, 0, 1000), range(4)))
    nginx.stop()
    nginx.start()
    if request_kind == "range":
        assert get(transport, url, 5, 1005) == ramp(1000, 5)
    else:
        assert transport.request(url, deadline_s=time.monotonic() + 20).status == 200


def test_a_connection_that_dies_just_as_it_is_used_is_replaced_at_once(transport: Transport) -> None:
    """The server closes after the request has arrived: what looks alive before sending can still be dead."""
    answers = [True, False, True]  # the second request is met with a close
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client: socket.socket | None = None
            for answer in answers:
                client = client or server.accept()[0]
                client.recv(65536)
                if answer:
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                else:
                    client.close()
                    client = None
            if client:
                client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        for _ in range(2):
            assert transport.request(url, deadline_s=time.monotonic() + 20).body == b"ok"
        thread.join(20)


def test_connections_are_bounded_and_reused(nginx: NginxServer, file: Path, chaos: Callable[[str], ChaosProxy]) -> None:
    proxy = chaos(nginx.url)
    transport = Transport(connections_max=3)
    url = f"{proxy.url}transport/w.bin"
    with ThreadPoolExecutor(12) as pool:
        parts = list(pool.map(lambda i: get(transport, url, i * 1000, i * 1000 + 1000), range(200)))
    assert b"".join(parts) == ramp(200_000)
    assert proxy.stats().connections <= 3
    transport.close()


def test_who_finds_all_connections_busy_waits_no_longer_than_the_deadline(lying: LiarServer) -> None:
    transport = Transport(connections_max=1)
    lying.lie(Lie.SILENCE)
    url = lying.url + "w.bin"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(get, transport, url, 0, 10)
        lying.wait_for_request("/w.bin")
        with pytest.raises(TransientStoreError, match="all 1 connections stayed busy"):
            get(transport, url, 0, 10, timeout_s=0.1)
        transport.close()
        with pytest.raises(StoreError, match="closed"):
            waiting.result(20)
    with pytest.raises(StoreError, match="closed"):
        get(transport, url, 0, 10)


def test_preconnect_opens_connections_that_requests_then_use(
    nginx: NginxServer, file: Path, transport: Transport, chaos: Callable[[str], ChaosProxy]
) -> None:
    proxy = chaos(nginx.url)
    origin = parse_target(proxy.url).origin
    transport.preconnect(proxy.url, 3, deadline_s=time.monotonic() + 20)
    limit_s = time.monotonic() + 20
    while transport._pool.counts(origin) != (3, 3) and time.monotonic() < limit_s:
        threading.Event().wait(0.005)
    assert transport._pool.counts(origin) == (3, 3)
    get(transport, f"{proxy.url}transport/w.bin", 0, 10)
    assert proxy.stats().connections == 3


def test_idle_connections_are_not_kept_for_ever(
    nginx: NginxServer, file: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{nginx.url}transport/w.bin"
    get(transport, url, 0, 10)
    connection = transport._pool._idle[parse_target(url).origin][0]
    connection.idle_since_s -= IDLE_S + 1
    get(transport, url, 0, 10)
    assert transport._pool._idle[parse_target(url).origin][0] is not connection


def test_spans_and_answers_without_a_meaning(nginx: NginxServer, file: Path, transport: Transport) -> None:
    url = f"{nginx.url}transport/w.bin"
    assert get(transport, url, 7, 7) == b""
    with pytest.raises(ValueError, match="out has 3 bytes"):
        transport.read_range(url, ByteRange(0, 4), out=memoryview(bytearray(3)), size=SIZE, deadline_s=9e9)
    with pytest.raises(StoreError, match="longer than the 1000 bytes"):
        transport.request(url, body_bytes_max=1000, deadline_s=time.monotonic() + 20)
    for bad in ("ftp://h/x", "http://h:port/", "http:///x"):
        with pytest.raises(StoreError, match="http"):
            transport.request(bad, deadline_s=time.monotonic() + 20)
    with pytest.raises(StoreError, match="control characters"):
        transport.request(nginx.url, headers={"X": "a\r\nEvil: 1"}, deadline_s=time.monotonic() + 20)


def test_unknown_hosts_and_closed_ports_are_named(transport: Transport) -> None:
    with pytest.raises(TransientStoreError, match=r"http://127\.0\.0\.1:1/x.*refused"):
        get(transport, "http://user:hunter2@127.0.0.1:1/x?sig=hunter2", 0, 10)
    with pytest.raises(StoreError) as caught:
        get(transport, "http://user:hunter2@no-such-host.invalid/x?sig=hunter2", 0, 10)
    assert "no-such-host.invalid" in str(caught.value)
    assert "hunter2" not in str(caught.value)


class ConnectProxy:
    """A forward proxy that knows CONNECT and absolute URLs, asks for credentials and remembers what it saw."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            thread.start()
            self._threads.append(thread)

    def _serve(self, client: socket.socket) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(65536)):
                    return
                head += data
            text = head.decode()
            self.heads.append(text)
            if "Proxy-Authorization: Basic dTpw" not in text:  # u:p
                client.sendall(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            method, target, _ = text.split("\r\n")[0].split(" ")
            authority = target if method == "CONNECT" else parse_target(target).origin.__str__().partition("//")[2]
            host, _, port = authority.rpartition(":")
            with socket.create_connection((host, int(port))) as upstream:
                if method == "CONNECT":
                    client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                else:
                    path = "/" + target.split("/", 3)[3]
                    upstream.sendall(head.replace(target.encode(), path.encode(), 1))
                back = threading.Thread(target=_pump, args=(upstream, client))
                back.start()
                _pump(client, upstream)
                back.join(20)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(20)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 20):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


def test_proxies_from_the_environment_are_used_with_their_credentials(
    nginx: NginxServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ConnectProxy()
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.ca_file))
    address = f"127.0.0.1:{proxy.port}"
    try:
        for url, variable in ((nginx.url, "http_proxy"), (nginx.tls_url, "https_proxy")):
            target = f"{url}transport/w.bin"
            monkeypatch.setenv(variable, f"http://u:p@{address}")
            transport = Transport()
            for _ in range(2):
                assert get(transport, target, 100, SIZE) == ramp(SIZE - 100, 100)
            transport.close()
            monkeypatch.setenv(variable, f"http://u:hunter2@{address}")
            transport = Transport()
            if variable == "https_proxy":
                with pytest.raises(AccessError, match=r"through the proxy .*407.*https_proxy") as caught:
                    get(transport, target, 0, 10)
                assert "hunter2" not in str(caught.value)
            else:
                assert transport.request(target, deadline_s=time.monotonic() + 20).status == 407
            transport.close()
            seen = len(proxy.heads)
            monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
            transport = Transport()
            assert get(transport, target, 0, 10) == ramp(10)
            transport.close()
            assert len(proxy.heads) == seen
            monkeypatch.delenv("no_proxy")
    finally:
        proxy.close()
    assert proxy.heads[0].startswith(f"GET {nginx.url}transport/w.bin HTTP/1.1\r\n")
    connects = [head for head in proxy.heads if head.startswith("CONNECT")]
    assert connects[0].startswith(f"CONNECT localhost:{nginx.tls_port} HTTP/1.1\r\n")
    assert all("Range" not in head for head in connects)


def test_a_proxy_that_cannot_be_is_a_config_error_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://u:hunter2@host:1080")
    with pytest.raises(ConfigError, match="socks5") as caught:
        proxy_for("https", "example.org", 443)
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("https_proxy", "http://u:hunter2@host:1080")
    assert "hunter2" not in repr(proxy_for("https", "example.org", 443))
    monkeypatch.setenv("no_proxy", "example.org")
    assert proxy_for("https", "example.org", 443) is None


def test_a_ca_bundle_that_cannot_be_read_is_named(
    nginx: NginxServer, transport: Transport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", os.fspath(tmp_path / "nowhere.pem"))
    with pytest.raises(ConfigError, match=r"AWS_CA_BUNDLE=.*nowhere\.pem"):
        get(transport, nginx.tls_url, 0, 10)
