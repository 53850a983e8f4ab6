"""`mfs kserve-init` as KServe calls it: models of a real mount, seen through links where a server looks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs import kserve
from mfs.errors import UsageError
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import touching

FILES = {"prod/llama/w.bin": ramp(300_000), "prod/llama/config.json": b"{}", "prod/lora/a.bin": ramp(1000, 3)}


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestMount]:
    folder = tmp_path_factory.mktemp("kserve")
    for name, content in FILES.items():
        (folder / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "models" / name).write_bytes(content)
    with TestMount(folder / "m", str(folder / "models")) as mount:
        yield mount


def init(mount: TestMount, *arguments: object, timeout: str = "5s") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mfs", "kserve-init", *map(str, arguments), "--timeout", timeout],
        env={**os.environ, "MFS_MOUNTS": str(mount.path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_models_are_where_their_server_looks_without_a_byte_of_them_read(mount: TestMount, tmp_path: Path) -> None:
    place = tmp_path / "mnt" / "models"
    for _ in range(2):  # an init container may be started again
        done = init(mount, "mfs://prod/llama", place, "mfs://prod/lora", place / "lora")
        assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(place)) == ["config.json", "lora", "w.bin"]
    assert mount.origin_bytes < 200_000
    server = mount.outside()
    assert server.call(touching.read, str(place / "w.bin")) == FILES["prod/llama/w.bin"]
    assert server.call(touching.read, str(place / "lora" / "a.bin")) == FILES["prod/lora/a.bin"]
    server.close()


def test_one_file_is_seen_under_its_name(mount: TestMount, tmp_path: Path) -> None:
    assert init(mount, "mfs://prod/llama/w.bin", tmp_path / "x").returncode == 0
    assert os.listdir(tmp_path / "x") == ["w.bin"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["s3://b/x", "X"], 2, "expected mfs://PATH"),
        (["mfs://prod/../../etc", "X"], 2, "without '.' and '..'"),
        (["mfs://prod/%2e%2e/x", "X"], 2, "without '.' and '..'"),
        (["mfs://", "X"], 2, "expected mfs://PATH"),
        (["mfs://prod/llama"], 2, "pairs of a URI and a directory"),
        (["mfs://prod/none", "X"], 1, "no such model in the mount"),
        (["mfs://prod/llama", "/proc/x"], 1, "/proc/x"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    mount: TestMount, tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    done = init(mount, *[str(tmp_path / "x") if each == "X" else each for each in arguments], timeout="200ms")
    assert (done.returncode, words in done.stderr, done.stderr.count("\n")) == (status, True, 1), done.stderr


def test_a_mount_that_is_not_there_is_waited_for_and_said(tmp_path: Path, mount: TestMount) -> None:
    done = init(mount, "mfs://prod/llama", tmp_path / "x", "--mounts", tmp_path, timeout="200ms")
    assert (done.returncode, "mountPropagation: HostToContainer" in done.stderr) == (1, True)


def test_what_is_no_link_of_ours_stays(mount: TestMount, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    done = init(mount, "mfs://prod/llama", tmp_path)
    assert (done.returncode, "no link of ours" in done.stderr) == (1, True)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_paths() -> None:
    assert kserve.model_path("mfs://a/b%20c/", Path("/mnt")) == Path("/mnt/a/b c")
    assert kserve.model_path("mfs:///a", Path("/mnt")) == Path("/mnt/a")
    with pytest.raises(UsageError):
        kserve.model_path("mfs://a?x", Path("/mnt"))
