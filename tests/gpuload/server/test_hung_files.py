"""A client's file on a file system that never answers again: its own client waits, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gpuload.client.asking import ask, connect, load_resident
from gpuload.server.client_files import Shares
from gpuload.testing import random_tensors, write
from gpuload.wire import send_blocking
from tests.gpuload.server.hanging import hanging_file

pytestmark = pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="needs FUSE")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server as a process, and its socket."""
    path = str(tmp_path / "s.sock")
    command = [sys.executable, "-m", "gpuload", "serve", "--arena", "cpu=8MiB", "--socket", path]
    process = subprocess.Popen([*command, "--digests", str(tmp_path / "d")], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "serving" in process.stderr.readline()
        yield process, path
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("calls", "ends"),
    [(["read"], True), (["getattr", "lookup"], False), (["statfs", "getxattr"], False), (["flush", "release"], False)],
    ids=["read", "stat", "statfs", "close"],
)
def test_a_hung_file_is_its_own_clients_trouble(
    served: tuple[subprocess.Popen[str], str], tmp_path: Path, calls: list[str], ends: bool
) -> None:
    """ends: whether the kernel lets a process go in that call; it waits for most that FUSE has handed out."""
    process, path = served
    file = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (50, 50)}))
    other = write(tmp_path / "b.safetensors", random_tensors(2, {"w": (50, 50)}))
    with hanging_file(tmp_path / "hung", file) as (hung, hang):
        fd = os.open(hung, os.O_RDONLY)
        clients = [connect(path, 30) for _ in range(60)]  # more than trio's own threads
        hang(calls)
        for client in clients:
            request = {"op": "load", "model": "hung", "device": "cpu", "files": [str(hung)]}
            send_blocking(client, request, [fd])
        closing = threading.Thread(target=_close, args=(fd,), daemon=True)  # it may hang too, and whoever is forked
        closing.start()
        for client in clients[:30]:
            client.close()
        for _ in range(3):
            assert ask({"op": "ping"}, socket_path=path, timeout_s=30)["protocol"] == 4
        assert load_resident(other, "other", "cpu", socket_path=path, timeout_s=60)["model"] == "other"
        for client in clients[30:]:
            client.close()
        process.send_signal(signal.SIGTERM)
        if ends:
            assert process.wait(60) == 0
        else:
            _assert_free(path)
    closing.join(60)


def test_tensors_that_hang_keep_no_device(served: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    """The table is there, and the load has its turn, when the file system stops answering."""
    process, path = served
    file = write(tmp_path / "a.safetensors", random_tensors(1, {"w": (1000, 1000)}))
    other = write(tmp_path / "b.safetensors", random_tensors(2, {"w": (50, 50)}))
    with hanging_file(tmp_path / "hung", file) as (hung, hang):
        hang(["read-on"])
        fd = os.open(hung, os.O_RDONLY)
        with connect(path, 30) as client:
            request = {"op": "load", "model": "hung", "device": "cpu", "files": [str(hung)]}
            send_blocking(client, request, [fd])
            while not ask({"op": "status"}, socket_path=path, timeout_s=30)["devices"][0]["loads"]:
                time.sleep(0.01)
            for name in ("one", "two"):
                assert load_resident(other, name, "cpu", socket_path=path, timeout_s=60)["model"] == name
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        os.close(fd)


def _close(fd: int) -> None:
    with suppress(OSError):  # of a dead mount by then
        os.close(fd)


def _assert_free(path: str) -> None:
    """Another server can take the place of one that cannot end."""
    command = [sys.executable, "-m", "gpuload", "serve", "--arena", "cpu=8MiB", "--socket", path]
    deadline = time.monotonic() + 60
    said = ""
    while "serving" not in said:
        assert time.monotonic() < deadline, said
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as again:
            assert again.stderr is not None
            said = again.stderr.readline()
            again.terminate()


def test_who_has_as_many_as_are_left_gets_no_more() -> None:
    shares = Shares(10)
    assert [shares.take(1) for _ in range(6)] == [True] * 5 + [False]
    assert [shares.take(2) for _ in range(4)] == [True, True, True, False]
    assert [shares.take(3) for _ in range(2)] == [True, False]
    shares.put(1)
    assert shares.take(3)
    for who in (1, 1, 1, 1, 2, 2, 2, 3, 3):
        shares.put(who)
    assert shares.taken_count == 0
