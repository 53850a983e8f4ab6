"""A cache directory that vanishes, or whose disk fails, costs the cache, not the readers, and comes back by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import MountFailedError, TestMount
from mfs.types import CHUNK_BYTES
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.mount.test_life import worker_is_gone

_BYTES = 3 * CHUNK_BYTES + 5


def test_reads_go_on_without_the_cache_directory(tmp_path: Path) -> None:
    source = tmp_path / "registry" / "model"
    source.mkdir(parents=True)
    (source / "weights.bin").write_bytes(ramp(_BYTES))
    with TestMount(tmp_path / "m", str(source.parent)) as mount:
        shutil.rmtree(tmp_path / "m" / "cache")
        mount.run("cmp", mount.path / "model" / "weights.bin", source / "weights.bin")
        assert mount.client.status()["reads"]["errors_count"] == 0
        # Said by whoever meets it first: the worker that writes, or the one that looks whether the tier is there.
        assert "without writing to the cache" in mount.log or "cache cannot be written" in mount.log


def test_a_prefetch_to_a_disk_that_takes_nothing_says_so(tmp_path: Path) -> None:
    source = tmp_path / "registry" / "model"
    source.mkdir(parents=True)
    (source / "weights.bin").write_bytes(ramp(_BYTES))
    with TestMount(tmp_path / "m", str(source.parent)) as mount:
        chunks = tmp_path / "m" / "cache" / "v2" / "objects"
        shutil.rmtree(chunks)
        chunks.touch()
        [failed] = list(mount.client.prefetch(["model"], "ssd", wait=True))[-1]["failed"]
        assert failed["path"] == "model/weights.bin"
        assert "could not be written" in failed["error"]
        mount.run("cmp", mount.path / "model" / "weights.bin", source / "weights.bin")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own to keep a cache on, to be made read-only or filled."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "none", place], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


class Trouble:
    """Something that befalls a cache, and its end."""

    def __init__(self, kind: str, disk: Path) -> None:
        self._kind, self._disk, self.cache = kind, disk, disk / "cache"

    def begins(self) -> bool:
        """Whether it has begun: a disk that is being written to cannot become read-only."""
        try:
            self.begin()
        except subprocess.CalledProcessError:
            return False
        return True

    def begin(self) -> None:
        match self._kind:
            case "read-only":
                subprocess.run(["mount", "-o", "remount,ro", self._disk], check=True)
            case "gone":
                self.cache.rename(self._disk / "aside")
            case "no marker, a foreign file":
                (self.cache / "mfs-cache.json").unlink()
                (self.cache / "thesis.tex").touch()
            case "index is no directory":
                shutil.rmtree(self.cache / "v2" / "index")
                (self.cache / "v2" / "index").touch()
            case "others can write to it":
                self.cache.chmod(0o777)
            case "full":
                shutil.rmtree(self.cache / "v2" / "index")
                free_bytes = shutil.disk_usage(self._disk).free
                with (self._disk / "ballast").open("wb") as ballast:
                    os.posix_fallocate(ballast.fileno(), 0, free_bytes)

    def end(self) -> None:
        match self._kind:
            case "read-only":
                subprocess.run(["mount", "-o", "remount,rw", self._disk], check=True)
            case "gone":
                (self._disk / "aside").rename(self.cache)
            case "no marker, a foreign file":
                (self.cache / "thesis.tex").unlink()
            case "index is no directory":
                (self.cache / "v2" / "index").unlink()
            case "others can write to it":
                self.cache.chmod(0o755)
            case "full":
                (self._disk / "ballast").unlink()


def kill_workers(mount: TestMount) -> bool:
    pids = mount.worker_pids
    for pid in pids:
        os.kill(pid, 9)
    return mount.wait_for(lambda: all(map(worker_is_gone, pids)))


@pytest.mark.parametrize(
    "kind",
    ["read-only", "gone", "no marker, a foreign file", "index is no directory", "others can write to it", "full"],
)
def test_workers_that_die_in_cache_trouble_come_back_without_it_and_then_with_it(
    folder: origins.FolderOrigin, mounted: Mounted, disk: Path, kind: str
) -> None:
    files = {"a.bin": ramp(_BYTES), "b.bin": ramp(_BYTES, 5)}
    folder.put_all(files)
    trouble = Trouble(kind, disk)
    mount = mounted(folder, cache_dir=trouble.cache)
    mount.call(touching.read, str(mount.path / "a.bin"))
    mount.wait_saved("a.bin")
    assert mount.wait_for(lambda: kill_workers(mount) and trouble.begins())
    for name, content in files.items():
        mount.call(touching.drop_pages, str(mount.path / name))
        mount.client.evict([name], "ram")
        assert mount.call(touching.read, str(mount.path / name)) == content
    assert mount.wait_for(lambda: mount.client.status()["ssd"]["state"] == "away")
    [warning] = [text for text in mount.client.status()["warnings"] if "SSD" in text]
    assert mount.client.status()["ssd"]["note"] in warning
    trouble.end()
    assert mount.wait_for(lambda: mount.client.status()["ssd"]["state"] == "ok")
    assert not [text for text in mount.client.status()["warnings"] if "SSD" in text]
    assert (mount.log.count("serving without the SSD tier"), mount.log.count("the SSD tier is there again")) == (1, 1)
    mount.wait_saved("b.bin")  # from RAM, without anybody's asking


def test_a_mount_and_a_handover_begin_without_a_disk_that_fails(
    folder: origins.FolderOrigin, mounted: Mounted, disk: Path
) -> None:
    folder.put("a.bin", ramp(_BYTES))
    trouble = Trouble("read-only", disk)
    mount = mounted(folder, cache_dir=trouble.cache)
    mount.stop()
    trouble.begin()
    mount.start()
    assert any("SSD" in warning for warning in mount.ready["warnings"])
    assert mount.call(touching.read, str(mount.path / "a.bin")) == ramp(_BYTES)
    mount.hand_over()
    assert any("SSD" in warning for warning in mount.ready["warnings"])
    assert mount.call(touching.read, str(mount.path / "a.bin")) == ramp(_BYTES)
    trouble.end()
    assert mount.wait_for(lambda: mount.client.status()["ssd"]["state"] == "ok")


def test_what_a_person_got_wrong_is_refused_and_a_handover_to_it_leaves_the_old_one(
    folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
) -> None:
    folder.put("a.bin", ramp(_BYTES))
    foreign, others = tmp_path / "foreign", tmp_path / "others"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    mount = mounted(folder)
    mount.alarms_expected += ["neither empty nor an mfs cache", "others can write to it"]
    with pytest.raises(MountFailedError, match="neither empty nor an mfs cache"):
        mount.hand_over(cache_dir=foreign)
    shutil.copytree(mount.folder / "cache", others)
    others.chmod(0o777)
    with pytest.raises(MountFailedError, match="others can write to it"):
        mount.hand_over(cache_dir=others)
    mount.hand_over(cache_dir=others, cache_shared=True)
    assert mount.call(touching.read, str(mount.path / "a.bin")) == ramp(_BYTES)
