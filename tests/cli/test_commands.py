"""Each command against a daemon on a real socket, whose mount hangs whoever touches it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import DEADLINE_S, FakeMount, Mfs

MODEL = "llama/model-00001-of-00002.safetensors"


def test_ls_aligns_and_tells_what_is_resident(mfs: Mfs, mnt: FakeMount) -> None:
    assert mfs("ls", mnt / "llama").stdout.splitlines() == [
        " SIZE    SSD   RAM  PIN  MODIFIED          NAME",
        "712 B  100 %             2023-11-14 22:13  config.json",
        "9.0 M   44 %  44 %       2023-11-14 22:13  model-00001-of-00002.safetensors",
        "5.0 M                    2023-11-14 22:13  model-00002-of-00002.safetensors",
    ]
    lines = mfs("ls", mnt.path).stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["llama/", "minilm/"]


def test_ls_of_several_paths_and_of_files(mfs: Mfs, mnt: FakeMount) -> None:
    text = mfs("ls", mnt / "minilm", mnt / MODEL).stdout
    blocks = text.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [f"{mnt.path}/minilm:", f"{mnt.path}/{MODEL}:"]
    assert "pin" in blocks[0]
    assert "naïve name\\u202e.txt" in text  # the override never reaches the terminal


def test_ls_without_a_path_is_the_current_directory(mfs: Mfs, mnt: FakeMount) -> None:
    mfs.error("ls")
    # A directory inside the mount cannot be entered here (the mount hangs), but a link leads there all the same.
    link = mnt.path.parent / "link"
    link.symlink_to(mnt.path / "llama")
    assert "config.json" in mfs("ls", "link", cwd=link.parent).stdout


def test_json_of_ls_and_stat_is_exact_and_stable(mfs: Mfs, mnt: FakeMount) -> None:
    rows = mfs.json("ls", mnt / "llama", mnt / MODEL)
    assert [row["path"] for row in rows[1:]] == [
        mnt / MODEL,
        mnt / "llama/model-00002-of-00002.safetensors",
        mnt / MODEL,
    ]
    assert set(rows[0]) == {"name", "kind", "size", "mtime", "ssd_bytes", "ram_bytes", "pinned", "path"}
    assert (rows[1]["size"], rows[1]["ssd_bytes"]) == (9 << 20, 4 << 20)
    (found,) = mfs.json("stat", mnt / MODEL)
    assert set(found) == {
        "path", "kind", "size", "mtime", "inode", "source", "source_path", "revision", "digest", "model_revision",
        "ssd_bytes", "ram_bytes", "pinned", "chunks_count", "open_handles",
    }  # fmt: skip
    assert found["path"] == mnt / MODEL


def test_stat_for_people(mfs: Mfs, mnt: FakeMount) -> None:
    text = mfs("stat", mnt / MODEL, mnt / "llama").stdout
    assert "Size:      9.0 M (9,437,184 bytes, 3 chunks)\n" in text
    assert "On SSD:    4.0 M (4,194,304 bytes, 44 %)\n" in text
    assert "Digest:" not in text
    assert text.count("Path:") == 2


def test_prefetch_evict_pin_and_verify(mfs: Mfs, mnt: FakeMount) -> None:
    assert mfs("prefetch", mnt / "llama").stdout == "3 files, 14.0 M now in the SSD tier (at once)\n"
    answer = mfs.json("prefetch", mnt / MODEL, "--tier", "ram")
    assert answer.pop("elapsed_s") >= 0
    assert answer == {
        "files_count": 1, "total_bytes": 9 << 20, "done_bytes": 9 << 20, "failed": [], "tier": "ram", "waited": True,
    }  # fmt: skip
    assert mfs("prefetch", "--no-wait", mnt / "llama").stdout.startswith("3 files, 14.0 M queued")
    assert mfs("pin", mnt / MODEL).stdout == "1 file pinned, 9.0 M\n"
    assert mfs("evict", mnt / "llama").stdout.splitlines() == [
        "3 files evicted: 5.0 M on SSD, 9.0 M in RAM freed",
        "1 pinned file kept; 'mfs unpin' first",
    ]
    assert mfs.json("unpin", mnt / MODEL) == {"files_count": 1, "bytes": 9 << 20}
    assert mfs.json("evict", mnt / MODEL, "--tier", "ssd")["ssd_bytes"] == 9 << 20
    assert mfs("verify", mnt.path).stdout == "3.0 M checked: all good\n"
    assert mfs.json("verify", mnt / "llama") == {"checked_bytes": 0, "bad": []}
    assert mfs("refresh", mnt.path).stdout == f"{mnt.path}: 0 added, 0 changed, 0 removed\n"


def test_paths_in_two_mounts_at_once(mfs: Mfs, fake_mount: Callable[..., FakeMount]) -> None:
    a, b = fake_mount("a"), fake_mount("b b")
    assert mfs.json("prefetch", a / "llama", b / "llama", a / "minilm")["files_count"] == 8
    assert mfs("refresh", a.path, b.path).stdout.count("0 added") == 2
    assert {row["mountpoint"] for row in mfs.json("status")} >= {str(a.path), str(b.path)}


def test_a_missing_path_is_one_line(mfs: Mfs, mnt: FakeMount) -> None:
    for command in ("ls", "stat", "prefetch", "pin", "evict", "verify"):
        assert "no/such does not exist" in mfs.error(command, mnt / "no/such")


def test_status_shows_one_mount(mfs: Mfs, mnt: FakeMount) -> None:
    text = mfs("status", mnt.path).stdout
    assert text.startswith(f"{mnt.path}  up ")
    assert "s3://models/prod" in text
    assert "7.0 M of 100 G" in text
    assert all(line == line.rstrip() and len(line) <= 4096 for line in text.splitlines())
    status = mfs.json("status", mnt / "llama")
    assert (status["pid"], status["ssd"]["used_bytes"]) == (mnt.record.pid, (7 << 20) + 712)


def test_status_lists_mounts_also_those_that_hang_or_are_dead(mfs: Mfs, fake_mount: Callable[..., FakeMount]) -> None:
    dead, good = fake_mount("dead"), fake_mount("good")
    pid = dead.record.pid
    dead.kill()
    rows = {row["mountpoint"]: row for row in mfs.json("status")}
    assert rows[str(dead.path)]["state"] == "dead"
    assert (rows[str(dead.path)]["pid"], rows[str(dead.path)]["status"]) == (pid, None)
    assert rows[str(good.path)]["state"] == "serving"
    assert set(rows[str(good.path)]) == {"mountpoint", "state", "pid", "started_at", "sources", "log_file", "status"}
    lines = mfs("status").stdout.splitlines()
    assert lines[0].split() == ["MOUNT", "STATE", "UP", "PID", "SSD", "RAM", "SOURCES"]
    assert any(str(dead.path) in line and "dead" in line for line in lines)


def test_a_daemon_that_is_stopped_does_not_hang_the_list(mfs: Mfs, mnt: FakeMount) -> None:
    os.kill(mnt.record.pid, signal.SIGSTOP)
    try:
        (row,) = [row for row in mfs.json("status") if row["mountpoint"] == str(mnt.path)]
        assert row["state"] == "not answering"
    finally:
        os.kill(mnt.record.pid, signal.SIGCONT)


def test_commands_say_that_a_mount_is_dead(mfs: Mfs, mnt: FakeMount) -> None:
    pid = mnt.record.pid
    mnt.kill()
    assert f"the mount at {mnt.path} is dead: its daemon (pid {pid}) has ended" in mfs.error("ls", mnt.path)


def test_config_can_be_read_and_used_again(mfs: Mfs, mnt: FakeMount, tmp_path: Path) -> None:
    text = mfs("config", mnt.path).stdout
    assert 'token = "***"' in text
    assert mfs("config", "show", mnt.path).stdout == text
    assert mfs.json("config", mnt.path)["ram_bytes"] == 64 << 20
    file = tmp_path / "again.toml"
    file.write_text(text.replace("# at the root of the mount", "[sources.prod]"))
    done = mfs("config", "check", file)
    assert done.stdout == f"{file}: good, 1 source (prod), to be mounted at {mnt.path}\n"
    assert mfs.json("config", "check", file)["cache_bytes"] == 100 << 30


def test_config_check_names_what_is_wrong(mfs: Mfs, tmp_path: Path) -> None:
    file = tmp_path / "mfs.toml"
    file.write_text('[mount]\ncache_sise = "1G"\n')
    assert "has no key 'cache_sise': did you mean 'cache_size'?" in mfs.error("config", "check", file)
    file.write_text('[sources.a]\nurl = "/data"\n')
    assert "good, 1 source (a), no mountpoint" in mfs("config", "check", file).stdout


def test_a_cache_is_read_without_its_daemon(mfs: Mfs, tmp_path: Path) -> None:
    assert "holds no mfs cache" in mfs.error("status", "--cache-dir", tmp_path)


@pytest.fixture
def terminal() -> tuple[int, int]:
    return pty.openpty()


def read_until(fd: int, text: bytes) -> bytes:
    """Everything shown on a terminal until `text` appears; the test's own timeout is the deadline."""
    shown = b""
    while text not in shown:
        shown += os.read(fd, 65536)
    return shown


def test_an_interrupted_prefetch_stops_the_work(
    fake_mount: Callable[..., FakeMount], terminal: tuple[int, int]
) -> None:
    """Also that there is a bar on a terminal, with bytes and the file's name."""
    mnt = fake_mount(url="s3://models/stuck")
    ours, theirs = terminal
    command = [sys.executable, "-m", "mfs", "prefetch", mnt / "minilm"]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        read_until(ours, b"fetching")
        process.send_signal(signal.SIGINT)
        read_until(ours, b"mfs: interrupted")
        assert process.communicate(timeout=DEADLINE_S)[0] == ""
        assert process.returncode == 130
    os.close(ours)


def test_progress_off_a_terminal_is_plain_lines(mnt: FakeMount, capsys: pytest.CaptureFixture[str]) -> None:
    from mfs.cli import progress

    updates = [{"total_bytes": 100 << 20, "done_bytes": n << 20, "files_count": 1, "path": "a/b"} for n in (0, 50)]
    last = {"done": True, "total_bytes": 100, "done_bytes": 100, "files_count": 1, "failed": []}
    assert progress.follow(iter([*updates, last]), "fetching") == last
    assert capsys.readouterr().err == ""  # too quick for a line
    line = progress._line(updates[1], "fetching", 10.0)
    assert line == "fetching 50.0 M of 100 M (50 %), 5.0 M/s, 10s left"


def test_watch_ends_with_the_mount(mfs: Mfs, mnt: FakeMount, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    command = [sys.executable, "-m", "mfs", "status", "--watch", str(mnt.path)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs) as process:
        read_until(ours, b"open files")
        process.send_signal(signal.SIGINT)
        read_until(ours, b"mfs: interrupted")
        assert process.wait(DEADLINE_S) == 130
    os.close(ours)
    os.close(theirs)


def test_the_fake_gave_its_warnings(mnt: FakeMount) -> None:
    assert json.dumps(mnt.warnings).startswith('["kernel read-ahead')
