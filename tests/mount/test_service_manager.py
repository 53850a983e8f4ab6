"""A mount as a systemd service: its descriptors outlive the main process in the manager's store; watchdog, reload."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs import children
from mfs.control import mountinfo, runtime
from mfs.manager import KINDS
from mfs.testing import ramp
from mfs.testing.outside import Outside
from tests.mount import touching
from tests.mount.service_manager import ServiceManager

SIZE = (9 << 20) + 17


class Service:
    """`mfs mount --foreground` of a folder, as mfs@.service has it."""

    def __init__(self, folder: Path, manager: ServiceManager) -> None:
        self.manager = manager
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()
        (folder / "models").mkdir()
        (folder / "models" / "w.bin").write_bytes(ramp(SIZE))
        self.config = folder / "mfs.toml"
        self.env = {"MFS_RUNTIME_DIR": str(folder / "run")}
        self._folder = folder
        self.write()

    def write(self, **more: str) -> None:
        settings = {
            "mountpoint": str(self.mountpoint),
            "cache_dir": str(self._folder / "cache"),
            "ram_size": "64M",
            **more,
        }
        lines = ["[mount]", "workers = 1", *(f'{name} = "{value}"' for name, value in settings.items())]
        self.config.write_text("\n".join([*lines, "[sources.m]", f'url = "{self._folder}/models"', ""]))

    def start(self, *, watchdog_s: float = 0.0) -> None:
        said = len(self.manager.said)
        command = children.python("-m", "mfs", "mount", "--config", str(self.config), "--foreground")
        self.manager.start(command, self.env, watchdog_s=watchdog_s)
        self.manager.wait_for("READY=1", after=said)

    def reload(self) -> None:
        """ExecReload=."""
        environment = {**os.environ, **self.env, "NOTIFY_SOCKET": str(self._folder / "notify")}
        command = [sys.executable, "-m", "mfs", "mount", "--handover", "--config", str(self.config)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)

    @property
    def record(self) -> runtime.Record:
        record = runtime.read_record(os.path.realpath(self.mountpoint), self._folder / "run")
        assert record is not None
        return record


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with ServiceManager(tmp_path) as manager:
        service = Service(tmp_path, manager)
        service.start()
        yield service
    subprocess.run(["umount", "-l", str(service.mountpoint)], check=False, capture_output=True)


@pytest.fixture
def reader() -> Iterator[Outside]:
    reader = Outside(cwd=Path.cwd())
    yield reader
    reader.close()


def kinds(manager: ServiceManager) -> list[str]:
    manager.take_all()
    return sorted(name.rpartition(".")[2] for name, _ in manager.store)


def test_a_mount_outlives_its_holder_and_all_with_it(service: Service, reader: Outside) -> None:
    manager, path = service.manager, str(service.mountpoint / "m" / "w.bin")
    assert kinds(manager) == sorted(KINDS)
    inode = reader.call(touching.hold, "fd", path)
    reader.call(touching.hold_map, "map", path)
    for turn in (1, 2):
        reader.call(touching.drop_pages, path)
        manager.kill_group()
        reader.start(touching.held_read, "fd", turn * 3_700_000, 1_000)
        assert reader.is_busy(for_s=0.1)
        service.start()
        assert reader.finish() == ramp(1_000, turn * 3_700_000)
        assert reader.call(touching.held_map, "map", 3_000_000, 1_000) == ramp(1_000, 3_000_000)
        assert reader.call(touching.hold, "again", path) == inode
        assert kinds(manager) == sorted(KINDS)
    os.kill(service.record.pid, signal.SIGKILL)  # a daemon alone is its holder's business, as ever
    reader.call(touching.drop_pages, path)
    assert reader.call(touching.held_read, "fd", 5_000_000, 1_000) == ramp(1_000, 5_000_000)
    assert len(mountinfo_of(service)) == 1


def mountinfo_of(service: Service) -> list[str]:
    place = os.path.realpath(service.mountpoint)
    return [mount.mountpoint for mount in mountinfo.read() if mount.mountpoint == place]


def test_who_stops_it_gets_it_unmounted_and_nothing_is_kept(service: Service) -> None:
    assert service.manager.stop() == 0
    assert kinds(service.manager) == []
    assert mountinfo_of(service) == []
    service.start()
    assert kinds(service.manager) == sorted(KINDS)


def test_after_a_reload_the_new_holders_are_kept(service: Service, reader: Outside) -> None:
    """ExecReload is a handover: the manager is told the new main process, and what it kept serves that one too."""
    manager, path = service.manager, str(service.mountpoint / "m" / "w.bin")
    reader.call(touching.hold, "fd", path)
    old = service.record
    service.reload()
    manager.wait_for(f"MAINPID={service.record.holder_pid}")
    assert manager.wait_ended() == 0
    assert kinds(manager) == sorted(KINDS)
    for pid in (service.record.holder_pid, service.record.pid):
        os.kill(pid, signal.SIGKILL)
    service.start()
    assert service.record.pid != old.pid
    assert reader.call(touching.held_read, "fd", 8_000_000, 1_000) == ramp(1_000, 8_000_000)
    assert kinds(manager) == sorted(KINDS)


def test_with_other_settings_it_is_another_mount(service: Service, reader: Outside) -> None:
    """What was kept is of no use then, and neither is its lock in the way."""
    path = str(service.mountpoint / "m" / "w.bin")
    reader.call(touching.hold, "fd", path)
    service.manager.kill_group()
    service.write(umask="077")
    service.start()
    assert reader.call(touching.held_outcome, "fd", 8_000_000, 1_000) in ("ENOTCONN", "ECONNABORTED", "EIO")
    assert reader.call(touching.read, path) == ramp(SIZE)
    assert kinds(service.manager) == sorted(KINDS)
    assert len(mountinfo_of(service)) == 1


def test_what_was_kept_of_a_mount_that_is_gone_is_no_trouble(service: Service) -> None:
    service.manager.kill_group()
    subprocess.run(["umount", "-l", str(service.mountpoint)], check=True)
    service.start()
    assert kinds(service.manager) == sorted(KINDS)
    assert len(mountinfo_of(service)) == 1


def test_the_watchdog_is_told_by_the_daemon_while_it_answers(service: Service) -> None:
    """By nobody else: a daemon that hangs is silent, whatever its holder and workers do."""
    manager = service.manager
    manager.stop()
    service.start(watchdog_s=0.3)
    for _ in range(3):
        manager.wait_for("WATCHDOG=1", after=len(manager.said))
    daemon = service.record.pid
    manager.take_all()
    assert {pid for pid, message in manager.said if message == "WATCHDOG=1"} == {daemon}
    os.kill(daemon, signal.SIGSTOP)
    manager.take_all()
    before = len(manager.said)
    try:
        with pytest.raises(AssertionError):
            manager.wait_for("WATCHDOG=1", after=before, within_s=1.0)
    finally:
        os.kill(daemon, signal.SIGCONT)
    manager.wait_for("WATCHDOG=1", after=before)


HOLDS = """
import os, signal, socket, sys
with socket.socket(fileno=int(sys.argv[sys.argv.index("--holder-fd") + 1])) as holder:
    socket.send_fds(holder, [b"hold"], [os.open(os.devnull, os.O_RDONLY) for _ in range(3)])
    holder.recv(1)
"""
"""A daemon that is held, and ends with its holder."""


def test_a_manager_that_listens_late_gets_the_mount_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that is started after the holder, or again; the holder tells it from time to time."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    log = tmp_path / "log"
    program = (
        "import os, sys\nfrom mfs import holder\nholder._STORED_EVERY_S = 0.05\n"
        f"holder.children.python = lambda *_: [sys.executable, '-c', {HOLDS!r}, *_]\nholder.main()\n"
    )
    with log.open("wb") as words, (tmp_path / "config").open("w+") as config:
        config.write("{}")
        config.seek(0)
        command = children.python("-c", program, "--store", "mfs-x", "--config-fd", "0")
        process = subprocess.Popen(command, stdin=config, stderr=words)
    try:
        until_s = time.monotonic() + 60
        while b"does not take" not in log.read_bytes() and time.monotonic() < until_s:
            time.sleep(0.02)
        with ServiceManager(tmp_path) as manager:
            manager.wait_for("FDNAME=mfs-x.journal")
            manager.wait_for("FDNAME=mfs-x.journal", after=len(manager.said))
            assert kinds(manager) == sorted(KINDS)
        assert log.read_text().count("does not take") == 1
    finally:
        process.kill()
        process.wait()
