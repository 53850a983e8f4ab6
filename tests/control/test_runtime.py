"""Records, locks and sockets of running daemons."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import trio

from mfs.control import detach, listening, runtime
from mfs.control.runtime import Record
from mfs.errors import AccessError, ConfigError, NotFoundError, StoreError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def record(mountpoint: str = "/mnt/models") -> Record:
    return runtime.record_of_self(mountpoint, cache_dir="/c", log_file=None, started_at=5.0, sources=("s3://b",))


def test_a_registered_daemon_is_found_and_leaves_nothing(folder: Path) -> None:
    with runtime.registered(record()) as socket_file:
        assert runtime.read_record("/mnt/models") == record()
        assert record().is_alive
        assert socket_file == runtime.socket_path("/mnt/models")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert runtime.read_record("/mnt/models") is None
    assert [file.suffix for file in folder.iterdir()] == [".lock"]


def test_one_daemon_per_mountpoint() -> None:
    with runtime.registered(record()):
        with pytest.raises(ConfigError, match="served already"), runtime.registered(record()):
            pass
        assert runtime.read_record("/mnt/models") is not None
        with runtime.registered(record("/mnt/other")):
            pass
    with runtime.registered(record()):
        pass


def test_a_killed_daemon_leaves_a_stale_record_that_is_replaced() -> None:
    program = (
        "import os, signal; from mfs.control import runtime\n"
        "r = runtime.record_of_self('/m', cache_dir=None, log_file=None, started_at=1.0, sources=())\n"
        "with runtime.registered(r): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    left = runtime.read_record("/m")
    assert left is not None
    assert not left.is_alive
    with runtime.registered(record("/m")):
        now = runtime.read_record("/m")
        assert now is not None
        assert now.pid == os.getpid()


def test_a_reused_pid_is_not_our_daemon() -> None:
    again = Record(os.getpid(), 1, "/m", None, None, 1.0)
    assert not again.is_alive


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert runtime.process_started_ticks(process.pid) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', "\0"])
def test_a_damaged_record_is_no_record(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / f"{runtime.mount_hash('/m')}.json").write_text(text)
    assert runtime.read_record("/m") is None


def test_a_directory_others_could_fill_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"mode 0777.*writable by nobody else"), runtime.registered(record()):
        pass


def test_a_link_in_place_of_the_directory_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not a directory"), runtime.registered(record()):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_a_directory_of_somebody_else_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match="owned by uid 65534"), runtime.registered(record()):
        pass


class TestRecordsThatLie:
    """Whoever can write a record could have any process of ours ended, or everybody's, where root unmounts."""

    @pytest.fixture
    def bystander(self) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(["sleep", "600"]) as process:
            yield process
            process.kill()

    def plant(self, folder: Path, pid: int, mountpoint: str = "/m") -> Record:
        folder.mkdir(mode=0o700, exist_ok=True)
        lie = Record(pid, runtime.process_started_ticks(pid) or 0, mountpoint, None, None, 1.0)
        file = folder / f"{runtime.mount_hash(mountpoint)}.json"
        file.write_text(json.dumps(asdict(lie)))
        return lie

    def test_a_process_that_does_not_hold_the_lock_is_not_ended(
        self, folder: Path, bystander: subprocess.Popen[bytes]
    ) -> None:
        lie = self.plant(folder, bystander.pid)
        assert runtime.read_record("/m") == lie
        with runtime.locked("/m"), pytest.raises(StoreError, match="was not ended: it does not hold the lock of /m"):
            detach.end_daemon(lie, 0.1)
        assert bystander.poll() is None

    def test_nor_one_that_has_the_file_open(self, folder: Path) -> None:
        self.plant(folder, 1)
        lock = runtime.socket_path("/m").with_suffix(".lock")
        lock.touch()
        with lock.open() as opened, subprocess.Popen(["sleep", "600"], pass_fds=[opened.fileno()]) as process:
            lie = self.plant(folder, process.pid)
            with pytest.raises(StoreError, match="was not ended"):
                detach.end_daemon(lie, 0.1)
            assert process.poll() is None
            process.kill()

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users")
    def test_nor_one_of_another_user_than_the_mounts(self, folder: Path) -> None:
        with runtime.locked("/m") as lock, subprocess.Popen(["sleep", "600"], pass_fds=[lock]) as process:
            lie = self.plant(folder, process.pid)
            assert runtime.serves(lie, folder, 0)
            with pytest.raises(StoreError, match="as a process of uid 65534"):
                detach.end_daemon(lie, 0.1, owner=65534)
            assert process.poll() is None
            detach.end_daemon(lie, 30)
            assert process.wait() == -signal.SIGTERM

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
    def test_a_directory_others_can_fill_is_not_read(self, folder: Path, mode: int) -> None:
        self.plant(folder, os.getpid())
        folder.chmod(mode)
        assert runtime.read_record("/m") is None
        with pytest.raises(AccessError, match="writable by nobody else; nothing in it is believed"):
            runtime._folders(os.geteuid())

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
    def test_nor_one_of_a_stranger(self, folder: Path) -> None:
        self.plant(folder, os.getpid())
        os.chown(folder, 65533, 65533)
        assert runtime.read_record("/m") is None
        assert runtime.read_record("/m", owner=65533) is not None  # the one who mounted

    @pytest.mark.parametrize(
        ("field", "value"),
        [("pid", -1), ("pid", 0), ("pid", "7"), ("pid", True), ("pid", 1 << 40), ("sources", [3]), ("mountpoint", [])],
    )
    def test_fields_that_are_not_what_they_should_be(self, folder: Path, field: str, value: object) -> None:
        self.plant(folder, 7)
        file = folder / f"{runtime.mount_hash('/m')}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
        assert runtime.read_record("/m") is None

    def test_what_is_no_file_is_not_waited_for(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        os.mkfifo(folder / f"{runtime.mount_hash('/m')}.json")
        (folder / f"{runtime.mount_hash('/n')}.json").symlink_to("/dev/zero")
        assert runtime.read_record("/m") is None
        assert runtime.read_record("/n") is None

    def test_nested_beyond_reason(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        (folder / f"{runtime.mount_hash('/m')}.json").write_text("[" * 100_000)
        assert runtime.read_record("/m") is None


def test_a_record_is_nobody_elses(folder: Path) -> None:
    before = os.umask(0)
    try:
        with runtime.registered(record()):
            assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    finally:
        os.umask(before)


def test_a_socket_path_the_kernel_cannot_bind_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(ConfigError, match="the kernel allows 107"):
        runtime.socket_path("/m")


@pytest.mark.parametrize("pid", [1, 4_194_304])
def test_the_longest_path_that_is_allowed_can_be_bound_by_any_process(
    monkeypatch: pytest.MonkeyPatch, pid: int
) -> None:
    """All doors of a mount: the longest name, and the one it has before it listens."""

    async def open_door(path: Path) -> None:
        with listening.door(path, 0o600):
            assert list(path.parent.iterdir()) == [path]

    with tempfile.TemporaryDirectory(prefix="mfs-") as short:
        folder = Path(short) / ("x" * (107 - len(short) - len("//0123456789abcdef.loans")))
        folder.mkdir()
        monkeypatch.setenv("MFS_RUNTIME_DIR", str(folder))
        monkeypatch.setattr(os, "getpid", lambda: pid)
        path = runtime.socket_path("/m")
        for ending in (".loans", ".sock", ".next"):
            trio.run(open_door, path.with_suffix(ending))
        monkeypatch.setenv("MFS_RUNTIME_DIR", f"{folder}y")
        with pytest.raises(ConfigError, match="108 bytes long: the kernel allows 107"):
            runtime.socket_path("/m")


def test_a_path_outside_any_mount_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="not under an mfs mount"):
        runtime.find_mount(str(tmp_path))
