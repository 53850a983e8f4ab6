"""kill -9 of the daemon alone, at any moment: its holder starts the next one, readers wait and get their bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from pathlib import Path

import pytest

from mfs.control import runtime
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import crash_soak, origins, touching
from tests.mount.conftest import Mounted
from tests.mount.test_handover import heir_that_signals, loop_reads, scan_slowly, three_waiting
from tests.mount.test_life import worker_is_gone
from tests.servers.liar import LiarServer, Lie

SIZE = (9 << 20) + 17


class TestReaders:
    def test_what_was_open_goes_on(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        """Descriptors, mappings, names and inodes; of the dead daemon nothing stays."""
        folder.put_all({"w.safetensors": ramp(SIZE), "d/v.bin": ramp(SIZE, 3)})
        mount = mounted(folder)
        path, other = str(mount.path / "w.safetensors"), str(mount.path / "d" / "v.bin")
        reader = mount.outside()
        inode = reader.call(touching.hold, "fd", path)
        reader.call(touching.hold_map, "map", path)
        assert reader.call(touching.held_read, "fd", 5_000_000, 1_000) == ramp(1_000, 5_000_000)
        before = {name: reader.call(touching.stat, name) for name in (path, other, str(mount.path / "d"))}
        workers = mount.worker_pids
        killed = mount.crash()
        assert reader.call(touching.held_read, "fd", 8_000_000, 1_000) == ramp(1_000, 8_000_000)
        assert reader.call(touching.held_map, "map", 3_000_000, 1_000) == ramp(1_000, 3_000_000)
        assert reader.call(touching.hold, "again", path) == inode
        assert {name: reader.call(touching.stat, name) for name in before} == before
        assert reader.call(touching.read, other) == ramp(SIZE, 3)
        mount.wait_successor(killed)
        assert mount.pid == mount.client.status()["pid"] != killed
        assert mount.wait_for(lambda: mount.client.status()["open_files"] == 3)
        for name in ("fd", "again", "map"):
            reader.call(touching.release, name)
        assert mount.wait_for(lambda: mount.client.status()["open_files"] == 0)
        assert mount.wait_for(lambda: all(map(worker_is_gone, workers)))
        assert mount.client.status()["warnings"] == []
        assert mount.log.count("starting the next one") == 1

    def test_requests_that_were_under_way_are_answered(self, liar: LiarServer, mounted: Mounted) -> None:
        """A read, a fault of a mapping and an open that the killed daemon had in hand."""
        with three_waiting(liar, mounted) as mount:
            for _ in range(2):
                mount.wait_successor(mount.crash())
                assert mount.wait_for(lambda: mount.client.status()["reads"]["waiting"] >= 2)

    def test_many_readers_through_many_kills(
        self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
    ) -> None:
        """No error, no wrong byte, no other inode; with pread, mappings and scans."""
        found = crash_soak.run(
            mounted(folder, cache_bytes=24 << 20), folder, kills=4, readers=6, stop=tmp_path / "stop"
        )
        print(found)
        assert found.wrong == []
        assert found.reads > 0

    def test_a_version_that_left_the_tree_is_read_on(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        path = str(mount.path / "w.bin")
        reader = mount.outside()
        old_inode = reader.call(touching.hold, "old", path)
        assert reader.call(touching.held_read, "old", 0, SIZE) == ramp(SIZE)
        mount.wait_saved("w.bin")
        folder.put("w.bin", ramp(SIZE, 77))
        assert mount.client.refresh()["changed_count"] == 1
        for _ in range(2):
            mount.wait_successor(mount.crash())
            reader.call(touching.drop_pages, path)
            assert reader.call(touching.held_read, "old", 5_000_000, 1000) == ramp(1000, 5_000_000)
        assert reader.call(touching.held_read, "old", 0, SIZE) == ramp(SIZE)
        assert reader.call(touching.read, path) == ramp(SIZE, 77)
        assert reader.call(touching.hold, "new", path) != old_inode
        assert reader.call(touching.held_size, "old") == SIZE

    def test_what_changed_at_the_origin_meanwhile_is_shown(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """The successor looks again by itself; who has the old version open never gets a byte of the new one."""
        folder.put_all({"a/w.bin": ramp(SIZE), "a/gone.bin": ramp(10), "b/v.bin": ramp(500)})
        mount = mounted(folder)
        path = str(mount.path / "a" / "w.bin")
        reader = mount.outside()
        reader.call(touching.hold, "old", path)
        assert reader.call(touching.read, path) == ramp(SIZE)
        mount.wait_saved("a/w.bin")
        os.kill(mount.holder_pid, signal.SIGSTOP)  # so that the origin changes while nobody serves
        killed = mount.crash()
        folder.put("a/w.bin", ramp(SIZE + 1, 5))
        folder.put("a/new.bin", ramp(10))
        (folder.root / "a/gone.bin").unlink()
        os.kill(mount.holder_pid, signal.SIGCONT)
        mount.wait_successor(killed)
        names = ["new.bin", "w.bin"]
        assert mount.wait_for(lambda: mount.call(touching.list_names, str(mount.path / "a")) == names)
        assert mount.wait_for(lambda: mount.call(touching.stat, path)["st_size"] == SIZE + 1)
        assert mount.call(touching.read, path) == ramp(SIZE + 1, 5)
        reader.call(touching.drop_pages, path)
        assert reader.call(touching.held_read, "old", 0, SIZE) == ramp(SIZE)

    def test_open_directories_go_on(self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path) -> None:
        names = [f"{number:04d}.bin" for number in range(2000)]
        folder.put_all({f"d/{name}": b"x" for name in names})
        mount = mounted(folder)
        reader = mount.outside()
        reader.start(scan_slowly, str(mount.path / "d"), str(tmp_path / "begun"), str(tmp_path / "go"))
        assert mount.wait_for((tmp_path / "begun").exists)
        mount.crash()
        (tmp_path / "go").touch()
        assert reader.finish() == names

    def test_every_kind_of_origin_without_a_cache_directory(self, origin: origins.Origin, mounted: Mounted) -> None:
        """Nothing is known of the tree but what the journal says."""
        origin.put_all({"d/e/w.bin": ramp(SIZE), "d/e/v.bin": ramp(SIZE, 3)})
        mount = mounted(origin, cache_dir=None)
        reader = mount.outside()
        inode = reader.call(touching.hold, "fd", str(mount.path / "d" / "e" / "w.bin"))
        before = reader.call(touching.stat, str(mount.path / "d" / "e" / "v.bin"))
        mount.wait_successor(mount.crash())
        assert reader.call(touching.held_read, "fd", 0, SIZE) == ramp(SIZE)
        assert reader.call(touching.stat, str(mount.path / "d" / "e" / "v.bin")) == before
        assert reader.call(touching.read, str(mount.path / "d" / "e" / "v.bin")) == ramp(SIZE, 3)
        assert reader.call(touching.hold, "again", str(mount.path / "d" / "e" / "w.bin")) == inode

    def test_with_the_origin_away(self, liar: LiarServer, mounted: Mounted) -> None:
        """What the SSD tier has is served at once; the rest waits its time and fails, as it would have."""
        (liar.files / "v.bin").write_bytes(ramp(SIZE, 3))
        (liar.files / "w.bin").write_bytes(ramp(SIZE, 5))
        mount = mounted(liar.url, timeout_s=4)
        mount.alarms_expected.append(".")
        assert mount.call(touching.read, str(mount.path / "v.bin")) == ramp(SIZE, 3)
        mount.wait_saved("v.bin")
        liar.lie(Lie.SILENCE, pattern="*")
        killed = mount.crash()
        mount.call(touching.drop_pages, str(mount.path / "v.bin"))
        assert mount.call(touching.read, str(mount.path / "v.bin")) == ramp(SIZE, 3)
        assert mount.call(touching.list_names, str(mount.path)) == ["v.bin", "w.bin"]
        assert mount.call(touching.read_failure, str(mount.path / "w.bin"), 5_000_000) == "EIO"
        mount.wait_successor(killed)
        liar.tell_truth()
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE, 5)


class TestMoments:
    """Of the kill; see also `crash_soak`."""

    def test_kills_while_the_tree_changes(self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path) -> None:
        """Whatever the successor knows of a publication that was under way, it shows one version of each file."""
        folder.put_all({f"m{n}/w.bin": ramp(300_000, n) for n in range(20)})
        mount = mounted(folder)
        mount.call(touching.tree, str(mount.path))
        for round_number in range(1, 4):
            folder.put_all({f"m{n}/w.bin": ramp(300_000 + round_number, n + round_number) for n in range(20)})
            refreshing = mount.outside()
            refreshing.start(_refresh, str(runtime.socket_path(str(mount.path), mount.folder / "run")))
            refreshing.is_busy(for_s=0.03 * round_number)  # not a wait for anything: the moment is what varies
            mount.wait_successor(mount.crash())
            refreshing.finish()

            def is_new(n: int, round_number: int = round_number) -> bool:
                expected = ramp(300_000 + round_number, n + round_number)
                try:
                    return mount.call(touching.read, str(mount.path / f"m{n}" / "w.bin")) == expected
                except OSError as error:  # the old version, of which not all is here, until the successor has looked
                    if error.errno != errno.ESTALE:
                        raise
                    return False

            assert all(mount.wait_for(lambda n=n: is_new(n)) for n in range(20))

    @pytest.mark.parametrize("victim", ["old", "new"])
    def test_kills_while_the_mount_is_handed_over(
        self, folder: origins.FolderOrigin, mounted: Mounted, victim: str, tmp_path: Path
    ) -> None:
        """One daemon serves in the end, whichever was killed when; readers notice nothing."""
        folder.put_all({f"{n}.bin": ramp(SIZE + n, n) for n in range(2)})
        mount = mounted(folder)
        mount.alarms_expected.append(".")
        stop = tmp_path / "stop"
        readers = [mount.outside() for _ in range(2)]
        for number, reader in enumerate(readers):
            reader.start(loop_reads, str(mount.path / f"{number}.bin"), number, str(stop))
        for number in range(4):
            old = mount.pid
            heir, ready = mount.spawn(handover=True)
            mount.wait_for(lambda: False, timeout_s=0.8 + 0.4 * number)  # the moment is what varies
            with contextlib.suppress(ProcessLookupError):  # the old one may have ended already
                os.kill(old if victim == "old" else _child(heir.pid) or heir.pid, signal.SIGKILL)
            with open(ready, "rb") as answer:
                answer.read()
            mount.settle_between(heir)
            mount.wait_successor(0)
        stop.touch()
        assert [reader.finish()["wrong"] for reader in readers] == [[], []]

    def test_an_old_daemon_that_dies_while_it_hands_over_is_followed_by_its_own_successor(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        mount.alarms_expected.append("its successor has the mount")
        reader = mount.outside()
        reader.call(touching.hold, "fd", str(mount.path / "w.bin"))
        killed = mount.pid
        heir, ready = mount.spawn(handover=True, program=heir_that_signals(killed, signal.SIGKILL))
        with open(ready, "rb") as answer:
            assert b"its successor has the mount" in answer.read()
        assert heir.wait(30) == 1
        assert reader.call(touching.held_outcome, "fd", 0, SIZE) == ramp(SIZE)
        mount.wait_successor(killed)
        mount.hand_over()
        assert reader.call(touching.held_outcome, "fd", 0, SIZE) == ramp(SIZE)


class TestHolder:
    def test_sigterm_to_the_holder_ends_the_mount_also_while_the_next_daemon_starts(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        mount.alarms_expected.append("told to stop")
        mount.crash()
        assert mount.wait_for(lambda: "starting the next one" in mount.log)
        os.kill(mount.holder_pid, signal.SIGTERM)
        mount.wait_ended()
        assert mount.status == 0

    def test_too_many_crashes_leave_a_stale_mount(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        reader = mount.outside()
        reader.call(touching.hold, "fd", str(mount.path / "w.bin"))
        for _ in range(6):
            killed = mount.crash()
            if not mount.wait_for(lambda killed=killed: mount._answering_pid() not in (0, killed), timeout_s=15):
                break
        assert mount.wait_for(lambda: "is given up" in mount.log)
        assert mount.call(touching.failure, "listdir", str(mount.path)) == "ENOTCONN"
        assert reader.call(touching.held_outcome, "fd", 0, 10) == "ENOTCONN"
        reader.close()
        mount.kill()
        mount.start()
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)

    def test_without_a_holder_the_daemon_goes_on_and_says_what_that_means(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        pid = mount.pid
        os.kill(mount.holder_pid, signal.SIGKILL)
        assert mount.wait_for(lambda: any("has ended" in text for text in mount.client.status()["warnings"]))
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
        os.kill(pid, signal.SIGKILL)
        assert mount.wait_for(lambda: mount.call(touching.failure, "listdir", str(mount.path)) == "ENOTCONN")
        mount.kill()

    def test_it_is_small(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        mount = mounted(folder)
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{mount.holder_pid}/status").read_text().splitlines())
        print("the holder's resident memory:", fields["VmRSS"].strip())
        assert int(fields["VmRSS"].split()[0]) < 16 << 10

    def test_an_unmount_during_a_crash_starts_nobody(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        os.kill(mount.holder_pid, signal.SIGSTOP)
        mount.crash()
        TestMount.detach(mount)
        os.kill(mount.holder_pid, signal.SIGCONT)
        mount.wait_ended()
        assert "starting the next one" not in mount.log


def _refresh(socket: str) -> str:
    """Ask a daemon to look again; what went wrong."""
    from mfs.control.client import Client
    from mfs.errors import MfsError

    try:
        Client(Path(socket), timeout_s=20).refresh()
    except MfsError as error:
        return str(error)
    return ""


def _child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else 0
