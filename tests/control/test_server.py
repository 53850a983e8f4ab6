"""The control server against clients that are slow, hostile, someone else, or gone."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from mfs.control import wire
from mfs.control.api import Json, Tier
from mfs.control.client import Client
from mfs.control.connecting import connect
from mfs.control.http import Limits
from mfs.control.server import ServerConfig, serve
from mfs.errors import (
    AccessError,
    ConfigError,
    IntegrityError,
    MfsError,
    StoreError,
    TransientStoreError,
    UsageError,
    from_wire,
)
from mfs.testing.fake_daemon import FakeDaemon, FakeFile
from tests.control.serving import ServerThread, serving

FILE = "a/model.safetensors"
MEBIBYTE_CHUNK = b"100000\r\n%b\r\n" % (b" " * (1 << 20))


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon({FILE: FakeFile(10)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture
def server(daemon: FakeDaemon, path: Path) -> Iterator[ServerThread]:
    with serving(daemon, path) as thread:
        yield thread


def talk(path: Path, data: bytes) -> bytes:
    """Send raw bytes and return all that comes back until the server closes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(data)
        return drain(sock)


def drain(sock: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            data = sock.recv(65536)
        except ConnectionResetError:  # it closed with bytes of ours unread, which it may
            return received
        if not data:
            return received
        received += data


def get(name: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET /v1/{name} HTTP/1.1", "Host: mfs", *headers, "", ""]).encode()


def test_socket_is_private_and_goes_away(daemon: FakeDaemon, path: Path) -> None:
    with serving(daemon, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert list(path.parent.iterdir()) == [path]
    assert not path.exists()


def test_socket_mode_can_be_opened_to_readers(daemon: FakeDaemon, path: Path) -> None:
    with serving(daemon, path, ServerConfig(socket_mode=0o666)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_a_dead_socket_is_replaced(daemon: FakeDaemon, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(StoreError, match="no mfs daemon listens"):
        Client(path).status()
    with serving(daemon, path):
        assert Client(path).status()["pid"] == os.getpid()


async def test_a_socket_that_cannot_be_made_is_a_config_error(daemon: FakeDaemon, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be made"):
        await serve(daemon, tmp_path / "no" / "such" / "directory.sock")


def test_requests_share_a_connection_also_pipelined(server: ServerThread, path: Path) -> None:
    answer = talk(path, get("status") + get("ls?path=a") + get("nothing", "Connection: close"))
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.count(b"HTTP/1.1 404") == 1


def test_curl_sees_plain_http(server: ServerThread, path: Path) -> None:
    command = ["curl", "-sS", "--unix-socket", str(path), f"http://mfs/v1/stat?path={FILE}"]
    answer = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(answer.stdout)["size"] == 10


def test_head_has_no_body(server: ServerThread, path: Path) -> None:
    answer = talk(path, get("status", "Connection: close").replace(b"GET", b"HEAD"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01 this is not HTTP\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nHost: mfs\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\nHost: mfs\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"POST /v1/pin HTTP/1.1\r\nHost: mfs\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/pin HTTP/1.1\r\nHost: mfs\r\nContent-Length: 3\r\nConnection: close\r\n\r\n{]}",
        b"POST /v1/pin HTTP/1.1\r\nHost: mfs\r\nContent-Length: 2\r\nConnection: close\r\n\r\n[]",
        b"POST /v1/pin HTTP/1.1\r\nHost: mfs\r\nTransfer-Encoding: chunked\r\n\r\n" + MEBIBYTE_CHUNK * 6,
        get("pin", "Connection: close"),
        get("ls?path=a&path2=b", "Connection: close"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(server: ServerThread, path: Path, request_bytes: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        try:
            sock.sendall(request_bytes)
        except (BrokenPipeError, ConnectionResetError):  # refused before it was all sent
            pass
        answer = drain(sock)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "UsageError"
    assert Client(path).status()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("prefetch", {"paths": [FILE], "tier": "vram"}),
        ("prefetch", {"paths": [FILE], "wait": 1}),
        ("prefetch", {"paths": []}),
        ("prefetch", {"paths": FILE}),
        ("prefetch", {"paths": [3]}),
        ("evict", {}),
        ("refresh", {"path": "a"}),
    ],
)
def test_bad_arguments_are_named(server: ServerThread, path: Path, name: str, body: Json) -> None:
    text = json.dumps(body)
    head = f"POST /v1/{name} HTTP/1.1\r\nHost: mfs\r\nConnection: close\r\nContent-Length: {len(text)}\r\n\r\n"
    answer = talk(path, (head + text).encode())
    assert answer.startswith(b"HTTP/1.1 400")


def test_slow_clients_are_dropped(daemon: FakeDaemon, path: Path) -> None:
    """Each client stops at another point; the server ends every wait by itself."""
    config = ServerConfig(limits=Limits(idle_s=0.05, request_s=0.05, send_s=0.05))
    with serving(daemon, path, config):
        assert talk(path, b"") == b""
        assert talk(path, b"GET /v1/sta").startswith(b"HTTP/1.1 400")
        body_never_comes = b"POST /v1/pin HTTP/1.1\r\nHost: mfs\r\nContent-Length: 9\r\n\r\n{"
        assert talk(path, body_never_comes).startswith(b"HTTP/1.1 400")
        assert Client(path).status()


class EndlessDaemon(FakeDaemon):
    """Streams for as long as somebody listens, and tells when nobody does any more."""

    def __init__(self) -> None:
        super().__init__({})
        self.ended = trio.Event()
        self.fault: Exception | None = None

    async def prefetch(self, paths: Sequence[str], tier: Tier, *, wait: bool) -> AsyncIterator[Json]:
        try:
            while True:
                yield {"padding": "x" * 10_000}
                await trio.lowlevel.checkpoint()
                if self.fault:
                    raise self.fault
        finally:
            self.ended.set()

    async def refresh(self) -> Json:
        try:
            await trio.sleep_forever()
        finally:
            self.ended.set()
        raise AssertionError


def test_a_client_that_stops_reading_is_dropped(path: Path) -> None:
    daemon = EndlessDaemon()
    body = b'{"paths":["a"]}'
    with (
        serving(daemon, path, ServerConfig(limits=Limits(send_s=0.05))) as server,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.connect(str(path))
        sock.sendall(b"POST /v1/prefetch HTTP/1.1\r\nHost: mfs\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        server.wait(daemon.ended)


def test_a_client_that_goes_cancels_a_stream(daemon: FakeDaemon, path: Path, server: ServerThread) -> None:
    daemon.blocked.add(FILE)
    updates = Client(path).prefetch([""], "ssd", wait=True)
    assert next(updates)["total_bytes"] == 10
    updates.close()  # type: ignore[attr-defined]
    server.wait(daemon.cancelled)


def test_a_client_that_goes_cancels_a_single_answer(path: Path) -> None:
    daemon = EndlessDaemon()
    with serving(daemon, path) as server:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"POST /v1/refresh HTTP/1.1\r\nHost: mfs\r\nContent-Length: 0\r\n\r\n")
        server.wait(daemon.ended)


def test_a_killed_client_cancels_its_work(daemon: FakeDaemon, path: Path, server: ServerThread) -> None:
    daemon.blocked.add(FILE)
    program = (
        "import sys, mfs.control.client as c, pathlib\n"
        "for update in c.Client(pathlib.Path(sys.argv[1])).prefetch([''], 'ssd', wait=True): print(update, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        client.stdout.readline()
        client.kill()
        server.wait(daemon.cancelled)


def test_an_operation_without_end_is_given_up(path: Path) -> None:
    with (
        serving(EndlessDaemon(), path, ServerConfig(operation_s=0.05)),
        pytest.raises(TransientStoreError, match="gave up"),
    ):
        Client(path).refresh()


def test_a_silent_stream_shows_signs_of_life(daemon: FakeDaemon, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.01)
    daemon.blocked.add(FILE)
    body = b'{"paths":[""]}'
    with serving(daemon, path), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"POST /v1/prefetch HTTP/1.1\r\nHost: mfs\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        received = b""
        while received.count(b"1\r\n\n\r\n") < 3:  # three chunks of one newline
            received += sock.recv(65536)


def test_an_error_in_the_middle_of_a_stream_arrives_as_itself(path: Path) -> None:
    daemon = EndlessDaemon()
    daemon.fault = IntegrityError("chunk 3 is\nnot what it was")
    with serving(daemon, path):
        updates = Client(path).prefetch(["a"], "ssd", wait=True)
        assert "padding" in next(updates)
        with pytest.raises(IntegrityError, match="chunk 3 is not what it was"):
            next(updates)


def test_a_defect_in_the_daemon_is_logged_and_answered(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    daemon = EndlessDaemon()
    daemon.fault = ZeroDivisionError("oops")
    with serving(daemon, path), pytest.raises(StoreError, match=r"internal error.*oops"):
        list(Client(path).prefetch(["a"], "ssd", wait=True))
    assert "ZeroDivisionError" in caplog.text


def test_connections_are_bounded(daemon: FakeDaemon, path: Path) -> None:
    with serving(daemon, path, ServerConfig(connections_max=2, patience_s=0.1)):
        held = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for sock in held:
            sock.connect(str(path))
            sock.sendall(get("status"))
            assert sock.recv(15).startswith(b"HTTP/1.1 200")
        with pytest.raises(TransientStoreError, match="2 control connections are open"):
            Client(path).status()
        with pytest.raises(TransientStoreError, match="2 control connections are open"):
            list(Client(path).verify(["a"] * 10_000))
        for sock in held:
            sock.close()


def test_who_finds_all_places_taken_waits_for_one(daemon: FakeDaemon, path: Path) -> None:
    with serving(daemon, path, ServerConfig(connections_max=1)), socket.socket(socket.AF_UNIX) as held:
        held.connect(str(path))
        held.sendall(get("status"))
        assert held.recv(15).startswith(b"HTTP/1.1 200")
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(Client(path).status)
            held.close()
            assert asked.result()


def test_hundreds_of_clients_at_once_are_all_answered(daemon: FakeDaemon, path: Path) -> None:
    patient = ServerConfig(patience_s=120, limits=Limits(request_s=120))
    with serving(daemon, path, patient), ThreadPoolExecutor(300) as threads:
        begin = threading.Barrier(300)

        def ask(_: int) -> Json:
            begin.wait()
            return Client(path, timeout_s=120).status()

        assert len(list(threads.map(ask, range(300)))) == 300


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_full_queue_is_waited_for_and_its_end_is_no_missing_daemon(path: Path, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as listener, ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        first, second, third = (stack.enter_context(socket.socket(socket.AF_UNIX, kind)) for _ in range(3))
        connect(first, path, 30)
        with pytest.raises(TimeoutError, match="too many others wait to be let in"):
            connect(second, path, 0.05)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(connect, third, path, 60)
            listener.accept()[0].close()
            waiting.result()
        assert third.gettimeout() == 60
    with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX, kind) as late:
        connect(late, path, 1)


def test_a_client_that_is_not_let_in_says_so(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        connect(first, path, 30)
        with pytest.raises(TransientStoreError, match="does not answer: too many others wait"):
            Client(path, timeout_s=0.05).status()


@pytest.mark.parametrize("depth", [17, 320, 900, 960, 980, 990, 1000, 100_000])
@pytest.mark.parametrize("form", ["[%s]", '{"paths":%s}', '{"a":%s}', '{"tier":%s,"paths":["a"]}'])
def test_json_nested_beyond_reason_is_one_line(path: Path, depth: int, form: str, caplog: Any) -> None:
    body = (form % ("[" * depth + "]" * depth)).encode()
    head = f"POST /v1/prefetch HTTP/1.1\r\nHost: mfs\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving(FakeDaemon({}), path):
        answer = talk(path, head.encode() + body)
    assert answer.startswith(b"HTTP/1.1 400")
    assert len(answer) < 1000
    assert not caplog.records


def test_a_path_that_is_no_text_is_refused(server: ServerThread, path: Path) -> None:
    with pytest.raises(UsageError, match="no text a file system could hold"):
        Client(path).pin(["a/\ud800"])


def test_shutdown_is_answered_although_it_ends_the_server(tmp_path: Path) -> None:
    class Mortal(FakeDaemon):
        async def shutdown(self) -> Json:
            server.cancel_nowait()
            return await super().shutdown()

    with serving(Mortal({}), tmp_path / "s.sock") as server:
        assert Client(tmp_path / "s.sock").shutdown() == {"pid": os.getpid()}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_others_may_read_but_not_change(daemon: FakeDaemon) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mfs-test-") as folder:  # tmp_path is closed to other users
        Path(folder).chmod(0o755)
        path = Path(folder) / "s.sock"
        with serving(daemon, path, ServerConfig(socket_mode=0o666)):
            assert as_nobody(path, "status") is None
            for change in ("pin", "evict", "refresh", "shutdown", "prefetch", "verify", "watch"):
                error = as_nobody(path, change)
                assert isinstance(error, AccessError), change
                assert f"uid 65534 may not {change}" in str(error)
        with serving(daemon, path):
            assert isinstance(as_nobody(path, "status"), AccessError)


def as_nobody(path: Path, name: str) -> MfsError | None:
    """The error a request of uid 65534 gets. Raw HTTP: our own files may not be readable for nobody."""

    operation = wire.OPERATIONS[name]
    body = b"" if operation.method == "GET" else b'{"paths":[""]}' if operation.takes_paths else b"{}"
    program = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "try: s.connect(sys.argv[1])\n"
        "except PermissionError: print('refused'); sys.exit()\n"
        "s.sendall(sys.stdin.buffer.read())\n"
        "print(s.makefile('rb').read().decode())\n"
    )
    headers = f"Host: mfs\r\nConnection: close\r\nContent-Length: {len(body)}"
    request = f"{operation.method} /v1/{name} HTTP/1.1\r\n{headers}\r\n\r\n"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], input=request.encode() + body, capture_output=True, check=True
    )
    answer = done.stdout.decode()
    if answer.strip() == "refused":
        return AccessError("refused")
    value = json.loads(answer.partition("\r\n\r\n")[2])
    return from_wire(value["error"]["type"], value["error"]["message"]) if "error" in value else None
