"""How a mount ends: by signal, umount or shutdown, with files open and reads waiting; and what it costs while idle."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mfs.testing import ramp
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.liar import LiarServer, Lie

SIZE = (9 << 20) + 17


def worker_is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


class TestEnding:
    def test_sigterm_with_open_files_and_mappings(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.safetensors", ramp(SIZE))
        mount = mounted(folder)
        path = str(mount.path / "w.safetensors")
        reader = mount.outside()
        reader.call(touching.hold, "fd", path)
        reader.call(touching.hold_map, "map", path)
        assert reader.call(touching.held_read, "fd", 5_000_000, 1_000) == ramp(1_000, 5_000_000)
        workers = mount.worker_pids
        os.kill(mount.pid, 15)
        mount.wait_ended()
        assert mount.status == 0
        mount.check_log()
        assert reader.call(touching.held_outcome, "fd", 0, 10) in (ramp(10), "ENOTCONN")
        assert mount.wait_for(lambda: all(map(worker_is_gone, workers)))
        reader.close()
        assert mount.call(os.listdir, str(mount.path)) == []

    def test_shutdown_through_the_control_socket(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        assert mount.client.shutdown() == {"pid": mount.pid}
        mount.wait_ended()
        assert mount.status == 0
        mount.check_log()

    @pytest.mark.parametrize("flags", [[], ["-l"]])
    def test_umount_from_outside_ends_the_daemon(
        self, folder: origins.FolderOrigin, mounted: Mounted, flags: list[str]
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
        workers = mount.worker_pids
        subprocess.run(["umount", *flags, str(mount.path)], check=True, timeout=30)
        mount.wait_ended()
        assert mount.status == 0
        mount.check_log()
        assert mount.wait_for(lambda: all(map(worker_is_gone, workers)))

    def test_what_only_ram_holds_is_saved_at_the_end(
        self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        assert mount.call(touching.pread, str(mount.path / "w.bin"), 1000, 100) == ramp(1000, 100)
        mount.stop()
        mount.start()
        assert mount.client.stat("w.bin")["ssd_bytes"] > 0

    def test_sigterm_while_reads_wait_for_a_stalled_origin(self, liar: LiarServer, mounted: Mounted) -> None:
        (liar.files / "w.safetensors").write_bytes(ramp(SIZE))
        (liar.files / "v.bin").write_bytes(ramp(SIZE, 3))
        mount = mounted(liar.url, timeout_s=60)
        liar.lie(Lie.SILENCE, pattern="*.[bs]*")
        readers = [mount.outside() for _ in range(3)]
        for reader, name in zip(readers, ("w.safetensors", "w.safetensors", "v.bin"), strict=True):
            reader.start(touching.read_failure, str(mount.path / name), 5_000_000)
        assert mount.wait_for(
            lambda: mount.client.status()["reads"]["waiting"] >= 2
        )  # of one page the kernel asks once
        os.kill(mount.pid, 15)
        mount.wait_ended()
        assert mount.status == 0
        for reader in readers:
            assert reader.finish() in ("ENOTCONN", "ECONNABORTED", "EIO")
        mount.check_log()

    def test_readers_killed_while_they_wait_leave_nothing(
        self, folder: origins.FolderOrigin, mounted: Mounted, liar: LiarServer
    ) -> None:
        (liar.files / "v.bin").write_bytes(ramp(SIZE, 3))
        mount = mounted(liar.url, timeout_s=3)
        liar.lie(Lie.SILENCE, pattern="*.bin")
        reader = mount.outside()
        reader.start(touching.read_failure, str(mount.path / "v.bin"), 5_000_000)
        assert mount.wait_for(lambda: mount.client.status()["reads"]["waiting"] >= 1)
        os.kill(reader.pid, 9)
        with pytest.raises(EOFError):
            reader.finish()
        liar.tell_truth()
        mount.wait_quiet()
        assert mount.call(touching.read, str(mount.path / "v.bin")) == ramp(SIZE, 3)


class TestWorkers:
    def test_a_killed_worker_is_replaced_and_readers_do_not_notice(self, liar: LiarServer, mounted: Mounted) -> None:
        (liar.files / "v.bin").write_bytes(ramp(SIZE, 3))
        mount = mounted(liar.url)
        before = mount.worker_pids
        reader = mount.outside()
        liar.lie(Lie.SILENCE, pattern="*.bin")
        reader.start(touching.pread, str(mount.path / "v.bin"), 2_000, 4_500_000)
        liar.wait_for_request("/v.bin")
        # The one that waits for the origin. Not both: a read is tried on one other worker, and then it fails.
        victim = next(worker["pid"] for worker in mount.client.status()["workers"] if worker["inflight"])
        os.kill(victim, 9)
        liar.tell_truth()
        assert reader.finish() == ramp(2_000, 4_500_003)
        assert mount.wait_for(lambda: len(mount.worker_pids) == len(before) and set(mount.worker_pids) != set(before))
        assert mount.call(touching.read, str(mount.path / "v.bin")) == ramp(SIZE, 3)

    def test_a_stopped_worker_is_killed_after_its_deadline(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder, timeout_s=1)
        mount.alarms_expected.append("killing it")
        before = mount.worker_pids
        for pid in before:
            os.kill(pid, 19)
        failure = mount.call(touching.read_failure, str(mount.path / "w.bin"), 5_000_000)
        assert failure == "EIO"
        assert mount.wait_for(lambda: not set(before) & set(mount.worker_pids) and len(mount.worker_pids) == 2)
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)

    @pytest.mark.parametrize("number", [9, 19], ids=["killed", "stopped"])
    def test_workers_that_do_nothing_cost_a_reader_a_part_of_his_time(
        self, folder: origins.FolderOrigin, mounted: Mounted, number: int
    ) -> None:
        """Two reads, all workers dead or stopped: others take their work within one time-out, and readers get bytes."""
        folder.put("w.bin", ramp(3 * SIZE))
        mount = mounted(folder, timeout_s=20)
        mount.alarms_expected.append("has said nothing")
        before = mount.worker_pids
        for pid in before:
            os.kill(pid, number)
        for offset in (5_000_000, 2 * SIZE):
            read = mount.call(touching.pread, str(mount.path / "w.bin"), 128 << 10, offset)
            assert read == ramp(128 << 10, offset)
        assert mount.wait_for(lambda: not set(before) & set(mount.worker_pids) and len(mount.worker_pids) == 2)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_mount_costs_no_cpu(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    folder.put("w.bin", ramp(SIZE))
    mount = mounted(folder)
    assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
    mount.wait_saved("w.bin")
    pids = [mount.pid, *mount.worker_pids]
    before = sum(map(cpu_s, pids))
    subprocess.run(["sleep", "10"], check=True)  # the measurement itself, not a wait for something
    spent = sum(map(cpu_s, pids)) - before
    print(f"idle CPU of daemon and workers: {spent:.2f} s in 10 s")
    assert spent < 0.5
