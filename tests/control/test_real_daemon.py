"""The real daemon, started as `mfs mount` starts it, passes the suite that the fake one passes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.config import MountConfig, SourceConfig
from mfs.control import detach, runtime
from mfs.control.client import Client
from mfs.launch import start_daemon
from mfs.testing import ramp
from tests.control.suite import ControlSuite, Expected

DEADLINE_S = 60
FILES = {
    "llama/config.json": 712,
    "llama/a.safetensors": 9 << 20,
    "llama/b.safetensors": (5 << 20) + 3,
    "minilm/model.bin": 3 << 20,
    "minilm/naïve.txt": 10,
}


class TestRealDaemon(ControlSuite):
    @pytest.fixture
    def client(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
        for name, size in FILES.items():
            file = tmp_path / "models" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(ramp(size))
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        sources = (SourceConfig(str(tmp_path / "models")),)
        cache_dir = tmp_path / "cache"
        config = MountConfig(mountpoint, sources, cache_dir=cache_dir, cache_bytes=1 << 30, ram_bytes=64 << 20)
        with tempfile.TemporaryDirectory(prefix="mfs-rt-") as folder:  # tmp_path may be too long for a socket
            monkeypatch.setenv("MFS_RUNTIME_DIR", folder)
            start_daemon(config, deadline_s=DEADLINE_S)
            record = runtime.read_record(str(mountpoint))
            assert record is not None
            try:
                yield Client(runtime.socket_path(str(mountpoint)))
                detach.unmount(str(mountpoint), lazy=False)
                assert detach.wait_until_ended(record, DEADLINE_S)
            finally:
                detach.end_daemon(record, DEADLINE_S)

    @pytest.fixture
    def expected(self, tmp_path: Path) -> Expected:
        return Expected(files=FILES, directory="llama", source_urls=(f"file://{tmp_path}/models",))
