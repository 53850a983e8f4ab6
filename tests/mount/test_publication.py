"""What a server that watches a tree sees of it: whole models, times that tell each change and nothing else.

A *stamp* is what Triton compares: the latest mtime or ctime of a tree, in nanoseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.chaos import ChaosProxy
from tests.servers.hub import HubServer
from tests.servers.liar import LiarServer, Lie
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

MODEL = {"m/config.pbtxt": b"v1", "m/1/model.py": b"one", "m/1/w.safetensors": ramp(300_000)}
VERSION_2 = {"m/2/model.py": b"two", "m/2/w.safetensors": ramp(300_000, 5)}
OTHER = {"other/config.pbtxt": b"o", "other/1/model.py": b"o"}
OLD_NS = 10**18


def times(mount: TestMount) -> dict[str, tuple[int, int, int]]:
    """(inode, mtime, ctime) of everything below the root, and of the root."""
    return mount.call(touching.all_times, str(mount.path))


def stamp(mount: TestMount, model: str = "m") -> int:
    """What Triton remembers of a model."""
    found = [pair for path, (_, *pair) in times(mount).items() if path == model or path.startswith(f"{model}/")]
    return max(max(pair) for pair in found)


def without_inodes(found: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int]]:
    return {path: (mtime_ns, ctime_ns) for path, (_, mtime_ns, ctime_ns) in found.items()}


def shown_soon(mount: TestMount, condition: Callable[[], bool]) -> None:
    """The kernel believes a directory's attributes for a second."""
    assert mount.wait_for(condition), times(mount)


class TestTimes:
    def test_move_forward_at_each_visible_change_and_at_no_other_time(
        self, origin: origins.Origin, mounted: Mounted
    ) -> None:
        """Version added, removed (the rollback), renamed, configuration edited, back to what was there at first."""
        renamed = {path.replace("m/1/", "m/5/"): content for path, content in MODEL.items()}
        origin.put_all(MODEL | OTHER)
        mount = mounted(origin)
        last, other = stamp(mount), stamp(mount, "other")
        for files in (MODEL | VERSION_2, MODEL, renamed, MODEL | {"m/config.pbtxt": b"v2"}, MODEL):
            origin.put_all(files | OTHER)
            if isinstance(origin, origins.FolderOrigin | origins.WebOrigin):
                origin.remove_empty_folders()
            assert mount.client.refresh()["errors"] == []
            shown_soon(mount, lambda: stamp(mount) > last)  # noqa: B023
            before = times(mount)
            assert set(files_of(before)) == set(files | OTHER)
            last = stamp(mount)
            assert mount.client.refresh()["changed_count"] == 0
            assert times(mount) == before
        assert stamp(mount, "other") == other

    def test_are_the_same_after_a_remount_and_move_on_from_there(
        self, origin: origins.Origin, mounted: Mounted
    ) -> None:
        """What changed while mounted keeps its time; what changes while unmounted is later than all before."""
        origin.put_all(MODEL)
        mount = mounted(origin)
        stamp(mount)
        origin.put_all(MODEL | VERSION_2 | {"m/config.pbtxt": b"v2"})
        mount.client.refresh()
        shown_soon(mount, lambda: "m/2/model.py" in times(mount))
        shown_soon(mount, lambda: times(mount) == times(mount))
        before = times(mount)
        mount.stop()
        mount.start()
        assert without_inodes(times(mount)) == without_inodes(before)
        last = stamp(mount)
        mount.stop()
        origin.put_all(MODEL | {"m/config.pbtxt": b"v2"})
        if isinstance(origin, origins.FolderOrigin | origins.WebOrigin):
            origin.remove_empty_folders()
        mount.start()
        assert stamp(mount) > last

    def test_of_equal_bytes_put_again_stay(self, swift: SwiftServer, s3_bucket: str, mounted: Mounted) -> None:
        """The store has a new date for them; the version is the same. Over a remount too."""
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all(MODEL)
        mount = mounted(origin)
        before = times(mount)
        mount.stop()
        again = origins.S3Origin(swift, s3_bucket)
        head = again.client.head_object(Bucket=s3_bucket, Key="models/prod/m/config.pbtxt")
        assert mount.wait_for(lambda: put_later(again, head["LastModified"]))
        mount.start()
        assert without_inodes(times(mount)) == without_inodes(before)

    @pytest.mark.parametrize("new_date_ns", [OLD_NS, None], ids=["older date", "same date"])
    def test_of_retrained_weights_of_equal_size(
        self, folder: origins.FolderOrigin, mounted: Mounted, new_date_ns: int | None
    ) -> None:
        """The file has its source's date, or, if that stayed the same, the publication's; the stamp moves forward."""
        folder.put_all(MODEL)
        path = folder.root / "m/1/w.safetensors"
        old_ns = path.stat().st_mtime_ns
        mount = mounted(folder)
        before, last = times(mount), stamp(mount)
        temporary = folder.root.with_name("new")
        temporary.write_bytes(ramp(300_000, 77))
        os.utime(temporary, ns=(new_date_ns or old_ns, new_date_ns or old_ns))
        temporary.rename(path)
        assert mount.client.refresh()["changed_count"] == 1
        shown_soon(mount, lambda: stamp(mount) > last)
        after = times(mount)
        inode, mtime_ns, _ = after["m/1/w.safetensors"]
        assert inode != before["m/1/w.safetensors"][0]
        if new_date_ns:
            assert mtime_ns == new_date_ns
        else:
            assert mtime_ns > old_ns
        assert mount.call(touching.read, str(mount.path / "m/1/w.safetensors")) == ramp(300_000, 77)
        mount.stop()
        mount.start()
        assert without_inodes(times(mount)) == without_inodes(after)

    def test_of_files_without_a_date_tell_versions_apart_on_every_mount(self, hub: HubServer, mounted: Mounted) -> None:
        origin = origins.HubOrigin(hub)
        origin.put_all(MODEL)
        first = mounted(origin, name="1", cache_dir=None)
        second = mounted(origin, name="2", cache_dir=None)
        before = times(first)
        assert without_inodes(times(second)) == without_inodes(before)
        origin.put_all(MODEL | {"m/config.pbtxt": b"v2"})
        first.client.refresh()
        shown_soon(first, lambda: times(first)["m/config.pbtxt"] != before["m/config.pbtxt"])
        assert times(first)["m/config.pbtxt"][1] != before["m/config.pbtxt"][1]

    def test_survive_a_record_that_is_damaged(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all(MODEL)
        mount = mounted(folder)
        stamp(mount)
        mount.stop()
        (mount.folder / "cache/v2/tree.sqlite").write_bytes(b"no database, but long enough to be taken for one" * 100)
        mount.start()
        assert set(files_of(times(mount))) == set(MODEL)
        assert "tree.sqlite" in mount.log


def put_later(origin: origins.S3Origin, than: object) -> bool:
    """Whether the same bytes, put again, have a later date by now."""
    origin.put_all(MODEL)
    origin._known.clear()
    found = origin.client.head_object(Bucket=origin.bucket, Key="models/prod/m/config.pbtxt")
    return bool(found["LastModified"] > than)


def files_of(found: dict[str, tuple[int, int, int]]) -> list[str]:
    """The files among what `times` found."""
    return [path for path in found if not any(other.startswith(f"{path}/") for other in found) and path != ""]


class TestWholeModels:
    @pytest.fixture
    def lying(self, liar: LiarServer) -> origins.FolderOrigin:
        """A folder that the liar serves."""
        liar.files.rmdir()
        return origins.FolderOrigin(liar.files)

    @pytest.mark.parametrize(
        "pattern", ["/m/2/", "/m/2/model.py"], ids=["its listing hangs", "its code hangs"]
    )  # fmt: skip
    def test_a_version_is_seen_whole_or_not_at_all(
        self, liar: LiarServer, lying: origins.FolderOrigin, mounted: Mounted, pattern: str
    ) -> None:
        """While a part of it hangs the model stays as it was, configuration included; another model goes on."""
        lying.put_all(MODEL | OTHER)
        mount = mounted(liar.url, timeout_s=2)
        before = times(mount)
        mount.wait_saved("m/config.pbtxt")  # brought by a first look: soon the origin has another
        lying.put_all(MODEL | VERSION_2 | OTHER | {"m/config.pbtxt": b"v2", "other/2/model.py": b"oo"})
        liar.lie(Lie.SILENCE, pattern=pattern)
        [error] = mount.client.refresh()["errors"]
        assert "/m/2/" in error
        shown_soon(mount, lambda: "other/2/model.py" in times(mount))
        after = times(mount)
        assert {p: t for p, t in after.items() if p.startswith("m")} == {
            p: t for p, t in before.items() if p.startswith("m")
        }
        assert mount.call(touching.read, str(mount.path / "m/config.pbtxt")) == b"v1"
        liar.tell_truth()
        assert mount.client.refresh()["errors"] == []
        shown_soon(mount, lambda: "m/2/model.py" in times(mount))
        assert mount.call(touching.read, str(mount.path / "m/config.pbtxt")) == b"v2"

    def test_a_new_model_is_seen_whole_or_not_at_all(
        self, liar: LiarServer, lying: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        lying.put_all(OTHER)
        mount = mounted(liar.url, timeout_s=2)
        lying.put_all(MODEL | OTHER | {"third/config.pbtxt": b"3"})
        liar.lie(Lie.SILENCE, pattern="/m/1/")
        assert len(mount.client.refresh()["errors"]) == 1
        assert mount.call(touching.list_names, str(mount.path)) == ["other", "third"]
        liar.tell_truth()
        mount.client.refresh()
        assert mount.call(touching.list_names, str(mount.path)) == ["m", "other", "third"]

    def test_one_that_may_not_be_read_is_published_with_a_warning(
        self, liar: LiarServer, lying: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """Waiting would not help."""
        lying.put_all(OTHER)
        mount = mounted(liar.url)
        lying.put_all(MODEL | OTHER)
        liar.lie(Lie.STATUS, pattern="/m/1/model.py", status=403)
        assert mount.client.refresh()["errors"] == []
        assert mount.call(touching.list_names, str(mount.path)) == ["m", "other"]
        assert "published, though not all of it can be read" in mount.log

    def test_walking_moves_no_weights_and_missing_names_ask_nobody(self, nginx: NginxServer, mounted: Mounted) -> None:
        origin = origins.WebOrigin(nginx)
        origin.put_all(MODEL | VERSION_2)
        mount = mounted(origin)
        times(mount)
        mount.wait_saved("m/config.pbtxt", "m/1/model.py", "m/2/model.py")  # what a first look has brought
        names = ["1/libtriton_python.so", "__pycache__", "2/__init__.py", "batchstrategy.so"]
        assert [mount.call(touching.failure, "stat", str(mount.path / "m" / name)) for name in names] == ["ENOENT"] * 4
        nginx.forget_requests()
        for _ in range(3):
            times(mount)
            for name in names:
                mount.call(touching.failure, "stat", str(mount.path / "m" / name))
        assert not nginx.requests()
        assert not [r for name in MODEL | VERSION_2 for r in nginx.requests(f"/{origin.root.name}/{name}")]

    def test_the_tree_answers_while_the_origin_is_gone(
        self, swift: SwiftServer, s3_bucket: str, mounted: Mounted, chaos: Callable[[str], ChaosProxy]
    ) -> None:
        """Refreshing every second, which fails each time: the same tree, and small files that can be read."""
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all(MODEL | OTHER)
        proxy = chaos(swift.endpoint)
        origin.source = {"endpoint_url": proxy.url}
        mount = mounted(origin, timeout_s=1, refresh_s=1)
        before = times(mount)
        mount.wait_quiet()
        proxy.stop()
        for _ in range(3):
            assert mount.client.refresh()["errors"]
            assert times(mount) == before
            assert mount.call(touching.failure, "stat", str(mount.path / "m/7")) == "ENOENT"
            for name in ("m/config.pbtxt", "m/1/model.py", "other/config.pbtxt"):
                mount.call(touching.drop_pages, str(mount.path / name))
                mount.client.evict([name], "ram")
                assert mount.call(touching.read, str(mount.path / name)) == (MODEL | OTHER)[name]

    def test_every_name_has_an_inode_and_links_lead_somewhere(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put_all(MODEL)
        (folder.root / "m/latest").symlink_to("1")
        (folder.root / "m/gone").symlink_to("9")
        mount = mounted(folder)
        for path in ("", "m", "m/1"):
            found = mount.call(touching.scan, str(mount.path / path))
            assert all(inode > 0 for inode, *_ in found.values())
            for name in found:
                assert mount.call(touching.failure, "stat", str(mount.path / path / name)) == ""
        assert "gone" not in mount.call(touching.list_names, str(mount.path / "m"))


class TestSmallFiles:
    def test_are_on_ssd_when_the_mount_is_ready_and_weights_are_not(
        self, swift: SwiftServer, s3_bucket: str, mounted: Mounted
    ) -> None:
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all(MODEL | OTHER | {"m/big.txt": ramp(2 << 20)})
        mount = mounted(origin)
        ssd = {name: mount.client.stat(name)["ssd_bytes"] for name in MODEL | OTHER | {"m/big.txt": b""}}
        assert ssd == {
            name: len(content) if not name.endswith(".safetensors") else 0 for name, content in (MODEL | OTHER).items()
        } | {"m/big.txt": 0}

    def test_come_after_somebody_has_looked_where_directories_are_listed_one_by_one(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put_all(MODEL)
        mount = mounted(folder)
        assert mount.client.status()["origin"]["fetched_bytes"] == 0
        times(mount)
        mount.wait_saved("m/config.pbtxt", "m/1/model.py")
        assert mount.client.stat("m/1/w.safetensors")["ssd_bytes"] == 0

    def test_leave_the_ssd_tier_after_weights(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all(MODEL | {f"w{n}.safetensors": ramp(10 << 20, n) for n in range(5)})
        mount = mounted(folder, cache_bytes=24 << 20)
        times(mount)
        mount.wait_saved("m/config.pbtxt", "m/1/model.py")
        for n in range(5):
            mount.call(touching.digest, str(mount.path / f"w{n}.safetensors"))
        assert mount.wait_for(lambda: "from SSD" in mount.log)
        assert sum(mount.client.stat(f"w{n}.safetensors")["ssd_bytes"] for n in range(5)) < 50 << 20
        assert mount.client.stat("m/config.pbtxt")["ssd_bytes"] == len(MODEL["m/config.pbtxt"])
        assert mount.client.stat("m/1/model.py")["ssd_bytes"] == len(MODEL["m/1/model.py"])


def test_stray_files_in_a_registry_are_harmless(folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path) -> None:
    """They appear as the plain files they are: Triton takes only directories of the root for models."""
    folder.put_all(MODEL | {"README.md": b"stray"})
    mount = mounted(folder)
    assert mount.call(touching.list_names, str(mount.path)) == ["README.md", "m"]
    assert not any(name.startswith(".") for name in mount.call(touching.list_names, str(mount.path)))
