"""Clients that are hostile, broken or confused: each gets one line or is let go, and nobody else is harmed."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import gpuload.client.tensors
from gpuload.client import asking
from gpuload.client.asking import ask, connect, load_resident
from gpuload.client.attached import attach, open_resident
from gpuload.device.base import Run
from gpuload.device.host import HostDevice
from gpuload.errors import AwayError, BusyError
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, assert_same, random_tensors, running_server, write
from gpuload.wire import receive_blocking, send_blocking
from mfs.errors import ConfigError, IntegrityError, NotFoundError, UsageError
from tests.gpuload.server.test_leases import NOBODY, in_child, one_way


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        ({"op": "dance"}, UsageError, "no such operation"),
        ({}, UsageError, "no such operation"),
        ({"op": ["load"]}, UsageError, "no such operation"),
        ({"op": "dance" * 100_000}, UsageError, "no such operation"),
        ({"op": "attach", "model": "m", "device": "x" * 100_000}, UsageError, "no such device: 'x{1,200}'"),
        ({"op": "unload", "model": "content:1"}, NotFoundError, "no model 'content:1' is resident"),
        ({"op": "attach", "model": "absent"}, NotFoundError, "there are: none"),
        ({"op": "attach", "model": 3}, UsageError, "printable"),
        ({"op": "attach", "model": "x\n"}, UsageError, "printable"),
        ({"op": "load", "model": "m", "device": "cpu", "files": ["a"]}, UsageError, "0 files came"),
        ({"op": "load", "model": "m", "device": "cuda:9", "files": []}, NotFoundError, "it has: cpu"),
        ({"op": "load", "model": "m", "device": "tpu"}, UsageError, "no such device"),
        ({"op": "load", "model": "content:1", "device": "cpu"}, UsageError, "server's own"),
        ({"op": "unload", "model": "absent"}, NotFoundError, "there are: none"),
    ],
)  # fmt: skip
def test_requests_that_mean_nothing(server: ServerThread, request_: dict, error: type, match: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=match):
        ask(request_, socket_path=server.socket_path)


def test_a_hostile_file_is_refused(server: ServerThread, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        load_resident(path, "m", "cpu", socket_path=server.socket_path)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\0", struct.pack(">I", 1 << 31), struct.pack(">I", 3) + b"abc", struct.pack(">I", 2) + b"[]",
     struct.pack(">I", 20) + b"{}", struct.pack(">I", 12) + b'{"fds":9999}', struct.pack(">I", 9) + b'{"fds":1}F',
     struct.pack(">I", 10) + b'{"fds":-1}'],
)  # fmt: skip
def test_a_client_that_breaks_the_protocol_harms_nobody(server: ServerThread, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.socket_path)
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(30)
        while sock.recv(4096):
            pass
    assert ask({"op": "ping"}, socket_path=server.socket_path)["protocol"] == 4


def test_unwanted_descriptors_are_closed(server: ServerThread) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with open("/dev/null") as file, pytest.raises(UsageError):
            ask({"op": "dance"}, [file.fileno()] * 300, socket_path=server.socket_path)
    server.settle()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_whoever_may_only_attach_sends_no_descriptors(config: ServerConfig) -> None:
    """Else a thousand connections of strangers, each with thousands of files, would leave the server none."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        config = replace(config, socket_path=f"{folder}/s.sock", socket_mode=0o666)
        with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:

            def work() -> str:
                os.setuid(NOBODY)
                with open("/dev/null") as file:
                    ask({"op": "ping"}, [file.fileno()], socket_path=server.socket_path)
                return "taken"

            process, out, hold = in_child(work)
            assert "1 descriptors, more than 0" in os.read(out, 10_000).decode()
            os.close(hold)
            os.waitpid(process, 0)
            os.close(out)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_other_users_connections_do_not_keep_the_owner_out(config: ServerConfig) -> None:
    """Nor those that are about to be refused: all come at once, the owner behind them."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        config = replace(config, socket_path=f"{folder}/s.sock", socket_mode=0o666, connections_max=4)
        with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
            held: list[socket.socket] = []
            go_on = threading.Event()
            connected, say = os.pipe()

            def work() -> str:
                os.setuid(NOBODY)
                held.extend(connect(server.socket_path, 30) for _ in range(6))
                os.write(say, b"6")
                return str(receive_blocking(held[2])[0]["message"])

            with ThreadPoolExecutor(1) as pool:
                pool.submit(server.on_loop, go_on.wait)
                process, out, hold = in_child(work)
                os.read(connected, 1)
                with connect(server.socket_path, 30) as ours:
                    go_on.set()
                    send_blocking(ours, {"op": "ping"})
                    assert receive_blocking(ours)[0]["pid"] == os.getpid()
            assert "too many connections of other users" in os.read(out, 10_000).decode()
            os.close(say)
            os.close(connected)
            os.close(hold)
            os.waitpid(process, 0)
            os.close(out)


def test_all_who_come_at_once_are_answered(config: ServerConfig) -> None:
    """A whole fleet starts: more connections than wait to be accepted, some beyond what is served at all."""
    with running_server(replace(config, backlog=2), lambda _: HostDevice(granule_bytes=4096)) as server:

        def work(_: int) -> object:
            return ask({"op": "ping"}, socket_path=server.socket_path, timeout_s=60)["pid"]

        with ThreadPoolExecutor(100) as pool:
            assert set(pool.map(work, range(400))) == {os.getpid()}


def test_beyond_its_connections_a_server_says_that_it_is_busy(config: ServerConfig, tmp_path: Path) -> None:
    config = replace(config, connections_max=3)
    with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
        held = [connect(server.socket_path, 30) for _ in range(3)]
        server.settle()
        path = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (50, 50)}))
        with pytest.raises(BusyError, match="has 3 connections"):
            ask({"op": "ping"}, socket_path=server.socket_path)
        with pytest.raises(BusyError, match="has 3 connections"):
            load_resident(path, "m", "cpu", socket_path=server.socket_path)
        for sock in held:
            sock.close()
        server.settle()
        assert ask({"op": "ping"}, socket_path=server.socket_path)["pid"] == os.getpid()


def test_a_server_that_accepts_nobody_is_busy_and_not_away(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as held:
        sock.bind(str(tmp_path / "s"))
        sock.listen(0)
        held.enter_context(connect(str(tmp_path / "s"), 1))
        with pytest.raises(BusyError, match="is busy: it accepted no more connections"):
            connect(str(tmp_path / "s"), 0.1)


def test_a_file_that_is_no_socket_is_not_replaced_by_one(config: ServerConfig) -> None:
    path = Path(config.socket_path)
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is there and is no socket"), running_server(config):
        raise AssertionError("it started")
    assert path.read_text() == "precious"


def test_a_model_that_was_opened_by_content_can_be_unloaded(server: ServerThread, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (50, 50)}))
    with open(path, "rb") as file:
        name = open_resident([file.fileno()], [str(path)], "cpu", socket_path=server.socket_path).model
    gc.collect()
    assert name.startswith("content:")
    assert ask({"op": "unload", "model": name}, socket_path=server.socket_path)["released"]


def test_tensors_that_this_torch_does_not_have_leave_no_lease(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (50, 50)}))
    load_resident(path, "m", "cpu", socket_path=server.socket_path)
    monkeypatch.delitem(gpuload.client.tensors.TORCH_DTYPES, "BF16")
    with pytest.raises(UsageError, match="'w' is BF16, which torch") as kept:
        attach("m", socket_path=server.socket_path)
    assert kept.value is not None
    assert server.gauges()["leases"] == 0, "though the error, with all it refers to, is still held"


@one_way
def test_others_are_answered_while_the_driver_hands_out_a_model(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA it is a call for each granule."""
    want = random_tensors(1, {"w": (50, 50)})
    load_resident(write(tmp_path / "a.safetensors", want), "m", "cpu", socket_path=server.socket_path)
    arena = server.sites["cpu"].arena
    export, began, go_on = arena.export, threading.Event(), threading.Event()

    def slow(runs: Sequence[Run]) -> list[int]:
        began.set()
        assert go_on.wait(60)
        return export(runs)

    monkeypatch.setattr(arena, "export", slow)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(attach, "m", socket_path=server.socket_path)
        assert began.wait(60)
        assert ask({"op": "ping"}, socket_path=server.socket_path, timeout_s=60)["protocol"] == 4
        go_on.set()
        assert_same(held.result(), want)
    del held


class TestWhileItBegins:
    """A card may take seconds to answer, an arena to be mapped; who asks meanwhile is answered later."""

    @pytest.fixture
    def begins(self, config: ServerConfig, small_granules: None) -> Iterator[tuple[threading.Event, threading.Event]]:
        """Set it and a server begins, without its device until the second is set."""
        starts, goes_on = threading.Event(), threading.Event()

        def open_one(name: str) -> HostDevice:
            assert goes_on.wait(60)
            return HostDevice(granule_bytes=4096)

        def run() -> None:
            assert starts.wait(60)
            with running_server(config, open_one):
                assert ends.wait(60)

        ends = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            served = pool.submit(run)
            yield starts, goes_on
            for event in (starts, goes_on, ends):
                event.set()
        served.result()

    def test_who_connects_waits(
        self, begins: tuple[threading.Event, threading.Event], config: ServerConfig, tmp_path: Path
    ) -> None:
        starts, goes_on = begins
        starts.set()
        until = time.monotonic() + 60
        while not os.path.exists(config.socket_path):
            assert time.monotonic() < until
        with contextlib.closing(connect(config.socket_path, 60)) as sock:
            send_blocking(sock, {"op": "ping"})
            goes_on.set()
            assert "error" not in receive_blocking(sock)[0]

    def test_a_load_waits_for_the_door_too(
        self, begins: tuple[threading.Event, threading.Event], config: ServerConfig, tmp_path: Path
    ) -> None:
        file = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (4,)}))
        starts, goes_on = begins
        goes_on.set()
        with pytest.raises(AwayError, match="No such file"):
            load_resident(file, "m", "cpu", socket_path=config.socket_path)
        told = []
        reply = load_resident(
            file, "m", "cpu", socket_path=config.socket_path, on_wait=lambda: (told.append(1), starts.set())
        )
        assert (reply["generation"], told) == (1, [1])

    def test_a_load_does_not_wait_for_ever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(asking, "START_S", 0.0)
        file = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (4,)}))
        with pytest.raises(AwayError, match="start one with"):
            load_resident(file, "m", "cpu", socket_path=str(tmp_path / "s.sock"), on_wait=lambda: None)
