"""The daemon's answer to whoever started it, and to the service manager."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from mfs.control.ready import DaemonStart, daemon_arguments, notify
from mfs.errors import ConfigError


def start(config: bytes = b"{}") -> tuple[DaemonStart, int]:
    config_read, config_write = os.pipe()
    ready_read, ready_write = os.pipe()
    os.write(config_write, config)
    os.close(config_write)
    return DaemonStart.receive(daemon_arguments(config_fd=config_read, ready_fd=ready_write)), ready_read


def read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def test_ready_with_warnings_is_one_line() -> None:
    daemon, fd = start(b'{"a": 1}')
    assert daemon.config_json == '{"a": 1}'
    daemon.ready(["take\ncare"])
    daemon.ready()  # only the first answer counts
    assert json.loads(read_all(fd)) == {"ready": True, "warnings": ["take\ncare"]}


def test_failure_carries_the_error() -> None:
    daemon, fd = start()
    daemon.failed(ConfigError("no such bucket"))
    assert json.loads(read_all(fd)) == {"error": {"type": "ConfigError", "message": "no such bucket"}}


def test_an_answer_to_nobody_is_no_error() -> None:
    daemon, fd = start()
    os.close(fd)
    daemon.ready()
    DaemonStart("{}", None).ready()


@pytest.mark.parametrize("is_abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abstract: bool) -> None:
    name = f"@{tmp_path}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if is_abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        DaemonStart("{}", None).ready()
        assert manager.recv(100).startswith(b"READY=1\n")


def test_without_a_service_manager_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("READY=1")
