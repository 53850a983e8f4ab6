"""The servers that misbehave on purpose do so exactly as told, and behave well when told nothing."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator

import pytest

from tests.servers.chaos import ChaosProxy
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
