"""The real command against a real socket: `mfs` as a child process, and a fake daemon whose mount answers nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mfs.config import MountConfig, SourceConfig
from mfs.control import detach, mountinfo, runtime
from mfs.control.runtime import Record
from mfs.launch import start_daemon

DEADLINE_S = 60


class Mfs:
    """Runs `mfs` with arguments."""

    def __call__(self, *args: str | Path, status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run it and check the exit status; nothing on stderr may be a traceback, nothing may hang."""
        command = [sys.executable, "-m", "mfs", *map(str, args)]
        options = {"capture_output": True, "text": True, "timeout": DEADLINE_S} | options
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def json(self, *args: str | Path, status: int = 0) -> Any:
        return json.loads(self(*args, "--json", status=status).stdout)

    def error(self, *args: str | Path, status: int = 1) -> str:
        """The one line it says on stderr."""
        done = self(*args, status=status)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("mfs: ")
        return line


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own; not below tmp_path, whose name may be too long for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="mfs-rt-"))
    monkeypatch.setenv("MFS_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("COLUMNS", "100")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def mfs() -> Mfs:
    return Mfs()


class FakeMount:
    """A mount whose daemon is `mfs.testing.fake_daemon`: whoever touches it hangs."""

    def __init__(self, mountpoint: Path, url: str = "s3://models/prod") -> None:
        self.path = mountpoint
        self.path.mkdir(exist_ok=True)
        source = SourceConfig(url, token="hush")
        self.config = MountConfig(mountpoint, (source,), cache_dir=mountpoint.parent / "cache", ram_bytes=64 << 20)
        self.warnings = start_daemon(self.config, deadline_s=DEADLINE_S, module="mfs.testing.fake_daemon")

    @property
    def record(self) -> Record:
        record = runtime.read_record(str(self.path))
        assert record is not None
        return record

    def __truediv__(self, name: str) -> str:
        return f"{self.path}/{name}"

    def kill(self) -> None:
        """End the daemon as a crash does: the mount stays."""
        record = self.record
        os.kill(record.pid, signal.SIGKILL)
        assert detach.wait_until_ended(record, DEADLINE_S)

    def close(self) -> None:
        record = runtime.read_record(str(self.path))
        if mountinfo.mount_at(str(self.path)) is not None:
            detach.unmount(str(self.path), lazy=True)
        if record is not None and record.is_alive:
            detach.end_daemon(record, DEADLINE_S)


@pytest.fixture
def fake_mount(tmp_path: Path) -> Iterator[Callable[..., FakeMount]]:
    """`fake_mount(name='mnt', url=...)` mounts below tmp_path; all are ended with the test."""
    made: list[FakeMount] = []

    def make(name: str = "mnt", url: str = "s3://models/prod") -> FakeMount:
        made.append(FakeMount(tmp_path / name, url))
        return made[-1]

    yield make
    for mount in made:
        mount.close()


@pytest.fixture
def mnt(fake_mount: Callable[..., FakeMount]) -> FakeMount:
    return fake_mount()
