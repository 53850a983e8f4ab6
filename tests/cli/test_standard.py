"""Both commands from places and at terminals that are not what one expects."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mfs.control import mountinfo
from tests.cli.conftest import DEADLINE_S

VERSIONS = [("mfs", "version"), ("gpuload", "--version")]


def run(command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """In a shell, with `mfs` and `gpuload` as the commands of this Python."""
    functions = "".join(f'{name}() {{ "{sys.executable}" -m {name} "$@"; }}\n' for name in ("mfs", "gpuload"))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | options.pop("env", {})
    return subprocess.run(
        ["bash", "-c", functions + command], check=False, capture_output=True, timeout=DEADLINE_S, env=environment,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("command", VERSIONS)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_descriptors(command: tuple[str, str], closed: str) -> None:
    done = run(f"{' '.join(command)} {closed}")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_mount_by_whoever_closed_them_all(tmp_path: Path) -> None:
    """Neither the daemon's words nor its settings end up where an answer was to be printed."""
    (tmp_path / "models" / "llama").mkdir(parents=True)
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    done = run(f"mfs mount {tmp_path}/models {mnt} --ram-size 64M --cache-dir {tmp_path}/cache <&- >&- 2>&-")
    assert done.returncode == 0
    assert mountinfo.mount_at(str(mnt)) is not None
    assert os.listdir(mnt) == ["llama"]
    assert run(f"mfs umount {mnt} <&- >&- 2>&-").returncode == 0


@pytest.mark.parametrize("command", VERSIONS)
@pytest.mark.parametrize("env", [{"PYTHONUNBUFFERED": ""}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_full_output_is_a_failure_in_one_line(command: tuple[str, str], env: dict[str, str]) -> None:
    done = run(f"{' '.join(command)} >/dev/full", env=env)
    assert done.returncode == 1
    said = f"{command[0]}: output cannot be written: No space left on device\n"
    assert done.stderr.decode() == said
    assert run(f"{' '.join(command)} >/dev/full 2>&1").returncode == 1


def test_a_full_standard_error_changes_no_status() -> None:
    assert run("mfs nonsense 2>/dev/full").returncode == 2
    assert run("mfs version 2>/dev/full").returncode == 0


@pytest.mark.parametrize("command", ["mfs mount --help", "gpuload --help", "mfs version"])
def test_a_reader_that_has_seen_enough_is_no_news(command: str) -> None:
    done = run(f"{command} | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 1)  # 0: written before the reader went
    assert done.stderr == b""


class TestNoDirectory:
    """The current directory was removed."""

    @pytest.fixture
    def gone(self, tmp_path: Path) -> str:
        return f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; "

    @pytest.mark.parametrize("command", ["mfs version", "mfs status", "gpuload --version"])
    def test_what_needs_no_directory_works(self, gone: str, command: str) -> None:
        done = run(f"{gone}{command}")
        assert (done.returncode, done.stderr) == (0, b"")

    def test_absolute_paths_work(self, gone: str, tmp_path: Path) -> None:
        for name in ("models", "mnt"):
            (tmp_path / name).mkdir()
        done = run(
            f"{gone} for c in 'mount {tmp_path}/models --ram-size 64M' 'status --json' ls umount;"
            f" do mfs $c {tmp_path}/mnt || exit; done"
        )
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize("command", ["mfs ls", "mfs mount models mnt", "gpuload plan models"])
    def test_relative_ones_are_refused_in_one_line(self, gone: str, command: str) -> None:
        done = run(f"{gone}{command}")
        assert done.returncode in (1, 2)
        (line,) = done.stderr.decode().splitlines()
        assert "internal error" not in line
        assert "directory was removed" in line or line == "gpuload: no such file or folder: models"


NAME = "é模.toml"
C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    ("env", "printed"),
    [
        ({}, "é模".encode()),
        ({"PYTHONIOENCODING": "ascii"}, rb"\xe9\u6a21"),
        ({"PYTHONIOENCODING": "latin-1"}, b"\xe9\\u6a21"),
        ({"PYTHONIOENCODING": "ascii:strict"}, rb"\xe9\u6a21"),
        (C, rb"\xe9\u6a21"),
        (C | {"PYTHONIOENCODING": "utf-8"}, "é模".encode()),
    ],
)
class TestEncodings:
    def test_of_mfs(self, tmp_path: Path, env: dict[str, str], printed: bytes) -> None:
        file = tmp_path / NAME
        file.write_text('[sources.a]\nurl="/m"\n', encoding="utf-8")
        done = run(f"mfs config check {file}; cd {tmp_path}; mfs config check {NAME}x", env=env)
        assert printed + b".toml: good" in done.stdout
        # Python writes escapes to stderr by itself, but for what the terminal can say.
        assert printed + b".tomlx cannot be read" in done.stderr

    def test_of_gpuload(self, tmp_path: Path, env: dict[str, str], printed: bytes) -> None:
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (tmp_path / "é模").mkdir()
        (tmp_path / "é模" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        done = run(f"gpuload plan {tmp_path}/é模", env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"/" + printed + b": 4 B in 1 tensor" in done.stdout


def test_names_of_a_mount_made_under_another_locale(tmp_path: Path) -> None:
    """They are the same bytes as under UTF-8: the daemon and its workers do not go by the locale."""
    (tmp_path / "models").mkdir()
    (tmp_path / "é模").mkdir()
    for name in ("é.txt", "模型.txt"):
        (tmp_path / "models" / name).write_text(name, encoding="utf-8")
    done = run(f"mfs mount {tmp_path}/models {tmp_path}/é模 --ram-size 64M && mfs ls {tmp_path}/é模", env=C)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u6a21\u578b.txt" in done.stdout
    assert sorted(os.listdir(tmp_path / "é模")) == ["é.txt", "模型.txt"]
    assert (tmp_path / "é模" / "模型.txt").read_text(encoding="utf-8") == "模型.txt"
    assert run(f"mfs umount {tmp_path}/é模", env=C).returncode == 0


@pytest.mark.skipif(shutil.which("localedef") is None, reason="makes a locale with localedef")
@pytest.mark.parametrize("command", ["mfs ls", "gpuload plan"])
def test_names_that_a_locale_of_several_bytes_a_character_cannot_read(tmp_path: Path, command: str) -> None:
    """What EUC-JP makes of UTF-8 does not go back to the same bytes."""
    made = subprocess.run(
        ["localedef", "-c", "-i", "ja_JP", "-f", "EUC-JP", tmp_path / "ja_JP.EUC-JP"], capture_output=True, check=False
    )
    if not (tmp_path / "ja_JP.EUC-JP").is_dir():
        pytest.skip(f"no such locale here: {made.stderr!r}")
    done = run(f"{command} {tmp_path}/é模型", env={"LOCPATH": str(tmp_path), "LC_ALL": "ja_JP.EUC-JP"})
    assert done.returncode == 1
    assert "é模型".encode("euc_jp") in done.stderr
    assert b"Traceback" not in done.stderr
