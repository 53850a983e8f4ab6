"""What an origin lists does not stop a mount, nor what others read in it; a tree that holds itself has an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from mfs.config import SourceConfig
from mfs.sources.bounds import MTIME_NS_MAX
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.liar import LiarServer, Lie

ODD = [
    {"path": "d/" * 3_000 + "x", "size": 1},
    {"path": "d/" * 10_000 + "x", "size": 1},
    {"path": "x" * 5_000, "size": 1},
    {"path": "bad\nname", "size": 1},
    {"path": "only-bad/\0", "size": 1},
    {"path": "wordy", "size": 1, "etag": "e" * (2 << 20)},
    {"path": "huge", "size": 2**63},
    {"path": "huger", "size": 2**64},
    {"path": "negative", "size": -1},
    {"path": "words", "size": "some"},
    {"path": "late", "size": 1, "mtime": "9999-12-31T23:59:59Z"},
    {"path": "early", "size": 1, "mtime": "0001-01-01T00:00:00Z"},
    {"path": "milliseconds", "size": 1, "mtime": 1767323045000},
    {"path": "deep/" + "d/" * 500 + "x", "size": 1},
    {"path": "good", "size": 1, "mtime": 1767323045},
]


def test_a_manifest_of_odd_entries(
    liar: LiarServer, tmp_path: Path, folder: origins.FolderOrigin, mounted: Mounted
) -> None:
    folder.put_all({"w.bin": ramp(1000)})
    place = liar.files / "odd-entries"
    place.mkdir()
    (place / "mfs-manifest.json").write_text(json.dumps({"files": ODD}))
    sources = (
        SourceConfig(url=f"{liar.url}odd-entries/mfs-manifest.json", name="odd"),
        SourceConfig(url=folder.url, name="plain"),
    )
    times = []
    for name in ("first", "again"):  # times go through the kernel, and through the record of the cache
        mount = mounted("", name=name, sources=sources, cache_dir=tmp_path / "cache")
        shown = set(mount.call(touching.list_names, str(mount.path / "odd")))
        assert shown == {"good", "late", "early", "milliseconds", "deep", "only-bad"}
        assert mount.call(touching.list_names, str(mount.path / "odd" / "only-bad")) == []
        assert mount.call(touching.read, str(mount.path / "plain" / "w.bin")) == ramp(1000)
        bottom = str(mount.path / "odd" / "deep") + "/d" * 500
        assert mount.call(touching.list_names, bottom) == ["x"]
        stats = {n: mount.call(touching.stat, str(mount.path / "odd" / n))["st_mtime_ns"] for n in ("late", "early")}
        times.append(stats)
        assert mount.client.refresh()["errors"] == []
        assert "left out 10 names" in mount.log
        assert len(mount.log) < 20_000
        mount.stop()
    assert times[0] == times[1]
    assert times[0]["late"] == MTIME_NS_MAX
    assert times[0]["early"] < 10**16


def test_a_signal_ends_a_mount_that_waits_for_its_origin(liar: LiarServer, tmp_path: Path) -> None:
    liar.lie(Lie.SILENCE)
    liar.forget_requests()
    mount = TestMount(tmp_path, liar.url, timeout_s=60.0)
    process, ready = mount.spawn()
    try:
        liar.wait_for_request("/")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
    finally:
        process.kill()
        process.wait()
        os.close(ready)
        liar.tell_truth()
    assert "told to stop before the mount could be used" in mount.log
    assert not mount.is_mounted


def test_folders_that_hold_mounts_end_there(tmp_path: Path, mounted: Mounted) -> None:
    """A source that holds its own mount and cache, and another mount whose source holds this one's mount."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w.bin").write_bytes(ramp(100))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "link").symlink_to("mnt")
    first = mounted(str(tmp_path))
    second = mounted(str(tmp_path), name="n")
    for mount in (first, second):
        assert {"model", "m"} <= set(mount.call(touching.list_names, str(mount.path)))
        assert mount.call(touching.read, str(mount.path / "model" / "w.bin")) == ramp(100)
    first.client.refresh()
    own = set(first.call(touching.list_names, str(first.path / "m")))
    assert not own & {"mnt", "cache", "link"}
    for mount, other in ((second, "m"), (first, "n")):
        names = set(mount.call(touching.list_names, str(mount.path / other)))
        assert not names & {"mnt", "link"}
        assert "cache" not in names or mount.call(touching.list_names, str(mount.path / other / "cache")) == []


def test_a_mount_reached_through_a_bind_mount_ends_there(tmp_path: Path, mounted: Mounted) -> None:
    """What is bound to a place in its own source is a mount of ours there too."""
    (tmp_path / "source" / "bound").mkdir(parents=True)
    mount = mounted(str(tmp_path / "source"))
    bind = ["mount", "--bind", str(mount.path), str(tmp_path / "source" / "bound")]
    if subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        assert mount.client.refresh()["errors"] == []
        assert mount.wait_for(lambda: mount.call(touching.list_names, str(mount.path)) == [])
    finally:
        subprocess.run(["umount", "-l", bind[-1]], check=True)
