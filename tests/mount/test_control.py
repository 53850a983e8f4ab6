"""What the shell commands ask of a real daemon: each does what `mfs.control.api` says."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mfs.errors import NotFoundError, StoreError
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from mfs.types import BLOCK_BYTES, CHUNK_BYTES
from tests.mount import origins, touching
from tests.mount.conftest import Mounted

MIB = 1 << 20
FILES = {"a/one.bin": ramp(9 * MIB + 1), "a/two.bin": ramp(5 * MIB, 31), "b/empty": b"", "b/small.txt": b"small"}
TOTAL_BYTES = sum(map(len, FILES.values()))


@pytest.fixture
def mount(folder: origins.FolderOrigin, mounted: Mounted) -> TestMount:
    folder.put_all(FILES)
    return mounted(folder)


def read_all(mount: TestMount) -> None:
    for name, content in FILES.items():
        assert mount.call(touching.read, str(mount.path / name)) == content


def drop_all_pages(mount: TestMount) -> None:
    for name in FILES:
        mount.call(touching.drop_pages, str(mount.path / name))


class TestPrefetch:
    def test_to_ssd(self, mount: TestMount) -> None:
        reports = list(mount.client.prefetch([""], "ssd", wait=True))
        assert reports[-1]["done"] is True
        assert reports[-1]["failed"] == []
        assert reports[-1]["total_bytes"] == reports[-1]["done_bytes"] == TOTAL_BYTES
        assert reports[-1]["files_count"] == len(FILES)
        assert all(a["done_bytes"] <= b["done_bytes"] for a, b in itertools.pairwise(reports))
        for name, content in FILES.items():
            assert mount.client.stat(name)["ssd_bytes"] == len(content)
        before = mount.origin_bytes
        read_all(mount)
        assert mount.origin_bytes == before == TOTAL_BYTES

    def test_to_ram(self, mount: TestMount) -> None:
        assert list(mount.client.prefetch(["a"], "ram", wait=True))[-1]["failed"] == []
        for name in ("a/one.bin", "a/two.bin"):
            assert mount.client.stat(name)["ram_bytes"] == len(FILES[name])
        assert mount.client.stat("b/small.txt")["ram_bytes"] == 0

    def test_without_waiting(self, mount: TestMount) -> None:
        reports = list(mount.client.prefetch(["a/one.bin"], "ssd", wait=False))
        assert reports[-1]["done"] is True
        mount.wait_saved("a/one.bin")

    def test_a_second_time_fetches_nothing(self, mount: TestMount) -> None:
        list(mount.client.prefetch([""], "ssd", wait=True))
        before = mount.origin_bytes
        assert list(mount.client.prefetch([""], "ssd", wait=True))[-1]["done_bytes"] == TOTAL_BYTES
        assert mount.origin_bytes == before

    def test_what_fails_is_named_and_the_rest_is_brought(self, folder: origins.FolderOrigin, mount: TestMount) -> None:
        mount.call(touching.tree, str(mount.path))
        (folder.root / "a/one.bin").unlink()
        done = list(mount.client.prefetch([""], "ssd", wait=True))[-1]
        assert [failed["path"] for failed in done["failed"]] == ["a/one.bin"]
        mount.wait_saved("a/two.bin", "b/small.txt")

    def test_more_than_ram_is_refused(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        with (folder.root / "huge.bin").open("wb") as file:
            file.truncate(1 << 30)
        mount = mounted(folder)
        with pytest.raises(StoreError, match="do not fit"):
            list(mount.client.prefetch(["huge.bin"], "ram", wait=True))

    def test_more_than_the_ssd_budget_stays_within_it(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        files = {f"{number}.bin": ramp(8 * MIB, number) for number in range(6)}
        folder.put_all(files)
        mount = mounted(folder, cache_bytes=20 * MIB)
        assert list(mount.client.prefetch([""], "ssd", wait=True))[-1]["failed"] == []
        assert mount.wait_for(lambda: mount.client.status()["ssd"]["used_bytes"] <= 20 * MIB)
        objects = mount.folder / "cache/v2/objects"
        on_disk = sum(file.stat().st_blocks * 512 for file in objects.rglob("*") if file.is_file())
        assert on_disk <= 20 * MIB
        for name, content in files.items():
            assert mount.call(touching.read, str(mount.path / name)) == content

    def test_closing_the_stream_cancels(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        with (folder.root / "huge.bin").open("wb") as file:
            file.truncate(4 << 30)
        mount = mounted(folder)
        stream = mount.client.prefetch(["huge.bin"], "ssd", wait=True)
        next(stream)
        stream.close()
        mount.wait_quiet()
        assert mount.origin_bytes < 4 << 30


class TestEvict:
    def test_tiers(self, mount: TestMount) -> None:
        read_all(mount)
        mount.wait_saved(*FILES)
        found = mount.client.evict(["a"], "ram")
        assert (found["ssd_bytes"], found["kept_pinned_count"]) == (0, 0)
        assert found["ram_bytes"] > 0
        assert mount.client.stat("a/one.bin")["ram_bytes"] == 0
        assert mount.client.stat("a/one.bin")["ssd_bytes"] == len(FILES["a/one.bin"])
        found = mount.client.evict(["a/one.bin"], "ssd")
        assert found["ssd_bytes"] == len(FILES["a/one.bin"])
        assert mount.client.stat("a/one.bin")["ssd_bytes"] == 0
        assert mount.client.stat("a/two.bin")["ssd_bytes"] == len(FILES["a/two.bin"])
        drop_all_pages(mount)
        before = mount.origin_bytes
        read_all(mount)
        assert mount.origin_bytes == before + len(FILES["a/one.bin"])
        mount.client.evict([""], "all")
        assert mount.client.status()["ssd"]["used_bytes"] == 0
        assert mount.wait_for(lambda: mount.client.status()["ram"]["used_bytes"] == 0)

    def test_while_it_is_read(self, mount: TestMount) -> None:
        reader = mount.outside()
        for _ in range(5):
            reader.start(touching.read, str(mount.path / "a/one.bin"))
            while reader.is_busy():
                mount.client.evict([""], "all")
            assert reader.finish() == FILES["a/one.bin"]
            drop_all_pages(mount)


class TestPin:
    def test_pinned_files_are_kept(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        files = {f"{number}.bin": ramp(8 * MIB, number) for number in range(5)}
        folder.put_all(files)
        mount = mounted(folder, cache_bytes=20 * MIB)
        assert mount.client.pin(["0.bin"]) == {"files_count": 1, "bytes": 8 * MIB}
        assert mount.call(touching.attributes, str(mount.path / "0.bin"))["user.mfs.pinned"] == "1"
        for name, content in files.items():
            assert mount.call(touching.read, str(mount.path / name)) == content
        assert mount.wait_for(lambda: mount.client.status()["ssd"]["used_bytes"] <= 20 * MIB)
        assert mount.client.stat("0.bin")["ssd_bytes"] == 8 * MIB
        assert mount.client.evict(["0.bin"], "all")["kept_pinned_count"] == 1
        assert mount.client.stat("0.bin")["ssd_bytes"] == 8 * MIB
        mount.stop()
        mount.start()
        assert mount.client.stat("0.bin")["pinned"] is True
        mount.client.unpin(["0.bin"])
        assert mount.client.stat("0.bin")["pinned"] is False
        assert mount.client.evict(["0.bin"], "ssd")["ssd_bytes"] == 8 * MIB


class TestVerify:
    def test_finds_and_drops_what_is_bad(self, mount: TestMount) -> None:
        read_all(mount)
        mount.wait_saved(*FILES)
        assert list(mount.client.verify([""]))[-1] == {"done": True, "checked_bytes": TOTAL_BYTES, "bad": []}
        victim = max((mount.folder / "cache/v2/objects").rglob("*"), key=lambda path: path.stat().st_size)  # a/one.bin
        with victim.open("r+b") as file:
            file.seek(CHUNK_BYTES + 1000)
            file.write(b"\0\0\0\0\0\0\0\0")
        done = list(mount.client.verify([""]))[-1]
        assert [(bad["path"], bad["chunk"]) for bad in done["bad"]] == [("a/one.bin", 1)]
        assert mount.client.stat("a/one.bin")["ssd_bytes"] == len(FILES["a/one.bin"]) - BLOCK_BYTES
        drop_all_pages(mount)
        read_all(mount)
        mount.wait_saved(*FILES)
        assert list(mount.client.verify([""]))[-1]["bad"] == []


class TestLooking:
    def test_ls_and_stat(self, mount: TestMount) -> None:
        rows = {row["name"]: row for row in mount.client.ls("")}
        assert {name: row["kind"] for name, row in rows.items()} == {"a": "directory", "b": "directory"}
        [row] = mount.client.ls("a/two.bin")
        assert (row["name"], row["size"], row["kind"]) == ("two.bin", 5 * MIB, "file")
        found = mount.client.stat("a/two.bin")
        outside = mount.call(touching.stat, str(mount.path / "a/two.bin"))
        assert (found["inode"], found["size"]) == (outside["st_ino"], outside["st_size"])
        assert found["chunks_count"] == 2
        mount.call(touching.hold, "h", str(mount.path / "a/two.bin"))
        assert mount.client.stat("a/two.bin")["open_handles"] == 1
        assert mount.client.status()["open_files"] == 1
        mount.call(touching.release, "h")
        assert mount.wait_for(lambda: mount.client.stat("a/two.bin")["open_handles"] == 0)
        for call in (mount.client.ls, mount.client.stat):
            with pytest.raises(NotFoundError, match="a/nothing"):
                call("a/nothing")

    def test_status_counts_what_happens(self, mount: TestMount) -> None:
        before = mount.client.status()
        assert before["origin"]["fetched_bytes"] == before["reads"]["count"] == 0
        assert before["ram"]["slots_count"] == 16
        read_all(mount)
        after = mount.client.status()
        assert after["origin"]["fetched_bytes"] == TOTAL_BYTES
        assert after["reads"]["bytes"] == TOTAL_BYTES
        assert after["reads"]["errors_count"] == 0
        assert len(after["workers"]) == 2

    def test_without_an_ssd_tier(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all(FILES)
        mount = mounted(folder, cache_dir=None)
        read_all(mount)
        assert mount.client.status()["ssd"]["state"] == "off"
        assert mount.client.ls("a")[0]["ssd_bytes"] == 0
        for call in (mount.client.pin, mount.client.unpin):
            with pytest.raises(StoreError, match="--cache-dir"):
                call(["a"])
        with pytest.raises(StoreError, match="--cache-dir"):
            list(mount.client.prefetch(["a"], "ssd", wait=True))
        assert mount.client.evict([""], "all")["ram_bytes"] > 0
        assert not (Path(mount.folder) / "cache").exists()
