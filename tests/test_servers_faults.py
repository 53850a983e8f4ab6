"""The servers that misbehave on purpose do so exactly as told, and behave well when told nothing."""

from __future__ import annotations

import email.utils
import http.client
import json
import time
import urllib.parse
from collections.abc import Callable, Iterator

import pytest

from tests.servers.chaos import ChaosProxy
from tests.servers.liar import LiarServer, Lie
from tests.servers.nginx import NginxServer

BODY = bytes(n % 251 for n in range(100_000))


def connect(url: str, timeout_s: float = 20) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)


def get(connection: http.client.HTTPConnection, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    """One GET on an open connection."""
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response, response.read()


class TestChaos:
    @pytest.fixture
    def proxy(self, nginx: NginxServer, chaos: Callable[[str], ChaosProxy]) -> ChaosProxy:
        (nginx.files / "chaos.bin").write_bytes(BODY)
        return chaos(nginx.url)

    @pytest.fixture
    def connection(self, proxy: ChaosProxy) -> Iterator[http.client.HTTPConnection]:
        connection = connect(proxy.url)
        yield connection
        connection.close()

    @pytest.fixture
    def head_bytes(self, nginx: NginxServer, connection: http.client.HTTPConnection, proxy: ChaosProxy) -> int:
        """Length of nginx's response head for the file, measured; the connection stays open."""
        before = proxy.stats().down_bytes
        assert get(connection, "/chaos.bin")[1] == BODY
        return proxy.stats().down_bytes - before - len(BODY)

    def test_fair_weather_changes_nothing(self, proxy: ChaosProxy, connection: http.client.HTTPConnection) -> None:
        assert get(connection, "/chaos.bin", Range="bytes=250-252")[1] == b"\xfa\x00\x01"
        stats = proxy.stats()
        assert (stats.connections, stats.open, stats.faults) == (1, 1, 0)

    def test_rtt_is_added(self, proxy: ChaosProxy, connection: http.client.HTTPConnection) -> None:
        proxy.set(rtt_ms=60)
        start_s = time.monotonic()
        get(connection, "/chaos.bin")
        first_s = time.monotonic() - start_s
        get(connection, "/chaos.bin")
        second_s = time.monotonic() - start_s - first_s
        # Lower bounds only: they hold on a loaded machine. The first request pays for the handshake too.
        assert first_s >= 0.118
        assert second_s >= 0.059

    def test_rate_is_capped(self, proxy: ChaosProxy, connection: http.client.HTTPConnection) -> None:
        proxy.set(rate_mb_s=1)
        start_s = time.monotonic()
        assert get(connection, "/chaos.bin")[1] == BODY
        assert time.monotonic() - start_s >= 0.09

    def test_window_over_rtt_caps_too(self, proxy: ChaosProxy, connection: http.client.HTTPConnection) -> None:
        proxy.set(rtt_ms=20, window_kib=25)
        start_s = time.monotonic()
        assert get(connection, "/chaos.bin")[1] == BODY
        assert time.monotonic() - start_s >= 0.095  # handshake, then four windows

    def test_corrupts_one_byte_of_each_answer(
        self, proxy: ChaosProxy, connection: http.client.HTTPConnection, head_bytes: int
    ) -> None:
        proxy.set(corrupt_after_bytes=head_bytes + 1000, faults_count=2)
        wrong = BODY[:1000] + bytes([BODY[1000] ^ 0xFF]) + BODY[1001:]
        assert [get(connection, "/chaos.bin")[1] for _ in range(3)] == [wrong, wrong, BODY]
        assert proxy.stats().faults == 2

    def test_truncates(self, proxy: ChaosProxy, connection: http.client.HTTPConnection, head_bytes: int) -> None:
        proxy.set(truncate_after_bytes=head_bytes + 1000)
        with pytest.raises(http.client.IncompleteRead) as caught:
            get(connection, "/chaos.bin")
        assert caught.value.partial == BODY[:1000]

    def test_resets(self, proxy: ChaosProxy, connection: http.client.HTTPConnection, head_bytes: int) -> None:
        proxy.set(reset_after_bytes=head_bytes + 1000, faults_count=1)
        with pytest.raises(ConnectionResetError):
            get(connection, "/chaos.bin")
        connection.close()
        assert get(connection, "/chaos.bin")[1] == BODY

    def test_stalls_until_cleared(
        self, proxy: ChaosProxy, connection: http.client.HTTPConnection, head_bytes: int
    ) -> None:
        proxy.set(stall_after_bytes=head_bytes + 1000)
        connection.request("GET", "/chaos.bin")
        response = connection.getresponse()
        assert response.read(1000) == BODY[:1000]
        connection.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.sock.recv(1)
        connection.sock.settimeout(20)
        proxy.clear()
        rest = b""
        while len(rest) < len(BODY) - 1000:
            rest += connection.sock.recv(1 << 16)
        assert rest == BODY[1000:]

    def test_refuses(self, proxy: ChaosProxy, connection: http.client.HTTPConnection) -> None:
        proxy.set(refuse=True, faults_count=1)
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            get(connection, "/chaos.bin")
        connection.close()
        assert get(connection, "/chaos.bin")[1] == BODY
        connection.close()
        proxy.stop()
        with pytest.raises(ConnectionRefusedError):
            get(connection, "/chaos.bin")
        connection.close()
        proxy.start()
        assert get(connection, "/chaos.bin")[1] == BODY


class TestHonestFolder:
    """What holds for nginx holds for the liar while it tells the truth."""

    @pytest.fixture(params=["nginx", "liar"])
    def folder(self, request: pytest.FixtureRequest, nginx: NginxServer) -> NginxServer | LiarServer:
        server: NginxServer | LiarServer = nginx if request.param == "nginx" else request.getfixturevalue("liar")
        (server.files / "truth" / "sub").mkdir(parents=True, exist_ok=True)
        (server.files / "truth" / "a b ü%.bin").write_bytes(BODY)
        server.forget_requests()
        return server

    @pytest.fixture
    def connection(self, folder: NginxServer | LiarServer) -> Iterator[http.client.HTTPConnection]:
        connection = connect(folder.url)
        yield connection
        connection.close()

    def test_listing(self, connection: http.client.HTTPConnection) -> None:
        response, body = get(connection, "/truth/")
        assert (response.status, response.headers.get_content_type()) == (200, "application/json")
        listed = {entry["name"]: (entry["type"], entry.get("size")) for entry in json.loads(body)}
        assert listed == {"sub": ("directory", None), "a b ü%.bin": ("file", len(BODY))}
        for entry in json.loads(body):
            assert email.utils.parsedate_to_datetime(entry["mtime"]).year >= 2024
        response, _ = get(connection, "/truth")
        assert response.status == 301
        assert response.headers["Location"].endswith("/truth/")

    def test_files(self, connection: http.client.HTTPConnection, folder: NginxServer | LiarServer) -> None:
        path = "/truth/" + urllib.parse.quote("a b ü%.bin")
        whole, body = get(connection, path)
        assert (whole.status, body) == (200, BODY)
        etag = whole.headers["ETag"]
        for asked, start, stop in [("250-252", 250, 253), ("99999-", 99_999, 100_000), ("-3", 99_997, 100_000)]:
            response, body = get(connection, path, Range=f"bytes={asked}", If_Match=etag)
            assert (response.status, body) == (206, BODY[start:stop])
            assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/100000"
            assert response.headers["ETag"] == etag
        assert get(connection, path, Range="bytes=99990-200000")[1] == BODY[99_990:]
        response, _ = get(connection, path, Range="bytes=100000-")
        assert (response.status, response.headers["Content-Range"]) == (416, "bytes */100000")
        assert get(connection, path, If_Match='"0"')[0].status == 412
        connection.close()  # nginx 1.22 says keep-alive on a 412 and hangs up all the same
        assert get(connection, "/truth/missing")[0].status == 404
        connection.request("HEAD", path)
        response = connection.getresponse()
        assert (response.read(), response.headers["Content-Length"]) == (b"", "100000")
        assert [r.range for r in folder.requests("/truth/a b ü%.bin")][:2] == ["", "bytes=250-252"]


class TestLies:
    PATH = "/lies.bin"
    ASKED = "bytes=1000-1999"
    PART = BODY[1000:2000]

    @pytest.fixture
    def connection(self, liar: LiarServer) -> Iterator[http.client.HTTPConnection]:
        (liar.files / "lies.bin").write_bytes(BODY)
        connection = connect(liar.url)
        yield connection
        connection.close()

    def ask(self, connection: http.client.HTTPConnection) -> tuple[http.client.HTTPResponse, bytes]:
        return get(connection, self.PATH, Range=self.ASKED)

    @pytest.mark.parametrize(
        ("lie", "status", "content_range", "body"),
        [
            (Lie.SHORT_LENGTH, 206, "bytes 1000-1999/100000", PART[:990]),
            (Lie.NO_LENGTH, 206, "bytes 1000-1999/100000", PART[:7]),
            (Lie.OTHER_RANGE, 206, "bytes 1001-2000/100000", BODY[1001:2001]),
            (Lie.SHORT_RANGE, 206, "bytes 1000-1499/100000", PART[:500]),
            (Lie.OTHER_TOTAL, 206, "bytes 1000-1999/100001", PART),
            (Lie.NO_CONTENT_RANGE, 206, None, PART),
            (Lie.IGNORES_RANGE, 200, None, BODY),
            (Lie.WRONG_BYTES, 206, "bytes 1000-1999/100000", PART[:7] + bytes([PART[7] ^ 0xFF]) + PART[8:]),
            (Lie.IGNORES_IF_MATCH, 206, "bytes 1000-1999/100000", bytes(byte ^ 0xFF for byte in PART)),
            (Lie.SHRUNK, 206, "bytes 1000-1999/50000", PART),
            (Lie.GROWN, 206, "bytes 1000-1999/200000", PART),
        ],
    )
    def test_answers(
        self,
        liar: LiarServer,
        connection: http.client.HTTPConnection,
        lie: Lie,
        status: int,
        content_range: str | None,
        body: bytes,
    ) -> None:
        etag = self.ask(connection)[0].headers["ETag"]
        liar.lie(lie, after_bytes=7)
        response, got = get(connection, self.PATH, Range=self.ASKED, If_Match=etag)
        assert (response.status, response.headers["Content-Range"], got) == (status, content_range, body)
        assert response.headers["ETag"] == etag
        assert liar.lies_told() == 1

    @pytest.mark.parametrize(("lie", "arrives"), [(Lie.LONG_LENGTH, PART), (Lie.TRUNCATED, PART[:7])])
    def test_bodies_that_end_early(
        self, liar: LiarServer, connection: http.client.HTTPConnection, lie: Lie, arrives: bytes
    ) -> None:
        liar.lie(lie, after_bytes=7)
        with pytest.raises(http.client.IncompleteRead) as caught:
            self.ask(connection)
        assert caught.value.partial == arrives

    def test_versions(self, liar: LiarServer, connection: http.client.HTTPConnection) -> None:
        etag = self.ask(connection)[0].headers["ETag"]
        liar.lie(Lie.NEW_ETAGS)
        first = get(connection, self.PATH, If_Match=etag)[0].headers["ETag"]
        assert len({etag, first, self.ask(connection)[0].headers["ETag"]}) == 3
        liar.lie(Lie.CHANGED)
        assert get(connection, self.PATH, If_Match=etag)[0].status == 412
        assert self.ask(connection)[0].headers["ETag"] == '"changed"'
        liar.lie(Lie.NO_ETAG)
        assert self.ask(connection)[0].headers["ETag"] is None

    def test_lies_are_counted_and_aimed(self, liar: LiarServer, connection: http.client.HTTPConnection) -> None:
        liar.lie(Lie.STATUS, status=429, retry_after_s=3, count=1, pattern="*.bin")
        assert get(connection, "/")[0].status == 200
        response, _ = self.ask(connection)
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        assert self.ask(connection)[1] == self.PART
        assert liar.lies_told() == 1

    def test_listings_can_be_anything(self, liar: LiarServer, connection: http.client.HTTPConnection) -> None:
        liar.set_listing("/", '[{"name": "../evil", "type": "file"')
        assert get(connection, "/")[1] == b'[{"name": "../evil", "type": "file"'
        liar.set_listing("/", None)
        assert json.loads(get(connection, "/")[1])[0]["name"] == "lies.bin"

    @pytest.mark.parametrize(
        ("lie", "error"),
        [
            (Lie.HANG_UP, http.client.RemoteDisconnected),
            (Lie.NOT_HTTP, http.client.BadStatusLine),
            (Lie.ENDLESS_HEADERS, http.client.HTTPException),
        ],
    )
    def test_no_http(
        self, liar: LiarServer, connection: http.client.HTTPConnection, lie: Lie, error: type[Exception]
    ) -> None:
        liar.lie(lie)
        with pytest.raises(error):
            self.ask(connection)

    @pytest.mark.parametrize("lie", [Lie.SILENCE, Lie.DRIP])
    def test_slow_ones_end_with_the_lie(
        self, liar: LiarServer, connection: http.client.HTTPConnection, lie: Lie
    ) -> None:
        liar.lie(lie, interval_s=3600)
        connection.request("GET", self.PATH, headers={"Range": self.ASKED})
        liar.wait_for_request(self.PATH)
        connection.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            _ = connection.getresponse().read()
        liar.tell_truth()
