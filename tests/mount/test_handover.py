"""A mount that changes its daemon while it is used: no reader notices but by waiting, and whatever fails changes
nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mfs.control import lending_door
from mfs.control.borrowing import Borrower
from mfs.control.runtime import socket_path
from mfs.fuse.backing import _LINGER_S
from mfs.handover import Heir, door_path
from mfs.testing import ramp
from mfs.testing.mounting import MountFailedError, TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.mount.test_life import worker_is_gone
from tests.servers.liar import LiarServer, Lie

SIZE = (9 << 20) + 17


def loop_reads(path: str, seed: int, until: str) -> dict[str, Any]:
    """Read pieces of a ramp, past the page cache every time, until the file `until` is there. (reads, slowest in ms,
    what was wrong).
    """
    count, slowest_s, wrong = 0, 0.0, []
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    while not os.path.exists(until):
        offset = (count * 999_983 + seed) % (size - 5000)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        since_s = time.monotonic()
        try:
            if os.pread(fd, 5000, offset) != ramp(5000, offset + seed):
                wrong.append(f"other bytes at {offset}")
        except OSError as error:
            wrong.append(str(error))
        slowest_s = max(slowest_s, time.monotonic() - since_s)
        count += 1
        with open(path, "rb") as again:  # names and opens go on too
            if os.fstat(again.fileno()).st_ino != os.fstat(fd).st_ino:
                wrong.append("another inode")
    os.close(fd)
    return {"reads": count, "slowest_ms": slowest_s * 1e3, "wrong": wrong}


def scan_slowly(path: str, begun: str, until: str) -> list[str]:
    """The names of a directory: the first, then the file `begun` is made, and the others once `until` is there."""
    with os.scandir(path) as entries:
        first = next(entries).name
        Path(begun).touch()
        while not os.path.exists(until):
            time.sleep(0.01)
        return sorted([first, *(entry.name for entry in entries)])


@contextmanager
def three_waiting(liar: LiarServer, mounted: Mounted) -> Iterator[TestMount]:
    """A mount with a read, a fault of a mapping and an open in hand, whose origin is silent; all are answered after."""
    (liar.files / "w.safetensors").write_bytes(ramp(SIZE))
    (liar.files / "v.bin").write_bytes(ramp(SIZE, 3))
    mount = mounted(liar.url, timeout_s=60)
    readers = [mount.outside() for _ in range(3)]
    readers[1].call(touching.hold_map, "map", str(mount.path / "v.bin"))
    liar.lie(Lie.SILENCE, pattern="*.[bs]*")
    readers[0].start(touching.pread, str(mount.path / "v.bin"), 2_000, 4_500_000)
    readers[1].start(touching.held_map, "map", 8_600_000, 2_000)
    readers[2].start(touching.pread, str(mount.path / "w.safetensors"), 2_000, 4_500_000)
    assert mount.wait_for(lambda: mount.client.status()["reads"]["waiting"] >= 2)
    yield mount
    liar.tell_truth()
    assert readers[0].finish() == ramp(2_000, 4_500_003)
    assert readers[1].finish() == ramp(2_000, 8_600_003)
    assert readers[2].finish() == ramp(2_000, 4_500_000)


class TestReaders:
    def test_open_files_mappings_and_names_go_on(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        """What was open stays open, with the same inode and the same bytes; nothing is listed or fetched again."""
        folder.put_all({"w.safetensors": ramp(SIZE), "d/v.bin": ramp(SIZE, 3)})
        mount = mounted(folder)
        path, other = str(mount.path / "w.safetensors"), str(mount.path / "d" / "v.bin")
        reader = mount.outside()
        inode = reader.call(touching.hold, "fd", path)
        reader.call(touching.hold_map, "map", path)
        assert reader.call(touching.held_read, "fd", 5_000_000, 1_000) == ramp(1_000, 5_000_000)
        before = {name: reader.call(touching.stat, name) for name in (path, other)}
        mount.wait_saved("w.safetensors") if reader.call(touching.read, path) else None
        old_pid, workers = mount.pid, mount.worker_pids
        mount.hand_over()
        assert mount.pid != old_pid
        assert mount.client.status()["pid"] == mount.pid
        assert mount.client.status()["open_files"] == 2
        for name in (path, other):
            reader.call(touching.drop_pages, name)
        assert reader.call(touching.held_read, "fd", 8_000_000, 1_000) == ramp(1_000, 8_000_000)
        assert reader.call(touching.held_map, "map", 3_000_000, 1_000) == ramp(1_000, 3_000_000)
        assert reader.call(touching.hold, "again", path) == inode
        after = {name: reader.call(touching.stat, name) for name in (path, other)}
        assert after == before
        assert reader.call(touching.read, other) == ramp(SIZE, 3)
        for name in ("fd", "again", "map"):
            reader.call(touching.release, name)
        assert mount.wait_for(lambda: mount.client.status()["open_files"] == 0)
        assert mount.wait_for(lambda: all(map(worker_is_gone, workers)))

    def test_eight_readers_that_verify_every_byte_through_several_handovers(
        self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
    ) -> None:
        """No error, no wrong byte, no other inode."""
        folder.put_all({f"{n}.bin": ramp(SIZE + n, n) for n in range(8)})
        mount = mounted(folder)
        stop = tmp_path / "stop"
        readers = [mount.outside() for _ in range(8)]
        for number, reader in enumerate(readers):
            reader.start(loop_reads, str(mount.path / f"{number}.bin"), number, str(stop))
        pids = {mount.pid}
        for _ in range(5):
            mount.hand_over()
            pids.add(mount.pid)
        stop.touch()
        found = [reader.finish() for reader in readers]
        print("slowest read of each in ms:", [round(one["slowest_ms"]) for one in found])
        assert [one["wrong"] for one in found] == [[]] * 8
        assert all(one["reads"] for one in found)
        assert len(pids) == 6
        assert mount.log.count("handed over to pid") == 5

    def test_waiting_reads_are_answered_by_the_new_daemon(self, liar: LiarServer, mounted: Mounted) -> None:
        """A read that the old daemon had in hand, a fault of a mapping and an open all get their answers."""
        with three_waiting(liar, mounted) as mount:
            mount.hand_over()
            assert mount.wait_for(lambda: mount.client.status()["reads"]["waiting"] >= 2)

    def test_a_replaced_version_that_is_open_keeps_its_bytes(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """Unlinked by a refresh, overwritten at the origin: what the SSD tier holds of it is read after a handover."""
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        path = str(mount.path / "w.bin")
        reader = mount.outside()
        old_inode = reader.call(touching.hold, "old", path)
        assert reader.call(touching.held_read, "old", 0, SIZE) == ramp(SIZE)
        folder.put("w.bin", ramp(SIZE, 77))
        assert mount.client.refresh()["changed_count"] == 1
        for _ in range(2):
            mount.hand_over()
            reader.call(touching.drop_pages, path)
            assert reader.call(touching.held_read, "old", 5_000_000, 1000) == ramp(1000, 5_000_000)
        assert reader.call(touching.held_read, "old", 0, SIZE) == ramp(SIZE)
        assert reader.call(touching.read, path) == ramp(SIZE, 77)
        assert reader.call(touching.hold, "new", path) != old_inode
        assert reader.call(touching.held_size, "old") == SIZE

    def test_refreshes_after_a_handover_give_new_inodes_only_to_what_changed(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put_all({"a/w.bin": ramp(1000), "a/same.bin": ramp(1000, 1), "b/v.bin": ramp(500)})
        mount = mounted(folder)
        before = {
            name: mount.call(touching.stat, str(mount.path / name)) for name in ("a", "a/w.bin", "a/same.bin", "b")
        }
        mount.hand_over()
        folder.put("a/w.bin", ramp(2000, 5))
        folder.put("c/new.bin", ramp(10))
        mount.client.refresh()
        after = {name: mount.call(touching.stat, str(mount.path / name)) for name in before}
        assert after["a/same.bin"] == before["a/same.bin"]
        assert after["b"] == before["b"]
        assert after["a"]["st_ino"] == before["a"]["st_ino"]
        assert after["a"]["st_mtime_ns"] > before["a"]["st_mtime_ns"]
        assert after["a/w.bin"]["st_ino"] not in [stat["st_ino"] for stat in before.values()]
        assert mount.call(touching.read, str(mount.path / "a/w.bin")) == ramp(2000, 5)
        assert mount.call(touching.list_names, str(mount.path)) == ["a", "b", "c"]

    def test_an_open_directory_goes_on_where_it_was(
        self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
    ) -> None:
        """Also when the directory shows something else by then: a listing that was begun is finished."""
        names = [f"{number:04d}.bin" for number in range(2000)]
        folder.put_all(dict.fromkeys(names, b"x"))
        mount = mounted(folder)
        reader = mount.outside()
        reader.start(scan_slowly, str(mount.path), str(tmp_path / "begun"), str(tmp_path / "go"))
        assert mount.wait_for((tmp_path / "begun").exists)
        folder.put("later.bin", b"x")
        mount.client.refresh()
        mount.hand_over()
        (tmp_path / "go").touch()
        assert reader.finish() == names
        assert "later.bin" in mount.call(touching.list_names, str(mount.path))

    def test_every_kind_of_origin(self, origin: origins.Origin, mounted: Mounted) -> None:
        """Also with nothing cached: what was listed is fetched in the version that was listed."""
        origin.put_all({"d/w.bin": ramp(SIZE), "d/v.bin": ramp(SIZE, 3)})
        mount = mounted(origin, cache_dir=None)
        reader = mount.outside()
        reader.call(touching.hold, "fd", str(mount.path / "d" / "w.bin"))
        before = reader.call(touching.stat, str(mount.path / "d" / "v.bin"))
        mount.hand_over()
        assert reader.call(touching.held_read, "fd", 0, SIZE) == ramp(SIZE)
        assert reader.call(touching.stat, str(mount.path / "d" / "v.bin")) == before
        assert reader.call(touching.read, str(mount.path / "d" / "v.bin")) == ramp(SIZE, 3)
        assert mount.client.refresh() == {"changed_count": 0, "added_count": 0, "removed_count": 0, "errors": []}

    def test_what_is_borrowed_is_good_until_it_is_given_back(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """The old daemon stays for those who borrowed, and ends with the last of them."""
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        old, before = mount.pid, socket_path(str(mount.path), mount.folder / "run")
        reader = Borrower(lending_door.door_path(before))
        file = reader.open("w.bin")
        with reader.lease(file, 1000, 2000) as view:
            heir, ready = mount.spawn(handover=True)
            with open(ready, "rb") as answer:
                assert b'"ready": true' in answer.readline()
            assert mount.client.status()["pid"] != old
            assert view == ramp(1000, 1000)
            with reader.lease(file, 5_000_000, 5_001_000) as more:
                assert more == ramp(1000, 5_000_000)
            assert not worker_is_gone(old)
        reader.close()
        mount.adopt(heir)
        door = lending_door.door_path(before)
        with closing(Borrower(door)) as again, again.lease(again.open("w.bin"), 0, 1000) as view:
            assert view == ramp(1000)


class TestSettings:
    def test_the_new_daemon_may_have_other_budgets(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        mount.hand_over(ram_bytes=96 << 20, timeout_s=7.0, workers_count=1)
        status = mount.client.status()
        assert status["ram"]["budget_bytes"] == 96 << 20
        assert len(status["workers"]) == 1
        assert mount.client.config()["timeout_s"] == 7.0
        assert mount.wait_for(lambda: mount.client.status()["ram"]["slots_free"] == 24)
        assert status["kernel"]["read_ahead_kb"] > 0

    def test_what_the_kernel_holds_cannot_change(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        mount.alarms_expected.append("cannot change while mounted")
        pid = mount.pid
        for name, value in {"allow_other": True, "umask": 0o077, "uid": 12}.items():
            with pytest.raises(MountFailedError, match=f"{name} cannot change while mounted"):
                mount.hand_over(**{name: value})
        assert mount.client.status()["pid"] == pid
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)

    def test_with_the_origin_gone(self, liar: LiarServer, mounted: Mounted) -> None:
        """The tree and all that is cached pass to the next daemon without a word from the origin."""
        (liar.files / "v.bin").write_bytes(ramp(SIZE, 3))
        mount = mounted(liar.url, timeout_s=3)
        assert mount.call(touching.read, str(mount.path / "v.bin")) == ramp(SIZE, 3)
        mount.wait_saved("v.bin")
        liar.lie(Lie.SILENCE, pattern="*")
        mount.hand_over()
        mount.call(touching.drop_pages, str(mount.path / "v.bin"))
        assert mount.call(touching.read, str(mount.path / "v.bin")) == ramp(SIZE, 3)
        assert mount.call(touching.list_names, str(mount.path)) == ["v.bin"]
        liar.tell_truth()


def door(mount: TestMount) -> Path:
    return door_path(socket_path(str(mount.path), mount.folder / "run"))


def heir_that_signals(pid: int, number: int) -> str:
    """A new daemon that ends the old one by a signal in the middle of the handover."""
    return (
        "import os, select, mfs.handover, mfs.daemon\nrestore = mfs.handover._restore\n"
        "def signal_and_restore(*what):\n"
        f"    os.kill({pid}, {int(number)})\n"
        f"    select.select([os.pidfd_open({pid})], [], [], 10)\n"
        "    restore(*what)\n"
        "mfs.handover._restore = signal_and_restore\nmfs.daemon.main()"
    )


IMPATIENT = "import mfs.handover, mfs.daemon\nmfs.handover._READY_S = 0.5\nmfs.daemon.main()"

STOPS_WITH_THE_MOUNT = {
    "daemon": (
        "import os, mfs.handover, mfs.daemon\nhold = mfs.handover.Heir.take_hold\n"
        "def stop_and_hold(*what):\n"
        "    os.kill(os.getpid(), 19)\n"
        "    hold(*what)\n"
        "mfs.handover.Heir.take_hold = stop_and_hold\nmfs.daemon.main()"
    ),
    "holder": (
        "import os, mfs.holder\ntell = mfs.holder._tell\n"
        "def stop_and_tell(connection, message):\n"
        "    if b'ask' in message:\n"
        "        os.kill(os.getpid(), 19)\n"
        "    return tell(connection, message)\n"
        "mfs.holder._tell = stop_and_tell\nmfs.holder.main()"
    ),
}
"""A new daemon, or its holder, that stops when it was given the mount and has not yet said that it has it."""


def heir_that_stops(pid: int) -> str:
    """A new daemon that stops the old one when that has given the mount, and not yet heard that it is held."""
    return (
        "import os, mfs.handover, mfs.daemon\nhold = mfs.handover.Heir.take_hold\n"
        "def stop_and_hold(*what):\n"
        f"    os.kill({pid}, 19)\n"
        "    hold(*what)\n"
        "mfs.handover.Heir.take_hold = stop_and_hold\nmfs.daemon.main()"
    )


DIES_WHEN_IT_HEARS = (
    "import mfs.children, mfs.holder\npython = mfs.children.python\nDAEMON = '''\n"
    "import os, mfs.handover, mfs.daemon\noffer = mfs.handover.Giver._offer\n"
    "async def offer_and_die(*what):\n"
    "    if await offer(*what):\n"
    "        os.kill(os.getpid(), 9)\n"
    "mfs.handover.Giver._offer = offer_and_die\nmfs.daemon.main()\n'''\n"
    "mfs.children.python = lambda m, module, *rest: python('-c', DAEMON, *rest)\nmfs.holder.main()"
)
"""A holder of daemons that die when they have heard that the next one is held, and told nobody."""


def heir_that_is_slow(folder: Path, seconds: float) -> str:
    """A new daemon that waits for a file before it takes the mount, and then takes its time with what it is told."""
    return (
        "import time, mfs.handover, mfs.daemon\nfrom pathlib import Path\n"
        f"folder, take, restore = Path({str(folder)!r}), mfs.handover.Heir._take, mfs.handover._restore\n"
        "def take_then(heir):\n"
        "    (folder / 'about').touch()\n"
        "    while not (folder / 'closed').exists():\n"
        "        time.sleep(0.01)\n"
        "    return take(heir)\n"
        "def restore_slowly(*what):\n"
        "    restore(*what)\n"
        f"    time.sleep({seconds})\n"
        "mfs.handover.Heir._take, mfs.handover._restore = take_then, restore_slowly\nmfs.daemon.main()"
    )


def close_in_time(name: str, folder: str) -> None:
    """Close what is held just before the mount is handed over."""
    while not Path(folder, "about").exists():
        time.sleep(0.01)
    touching.release(name)
    Path(folder, "closed").touch()


def daemon_that_reads_late(folder: Path) -> str:
    """A daemon that is told of a request, and comes to read it only once the file `go` is there."""
    return (
        "import trio, mfs.daemon\nfrom pathlib import Path\nwait = trio.lowlevel.wait_readable\n"
        f"folder = Path({str(folder)!r})\n"
        "async def wait_long(fd):\n"
        "    await wait(fd)\n"
        "    while (folder / 'late').exists() and not (folder / 'go').exists():\n"
        "        (folder / 'told').touch()\n"
        "        await trio.sleep(0.01)\n"
        "trio.lowlevel.wait_readable = wait_long\nmfs.daemon.main()"
    )


def recorded(mount: TestMount) -> list[Any]:
    """The times that the next mount will show."""
    with closing(sqlite3.connect(f"file:{next(mount.folder.rglob('tree.sqlite'))}?mode=ro", uri=True)) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        return [row for name in tables for row in database.execute(f"select * from {name}")]


def test_what_the_new_daemon_is_told_stays_so(folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path) -> None:
    """A file that was closed a moment ago is the new daemon's to give back, however long it takes to begin."""
    folder.put("w.bin", ramp(SIZE))
    mount = mounted(folder)
    path = str(mount.path / "w.bin")
    list(mount.client.prefetch(["w.bin"], "ssd", wait=True))
    reader = mount.outside()
    reader.call(touching.hold, "fd", path)
    reader.start(close_in_time, "fd", str(tmp_path))
    mount.hand_over(program=heir_that_is_slow(tmp_path, _LINGER_S + 2))
    reader.finish()
    assert mount.call(touching.read, path) == ramp(SIZE)
    mount.stop()
    assert "was not given back" not in mount.log


class TestFailures:
    def test_a_new_daemon_that_dies_with_the_mount_in_its_hands(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """It has the device and the tree, readers wait: the old one goes on, and answers what was asked meanwhile."""
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        program = (
            "import sys, time\nfrom pathlib import Path\nfrom mfs.handover import Heir\n"
            "heir = Heir(Path(sys.argv[1]))\nheir._take()\nprint('taken', flush=True)\ntime.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", program, str(door(mount))], stdout=subprocess.PIPE) as thief:
            assert thief.stdout is not None
            assert thief.stdout.readline() == b"taken\n"
            reader = mount.outside()
            reader.start(touching.read, str(mount.path / "w.bin"))
            assert reader.is_busy(for_s=0.2), "the mount is paused"
            thief.kill()
        assert reader.finish() == ramp(SIZE)
        assert mount.wait_for(lambda: "going on" in mount.log)
        mount.hand_over()
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
        folder.put("w.bin", ramp(100, 9))
        mount.client.refresh()
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(100, 9)

    def test_a_refresh_after_a_failed_handover_is_told_to_the_kernel(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
        with Heir(door(mount)) as heir:
            heir._take()
        assert mount.wait_for(lambda: "going on" in mount.log)
        folder.put("w.bin", ramp(SIZE, 1))
        mount.client.refresh()
        assert mount.wait_for(lambda: mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE, 1))

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
    def test_a_full_runtime_directory_is_found_before_the_mount_changes_hands(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """The new daemon could not be found by anybody: the old one keeps the mount."""
        folder.put("w.bin", ramp(SIZE))
        with tempfile.TemporaryDirectory(prefix="mfs-rt-") as run:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", run], check=True)
            try:
                mount = mounted(folder.url, env={"MFS_RUNTIME_DIR": run})
                mount.alarms_expected.append("nothing can be written in")
                pid = mount.pid
                with pytest.raises(OSError, match="No space left"):
                    Path(run, "filler").write_bytes(bytes(1 << 20))
                with pytest.raises(MountFailedError, match=f"nothing can be written in {run}: No space left"):
                    mount.hand_over()
                assert mount.client.status()["pid"] == pid
                assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
                Path(run, "filler").unlink()
                mount.hand_over()
                assert sorted(path.suffix for path in Path(run).iterdir()) == [
                    ".json", ".loans", ".lock", ".next", ".sock",
                ]  # fmt: skip
                mount.stop()
            finally:
                subprocess.run(["umount", "-l", run], check=True)

    def test_what_is_published_in_the_pause_is_written_down_only_by_a_daemon_that_keeps_the_mount(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """The next daemon does not know of it: its readers' times would go back when the record is read again."""
        folder.put("w.bin", ramp(1000))
        mount = mounted(folder)
        assert mount.call(touching.list_names, str(mount.path)) == ["w.bin"]
        with Heir(door(mount)) as heir:
            heir._take()
            before = recorded(mount)
            assert before
            folder.put("w.bin", ramp(2000, 1))
            assert mount.client.refresh()["changed_count"] == 1
            assert not mount.wait_for(lambda: recorded(mount) != before, timeout_s=0.5)
        assert mount.wait_for(lambda: recorded(mount) != before)

    def test_a_request_that_is_taken_back_before_it_is_read_does_not_stop_the_daemon(
        self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
    ) -> None:
        """Its reader was killed; the read of the device finds nothing, and must not wait for whoever comes next."""
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        mount.hand_over(program=daemon_that_reads_late(tmp_path))
        reader = mount.outside()
        (tmp_path / "late").touch()
        reader.start(touching.digest, str(mount.path / "w.bin"))
        assert mount.wait_for((tmp_path / "told").exists)
        os.kill(reader.pid, signal.SIGKILL)
        reader.close()
        (tmp_path / "go").touch()
        for _ in range(3):
            assert mount.client.status()["open_files"] == 0
        assert mount.call(touching.digest, str(mount.path / "w.bin")) == hashlib.sha256(ramp(SIZE)).hexdigest()

    def test_a_new_daemon_that_is_killed_with_its_holder_leaves_a_stale_mount(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """Never a hanging one: readers get ENOTCONN, and the next mount serves."""
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        reader = mount.outside()
        reader.call(touching.hold, "fd", str(mount.path / "w.bin"))
        mount.hand_over()
        mount.kill(detach=False)
        assert reader.call(touching.held_outcome, "fd", 0, 10) == "ENOTCONN"
        reader.close()
        mount.detach()
        mount.start()
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)

    @pytest.mark.parametrize("who", STOPS_WITH_THE_MOUNT)
    def test_a_new_daemon_that_was_stopped_finds_that_the_old_one_goes_on(
        self, folder: origins.FolderOrigin, mounted: Mounted, who: str
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        mount.alarms_expected.append("it keeps the mount")
        mount.hand_over(program=IMPATIENT)
        pid = mount.pid
        heir, answer = mount.spawn(handover=True, program=STOPS_WITH_THE_MOUNT[who])
        assert mount.wait_for(lambda: "going on" in mount.log)
        heir.send_signal(signal.SIGCONT)
        with open(answer) as said:
            assert "keeps the mount" in said.read()
        assert heir.wait(10) == 1
        assert mount.client.status()["pid"] == pid
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
        mount.hand_over()
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)

    def test_an_old_daemon_that_dies_before_it_hears_that_the_new_one_serves_is_not_followed(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        """The new one has said so and gone its way: what it said still stands in the connection it has closed."""
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        old = mount.pid
        heir, answer = mount.spawn(handover=True, program=heir_that_stops(old))
        with open(answer) as said:
            mount.ready = json.loads(said.read().splitlines()[-1])
        os.kill(old, signal.SIGKILL)
        mount.adopt(heir, old_status=-signal.SIGKILL)
        assert "starting the next one" not in mount.log
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)

    def test_an_old_daemon_that_dies_when_it_hears_that_the_new_one_serves_is_not_followed(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        mount.hand_over(program=DIES_WHEN_IT_HEARS)
        mount.hand_over(old_status=-signal.SIGKILL)
        assert "starting the next one" not in mount.log
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)

    def test_two_new_daemons_at_once(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        """One gets the mount, the other is told."""
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        with Heir(door(mount)) as first, Heir(door(mount)) as second:
            first._take()
            with pytest.raises(Exception, match="being handed over already"):
                second._take()
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)

    def test_another_format_is_refused(
        self, folder: origins.FolderOrigin, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mount = mounted(folder)
        monkeypatch.setattr("mfs.handover.FORMAT", 999)
        with Heir(door(mount)) as heir, pytest.raises(Exception, match="format 2, the new daemon takes 999"):
            heir._take()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
    def test_only_the_mounts_own_user_may_take_it(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        """Nobody else can connect; should the socket's mode be widened, the daemon itself refuses."""
        with tempfile.TemporaryDirectory(prefix="mfs-rt-") as run:  # not below tmp_path, which is closed to others
            Path(run).chmod(0o755)
            mount = mounted(folder.url, env={"MFS_RUNTIME_DIR": run})
            place = door_path(socket_path(str(mount.path), Path(run)))
            program = (
                "import sys\nfrom pathlib import Path\nfrom mfs.handover import Heir\n"
                "try: Heir(Path(sys.argv[1]))\nexcept Exception as error: print(error)"
            )
            command = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", program, str(place)]
            refused = subprocess.run(command, capture_output=True, text=True, check=False)
            place.chmod(0o666)
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            mount.stop()
        assert "Permission denied" in refused.stdout
        assert "uid 65534 may not take this mount over" in said.stdout

    def test_sigterm_during_a_handover_unmounts(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        """The new daemon says why it did not come about."""
        mount = mounted(folder)
        mount.alarms_expected.append("taken away while it was handed over")
        with pytest.raises(MountFailedError, match="taken away while it was handed over"):
            mount.hand_over(program=heir_that_signals(mount.pid, signal.SIGTERM))
        mount.wait_ended()
        assert mount.status == 0
