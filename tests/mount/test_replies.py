"""Replies that a worker writes by itself: who has brought the bytes answers, whoever dies of those who told him."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.mapping import map_file
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.workers.rig import FAULTY_PATH

_AT = (6 << 20) + 12288
CONTENT = ramp((17 << 20) + 1, 5)

_held: dict[str, int] = {}


def hold(path: str) -> None:
    """Open a file of which the kernel is to read no more than is asked."""
    _held[path] = fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def read_held(path: str, start: int = _AT) -> bytes:
    return os.pread(_held[path], 4096, start)


def read_around(path: str, seed: int, count: int) -> int:
    """Pages of a mapping in no order, each compared; how many were looked at."""
    chance = random.Random(seed)
    with open(path, "rb") as file:
        view = map_file(file.fileno(), len(CONTENT), writable=False)
    for _ in range(count):
        start = chance.randrange(len(CONTENT))
        assert view[start : start + 64] == CONTENT[start : start + 64], start
    return count


class _Faulty:
    """A mount of a folder that waits, and kills, when told to."""

    def __init__(self, tmp_path: Path) -> None:
        self._origin = tmp_path / "origin"
        self._faults = tmp_path / "origin.faults"
        for folder in (self._origin, self._faults):
            folder.mkdir()
        (self._origin / "a.bin").write_bytes(CONTENT)
        self.mount = TestMount(
            tmp_path / "m", f"faulty://{self._origin}", env={"PYTHONPATH": FAULTY_PATH}, workers_count=2
        )
        self.file = str(self.mount.path / "a.bin")

    @property
    def gate(self) -> Path:
        return self._faults / "gate"

    def kill_after_reply(self, whom: str) -> None:
        (self._faults / "kill-after-reply").write_text(whom)

    @property
    def has_killed(self) -> bool:
        return not (self._faults / "kill-after-reply").exists()

    def asked(self, at: int = _AT) -> int:
        """How often the origin was asked for what stands there."""
        log = self._faults / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return sum(int(start) <= at < int(stop) for _, start, stop in map(str.split, lines))


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[_Faulty]:
    made = _Faulty(tmp_path)
    with made.mount:
        yield made


def test_a_reader_has_his_bytes_while_the_daemon_stands_still(faulty: _Faulty) -> None:
    mount = faulty.mount
    faulty.gate.touch()
    reader = mount.outside()
    reader.call(hold, faulty.file)
    reader.start(read_held, faulty.file)
    assert mount.wait_for(lambda: faulty.asked() == 1)
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        faulty.gate.unlink()
        assert reader.finish() == CONTENT[_AT : _AT + 4096]
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    mount.wait_quiet()
    reads = mount.client.status()["reads"]
    assert (reads["count"], reads["bytes"], reads["errors_count"]) == (1, 4096, 0), "the daemon keeps the books"


def test_a_worker_that_dies_when_it_has_answered_costs_a_fetch_and_nobody_a_byte(faulty: _Faulty) -> None:
    mount = faulty.mount
    mount.alarms_expected.append(r"worker \d+ ended")
    mount.call(hold, faulty.file)
    faulty.kill_after_reply("worker")
    assert mount.call(read_held, faulty.file) == CONTENT[_AT : _AT + 4096]
    assert mount.wait_for(lambda: faulty.has_killed and faulty.asked() == 2), "nobody told the daemon"
    assert mount.call(read_around, faulty.file, 1, 200) == 200
    mount.wait_quiet()
    assert mount.client.status()["reads"]["errors_count"] == 0


def test_a_daemon_that_dies_when_its_worker_has_answered_leaves_its_successor_nothing_to_mend(faulty: _Faulty) -> None:
    mount = faulty.mount
    mount.alarms_expected.append("starting the next one")
    mount.call(hold, faulty.file)
    killed = mount.pid
    faulty.kill_after_reply("daemon")
    assert mount.call(read_held, faulty.file) == CONTENT[_AT : _AT + 4096]
    mount.wait_successor(killed)
    assert mount.call(read_around, faulty.file, 2, 200) == 200
    assert mount.client.status()["reads"]["errors_count"] == 0


def test_random_faults_go_on_while_the_mount_is_handed_over(faulty: _Faulty) -> None:
    mount = faulty.mount
    readers = [mount.outside() for _ in range(3)]
    for seed, reader in enumerate(readers):
        reader.start(read_around, faulty.file, seed, 4000)
    mount.hand_over()
    mount.client.evict([""], "all")
    mount.hand_over()
    assert [reader.finish(timeout_s=60) for reader in readers] == [4000] * 3
    assert mount.client.status()["reads"]["errors_count"] == 0


def test_nobody_is_given_the_device_of_a_mount_that_is_gone(faulty: _Faulty) -> None:
    """What is only in RAM is being saved, and what was ordered for a reader is ordered again."""
    mount = faulty.mount
    mount.alarms_expected.append(r"worker \d+ ended")
    reader = mount.outside()
    reader.call(hold, faulty.file)
    assert reader.call(read_held, faulty.file, 4096) == CONTENT[4096:8192]
    faulty.gate.touch()
    reader.start(read_held, faulty.file)
    assert mount.wait_for(lambda: faulty.asked() == 1)
    workers = mount.client.status()["workers"]
    for worker in workers:
        os.kill(worker["pid"], signal.SIGSTOP)
    os.kill(mount.holder_pid, signal.SIGTERM)
    assert mount.wait_for(lambda: not mount.is_mounted)
    [busy] = [worker["pid"] for worker in workers if worker["inflight"]]
    os.kill(busy, signal.SIGKILL)
    mount.wait_ended()
    assert mount.status == 0
    mount.check_log()
