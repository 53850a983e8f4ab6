"""What is open or mapped, over everything that takes its bytes away: exact, or an error, and never zeros.

A pread may end before a page that cannot be had, as any read(2); the next says why. So it is for who maps: up to there
his bytes, then SIGBUS.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from mfs.testing.outside import Outside
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.mount.test_whole import passed_through

SIZE = (9 << 20) + 17
_PART = 512 << 10


def test_a_read_ends_before_the_page_that_is_gone_and_a_mapping_fails_there(
    folder: origins.FolderOrigin, mounted: Mounted
) -> None:
    """The kernel keeps the pages that somebody has mapped, 64 KiB around a fault; others it drops when asked to."""
    folder.put("w.bin", ramp(SIZE))
    mount = mounted(folder)
    path, edge = str(mount.path / "w.bin"), 5 << 20
    reader = mount.outside()
    reader.call(touching.hold, "fd", path)
    reader.call(touching.hold_map, "map", path)
    assert reader.call(touching.held_read, "fd", edge - 70_000, 140_000) == ramp(140_000, edge - 70_000)
    assert reader.call(touching.held_map, "map", edge - 100, 100) == ramp(100, edge - 100)
    folder.put("w.bin", ramp(SIZE, 7))
    mount.client.evict([""], "all")
    mount.call(touching.drop_pages, path)
    mount.client.refresh()
    assert reader.call(touching.held_read, "fd", edge - 1000, 5000) == ramp(1000, edge - 1000)
    assert reader.call(touching.held_outcome, "fd", edge - 1000, 5000) == "ESTALE"
    assert reader.call(touching.held_map_outcome, "map", edge - 1000, 1000) == ramp(1000, edge - 1000)
    assert reader.call(touching.held_map_outcome, "map", edge - 1000, 5000) == "EFAULT"
    assert mount.call(touching.read, path) == ramp(SIZE, 7)


class _Held:
    """A file that is open, mapped, and mapped without being open; each look is at bytes that nobody has read before."""

    def __init__(self, mount: TestMount, name: str) -> None:
        self._reader: Outside = mount.outside()
        self._at = 0
        path = str(mount.path / name)
        self._reader.call(touching.hold, "fd", path)
        self._reader.call(touching.hold_map, "map", path)
        self._reader.call(touching.hold_map_alone, "alone", path)

    def check(self, *, is_open: bool = True) -> None:
        looks: dict[str, Callable[..., Any]] = {"alone": touching.held_map_outcome}
        if is_open:
            looks |= {"fd": touching.held_outcome, "map": touching.held_map_outcome}
        for name, look in looks.items():
            at, self._at = self._at, self._at + _PART
            assert self._reader.call(look, name, at, _PART) == ramp(_PART, at), name

    def close(self) -> None:
        """All but the mapping by itself."""
        self._reader.call(touching.release, "fd")
        self._reader.call(touching.release, "map")


@pytest.mark.parametrize("tier", ["ssd", "ram"])
def test_who_reads_without_the_daemon_reads_on(folder: origins.FolderOrigin, mounted: Mounted, tier: Any) -> None:
    """Evicted, pushed out by others, replaced at the origin, handed over, killed; closed, evicted, and all removed."""
    folder.put_all({"w.bin": ramp(SIZE), "x.bin": ramp(SIZE, 1), "y.bin": ramp(SIZE, 2)})
    mount = mounted(folder, cache_bytes=24 << 20)
    list(mount.client.prefetch(["w.bin"], tier, wait=True))
    held = _Held(mount, "w.bin")
    assert passed_through(mount) >= 2
    mount.client.evict([""], "all")
    held.check()
    list(mount.client.prefetch([""], tier, wait=True))  # more than there is room for
    held.check()
    mount.hand_over()
    held.check()
    mount.wait_successor(mount.crash())
    held.check()
    held.close()
    assert mount.wait_for(lambda: passed_through(mount) == 0)
    list(mount.client.prefetch(["w.bin"], tier, wait=True))
    mount.client.evict([""], "all")
    assert mount.wait_for(lambda: mount.client.stat("w.bin")["ssd_bytes"] == 0)
    held.check(is_open=False)
    shutil.rmtree(mount.folder / "cache/v2/objects")
    held.check(is_open=False)
    assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)


@pytest.mark.parametrize("tier", ["ssd", "ram"])
def test_who_reads_a_replaced_version_without_the_daemon_reads_on(
    folder: origins.FolderOrigin, mounted: Mounted, tier: Any
) -> None:
    folder.put("w.bin", ramp(SIZE))
    mount = mounted(folder)
    list(mount.client.prefetch(["w.bin"], tier, wait=True))
    held = _Held(mount, "w.bin")
    for start in (7, 8):
        folder.put("w.bin", ramp(SIZE, start))
        mount.client.refresh()
        held.check()
        list(mount.client.prefetch(["w.bin"], tier, wait=True))
        mount.client.evict([""], "all")
        held.check()
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE, start)
