"""`mfs top` and `mfs page` as a person and a script use them."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mfs.cli.top_view import Watched, render, sparkline
from mfs.control.runtime import find_mount
from tests.cli.conftest import FakeMount, Mfs

FakeMounts = Callable[..., FakeMount]


class TestOnce:
    def test_all_mounts_with_their_models(self, mfs: Mfs, fake_mount: FakeMounts) -> None:
        mounts = [fake_mount("one"), fake_mount("two")]
        said = mfs("top", "--once").stdout
        for mount in mounts:
            assert str(mount.path) in said
            assert f"{mount.path}/llama" in said
        assert "\x1b" not in said

    def test_one_mount_names_models_alone(self, mfs: Mfs, fake_mount: FakeMounts) -> None:
        mount = fake_mount()
        lines = mfs("top", mount.path).stdout.splitlines()  # not a terminal: once
        assert [line.split()[-1] for line in lines if line.endswith(("llama", "minilm"))] == ["llama", "minilm"]

    def test_a_path_below_shows_what_is_there(self, mfs: Mfs, fake_mount: FakeMounts) -> None:
        said = mfs("top", fake_mount() / "llama").stdout
        assert "llama" in said
        assert "minilm" not in said

    def test_a_dead_mount_does_not_hide_the_others(self, mfs: Mfs, fake_mount: FakeMounts) -> None:
        living, dead = fake_mount("one"), fake_mount("two")
        dead.kill()
        said = mfs("top", "--once").stdout
        [line] = [line for line in said.splitlines() if line.startswith(f"{dead.path} ")]
        assert line.split() == [str(dead.path), "dead"]
        assert f"! the mount at {dead.path} is dead: " in said  # in a line of its own, which pushes no column aside
        [row] = [row for row in mfs.json("top")["mounts"] if row["mountpoint"] == str(dead.path)]
        assert row["state"] == "dead"
        assert row["fault"].startswith(f"the mount at {dead.path} is dead")
        assert f"{living.path}/llama" in said

    def test_names_keep_their_room_in_a_narrow_terminal(self, fake_mount: FakeMounts) -> None:
        mount = fake_mount()
        served = find_mount(str(mount.path))
        watched = Watched(served)
        watched.look("name", 10)
        out = Console(width=64, file=io.StringIO())
        with out.capture() as captured:
            out.print(render([watched], "name", rows_max=10, size=out.size))
        lines = [line.rstrip() for line in captured.get().splitlines()]
        assert any(line.endswith(" minilm") for line in lines)
        assert any(line.split() == ["MOUNT", "SSD", "RAM", "FROM", "ORIGIN", "WAITING", "OPEN", "UP"] for line in lines)

    def test_json(self, mfs: Mfs, fake_mount: FakeMounts) -> None:
        mount = fake_mount()
        [row] = mfs.json("top", mount.path)["mounts"]
        assert (row["mountpoint"], row["state"]) == (str(mount.path), "serving")
        assert row["rates"] == {"origin": 0.0, "ssd": 0.0, "ram": 0.0}
        assert [model["path"] for model in row["models"]] == ["llama", "minilm"]
        assert row["overview"]["status"]["pid"] == mount.record.pid

    def test_json_of_all(self, mfs: Mfs, fake_mount: FakeMounts) -> None:
        mount = fake_mount()
        assert str(mount.path) in [row["mountpoint"] for row in mfs.json("top")["mounts"]]  # others may be there too

    def test_wrong_usage(self, mfs: Mfs, tmp_path: Path) -> None:
        assert "--sort" in mfs.error("top", "--sort", "weight", status=2)
        assert "not under an mfs mount" in mfs.error("top", tmp_path)


class TestLive:
    def test_keys_order_and_quit(self, fake_mount: FakeMounts) -> None:
        mount = fake_mount()
        ours, theirs = pty.openpty()
        os.set_inheritable(theirs, True)
        command = [sys.executable, "-m", "mfs", "top", str(mount.path)]
        environment = os.environ | {"TERM": "xterm", "LINES": "40"}
        with (
            subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process,
            contextlib.ExitStack() as stack,
        ):
            os.close(theirs)
            stack.callback(process.kill)  # a test that fails must not wait for it
            wait_for(ours, "by what is going on")
            os.write(ours, b"z")
            wait_for(ours, "by size")
            os.write(ours, b"\x1b[A\x1bOPnq")
            wait_for(ours, "by name", ends=True)
            assert process.wait(20) == 0
        os.close(ours)


def wait_for(terminal: int, words: str, *, ends: bool = False) -> None:
    """Read until these words are shown; and, if it ends, on to the end."""
    seen, until = "", time.monotonic() + 20
    while words not in seen or ends:
        left = until - time.monotonic()
        assert left > 0, seen
        assert select.select([terminal], [], [], left)[0], seen
        try:
            seen += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the other side is closed: pty(7)
            break
    assert words in seen


class TestPage:
    def test_a_mount_without_one_says_how_to_get_it(self, mfs: Mfs, fake_mount: FakeMounts) -> None:
        mount = fake_mount()
        assert "--handover --page-addr" in mfs.error("page", mount.path)

    def test_an_address_for_everybody_is_refused(self, mfs: Mfs, tmp_path: Path) -> None:
        (tmp_path / "mnt").mkdir()
        said = mfs.error("mount", "/tmp", tmp_path / "mnt", "--page-addr", "0.0.0.0:8650")
        assert "can be reached from elsewhere" in said


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([0.0, 0.0], "··"), ([1.0, 8.0, 0.0], "▁█·"), ([1e-9, 1.0], "▁█")],
)
def test_sparkline(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn
