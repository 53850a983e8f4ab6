"""kill -9 of the daemon at any moment: the next mount serves every byte right, and nothing piles up."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mfs.control import runtime
from mfs.testing import ramp
from mfs.testing.mounting import MountFailedError, TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.mount.test_life import worker_is_gone
from tests.servers.liar import LiarServer, Lie

FILES = {"a.bin": ramp((13 << 20) + 3), "b.safetensors": ramp((17 << 20) + 1, 99), "c/d.bin": ramp(200_000, 7)}


def test_kill_in_the_middle_of_fills_many_times(folder: origins.FolderOrigin, tmp_path: Path) -> None:
    folder.put_all(FILES)
    chance = random.Random(7)
    with TestMount(tmp_path / "m", folder.url, workers_count=1) as mount:
        for number in range(15):
            workers = mount.worker_pids
            readers = [mount.outside() for _ in range(2)]
            for reader in readers:
                name = chance.choice(list(FILES))
                reader.start(touching.read, str(mount.path / name))
            # Not a wait for anything: the moment is what varies.
            readers[0].is_busy(for_s=chance.uniform(0, 0.12))
            mount.kill(detach=False)
            for reader in readers:
                try:
                    assert reader.finish() in FILES.values()
                except OSError:
                    pass  # ENOTCONN: the daemon was dead
            assert mount.is_mounted, "a killed daemon leaves a stale mount"
            assert mount.call(touching.failure, "listdir", str(mount.path)) == "ENOTCONN"
            mount.detach()
            mount.close_outsiders()
            assert mount.wait_for(lambda workers=workers: all(map(worker_is_gone, workers))), number
            mount.start()
            if number % 5 == 4:
                for name, content in FILES.items():
                    assert mount.call(touching.read, str(mount.path / name)) == content, (number, name)
                mount.client.evict([""], "all")
        for name, content in FILES.items():
            assert mount.call(touching.read, str(mount.path / name)) == content
        verified = list(mount.client.verify([""]))[-1]
        assert verified["bad"] == []
        assert not list((tmp_path / "m" / "cache").rglob("*.new")), "halves that the kills left are swept"
    assert mount.log.count("is served") == 16


class TestCacheSurvives:
    @pytest.mark.parametrize("end", [TestMount.stop, TestMount.kill])
    def test_what_was_saved_is_read_after_a(
        self, folder: origins.FolderOrigin, mounted: Mounted, end: Callable[[TestMount], None]
    ) -> None:
        folder.put_all(FILES)
        mount = mounted(folder)
        for name in FILES:
            mount.call(touching.read, str(mount.path / name))
        mount.wait_saved(*FILES)
        end(mount)
        mount.start()
        for name, content in FILES.items():
            assert mount.call(touching.read, str(mount.path / name)) == content
        assert mount.origin_bytes == 0

    @pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign", "header", "delete", "directory"])
    def test_damage_to_the_files_of_objects(self, folder: origins.FolderOrigin, mounted: Mounted, damage: str) -> None:
        folder.put_all(FILES)
        mount = mounted(folder)
        for name in FILES:
            mount.call(touching.read, str(mount.path / name))
        mount.wait_saved(*FILES)
        mount.stop()
        files = sorted(path for path in (mount.folder / "cache" / "v2" / "objects").rglob("*") if path.is_file())
        assert len(files) == 2 * len(FILES)  # data and sidecar of each
        for number, file in enumerate(files[::2]):  # of one object the data, of the next the sidecar
            spoil(file if number % 2 else file.with_suffix(".sums"), damage, files[-2])
        mount.start()
        for name, content in FILES.items():
            assert mount.call(touching.read, str(mount.path / name)) == content
        assert mount.origin_bytes > 0
        # and what was refetched is there again
        mount.wait_saved(*FILES) if damage != "directory" else None

    @pytest.mark.parametrize("damage", ["delete", "garbage", "truncate"])
    def test_damage_to_the_tables(self, folder: origins.FolderOrigin, mounted: Mounted, damage: str) -> None:
        folder.put_all(FILES)
        mount = mounted(folder)
        for name in FILES:
            mount.call(touching.read, str(mount.path / name))
        mount.wait_saved(*FILES)
        mount.stop()
        for file in (mount.folder / "cache" / "v2" / "index").rglob("*"):
            if file.is_file():
                match damage:
                    case "delete":
                        file.unlink()
                    case "garbage":
                        file.write_bytes(b"\xff" * file.stat().st_size)
                    case _:
                        os.truncate(file, file.stat().st_size // 3)
        mount.start()
        for name, content in FILES.items():
            assert mount.call(touching.read, str(mount.path / name)) == content
        assert mount.origin_bytes == 0, "the sidecars were good"
        assert mount.client.stat("a.bin")["ssd_bytes"] == len(FILES["a.bin"])


def spoil(file: Path, damage: str, other: Path) -> None:
    size = file.stat().st_size
    match damage:
        case "flip":
            with file.open("r+b") as opened:
                opened.seek(4096 + (size - 4096) // 2)
                byte = opened.read(1)[0]
                opened.seek(-1, 1)
                opened.write(bytes([byte ^ 0x10]))
        case "truncate":
            os.truncate(file, size // 2)
        case "empty":
            os.truncate(file, 0)
        case "foreign":
            file.write_bytes(other.read_bytes())
        case "header":
            with file.open("r+b") as opened:
                opened.write(b"NOTOURS!")
        case "directory":
            file.unlink()
            file.mkdir()
        case _:
            file.unlink()


def test_two_mounts_share_one_cache(folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path) -> None:
    folder.put_all(FILES)
    shared = tmp_path / "shared"
    first = mounted(folder, name="one", cache_dir=shared)
    second = mounted(folder, name="two", cache_dir=shared)
    for name, content in FILES.items():
        assert first.call(touching.read, str(first.path / name)) == content
    first.wait_saved(*FILES)
    for name, content in FILES.items():
        assert second.call(touching.read, str(second.path / name)) == content
    assert second.origin_bytes == 0
    first.kill()
    assert second.call(touching.read, str(second.path / "a.bin")) == FILES["a.bin"]
    third = mounted(folder, name="three", cache_dir=shared)
    assert third.call(touching.read, str(third.path / "b.safetensors")) == FILES["b.safetensors"]
    assert third.origin_bytes == 0


def test_two_mounts_fill_and_evict_one_cache_at_once(
    folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
) -> None:
    files = {f"{number}.bin": ramp((6 << 20) + number, number) for number in range(8)}
    folder.put_all(files)
    # Room for about four of the eight: both evict all the time.
    mounts = [
        mounted(folder, name=name, workers_count=1, cache_dir=tmp_path / "shared", cache_bytes=26 << 20)
        for name in "ab"
    ]
    readers = [mount.outside() for mount in mounts for _ in range(2)]
    chance = random.Random(3)
    for _ in range(6):
        wanted = [chance.choice(list(files)) for _ in readers]
        for number, (reader, name) in enumerate(zip(readers, wanted, strict=True)):
            reader.start(touching.read, str(mounts[number // 2].path / name))
        for reader, name in zip(readers, wanted, strict=True):
            assert reader.finish() == files[name]
        for mount in mounts:
            mount.client.evict([""], "ram")
            for name in files:
                mount.call(touching.drop_pages, str(mount.path / name))
    used = subprocess.run(["du", "-sb", tmp_path / "shared/v2/objects"], capture_output=True, text=True, check=True)
    print("SSD tier after eviction, bytes:", used.stdout.split()[0])


class TestOriginAway:
    """The daemon was killed, and its origin does not answer when the next one begins."""

    def test_what_the_cache_holds_is_mounted_and_the_rest_comes_with_the_origin(
        self, liar: LiarServer, mounted: Mounted
    ) -> None:
        for name, content in FILES.items():
            (liar.files / "m" / name).parent.mkdir(parents=True, exist_ok=True)
            (liar.files / "m" / name).write_bytes(content)
        mount = mounted(liar.url, timeout_s=5)
        mount.alarms_expected.append("no answer|not answer")
        tree = mount.call(touching.tree, str(mount.path))
        for name in ("a.bin", "c/d.bin"):
            mount.call(touching.read, str(mount.path / "m" / name))
        mount.wait_saved("m/a.bin", "m/c/d.bin")
        liar.lie(Lie.SILENCE)
        mount.kill(detach=False)
        mount.start()  # beside the dead mount, which it replaces
        assert any("what the last mount showed" in warning for warning in mount.ready["warnings"])
        assert any("replaced a stale mount" in warning for warning in mount.ready["warnings"])
        assert mount.call(touching.tree, str(mount.path)) == tree
        for name in ("a.bin", "c/d.bin"):
            assert mount.call(touching.read, str(mount.path / "m" / name)) == FILES[name]
        assert mount.call(touching.read_failure, str(mount.path / "m" / "b.safetensors"), 9 << 20) == "EIO"
        assert mount.client.status()["sources"][0]["last_error"]
        liar.tell_truth()
        assert mount.wait_for(lambda: not any("last mount" in text for text in mount.client.status()["warnings"]))
        assert mount.call(touching.read, str(mount.path / "m" / "b.safetensors")) == FILES["b.safetensors"]
        assert mount.call(touching.tree, str(mount.path)) == tree

    def test_a_dead_mount_stays_until_another_can_stand(
        self, liar: LiarServer, mounted: Mounted, tmp_path: Path
    ) -> None:
        (liar.files / "a.bin").write_bytes(FILES["a.bin"])
        mount = mounted(liar.url, timeout_s=4)
        mount.alarms_expected.append(".")
        mount.kill(detach=False)
        shutil.rmtree(mount.folder / "cache")  # nobody knows what the origin has
        liar.lie(Lie.SILENCE)
        with pytest.raises(MountFailedError, match=str(liar.port)):
            mount.start()
        assert mount.is_mounted
        assert mount.call(touching.failure, "listdir", str(mount.path)) == "ENOTCONN"
        liar.tell_truth()
        mount.start()
        assert mount.call(touching.read, str(mount.path / "a.bin")) == FILES["a.bin"]


def test_of_mounts_that_are_gone_the_runtime_directory_keeps_nothing(
    folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
) -> None:
    folder.put_all(FILES)
    shared = {"MFS_RUNTIME_DIR": str(tmp_path / "run")}
    ended, killed, living = (mounted(folder.url, name=name, env=shared, workers_count=1) for name in ("e", "k", "l"))
    run = tmp_path / "run"

    def names(mount: TestMount) -> list[str]:
        stem = runtime.mount_hash(str(mount.path))
        return sorted(path.suffix for path in run.glob(f"{stem}.*"))

    ended.stop()
    assert names(ended) == []
    killed.kill()
    (run / f"{runtime.mount_hash(str(killed.path))}.log").touch()
    assert ".lock" in names(killed)
    here = names(living)
    ended.start()  # the next mount, wherever, takes away what the killed one left, other than a log of today
    assert names(killed) == [".log"]
    assert names(living) == here
    living.hand_over()
    assert ".lock" in names(living), "the new daemon holds it"
    living.stop()
    assert names(living) == []
