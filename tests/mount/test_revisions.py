"""Each open file is one object version: the origin may change, a reader gets old bytes or ESTALE, never a mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.chaos import ChaosProxy
from tests.servers.swift import SwiftServer

SIZE = (9 << 20) + 17
OLD, NEW = ramp(SIZE), ramp(SIZE, 100)
OTHER_SIZE = ramp(SIZE + 5_000, 57)


def outcomes(mount: TestMount, name: str) -> set[str]:
    """What reads all over a held file give: 'old', 'ESTALE', and hopefully nothing else."""
    found = set()
    for offset in range(0, SIZE, 1 << 20):
        got = mount.call(touching.held_outcome, name, offset, 4_096)
        found.add("old" if got == OLD[offset : offset + 4_096] else got if isinstance(got, str) else "other bytes")
    return found


class TestChangedObjects:
    @pytest.mark.parametrize("new", [NEW, OTHER_SIZE], ids=["same size", "other size"])
    def test_an_open_file_keeps_its_bytes_or_is_stale(
        self, origin: origins.Origin, mounted: Mounted, new: bytes
    ) -> None:
        origin.put_all({"m/w.bin": OLD, "m/other": b"1"})
        mount = mounted(origin)
        path = str(mount.path / "m/w.bin")
        inode = mount.call(touching.hold, "old", path)
        assert mount.call(touching.held_read, "old", 0, 4_096) == OLD[:4_096]
        origin.put_all({"m/w.bin": new, "m/other": b"1"})
        assert outcomes(mount, "old") <= {"old", "ESTALE"}
        assert mount.call(touching.held_read, "old", 0, 4_096) == OLD[:4_096]
        mount.client.refresh()
        assert mount.wait_for(lambda: mount.call(touching.stat, path)["st_ino"] != inode)
        assert mount.call(touching.read, path) == new
        assert outcomes(mount, "old") <= {"old", "ESTALE"}
        assert mount.call(touching.held_size, "old") == SIZE
        mount.call(touching.release, "old")
        assert mount.call(touching.read, str(mount.path / "m/other")) == b"1"

    def test_a_cached_file_stays_readable_through_its_old_handle(
        self, origin: origins.Origin, mounted: Mounted
    ) -> None:
        origin.put_all({"w.bin": OLD})
        mount = mounted(origin)
        path = str(mount.path / "w.bin")
        assert mount.call(touching.read, path) == OLD
        mount.wait_saved("w.bin")
        mount.call(touching.hold, "old", path)
        mount.call(touching.drop_pages, path)
        mount.client.evict([""], "ram")
        origin.put_all({"w.bin": NEW})
        mount.client.refresh()
        assert mount.wait_for(lambda: mount.call(touching.read, path) == NEW)
        assert outcomes(mount, "old") == {"old"}

    def test_a_stale_read_makes_the_mount_look_again_by_itself(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put("w.bin", OLD)
        mount = mounted(folder)
        path = str(mount.path / "w.bin")
        mount.call(touching.hold, "old", path)
        folder.put("w.bin", NEW)
        assert mount.call(touching.held_outcome, "old", 5_000_000, 4_096) == "ESTALE"
        assert mount.wait_for(lambda: mount.call(touching.read_failure, path) == "")
        assert mount.call(touching.read, path) == NEW

    def test_a_mapping_of_a_changed_file_has_old_pages(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", OLD)
        mount = mounted(folder)
        path = str(mount.path / "w.bin")
        assert mount.call(touching.read, path) == OLD
        mount.call(touching.hold_map, "map", path)
        folder.put("w.bin", NEW)
        mount.client.refresh()
        assert mount.wait_for(lambda: mount.call(touching.read, path) == NEW)
        assert mount.call(touching.held_map, "map", 0, SIZE) == OLD


class TestRefresh:
    def test_publishes_what_changed_and_says_how_much(self, origin: origins.Origin, mounted: Mounted) -> None:
        origin.put_all({"a/changed": ramp(100), "a/removed": b"x", "a/same": b"s", "b/untouched": b"u"})
        mount = mounted(origin)

        def stats() -> dict[str, dict[str, int]]:
            return {
                name: mount.call(touching.stat, str(mount.path / name))
                for name in ("a", "a/changed", "a/same", "b", "b/untouched")
            }

        before = stats()
        for name in ("a/removed", "a/same", "b/untouched"):
            assert mount.call(touching.read_failure, str(mount.path / name)) == ""
        assert mount.call(touching.failure, "stat", str(mount.path / "a/added")) == "ENOENT"
        origin.put_all({"a/changed": ramp(101, 9), "a/added": b"+", "a/same": b"s", "b/untouched": b"u"})
        found = mount.client.refresh()
        assert found == {"changed_count": 1, "added_count": 1, "removed_count": 1, "errors": []}
        assert mount.wait_for(lambda: stats()["a"]["st_mtime_ns"] > before["a"]["st_mtime_ns"])
        after = stats()
        assert after["a/changed"]["st_ino"] != before["a/changed"]["st_ino"]
        assert after["a/changed"]["st_size"] == 101
        for name in ("a/same", "b", "b/untouched"):
            assert after[name] == before[name], name
        assert after["a"]["st_ino"] == before["a"]["st_ino"]
        assert mount.call(touching.list_names, str(mount.path / "a")) == ["added", "changed", "same"]
        assert mount.call(touching.failure, "stat", str(mount.path / "a/removed")) == "ENOENT"
        assert mount.call(touching.read, str(mount.path / "a/changed")) == ramp(101, 9)
        assert mount.call(touching.read, str(mount.path / "a/added")) == b"+"
        assert mount.client.refresh() == {"changed_count": 0, "added_count": 0, "removed_count": 0, "errors": []}

    def test_a_removed_folder_is_no_error(self, origin: origins.Origin, mounted: Mounted) -> None:
        origin.put_all({"gone/deep/er/x": b"1", "gone/y": b"2", "stays": b"3"})
        mount = mounted(origin)
        assert len(mount.call(touching.tree, str(mount.path))) == 3
        origin.put_all({"stays": b"3"})
        if isinstance(origin, origins.FolderOrigin | origins.WebOrigin):
            origin.remove_empty_folders()
        found = mount.client.refresh()
        assert found["errors"] == []
        assert mount.wait_for(lambda: mount.call(touching.list_names, str(mount.path)) == ["stays"])
        deep = str(mount.path / "gone/deep")  # the kernel is told of names by a thread
        assert mount.wait_for(lambda: mount.call(touching.failure, "stat", deep) == "ENOENT")

    def test_a_file_becomes_a_folder_and_back(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("x", b"file")
        mount = mounted(folder)
        path = str(mount.path / "x")
        assert mount.call(touching.read, path) == b"file"
        folder.put_all({})
        folder.put("x/inner", b"inner")
        mount.client.refresh()
        assert mount.wait_for(lambda: mount.call(touching.failure, "stat", f"{path}/inner") == "")
        assert mount.call(touching.read, f"{path}/inner") == b"inner"
        folder.put_all({})
        folder.remove_empty_folders()
        folder.put("x", b"file again")
        mount.client.refresh()
        assert mount.wait_for(lambda: mount.call(touching.read_failure, path) == "")
        assert mount.call(touching.read, path) == b"file again"

    def test_by_itself_every_second(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("a", b"old")
        mount = mounted(folder, refresh_s=1.0)
        assert mount.call(touching.read, str(mount.path / "a")) == b"old"
        folder.put("a", b"new")
        folder.put("b", b"added")
        assert mount.wait_for(lambda: mount.call(touching.list_names, str(mount.path)) == ["a", "b"])
        assert mount.wait_for(lambda: mount.call(touching.read, str(mount.path / "a")) == b"new")

    def test_a_source_that_fails_keeps_its_tree(
        self, swift: SwiftServer, s3_bucket: str, mounted: Mounted, chaos: Callable[[str], ChaosProxy]
    ) -> None:
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all({"m/a": b"1", "m/b": ramp(5_000)})
        proxy = chaos(swift.endpoint)
        origin.source = {"endpoint_url": proxy.url}
        mount = mounted(origin, timeout_s=2)
        before = mount.call(touching.tree, str(mount.path))
        proxy.stop()
        found = mount.client.refresh()
        assert len(found["errors"]) >= 1
        assert found["removed_count"] == found["changed_count"] == 0
        assert mount.client.status()["sources"][0]["last_error"] == found["errors"][0]
        assert mount.call(touching.tree, str(mount.path)) == before == {"m/a": 1, "m/b": 5_000}
        proxy.start()
        assert mount.client.refresh()["errors"] == []
        assert mount.client.status()["sources"][0]["last_error"] is None
        assert mount.call(touching.read, str(mount.path / "m/b")) == ramp(5_000)

    def test_an_emptied_source_keeps_or_empties_its_tree_but_never_mixes(
        self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
    ) -> None:
        folder.put("a", b"1")
        mount = mounted(folder)
        assert mount.call(touching.list_names, str(mount.path)) == ["a"]
        folder.root.rename(tmp_path / "moved")
        found = mount.client.refresh()
        assert len(found["errors"]) == 1
        assert mount.call(touching.list_names, str(mount.path)) == ["a"]
        (tmp_path / "moved").rename(folder.root)
        assert mount.client.refresh()["errors"] == []
        assert mount.call(touching.read, str(mount.path / "a")) == b"1"
