"""`mfs mount` and `mfs umount`: with the real daemon, with one that fails, and after a crash."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mfs.config import MountConfig, SourceConfig
from mfs.control import detach, mountinfo, runtime
from mfs.errors import ConfigError, StoreError
from mfs.launch import start_daemon
from tests.cli.conftest import DEADLINE_S, FakeMount, Mfs
from tests.servers.nginx import NginxServer
from tests.servers.process import free_port

SMALL = ("--ram-size", "64M")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder to mount."""
    folder = tmp_path / "models"
    (folder / "llama").mkdir(parents=True)
    (folder / "llama" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; whatever is mounted there in the end is taken away with its daemon."""
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    record = runtime.read_record(str(path))
    if mountinfo.mount_at(str(path)) is not None:
        detach.unmount(str(path), lazy=True)
    if record is not None and record.is_alive:
        detach.end_daemon(record, DEADLINE_S)


def test_mount_look_read_unmount(mfs: Mfs, models: Path, mnt: Path) -> None:
    done = mfs("mount", models, mnt, *SMALL)
    assert done.stdout == f"{models} mounted at {mnt}; look with 'mfs status {mnt}', end with 'mfs umount {mnt}'\n"
    assert (mnt / "llama" / "config.json").read_text() == "{}"
    assert "config.json" in mfs("ls", mnt / "llama").stdout
    assert str(mnt) in mfs("status", mnt).stdout
    assert mfs("umount", mnt).stdout == f"{mnt} unmounted\n"
    assert list(mnt.iterdir()) == []
    assert runtime.read_record(str(mnt)) is None
    assert "is not under an mfs mount" in mfs.error("umount", mnt)


def test_a_mount_from_a_file(mfs: Mfs, models: Path, mnt: Path, tmp_path: Path) -> None:
    file = tmp_path / "mfs.toml"
    file.write_text(f'[mount]\nram_size="64M"\n[sources.a]\nurl="{models}"\n[sources.b]\nurl="{models}/llama"\n')
    done = mfs("mount", "--config", file, mnt, "--log-file", tmp_path / "log", "--log-level", "debug")
    assert done.stdout.startswith(f"2 sources (a, b) mounted at {mnt}")
    assert sorted(path.name for path in mnt.iterdir()) == ["a", "b"]
    settings = mfs.json("config", mnt)
    assert (settings["log_level"], settings["ram_bytes"]) == ("debug", 64 << 20)
    assert (tmp_path / "log").stat().st_size > 0
    mfs("umount", mnt)


def test_a_relative_folder_and_mountpoint(mfs: Mfs, models: Path, mnt: Path) -> None:
    mfs("mount", "models", "mnt", *SMALL, cwd=mnt.parent)
    assert (mnt / "llama").is_dir()
    mfs("umount", "mnt/", cwd=mnt.parent)


def test_a_live_mount_is_not_replaced(mfs: Mfs, models: Path, mnt: Path) -> None:
    mfs("mount", models, mnt, *SMALL)
    pid = mfs.json("status", mnt)["pid"]
    message = mfs.error("mount", models, mnt, *SMALL)
    assert f"{mnt} is an mfs mount of {models} (pid {pid}) already: 'mfs umount {mnt}' first" in message
    assert (mnt / "llama").is_dir()
    mfs("umount", mnt)


def test_a_stale_mount_is_replaced(mfs: Mfs, models: Path, mnt: Path, fake_mount: Callable[..., FakeMount]) -> None:
    crashed = fake_mount()
    pid = crashed.record.pid
    crashed.kill()
    done = mfs("mount", models, mnt, *SMALL)
    assert f"replaced a stale mount at {mnt}: its daemon (pid {pid}) had ended without unmounting" in done.stderr
    assert (mnt / "llama").is_dir()
    mfs("umount", mnt)


def test_a_stale_mount_without_a_record_is_replaced(
    mfs: Mfs, models: Path, mnt: Path, fake_mount: Callable[..., FakeMount], runtime_dir: Path
) -> None:
    crashed = fake_mount()
    crashed.kill()
    for file in runtime_dir.iterdir():
        file.unlink()
    assert "replaced a stale mount" in mfs("mount", models, mnt, *SMALL).stderr
    mfs("umount", mnt)


def test_a_hung_mount_without_a_record_is_not_taken_for_stale(
    mfs: Mfs, models: Path, fake_mount: Callable[..., FakeMount], runtime_dir: Path
) -> None:
    """Nothing proves that it is dead: a daemon that hangs may come back."""
    hung = fake_mount()
    record = hung.record
    for file in runtime_dir.iterdir():
        file.unlink()
    assert "is an mfs mount already" in mfs.error("mount", models, hung.path, *SMALL)
    detach.unmount(str(hung.path), lazy=True)
    detach.end_daemon(record, DEADLINE_S)


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_umount_of_a_dead_mount(mfs: Mfs, fake_mount: Callable[..., FakeMount], force: tuple[str, ...]) -> None:
    crashed = fake_mount()
    crashed.kill()
    assert "(its daemon had ended already)" in mfs("umount", crashed.path, *force).stdout
    assert mountinfo.mount_at(str(crashed.path)) is None


def test_umount_of_a_hung_mount(mfs: Mfs, fake_mount: Callable[..., FakeMount]) -> None:
    hung = fake_mount()
    os.kill(hung.record.pid, signal.SIGSTOP)
    record = hung.record
    assert "still runs after 100ms; --force ends it" in mfs("umount", hung.path, "--timeout", "100ms", status=1).stderr
    mfs("umount", hung.path, "--timeout", "100ms")  # detached now, but its daemon is still to be ended
    assert not record.is_alive


def test_umount_of_a_mount_in_use(mfs: Mfs, models: Path, mnt: Path) -> None:
    mfs("mount", models, mnt, *SMALL)
    fd = os.open(mnt / "llama" / "config.json", os.O_RDONLY)
    assert f"{mnt} is in use" in mfs.error("umount", mnt)
    mfs("umount", mnt, "--force")
    os.close(fd)  # of which nobody has to be told
    assert mountinfo.mount_at(str(mnt)) is None
    assert runtime.read_record(str(mnt)) is None


def test_umount_names_who_has_the_mount_elsewhere(mfs: Mfs, models: Path, mnt: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mount namespaces are root's")
    mfs("mount", models, mnt, *SMALL)
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; read end"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        other.stdout.readline()
        said = mfs("umount", "--timeout", "0.5s", mnt, status=1).stderr
        assert re.search(rf"in the mount namespaces of processes [\d, ]*\b{other.pid}\b", said)
        other.communicate(b"\n", timeout=30)


def test_umount_wants_the_mountpoint(mfs: Mfs, fake_mount: Callable[..., FakeMount]) -> None:
    mnt = fake_mount()
    assert f"name its mount point, {mnt.path}" in mfs.error("umount", mnt / "llama", status=2)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda mnt: mnt.rmdir(), "does not exist: create it with mkdir -p"),
        (lambda mnt: (mnt / "x").touch(), "is not empty (it holds 'x')"),
        (lambda mnt: (mnt.rmdir(), mnt.touch()), "is not a directory"),
    ],
)
def test_bad_mountpoints(mfs: Mfs, models: Path, mnt: Path, make: Callable[[Path], object], complaint: str) -> None:
    make(mnt)
    assert complaint in mfs.error("mount", models, mnt, *SMALL)


def test_bad_budgets_and_places(mfs: Mfs, models: Path, mnt: Path) -> None:
    assert "expected at least 64M (16 slots of 4M)" in mfs.error("mount", models, mnt, "--ram-size", "63M")
    assert "lies inside the mount point" in mfs.error("mount", models, mnt, "--cache-dir", mnt / "c")
    tiny = ("--cache-dir", mnt.parent / "c", "--cache-size", "1M")
    assert "expected at least 4M (one chunk)" in mfs.error("mount", models, mnt, *tiny)
    assert "log file /proc/log cannot be written" in mfs.error("mount", models, mnt, "--log-file", "/proc/log")


def test_a_source_that_cannot_be_used(mfs: Mfs, mnt: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in mfs.error("mount", tmp_path / "nowhere", mnt, *SMALL)
    assert "'s4://bucket': not a source" in mfs.error("mount", "s4://bucket", mnt, *SMALL, status=2)
    assert mountinfo.mount_at(str(mnt)) is None


def told(manager: socket.socket) -> bytes:
    """The next word to a service manager that is not about descriptors to keep (`tests/mount/test_service_manager`)."""
    while (said := manager.recv(4096)).startswith(b"FDSTORE"):
        pass
    return said


class TestHandover:
    """`mfs mount --handover`; what readers see of it is tested in tests/mount/test_handover.py."""

    def test_the_mount_has_another_daemon_and_the_same_files(self, mfs: Mfs, models: Path, mnt: Path) -> None:
        mfs("mount", models, mnt, *SMALL, "--log-file", mnt.parent / "log")
        with open(mnt / "llama" / "config.json") as file:
            before = runtime.read_record(str(mnt))
            assert before is not None
            done = mfs("mount", "--handover", mnt)
            assert done.stdout.startswith(f"{mnt} taken over from pid {before.pid} (mfs ")
            after = runtime.read_record(str(mnt))
            assert after is not None
            assert after.pid != before.pid
            assert detach.wait_until_ended(before, DEADLINE_S)
            assert file.read() == "{}"
        assert mfs.json("status", mnt)["pid"] == after.pid
        assert mfs.json("config", mnt)["ram_bytes"] == 64 << 20
        assert f"handed over to pid {after.pid}" in (mnt.parent / "log").read_text()
        mfs("umount", mnt)
        assert not after.is_alive
        assert mountinfo.mount_at(str(mnt)) is None

    def test_settings_come_from_the_command_or_the_file(
        self, mfs: Mfs, models: Path, mnt: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "mfs.toml"
        file.write_text(f'[mount]\nmountpoint="{mnt}"\nram_size="64M"\n[sources.a]\nurl="{models}"\n')
        mfs("mount", "--config", file)
        mfs("mount", "--handover", "--ram-size", "68M", "mnt/", cwd=mnt.parent)
        assert mfs.json("config", mnt)["ram_bytes"] == 68 << 20
        file.write_text(file.read_text().replace("64M", "72M"))
        mfs("mount", "--handover", "--config", file)
        assert mfs.json("config", mnt)["ram_bytes"] == 72 << 20
        assert (mnt / "a" / "llama").is_dir()
        mfs("umount", mnt)

    def test_credentials_of_the_environment_go_along(self, mfs: Mfs, models: Path, mnt: Path) -> None:
        """Of two environments the new one counts, and the old one where that says nothing."""
        mfs("mount", models, mnt, *SMALL, env=os.environ | {"AWS_PROFILE": "old", "HF_TOKEN": "old"})
        mfs("mount", "--handover", mnt, env=os.environ | {"HF_TOKEN": "new"})
        record = runtime.read_record(str(mnt))
        assert record is not None
        environment = Path(f"/proc/{record.pid}/environ").read_bytes().split(b"\0")
        assert {b"AWS_PROFILE=old", b"HF_TOKEN=new"} <= set(environment)
        mfs("umount", mnt)

    def test_watch_says_that_the_daemon_it_watched_has_gone(self, mfs: Mfs, models: Path, mnt: Path) -> None:
        """Its command goes on, and its exit status counts."""
        mfs("mount", models, mnt, *SMALL)
        record = runtime.read_record(str(mnt))
        assert record is not None
        command = f"'{sys.executable}' -m mfs mount --handover '{mnt}' && tail --pid {record.pid} -f /dev/null; exit 7"
        done = mfs("watch", mnt, "sh", "-c", command, status=7)
        assert "taken over from" in done.stdout
        assert "has ended or handed the mount over" in done.stderr
        mfs("umount", mnt)

    def test_what_cannot_be_handed_over_is_said(
        self, mfs: Mfs, models: Path, mnt: Path, fake_mount: Callable[..., FakeMount]
    ) -> None:
        assert "is not under an mfs mount" in mfs.error("mount", "--handover", mnt)
        assert "needs the MOUNTPOINT" in mfs.error("mount", "--handover", status=2)
        crashed = fake_mount("crashed")
        crashed.kill()
        assert "has ended; 'mfs umount" in mfs.error("mount", "--handover", crashed.path)
        mfs("mount", models, mnt, *SMALL)
        pid = mfs.json("status", mnt)["pid"]
        assert f"name its mount point, {mnt}" in mfs.error("mount", "--handover", mnt / "llama", status=2)
        assert "sources cannot change" in mfs.error("mount", "--handover", models / "llama", mnt, *SMALL)
        assert "umask cannot change" in mfs.error("mount", "--handover", mnt, "--umask", "077")
        assert "cannot change while mounted" in mfs.error("mount", "--handover", mnt, "--region", "x", status=2)
        assert mfs.json("status", mnt)["pid"] == pid
        mfs("umount", mnt)

    def test_a_new_daemon_that_cannot_start_leaves_the_old_one(self, mfs: Mfs, models: Path, mnt: Path) -> None:
        mfs("mount", models, mnt, *SMALL)
        pid = mfs.json("status", mnt)["pid"]
        (mnt.parent / "file").touch()
        assert "is not a directory" in mfs.error("mount", "--handover", mnt, "--cache-dir", mnt.parent / "file")
        assert mfs.json("status", mnt)["pid"] == pid
        assert (mnt / "llama" / "config.json").read_text() == "{}"
        mfs("umount", mnt)

    def test_in_the_foreground_and_told_to_the_service_manager(
        self, mfs: Mfs, models: Path, mnt: Path, tmp_path: Path
    ) -> None:
        """As under systemd: the manager learns the new main process, and the log goes where it went."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, (tmp_path / "journal").open("wb") as journal:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(DEADLINE_S)
            command = [sys.executable, "-m", "mfs", "mount", str(models), str(mnt), "--foreground", *SMALL]
            environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
            with subprocess.Popen(command, env=environment, stderr=journal) as process:
                assert told(manager).startswith(b"READY=1\n")
                mfs("mount", "--handover", mnt)
                record = runtime.read_record(str(mnt))
                assert record is not None
                said = {told(manager).partition(b"\n")[0] for _ in range(2)}  # by two processes: in either order
                assert said == {f"MAINPID={record.holder_pid}".encode(), b"READY=1"}
                assert process.wait(DEADLINE_S) == 0
            assert f'"pid": {record.pid},' in (tmp_path / "journal").read_text()
            mfs("umount", mnt)
            assert told(manager) == b"STOPPING=1"


def test_umount_ends_no_process_that_a_planted_record_names(
    mfs: Mfs, fake_mount: Callable[..., FakeMount], runtime_dir: Path
) -> None:
    crashed = fake_mount()
    record = crashed.record
    crashed.kill()
    with subprocess.Popen(["sleep", "600"]) as bystander:
        ticks = runtime.process_started_ticks(bystander.pid)
        assert ticks is not None
        lie = replace(record, pid=bystander.pid, pid_started_ticks=ticks)
        (runtime_dir / f"{runtime.mount_hash(record.mountpoint)}.json").write_text(json.dumps(asdict(lie)))
        mfs("umount", "--force", "--timeout", "100ms", crashed.path)
        assert "is not under an mfs mount" in mfs.error("umount", "--force", "--timeout", "100ms", crashed.path)
        assert bystander.poll() is None
        bystander.kill()


class TestSecrets:
    """A token in a URL stands nowhere that anybody looks: record, log, status, list of mounts, settings, errors."""

    @pytest.mark.parametrize("user", ["C4nary", "user:C4nary", "user:C4nary%40"], ids=["user", "password", "quoted"])
    def test_of_a_mount(self, mfs: Mfs, mnt: Path, nginx: NginxServer, runtime_dir: Path, user: str) -> None:
        (nginx.files / "llama").mkdir(parents=True, exist_ok=True)
        (nginx.files / "llama" / "config.json").write_text("{}")
        source, shown = nginx.url.replace("://", f"://{user}@"), nginx.url.replace("://", "://***@")
        said = mfs("mount", source, mnt, "--log-level", "debug", *SMALL).stdout
        assert f"{shown} mounted at" in said
        said += "".join(mfs(*args).stdout for args in [("status",), ("status", mnt), ("config", mnt), ("ls", mnt)])
        said += json.dumps([mfs.json(*args) for args in [("status",), ("status", mnt), ("config", mnt)]])
        said += mfs("stat", mnt / "llama" / "config.json").stdout
        said += Path("/proc/self/mountinfo").read_text()
        for file in runtime_dir.glob("*.[jl]*[nkg]"):  # the record, the lock and the log
            assert file.stat().st_mode & 0o777 == 0o600
            said += file.read_text()
        mfs("umount", mnt)
        said += mfs.error("mount", source + "no/such/", mnt, "--timeout", "1s", *SMALL)
        assert shown in said
        assert "C4nary" not in said

    @pytest.mark.parametrize("endpoint", ["user:C4nary@127.0.0.1:9", "ftp://C4nary@127.0.0.1:9"], ids=["bare", "ftp"])
    def test_of_an_endpoint_that_is_refused(self, mfs: Mfs, mnt: Path, endpoint: str) -> None:
        said = mfs.error("mount", "s3://b", mnt, "--endpoint-url", endpoint, *SMALL)
        assert "expected http://" in said
        assert "C4nary" not in said

    def test_of_settings(self, mfs: Mfs, tmp_path: Path) -> None:
        file = tmp_path / "mfs.toml"
        file.write_text('[sources.a]\nurl="https://h/?sig=C4nary"\nendpoint_url="https://C4nary@h"\ntoken="C4nary"\n')
        said = json.dumps(mfs.json("config", "check", file)) + mfs("config", "check", file).stdout
        file.write_text('[sources.a]\nurl="https://h/"\ntoken=["C4nary"]\n')
        refused = mfs.error("config", "check", file)
        assert "token: is not a string" in refused
        assert "C4nary" not in said + refused


class TestWaiting:
    """For an origin that cannot be asked yet: after two seconds whoever mounts is told, once."""

    def mount(self, mfs: Mfs, mnt: Path, port: int) -> list[str]:
        url = f"http://reader:C4nary@127.0.0.1:{port}/"
        said = mfs("mount", url, mnt, "--timeout", "6s", *SMALL, status=1).stderr.splitlines()
        assert all(line.startswith("mfs: ") and "C4nary" not in line for line in said)
        return said

    def test_that_refuses(self, mfs: Mfs, mnt: Path) -> None:
        waiting, failed = self.mount(mfs, mnt, free_port())
        assert waiting.startswith("mfs: waiting for source http://***@127.0.0.1:")
        assert re.search(r"Connection refused; asked until \d\d:\d\d:\d\d$", waiting)
        assert "given up after" in failed

    def test_that_says_nothing(self, mfs: Mfs, mnt: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            waiting, _ = self.mount(mfs, mnt, silent.getsockname()[1])
        assert re.search(r"(no answer yet|silent for 2.0 s); asked until \d\d:\d\d:\d\d$", waiting)


class TestStart:
    """Of a daemon that fails; the fake fails on demand."""

    def start(self, mnt: Path, url: str) -> list[str]:
        config = MountConfig(mnt, (SourceConfig(url),))
        return start_daemon(config, deadline_s=DEADLINE_S, module="mfs.testing.fake_daemon")

    def test_its_error_is_ours(self, mnt: Path) -> None:
        with pytest.raises(ConfigError, match="s3://x/unreachable is unreachable: check the name"):
            self.start(mnt, "s3://x/unreachable")

    def test_its_crash_is_told_with_its_last_words(self, mnt: Path) -> None:
        with pytest.raises(StoreError, match=r"ended while it started: RuntimeError: a defect \(log: .*\.log\)"):
            self.start(mnt, "s3://x/crash")

    def test_its_silence_ends_it(self, mnt: Path) -> None:
        config = MountConfig(mnt, (SourceConfig("s3://x/silent"),))
        with pytest.raises(StoreError, match=r"not ready after 0\.1 s without a word"):
            start_daemon(config, deadline_s=0.1, module="mfs.testing.fake_daemon")

    def test_a_mount_that_is_kept_is_not_given_up_by_one_that_fails(self, mnt: Path, tmp_path: Path) -> None:
        """It has no time to: it and its holder are killed."""
        code = (
            "import json, os, signal, sys\n"
            f"signal.signal(signal.SIGTERM, lambda *_: open({str(tmp_path / 'given-up')!r}, 'w'))\n"
            "said = json.dumps({'error': {'type': 'StoreError', 'message': f'no, says {os.getpid()}'}})\n"
            "os.write(int(sys.argv[sys.argv.index('--ready-fd') + 1]), said.encode() + b'\\n')\n"
            "while True: signal.pause()\n"
        )
        (tmp_path / "taker.py").write_text(code)
        config = MountConfig(mnt, (SourceConfig("s3://x/y"),))
        with open(os.devnull, "rb") as kept, pytest.raises(StoreError, match=r"no, says \d+") as caught:
            start_daemon(
                config, deadline_s=DEADLINE_S, module="taker", held=[kept.fileno()],
                environment={**os.environ, "PYTHONPATH": str(tmp_path)},
            )  # fmt: skip
        assert not Path("/proc", str(caught.value).rpartition(" ")[2]).exists()
        assert not (tmp_path / "given-up").exists()

    def test_its_warnings_are_returned(self, fake_mount: Callable[..., FakeMount]) -> None:
        assert fake_mount().warnings == ["kernel read-ahead is 128 KiB: run 'sudo something' to raise it"]


def test_foreground_tells_the_service_manager_and_ends_on_sigterm(models: Path, mnt: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE_S)
        command = [sys.executable, "-m", "mfs", "mount", str(models), str(mnt), "--foreground", *SMALL]
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with subprocess.Popen(command, env=environment) as process:
            assert told(manager).startswith(b"READY=1\n")
            record = runtime.read_record(str(mnt))
            assert record is not None
            assert record.holder_pid == process.pid
            assert (mnt / "llama").is_dir()
            process.terminate()
            assert process.wait(DEADLINE_S) == 0
    assert mountinfo.mount_at(str(mnt)) is None
