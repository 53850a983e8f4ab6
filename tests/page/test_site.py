"""The page's door against whoever may knock: other sites' pages, other users' programs, names that lead here."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from mfs.control.api import Json
from mfs.control.http import Limits
from mfs.control.server import ServerConfig
from mfs.errors import AccessError, ConfigError, NotFoundError
from mfs.page import gpus, site, where
from mfs.testing.fake_daemon import FakeDaemon, example_files

CONTROLS = ["prefetch", "pin", "unpin", "evict", "refresh"]
PATHS = json.dumps({"paths": ["llama"]})


class LoadedDaemon(FakeDaemon):
    """A daemon that has seen loads."""

    async def loads(self, path: str) -> Json:
        loads = [{"model": f"m{n}", "began_at": float(n), "seconds": 1.0, "phases": {"open": 1.0}} for n in (1, 3, 2)]
        return {"loads": loads}

    async def latest_load(self, path: str, number: int) -> Json:
        loads = sorted((await self.loads(path))["loads"], key=lambda load: load["began_at"], reverse=True)
        return {"count": len(loads), "load": loads[number] if number < len(loads) else None}


class Door:
    """A site that is served, as a client of it knows it."""

    def __init__(self, address: tuple[str, int], token: str, socket_path: Path) -> None:
        self.address = address
        self.token = token
        self.socket_path = socket_path
        self.host = f"127.0.0.1:{address[1]}"

    def talk(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send raw bytes and a wish to close; (status, headers, body) of the answer."""
        with socket.create_connection(self.address, 20) as sock:
            sock.sendall(data)
            received = b""
            while part := _received(sock):
                received += part
        head, _, body = received.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        return int(lines[0].split()[1]), {name.lower(): value for name, value in headers.items()}, body

    def ask(
        self, target: str, body: str | None = None, *, method: str = "", token: str | None = "", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One request, with the right token and Host unless said otherwise. token: None sends none."""
        sent = {"Host": self.host, "Connection": "close"}
        if token is not None:
            sent["Authorization"] = f"Bearer {token or self.token}"
        if body is not None:
            sent["Content-Length"] = str(len(body))
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method or ('GET' if body is None else 'POST')} {target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in sent.items()]
        return self.talk("\r\n".join([*lines, "", body or ""]).encode())

    def error(self, *args: Any, **options: Any) -> tuple[int, str]:
        status, _, body = self.ask(*args, **options)
        return status, json.loads(body)["error"]["message"]


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionResetError:  # it closed with bytes of ours unread, which it may
        return b""


@contextmanager
def served(
    daemon: FakeDaemon, folder: Path, address: tuple[str, int] = ("127.0.0.1", 0), *,
    config: ServerConfig = site.CONFIG, on_fault: Callable[[str], None] = lambda fault: None, stays: bool = False,
) -> Iterator[Path]:  # fmt: skip
    """Serve `daemon` in a thread of its own; yields the control socket's path, beside which the address stands."""
    socket_path, ready, ends = folder / "0123456789abcdef.sock", threading.Event(), list[Callable[[], None]]()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            token = trio.lowlevel.current_trio_token()
            ends.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))

            async def serve(*, task_status: trio.TaskStatus[None]) -> None:
                await site.serve(daemon, address, socket_path, lambda: stays, on_fault, config=config,
                                 task_status=task_status)  # fmt: skip

            await nursery.start(serve)
            ready.set()

    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()
    assert ready.wait(20)
    try:
        yield socket_path
    finally:
        ends[0]()
        thread.join()


def known(socket_path: Path) -> Door:
    said = json.loads(where.page_file(socket_path).read_text())
    return Door(("127.0.0.1", int(said["url"].rstrip("/").rpartition(":")[2])), said["token"], socket_path)


@pytest.fixture
def daemon() -> FakeDaemon:
    return LoadedDaemon(example_files())


@pytest.fixture
def door(daemon: FakeDaemon, tmp_path: Path) -> Iterator[Door]:
    with served(daemon, tmp_path) as socket_path:
        yield known(socket_path)


class TestWhoIsLetIn:
    @pytest.mark.parametrize("token", [None, "wrong", "x" * 4000, "Bearer"])
    @pytest.mark.parametrize(
        "target", ["/v1/overview", "/v1/heat?path=", "/v1/loads", "/timeline", "/gpus", "/v1/nothing"]
    )
    def test_nothing_is_told_without_the_token(self, door: Door, target: str, token: str | None) -> None:
        status, said = door.error(target, token=token)
        assert status == 403
        assert "mfs page" in said

    @pytest.mark.parametrize("operation", CONTROLS)
    def test_nothing_is_done_without_the_token(self, daemon: FakeDaemon, door: Door, operation: str) -> None:
        before = {path: (file.ssd_bytes, file.ram_bytes, file.pinned) for path, file in daemon.files.items()}
        for token in (None, "wrong", door.token[:-1], door.token.lower()):
            assert door.error(f"/v1/{operation}", PATHS if operation != "refresh" else "{}", token=token)[0] == 403
        assert {path: (file.ssd_bytes, file.ram_bytes, file.pinned) for path, file in daemon.files.items()} == before

    def test_with_the_token_it_is(self, daemon: FakeDaemon, door: Door) -> None:
        assert door.ask("/v1/pin", PATHS)[0] == 200
        assert daemon.files["llama/config.json"].pinned
        status, _, body = door.ask("/v1/overview?sort=ssd&match=LLA&count=5")
        assert status == 200
        assert [row["path"] for row in json.loads(body)["models"]["rows"]] == ["llama"]

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil:1", "", "a@127.0.0.1:b", "[::1"],
    )
    @pytest.mark.parametrize("target", ["/", "/page.js", "/v1/status"])
    def test_a_name_that_leads_here_is_refused(self, door: Door, target: str, host: str) -> None:
        assert door.error(target, Host=host)[0] == 403

    @pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1", "[::1]:8", "LOCALHOST"])
    def test_this_machine_by_any_port_may_be_meant(self, door: Door, host: str) -> None:
        assert door.ask("/v1/status", Host=host)[0] == 200  # ssh -L

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"])
    def test_another_origin_is_refused_token_or_not(self, daemon: FakeDaemon, door: Door, origin: str) -> None:
        assert door.error("/v1/pin", PATHS, Origin=origin)[0] == 403
        assert not daemon.files["llama/config.json"].pinned

    def test_the_page_itself_is_not(self, door: Door) -> None:
        assert door.ask("/v1/pin", PATHS, Origin=f"http://{door.host}", Sec_Fetch_Site="same-origin")[0] == 200
        assert door.error("/v1/pin", PATHS, Sec_Fetch_Site="cross-site")[0] == 403
        assert door.error("/v1/pin", PATHS, Sec_Fetch_Site="same-site")[0] == 403

    @pytest.mark.parametrize("doubled", ["Host", "Authorization", "Origin"])
    def test_a_header_that_is_there_twice_is_no_header(self, daemon: FakeDaemon, door: Door, doubled: str) -> None:
        values = {"Host": door.host, "Authorization": f"Bearer {door.token}", "Origin": f"http://{door.host}"}
        lines = [f"{name}: {value}" for name, value in values.items()] + [f"{doubled}: {values[doubled]}"]
        head = "\r\n".join(["POST /v1/pin HTTP/1.1", *lines, f"Content-Length: {len(PATHS)}", "Connection: close"])
        assert door.talk(f"{head}\r\n\r\n{PATHS}".encode())[0] == 400
        assert not daemon.files["llama/config.json"].pinned

    def test_nobody_is_told_that_other_sites_may_ask(self, door: Door) -> None:
        status, headers, _ = door.ask("/v1/pin", method="OPTIONS", token=None, Origin="http://evil.example")
        assert status == 403
        assert not [name for name in headers if name.startswith("access-control")]

    @pytest.mark.parametrize("operation", ["shutdown", "watch", "verify", "config", "stat", "ls"])
    def test_what_is_for_the_shell_stays_there(self, daemon: FakeDaemon, door: Door, operation: str) -> None:
        method, body = ("GET", None) if operation in ("config", "stat", "ls") else ("POST", "{}")
        assert door.error(f"/v1/{operation}", body, method=method)[0] == 403
        assert not daemon.stopped.is_set()

    def test_a_get_changes_nothing(self, daemon: FakeDaemon, door: Door) -> None:
        assert door.error("/v1/refresh")[0] == 400
        assert door.error("/", "x")[0] == 400


class TestWhatIsServed:
    @pytest.mark.parametrize("target", sorted([*site._FILES, "/timeline.css"]))
    def test_every_file_of_the_page_is_there_for_anybody(self, door: Door, target: str) -> None:
        status, headers, body = door.ask(target, token=None)
        assert (status, len(body) > 0) == (200, True)
        assert "'unsafe" not in headers["content-security-policy"]
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-type"].split("/")[0] in ("text", "image")

    def test_the_page_names_nothing_from_elsewhere(self) -> None:
        folder = Path(site.__file__).parent / "assets"
        for file in folder.rglob("*"):
            if file.is_file() and file.suffix in (".html", ".css", ".js") and "vendor" not in file.parts:
                assert "http://" not in file.read_text(), file
                assert "https://" not in file.read_text(), file
        html = (folder / "index.html").read_text()
        assert "<script>" not in html
        assert " style=" not in html
        assert " on" not in html.replace(" only", "")

    def test_the_libraries_are_those_that_are_named(self) -> None:
        folder = Path(site.__file__).parent / "assets/vendor"
        named = dict(re.findall(r"\| `([a-z-]+\.(?:js|css))` .*`([0-9a-f]{64})`", (folder / "README.md").read_text()))
        found = {file.name: file for file in folder.iterdir() if file.suffix in (".js", ".css")}
        assert named == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in found.items()}

    @pytest.mark.parametrize(
        "target",
        ["/../site.py", "/vendor/../../site.py", "/%2e%2e/site.py", "//etc/passwd", "/assets/page.js", "/page.js/",
         "/vendor/", "/vendor/..%2f..%2fsite.py", "/page.js%00", "/.", "*"],
    )  # fmt: skip
    def test_there_is_nothing_else(self, door: Door, target: str) -> None:
        status, _, body = door.ask(target)
        assert status in (400, 404)
        assert b"def " not in body

    def test_the_last_load_as_a_drawing(self, door: Door) -> None:
        for number, model in enumerate(["m3", "m2", "m1"]):
            found = json.loads(door.ask(f"/timeline?number={number}")[2])
            assert found["count"] == 3
            assert f">{model}: 1.00 s" in found["svg"]
        assert json.loads(door.ask("/timeline?number=3")[2]) == {"count": 3, "svg": None}
        assert door.error("/timeline?number=-1")[0] == 400
        assert door.error("/timeline?path=../x")[0] == 400

    def test_a_daemon_that_knows_no_loads(self, tmp_path: Path) -> None:
        with served(FakeDaemon(example_files()), tmp_path) as socket_path:
            assert json.loads(known(socket_path).ask("/timeline")[2]) == {"count": 0, "svg": None}


class TestBounds:
    def test_long_bodies_and_headers_are_refused(self, door: Door) -> None:
        assert door.ask("/v1/pin", json.dumps({"paths": ["x" * 100_000]}))[0] == 400
        assert door.ask("/v1/status", Cookie="x" * 60_000)[0] == 400
        assert door.ask("/v1/overview?match=" + "x" * 300)[0] == 400
        assert door.ask("/v1/overview?count=1000000")[0] == 400
        assert door.ask("/v1/overview?count=-1")[0] == 400
        assert door.ask("/v1/overview?sort=evil")[0] == 400

    def test_who_is_slow_is_dropped_and_others_are_served_meanwhile(self, daemon: FakeDaemon, tmp_path: Path) -> None:
        config = ServerConfig(connections_max=4, patience_s=30.0, limits=Limits(idle_s=0.5, request_s=0.5))
        with served(daemon, tmp_path, config=config) as socket_path, ExitStack() as stack:
            door = known(socket_path)
            slow = [stack.enter_context(socket.create_connection(door.address, 20)) for _ in range(4)]
            for sock in slow:
                sock.sendall(b"GET /v1/status HTTP/1.1\r\nHost: ")
            assert door.ask("/v1/status")[0] == 200  # as soon as the places are free again
            assert all(b"400" in sock.recv(100) for sock in slow)

    def test_all_places_taken_is_said(self, daemon: FakeDaemon, tmp_path: Path) -> None:
        config = ServerConfig(connections_max=1, patience_s=0.05)
        with served(daemon, tmp_path, config=config) as socket_path, ExitStack() as stack:
            door = known(socket_path)
            stack.enter_context(socket.create_connection(door.address, 20))
            until = time.monotonic() + 20
            while door.ask("/")[0] != 503:
                assert time.monotonic() < until


class TestWhereItIs:
    def test_the_token_is_for_its_owner_alone(self, door: Door) -> None:
        file = where.page_file(door.socket_path)
        assert file.stat().st_mode & 0o777 == 0o600
        assert len(door.token) >= 40
        assert where.page_url(door.socket_path) == f"http://127.0.0.1:{door.address[1]}/#token={door.token}"
        file.chmod(0o644)
        with pytest.raises(AccessError, match="mode 0644"):
            where.page_url(door.socket_path)

    def test_the_next_daemon_goes_on_with_it(self, daemon: FakeDaemon, tmp_path: Path) -> None:
        with served(daemon, tmp_path, stays=True) as socket_path:
            token = known(socket_path).token
        with served(daemon, tmp_path) as socket_path:
            assert known(socket_path).token == token
        with pytest.raises(NotFoundError):
            where.page_url(socket_path)
        with served(daemon, tmp_path) as socket_path:
            assert known(socket_path).token != token

    @pytest.mark.parametrize(
        "left", ["", "[]", "{}", '{"token": 5}', '{"token": "short"}', "\x00", '{"token": "' + "x" * 9999]
    )
    def test_what_is_no_token_is_not_gone_on_with(self, daemon: FakeDaemon, tmp_path: Path, left: str) -> None:
        file = where.page_file(tmp_path / "0123456789abcdef.sock")
        file.write_text(left)
        file.chmod(0o600)
        with served(daemon, tmp_path) as socket_path:
            assert known(socket_path).ask("/v1/status")[0] == 200

    def test_a_token_that_others_could_read_is_not_gone_on_with(self, daemon: FakeDaemon, tmp_path: Path) -> None:
        file = where.page_file(tmp_path / "0123456789abcdef.sock")
        file.write_text(json.dumps({"token": "x" * 43}))
        file.chmod(0o644)
        with served(daemon, tmp_path) as socket_path:
            assert known(socket_path).token != "x" * 43

    def test_an_address_that_is_taken_is_waited_for(self, daemon: FakeDaemon, tmp_path: Path) -> None:
        faults, changed = list[str](), threading.Event()

        def note(fault: str) -> None:
            faults.append(fault)
            changed.set()

        with socket.create_server(("127.0.0.1", 0)) as other:
            address = other.getsockname()
            with served(daemon, tmp_path, address, on_fault=note):
                assert changed.is_set()
                assert "in use" in faults[0]
                changed.clear()
                other.close()
                assert changed.wait(20)
                assert faults[1:] == [""]

    @pytest.mark.parametrize("text", ["0.0.0.0:80", "10.0.0.1:80", "example.org:80", ":80", "127.0.0.1", "127.0.0.1:x",
                                      "::1:80", "127.0.0.1:70000", "[::]:80"])  # fmt: skip
    def test_an_address_others_can_reach_is_refused(self, tmp_path: Path, text: str) -> None:
        from mfs.config import MountConfig, SourceConfig

        with pytest.raises(ConfigError, match="page address"):
            MountConfig(tmp_path / "m", (SourceConfig("/x"),), page_addr=text)


class TestGpuload:
    def test_both_look_in_the_same_place(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from gpuload.paths import default_socket

        for runtime in (str(tmp_path), "/nowhere"):
            monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
            assert gpus.socket_path() == default_socket()
        monkeypatch.setenv("GPULOAD_SOCKET", "/somewhere")
        assert gpus.socket_path() == default_socket()

    def test_what_a_real_server_holds(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """On host memory; of a GPU's arena it says the same."""
        from safetensors.numpy import save_file

        from gpuload.client.asking import load_resident
        from gpuload.device.host import HostDevice
        from gpuload.server.daemon import ServerConfig as GpuConfig
        from gpuload.testing import running_server

        save_file({"w": np.ones(1000, np.float32)}, tmp_path / "tiny.safetensors")
        config = GpuConfig(socket_path=str(tmp_path / "g.sock"), arena_bytes={"cpu": 64 << 20})
        monkeypatch.setenv("GPULOAD_SOCKET", config.socket_path)
        with running_server(config, lambda name: HostDevice()):
            load_resident(tmp_path / "tiny.safetensors", "tiny", None)
            found = gpus.look()
        [device] = found["devices"]
        assert (found["state"], device["device"], device["arena_bytes"], device["swaps"]) == ("ok", "cpu", 64 << 20, 0)
        assert device["models"] == [{"name": "tiny", "bytes": 4000, "leases": 0, "pinned": False}]
        assert 0 < device["free_bytes"] < device["arena_bytes"]

    @pytest.mark.parametrize("answer", [b"", b"\0\0\0\x05hello", b"\xff\xff\xff\xff", b"\0\0\0\x02{}", b"\0\0\0\x02[]"])
    def test_who_answers_nonsense_is_named(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bytes
    ) -> None:
        path = tmp_path / "g.sock"
        monkeypatch.setenv("GPULOAD_SOCKET", str(path))
        assert gpus.look()["state"] == "none"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()

            def serve() -> None:
                client, _ = server.accept()
                with client:
                    client.recv(1000)
                    client.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            assert gpus.look()["state"] == "not answering"
            thread.join()
