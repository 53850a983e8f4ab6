"""Whole files: sealed when they are complete, read by the kernel itself, also without us; and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted

SIZE = (9 << 20) + 17


def is_sealed(mount: TestMount, count: int = 1) -> bool:
    return bool(mount.wait_for(lambda: mount.client.status()["passthrough"]["sealed_count"] == count))


def passed_through(mount: TestMount) -> int:
    found: int = mount.client.status()["passthrough"]["open_files"]
    return found


def sealed_data(mount: TestMount) -> Path:
    """The one object's file in the SSD tier."""
    [data] = [file for file in (mount.folder / "cache/v2/objects").rglob("*") if file.is_file() and not file.suffix]
    return data


@pytest.fixture
def mount(folder: origins.FolderOrigin, mounted: Mounted) -> TestMount:
    """A mount of one file, w.bin, of which nothing is here."""
    folder.put("w.bin", ramp(SIZE))
    return mounted(folder)


def test_who_opens_a_complete_file_reads_it_without_the_daemon(mount: TestMount) -> None:
    path = str(mount.path / "w.bin")
    assert mount.client.status()["passthrough"]["note"] is None
    assert mount.call(touching.read, path) == ramp(SIZE)
    assert is_sealed(mount)
    before = mount.client.status()["reads"]["count"]
    mount.call(touching.drop_pages, path)
    assert mount.call(touching.read, path) == ramp(SIZE)
    for kind in ("shared", "private", "writable"):
        assert mount.call(touching.map_file, path, kind) == ramp(SIZE)
    assert mount.call(touching.pread_direct, path, 4096, 8 << 20) == ramp(4096, 8 << 20)
    assert mount.client.status()["reads"]["count"] == before


def test_who_reads_on_in_order_is_read_ahead_of(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    size = 80 << 20
    folder.put("w.bin", ramp(size))
    mount = mounted(folder)
    path = str(mount.path / "w.bin")
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    reader = mount.outside()
    reader.call(touching.hold, "fd", path)
    reader.call(touching.held_read, "fd", 0, 4096)
    for start in range(0, 40 << 20, 1 << 20):
        assert reader.call(touching.held_read, "fd", start, 1 << 20) == ramp(1 << 20, start)
    assert mount.wait_for(lambda: mount.client.status()["passthrough"]["read_ahead_bytes"] > 0)
    for start in range(40 << 20, size, 1 << 20):
        assert reader.call(touching.held_read, "fd", start, 1 << 20) == ramp(1 << 20, start)
    assert mount.client.status()["reads"]["count"] == 0


def test_who_reads_it_finds_the_memory_that_was_kept_ready_for_fetches(
    folder: origins.FolderOrigin, mounted: Mounted
) -> None:
    """And nothing is kept ready until something is fetched again."""
    folder.put("w.bin", ramp(SIZE))
    folder.put("v.bin", ramp(SIZE, 7))
    mount = mounted(folder)

    def warm_bytes() -> int:
        found: int = mount.client.status()["ram"]["warm_bytes"]
        return found

    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    assert mount.wait_for(lambda: warm_bytes() > 0)
    reader = mount.outside()
    reader.call(touching.hold, "fd", str(mount.path / "w.bin"))
    assert passed_through(mount) == 1
    assert mount.wait_for(lambda: warm_bytes() == 0)  # a piece may be just being touched, and goes when it was
    assert reader.call(touching.held_read, "fd", 0, SIZE) == ramp(SIZE)
    assert mount.call(touching.read, str(mount.path / "v.bin")) == ramp(SIZE, 7)
    assert mount.wait_for(lambda: warm_bytes() > 0)


def test_prefetch_seals_and_the_first_reader_is_passed_through(mount: TestMount) -> None:
    path = str(mount.path / "w.bin")
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    assert mount.client.status()["passthrough"]["sealed_count"] == 1
    reader = mount.outside()
    reader.call(touching.hold, "fd", path)
    assert passed_through(mount) == 1
    assert reader.call(touching.held_read, "fd", SIZE - 10, 100) == ramp(10, SIZE - 10)
    assert mount.client.status()["reads"]["count"] == 0
    reader.call(touching.release, "fd")
    assert mount.wait_for(lambda: passed_through(mount) == 0)


def test_a_file_that_becomes_complete_while_it_is_open_is_passed_through_to_who_comes_then(mount: TestMount) -> None:
    """Both go on side by side, and show the same inode; so do mappings."""
    path = str(mount.path / "w.bin")
    early, late = mount.outside(), mount.outside()
    inode = early.call(touching.hold, "fd", path)
    early.call(touching.hold_map, "map", path)
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    assert mount.wait_for(lambda: late.call(touching.hold, "fd", path) == inode and passed_through(mount) > 0)
    late.call(touching.hold_map, "map", path)
    for reader in (early, late):
        assert reader.call(touching.held_read, "fd", 5 << 20, 1000) == ramp(1000, 5 << 20)
        assert reader.call(touching.held_map, "map", 8 << 20, 1000) == ramp(1000, 8 << 20)
    assert mount.call(touching.stat, path)["st_ino"] == inode
    assert mount.call(touching.scan, str(mount.path))["w.bin"][0] == inode
    early.call(touching.hold, "again", path)
    assert early.call(touching.held_read, "again", 0, 1000) == ramp(1000)


def test_what_is_open_is_read_on_after_kill_9(mount: TestMount) -> None:
    path = str(mount.path / "w.bin")
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    reader = mount.outside()
    reader.call(touching.hold, "fd", path)
    reader.call(touching.hold_map, "map", path)
    assert passed_through(mount) == 2
    mount.kill(detach=False)
    try:
        assert reader.call(touching.held_read, "fd", 5 << 20, 1000) == ramp(1000, 5 << 20)
        assert reader.call(touching.held_map, "map", 8 << 20, 1000) == ramp(1000, 8 << 20)
    finally:
        mount.detach()


def test_what_is_open_is_not_evicted_and_what_is_closed_is(mount: TestMount) -> None:
    path = str(mount.path / "w.bin")
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    reader = mount.outside()
    reader.call(touching.hold, "fd", path)
    reader.call(touching.hold_map, "map", path)
    assert mount.client.evict(["w.bin"], "ssd")["ssd_bytes"] == 0
    assert reader.call(touching.held_read, "fd", 5 << 20, 1000) == ramp(1000, 5 << 20)
    reader.call(touching.release, "fd")
    assert mount.wait_for(lambda: passed_through(mount) == 1)
    assert reader.call(touching.held_map, "map", 8 << 20, 1000) == ramp(1000, 8 << 20)
    reader.call(touching.release, "map")
    assert mount.wait_for(lambda: passed_through(mount) == 0)


def test_after_an_eviction_it_is_read_through_the_daemon_until_it_is_complete_again(
    folder: origins.FolderOrigin, mounted: Mounted
) -> None:
    folder.put("w.bin", ramp(SIZE))
    mount = mounted(folder)
    path = str(mount.path / "w.bin")
    for round_ in (1, 2, 3):
        assert mount.call(touching.pread, path, 100, 0) == ramp(100)
        assert passed_through(mount) == 0
        list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
        assert mount.client.status()["passthrough"]["sealed_count"] == round_
        reader = mount.outside()
        reader.call(touching.hold, "fd", path)
        assert passed_through(mount) == 1
        reader.call(touching.release, "fd")
        assert mount.wait_for(lambda: passed_through(mount) == 0)
        # What is open is kept a while longer than it is open.
        assert mount.wait_for(lambda: mount.client.evict(["w.bin"], "all")["ssd_bytes"] > 0)


def test_handed_over_it_is_read_on_and_opened_alike(mount: TestMount) -> None:
    path = str(mount.path / "w.bin")
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    reader = mount.outside()
    inode = reader.call(touching.hold, "fd", path)
    reader.call(touching.hold_map, "map", path)
    mount.hand_over()
    assert passed_through(mount) == 2
    assert reader.call(touching.held_read, "fd", 5 << 20, 1000) == ramp(1000, 5 << 20)
    assert reader.call(touching.held_map, "map", 8 << 20, 1000) == ramp(1000, 8 << 20)
    assert reader.call(touching.hold, "again", path) == inode
    assert passed_through(mount) == 3
    for name in ("fd", "map", "again"):
        reader.call(touching.release, name)
    assert mount.wait_for(lambda: passed_through(mount) == 0)


def test_materialized_files_are_passed_through_from_their_first_open(
    folder: origins.FolderOrigin, mounted: Mounted
) -> None:
    folder.put("w.bin", ramp(SIZE))
    mount = mounted(folder, materialize=("*.bin",))
    assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
    assert mount.client.status()["reads"]["count"] == 0


def test_small_files_are_not(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    folder.put("config.json", ramp(1000))
    mount = mounted(folder)
    list(mount.client.prefetch(["config.json"], "ssd", wait=True))
    assert mount.call(touching.read, str(mount.path / "config.json")) == ramp(1000)
    assert mount.client.status()["passthrough"]["sealed_count"] == 0


def test_a_damaged_one_is_given_to_nobody_else(mount: TestMount) -> None:
    """Also while it is open: the name then leads to another node."""
    path = str(mount.path / "w.bin")
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    reader = mount.outside()
    inode = reader.call(touching.hold, "fd", path)
    data = sealed_data(mount)
    with data.open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"damaged")
    os.utime(data, ns=(data.stat().st_atime_ns, data.stat().st_mtime_ns))
    mount.alarms_expected += ["dropped", "fail their checksums", "bad"]
    assert list(mount.client.verify(["w.bin"]))[-1]["bad"]
    assert reader.call(touching.held_again, "fd") == "ESTALE"
    assert reader.call(touching.hold, "again", path) == inode
    assert reader.call(touching.held_read, "again", 5 << 20, 1000) == ramp(1000, 5 << 20)
    assert reader.call(touching.held_again, "again") == ""
    assert mount.call(touching.read, path) == ramp(SIZE)


class TestRam:
    """What is asked into RAM, or has no SSD to stand on, is given from there."""

    def test_asked_into_ram_it_is_read_without_the_daemon(self, mount: TestMount) -> None:
        path = str(mount.path / "w.bin")
        list(mount.client.prefetch(["w.bin"], "ram", wait=True))
        reader = mount.outside()
        reader.call(touching.hold, "fd", path)
        reader.call(touching.hold_map, "map", path)
        assert passed_through(mount) == 2
        assert reader.call(touching.held_read, "fd", SIZE - 10, 100) == ramp(10, SIZE - 10)
        assert reader.call(touching.held_map, "map", 8 << 20, 1000) == ramp(1000, 8 << 20)
        assert mount.client.status()["reads"]["count"] == 0

    def test_without_an_ssd_tier(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder, cache_dir=None)
        path = str(mount.path / "w.bin")
        assert mount.call(touching.read, path) == ramp(SIZE)
        before = mount.client.status()["reads"]["count"]
        assert mount.wait_for(lambda: mount.client.status()["open_files"] == 0)
        assert mount.call(touching.map_file, path, "shared") == ramp(SIZE)
        assert mount.client.status()["reads"]["count"] == before

    def test_who_has_it_open_reads_on_when_it_is_dropped_or_room_is_needed(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """And what was read from there is exact however RAM is used meanwhile: 16 slots, 3 a file."""
        files = {f"{n}.bin": ramp(SIZE, n) for n in range(8)}
        folder.put_all(files)
        mount = mounted(folder, cache_dir=None)
        reader = mount.outside()
        for round_ in range(2):
            for n, (name, content) in enumerate(files.items()):
                path = str(mount.path / name)
                assert mount.call(touching.read, path) == content
                held = f"{round_}.{n}"
                reader.call(touching.hold, held, path)
                reader.call(touching.hold_map, f"map {held}", path)
                if n % 2:
                    mount.client.evict([name], "ram")
                for other in range(n):
                    at = 1_000_003 * other + round_
                    assert reader.call(touching.held_map, f"map {round_}.{other}", at, 5000) == ramp(5000, at + other)
                if n >= 2:
                    reader.call(touching.release, f"{round_}.{n - 2}")
        assert mount.client.status()["reads"]["errors_count"] == 0

    def test_killed_and_followed_by_another_daemon(self, mount: TestMount) -> None:
        path = str(mount.path / "w.bin")
        list(mount.client.prefetch(["w.bin"], "ram", wait=True))
        reader = mount.outside()
        reader.call(touching.hold, "fd", path)
        mount.crash()
        assert reader.call(touching.held_read, "fd", 5 << 20, 1000) == ramp(1000, 5 << 20)
        reader.call(touching.hold, "again", path)
        assert reader.call(touching.held_read, "again", 5 << 20, 1000) == ramp(1000, 5 << 20)


class TestDamage:
    """Found by whoever reads what the kernel would read by itself: nobody new is given it."""

    def damage(self, mount: TestMount, at: int = 5 << 20) -> None:
        data = sealed_data(mount)
        before = data.stat()
        with data.open("r+b") as file:
            file.seek(at)
            file.write(b"damaged")
        os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk damages it, not a program
        mount.alarms_expected += ["dropped", "fail their checksums", "bad"]

    def test_by_a_read_of_ours(self, mount: TestMount) -> None:
        path = str(mount.path / "w.bin")
        list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
        reader = mount.outside()
        reader.call(touching.hold, "fd", path)
        self.damage(mount)
        mount.client.evict(["w.bin"], "ram")
        list(mount.client.prefetch(["w.bin"], "ram", wait=True))
        assert mount.call(touching.read, path) == ramp(SIZE)
        reader.call(touching.release, "fd")
        assert mount.call(touching.read, path) == ramp(SIZE)

    def test_after_it_was_closed_and_sealed_anew(self, mount: TestMount) -> None:
        """The id of the old file lingers no longer than the file is thought well of."""
        path = str(mount.path / "w.bin")
        list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
        assert mount.call(touching.read, path) == ramp(SIZE)
        self.damage(mount)
        assert list(mount.client.verify(["w.bin"]))[-1]["bad"]
        list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
        assert mount.call(touching.read, path) == ramp(SIZE)

    @pytest.mark.parametrize("how", ["crash", "hand_over"])
    def test_the_next_daemon_knows(self, mount: TestMount, how: str) -> None:
        path = str(mount.path / "w.bin")
        list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
        reader = mount.outside()
        reader.call(touching.hold, "fd", path)
        self.damage(mount)
        assert list(mount.client.verify(["w.bin"]))[-1]["bad"]
        killed = mount.pid
        getattr(mount, how)()
        mount.wait_successor(killed)
        mount.call(touching.drop_dentries)  # the next open asks which node it is
        assert mount.call(touching.read, path) == ramp(SIZE)


def test_who_read_it_through_a_killed_daemon_does_not_keep_others_from_passing_through(mount: TestMount) -> None:
    path = str(mount.path / "w.bin")
    reader = mount.outside()
    reader.call(touching.hold, "fd", path)
    assert reader.call(touching.held_read, "fd", 0, 10) == ramp(10)
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    killed = mount.crash()
    mount.wait_successor(killed)
    mount.call(touching.drop_dentries)  # the killed daemon may not have come to tell that the name leads elsewhere
    late = mount.outside()

    def is_passed_through() -> bool:
        late.call(touching.hold, "fd", path)
        found = passed_through(mount) > 0
        late.call(touching.release, "fd")
        return found

    assert mount.wait_for(is_passed_through)
    assert reader.call(touching.held_read, "fd", 5 << 20, 10) == ramp(10, 5 << 20)


def test_files_given_from_ram_make_room_for_the_next(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    """16 slots, of which 8 may be given, 3 a file."""
    files = {f"{n}.bin": ramp(SIZE, n) for n in range(6)}
    folder.put_all(files)
    mount = mounted(folder, cache_dir=None)
    reader = mount.outside()
    for name, content in files.items():
        path = str(mount.path / name)
        assert mount.call(touching.read, path) == content
        assert mount.wait_for(lambda: mount.client.status()["open_files"] == 0)
        reader.call(touching.hold, "fd", path)
        assert passed_through(mount) == 1, name
        assert reader.call(touching.held_read, "fd", 5 << 20, 1000) == content[5 << 20 : (5 << 20) + 1000]
        reader.call(touching.release, "fd")
        assert mount.wait_for(lambda: mount.client.status()["open_files"] == 0)
