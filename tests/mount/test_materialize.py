"""--materialize: an open file is whole, and stays so whatever the origin, the RAM tier and the SSD tier go through."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.chaos import ChaosProxy
from tests.servers.swift import SwiftServer

MIB = 1 << 20
SIZE = (13 << 20) + 77
WEIGHTS, OTHER = ramp(SIZE), ramp(SIZE, 31)
FILES = {"kept/w.bin": WEIGHTS, "kept/config.json": b"{}", "kept/empty": b"", "lazy/w.bin": OTHER}


@pytest.fixture
def remote(
    swift: SwiftServer, s3_bucket: str, mounted: Mounted, chaos: Callable[[str], ChaosProxy]
) -> Callable[..., tuple[TestMount, ChaosProxy]]:
    """`remote(**settings)` mounts FILES over a proxy that can be stopped."""

    def make(**settings: Any) -> tuple[TestMount, ChaosProxy]:
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all(FILES)
        proxy = chaos(swift.endpoint)
        origin.source = {"endpoint_url": proxy.url}
        return mounted(origin, **{"timeout_s": 3.0, "materialize": ("kept",)} | settings), proxy

    return make


def forget(mount: TestMount, name: str) -> None:
    """Take from a file what stands in the page cache, in RAM slots and, where that may be, on SSD."""
    mount.client.evict([name], "all")
    mount.call(touching.drop_pages, str(mount.path / name))


class TestAnOpenFile:
    @pytest.mark.parametrize("settings", [{}, {"cache_dir": None}], ids=["on SSD", "in RAM"])
    def test_outlives_its_origin(
        self, remote: Callable[..., tuple[TestMount, ChaosProxy]], settings: dict[str, Any]
    ) -> None:
        """No byte was asked for before the origin died; a mapping gives all of them, after close(2) too."""
        mount, proxy = remote(**settings)
        path = str(mount.path / "kept/w.bin")
        mount.call(touching.hold, "file", path)
        mount.call(touching.hold_map, "map", path)
        proxy.stop()
        forget(mount, "kept/w.bin")
        assert mount.call(touching.held_read, "file", 5 * MIB, 1_000) == WEIGHTS[5 * MIB :][:1_000]
        mount.call(touching.release, "file")
        forget(mount, "kept/w.bin")
        assert mount.call(touching.held_map, "map", 0, SIZE) == WEIGHTS
        mount.call(touching.release, "map")

    def test_others_stay_lazy(self, remote: Callable[..., tuple[TestMount, ChaosProxy]]) -> None:
        mount, _ = remote()
        before = mount.origin_bytes
        mount.call(touching.hold, "file", str(mount.path / "lazy/w.bin"))
        assert mount.origin_bytes == before
        mount.call(touching.release, "file")

    def test_is_kept_when_the_ssd_tier_is_full(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        """Eviction takes what was used later, and leaves what is open."""
        folder.put("kept.bin", WEIGHTS)
        for number in range(4):
            folder.put(f"other-{number}.bin", ramp(10 * MIB, number))
        mount = mounted(folder, materialize=("kept.bin",), cache_bytes=32 * MIB)
        path = str(mount.path / "kept.bin")
        mount.call(touching.hold, "file", path)
        for number in range(4):
            assert mount.call(touching.read, str(mount.path / f"other-{number}.bin")) == ramp(10 * MIB, number)
        assert mount.wait_for(lambda: "from SSD" in mount.log)
        assert mount.client.stat("kept.bin")["ssd_bytes"] == SIZE
        folder.put("kept.bin", OTHER)
        forget(mount, "kept.bin")
        assert mount.call(touching.held_read, "file", 0, SIZE) == WEIGHTS
        mount.call(touching.release, "file")

    def test_is_kept_when_other_readers_need_the_slots(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("kept.bin", WEIGHTS)
        folder.put("other.bin", ramp(80 * MIB, 3))
        mount = mounted(folder, materialize=("kept.bin",), cache_dir=None)
        mount.call(touching.hold, "file", str(mount.path / "kept.bin"))
        assert mount.call(touching.read, str(mount.path / "other.bin")) == ramp(80 * MIB, 3)
        (folder.root / "kept.bin").unlink()
        mount.call(touching.drop_pages_if_there, str(mount.path / "kept.bin"))
        assert mount.call(touching.held_read, "file", 0, SIZE) == WEIGHTS
        mount.call(touching.release, "file")

    def test_is_brought_once_however_many_open_it(self, remote: Callable[..., tuple[TestMount, ChaosProxy]]) -> None:
        mount, _ = remote()
        path = str(mount.path / "kept/w.bin")
        readers = [mount.outside() for _ in range(4)]
        for reader in readers:
            reader.start(touching.read, path)
        for reader in readers:
            assert reader.finish(timeout_s=60) == WEIGHTS
        assert SIZE <= mount.origin_bytes < SIZE + MIB

    def test_is_kept_by_the_next_daemon_too(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        """The file is gone from the origin and evicted from everywhere it may be evicted from."""
        folder.put("kept.bin", WEIGHTS)
        mount = mounted(folder, materialize=("kept.bin",))
        mount.call(touching.hold, "file", str(mount.path / "kept.bin"))
        mount.hand_over()
        assert mount.wait_for(lambda: mount.log.count("kept.bin is whole") == 2)
        (folder.root / "kept.bin").unlink()
        forget(mount, "kept.bin")
        assert mount.call(touching.held_read, "file", 0, SIZE) == WEIGHTS
        mount.call(touching.release, "file")


class TestAnOpenThatCannotKeepItsPromise:
    def test_fails_when_the_origin_is_gone_and_works_when_it_is_back(
        self, remote: Callable[..., tuple[TestMount, ChaosProxy]]
    ) -> None:
        mount, proxy = remote()
        path = str(mount.path / "kept/w.bin")
        proxy.stop()
        begun_s = time.monotonic()
        assert mount.call(touching.read_failure, path, timeout_s=60) == "EIO"
        assert time.monotonic() - begun_s < 30
        assert "open: " in mount.log
        proxy.start()
        assert mount.call(touching.read, path) == WEIGHTS

    @pytest.mark.parametrize(
        ("settings", "hint"),
        [
            ({"cache_bytes": 14 * MIB}, "--cache-size"),
            ({"cache_dir": None, "size": 60 * MIB}, "--ram-size"),
        ],
        ids=["on SSD", "in RAM"],
    )
    def test_fails_at_once_when_there_is_no_room(
        self, folder: origins.FolderOrigin, mounted: Mounted, settings: dict[str, Any], hint: str
    ) -> None:
        size = settings.pop("size", SIZE)
        folder.put("w.bin", ramp(size))
        mount = mounted(folder, materialize=("**",), **settings)
        assert mount.call(touching.read_failure, str(mount.path / "w.bin")) == "ENOSPC"
        assert "cannot be kept whole" in mount.log
        assert hint in mount.log
        assert mount.origin_bytes == 0
