"""kill -9 of the daemon at any moment: the next mount serves every byte right, and nothing piles up."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.mount.test_life import worker_is_gone

FILES = {"a.bin": ramp((13 << 20) + 3), "b.safetensors": ramp((17 << 20) + 1, 99), "c/d.bin": ramp(200_000, 7)}


def temporary_files(cache: Path) -> list[Path]:
    return list(cache.rglob("*.tmp"))


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
        assert len(temporary_files(tmp_path / "m" / "cache")) <= 15 * 6
        for name, content in FILES.items():
            assert mount.call(touching.read, str(mount.path / name)) == content
        verified = list(mount.client.verify([""]))[-1]
        assert verified["bad"] == []
    assert mount.log.count("is served") == 16


class TestCacheSurvives:
    def test_restart(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all(FILES)
        mount = mounted(folder)
        for name in FILES:
            mount.call(touching.read, str(mount.path / name))
        mount.wait_saved(*FILES)
        mount.stop()
        mount.start()
        for name, content in FILES.items():
            assert mount.call(touching.read, str(mount.path / name)) == content
        assert mount.origin_bytes == 0

    def test_kill(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all(FILES)
        mount = mounted(folder)
        for name in FILES:
            mount.call(touching.read, str(mount.path / name))
        mount.wait_saved(*FILES)
        mount.kill()
        mount.start()
        for name, content in FILES.items():
            assert mount.call(touching.read, str(mount.path / name)) == content
        assert mount.origin_bytes == 0

    @pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign", "header", "delete", "directory"])
    def test_damage_to_chunk_files(self, folder: origins.FolderOrigin, mounted: Mounted, damage: str) -> None:
        folder.put_all(FILES)
        mount = mounted(folder)
        for name in FILES:
            mount.call(touching.read, str(mount.path / name))
        mount.wait_saved(*FILES)
        mount.stop()
        chunks = sorted(path for path in (mount.folder / "cache" / "v1" / "chunks").rglob("*") if path.is_file())
        assert len(chunks) == 4 + 5 + 1
        for chunk in chunks[::2]:
            spoil(chunk, damage, chunks[1])
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
        for file in (mount.folder / "cache" / "v1" / "index").rglob("*"):
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
        assert mount.origin_bytes == 0, "the chunk files were good"
        assert mount.client.stat("a.bin")["ssd_bytes"] == len(FILES["a.bin"])


def spoil(chunk: Path, damage: str, other: Path) -> None:
    size = chunk.stat().st_size
    match damage:
        case "flip":
            with chunk.open("r+b") as file:
                file.seek(4096 + (size - 4096) // 2)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 0x10]))
        case "truncate":
            os.truncate(chunk, size // 2)
        case "empty":
            os.truncate(chunk, 0)
        case "foreign":
            chunk.write_bytes(other.read_bytes())
        case "header":
            with chunk.open("r+b") as file:
                file.write(b"NOTOURS!")
        case "directory":
            chunk.unlink()
            chunk.mkdir()
        case _:
            chunk.unlink()


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
    used = subprocess.run(["du", "-sb", tmp_path / "shared/v1/chunks"], capture_output=True, text=True, check=True)
    print("SSD tier after eviction, bytes:", used.stdout.split()[0])
