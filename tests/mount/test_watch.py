"""What `mfs watch` tells is what happened: every read, every byte of the origin, nothing when nobody watches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.types import BLOCK_BYTES
from tests.frameworks.conftest import watching
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.hub import HubServer

MIB = 1 << 20
CONTENT = ramp(20 * MIB + 7)


def test_reads_and_fetches_are_told_with_their_ranges(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    folder.put("a/w.bin", CONTENT)
    mount = mounted(folder)
    path = str(mount.path / "a/w.bin")
    with watching(mount) as records:
        assert mount.call(touching.pread_direct, path, 5000, 8 * MIB) == CONTENT[8 * MIB : 8 * MIB + 5000]
        mount.wait_quiet()
    assert {record["file"] for record in records} == {"a/w.bin"}
    by_op = {op: [r for r in records if r["op"] == op] for op in ("open", "read", "fetch", "close")}
    assert [r["size"] for r in by_op["open"]] == [len(CONTENT)]
    assert len(by_op["close"]) == 1
    [read] = by_op["read"]
    assert (read["start"], read["stop"]) == (8 * MIB, 8 * MIB + 5000)
    assert read["waited_s"] > 0
    assert "error" not in read
    [fetch] = by_op["fetch"]
    assert (fetch["start"], fetch["stop"], fetch["ahead"]) == (8 * MIB, 8 * MIB + BLOCK_BYTES, False)
    assert fetch["origin_bytes"] == BLOCK_BYTES == mount.origin_bytes


def test_all_bytes_of_the_origin_are_accounted_for(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    folder.put_all({"a.bin": CONTENT, "b.bin": CONTENT[: 9 * MIB]})
    mount = mounted(folder)
    with watching(mount) as records:
        for name in ("a.bin", "b.bin"):
            mount.call(touching.read, str(mount.path / name))
        mount.wait_quiet()
    assert sum(r["origin_bytes"] for r in records if r["op"] == "fetch") == mount.origin_bytes == len(CONTENT) + 9 * MIB
    seen = {name: set[int]() for name in ("a.bin", "b.bin")}
    for record in records:
        if record["op"] == "read":
            seen[record["file"]] |= set(range(record["start"] // 4096, -(-record["stop"] // 4096)))
    assert [len(pages) for pages in seen.values()] == [-(-len(CONTENT) // 4096), 9 * MIB // 4096]


def test_two_names_of_one_digest_are_told_apart(hub: HubServer, mounted: Mounted) -> None:
    origin = origins.HubOrigin(hub)
    origin.put_all({"a.bin": CONTENT, "b.bin": CONTENT})
    mount = mounted(origin)
    with watching(mount) as records:
        for name in ("a.bin", "b.bin"):
            mount.call(touching.hold, name, str(mount.path / name))
        assert mount.call(touching.held_read, "a.bin", 100, 5000) == CONTENT[100:5100]
        for name in ("a.bin", "b.bin"):
            mount.call(touching.release, name)
    assert {record["file"] for record in records if record["op"] == "read"} == {"a.bin"}
    assert [record["file"] for record in records if record["op"] == "open"] == ["a.bin", "b.bin"]


def test_a_read_that_fails_is_told_with_its_reason(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    folder.put("w.bin", CONTENT)
    mount = mounted(folder)
    (folder.root / "w.bin").write_bytes(b"another")
    with watching(mount) as records:
        assert mount.call(touching.read_failure, str(mount.path / "w.bin")) == "ESTALE"
    failures = [record["error"] for record in records if "error" in record]
    assert failures
    assert all("w.bin" in failure for failure in failures), failures


def test_two_watchers_see_the_same_and_none_costs_nothing(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    folder.put("w.bin", CONTENT)
    mount = mounted(folder)
    path = str(mount.path / "w.bin")
    mount.call(touching.pread, path, 10, 0)
    with watching(mount) as first, watching(mount) as second:
        mount.call(touching.pread_direct, path, 4096, 4 * MIB)
    mount.call(touching.pread_direct, path, 4096, 12 * MIB)
    assert first == second
    assert [r["start"] for r in first if r["op"] == "read"] == [4 * MIB]


class TestCommand:
    def watch(self, *arguments: object, runtime_dir: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "mfs", "watch", *map(str, arguments)]
        env = os.environ | {"MFS_RUNTIME_DIR": str(runtime_dir)}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=env)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def test_sums_up_what_a_command_did(self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path) -> None:
        folder.put_all({"a/w.bin": CONTENT, "b/other.bin": CONTENT})
        mount = mounted(folder)
        mount.call(touching.pread_direct, str(mount.path / "b/other.bin"), 4096, 0)
        log = tmp_path / "ops.jsonl"
        done = self.watch(
            "--json", "--log", log, mount.path / "a", "cmp", "--bytes", "4096", mount.path / "a/w.bin", os.devnull,
            runtime_dir=mount.folder / "run", status=1,
        )  # fmt: skip
        [row] = json.loads(done.stdout)
        assert (row["file"], row["opens_count"], row["size"]) == ("a/w.bin", 1, len(CONTENT))
        assert 4096 <= row["touched_bytes"] <= row["read_bytes"] <= len(CONTENT)
        assert row["origin_bytes"] == mount.origin_bytes - BLOCK_BYTES
        records = [json.loads(line) for line in log.read_text().splitlines()]
        assert {record["op"] for record in records} == {"open", "read", "fetch", "close"}

    def test_a_table_for_people(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", CONTENT)
        mount = mounted(folder)
        run = mount.folder / "run"
        lines = self.watch(mount.path, "sha256sum", mount.path / "w.bin", runtime_dir=run).stdout.splitlines()
        assert lines[1].split()[0] == "OPENS"
        assert lines[2].split()[0] == "1"
        assert lines[2].endswith("w.bin")
        assert self.watch(mount.path, "true", runtime_dir=run).stdout == "nothing was opened or read\n"

    def test_without_a_command_it_watches_until_interrupted(
        self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
    ) -> None:
        folder.put("w.bin", CONTENT)
        mount, log = mounted(folder), tmp_path / "ops.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-m", "mfs", "watch", "--log", log, mount.path], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"MFS_RUNTIME_DIR": str(mount.folder / "run")},
        )  # fmt: skip
        try:

            def is_told() -> bool:
                mount.call(touching.pread_direct, str(mount.path / "w.bin"), 4096, 8 * MIB)
                return log.exists() and '"read"' in log.read_text()

            assert mount.wait_for(is_told)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0
        assert out.splitlines()[-1].endswith("w.bin")

    def test_mistakes_are_one_line(self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path) -> None:
        folder.put("w.bin", b"x")
        mount = mounted(folder)
        run = mount.folder / "run"
        assert "no-such-program" in self.watch(mount.path, "no-such-program", runtime_dir=run, status=1).stderr
        assert self.watch(tmp_path, "true", runtime_dir=run, status=1).stderr.count("\n") == 1
        assert self.watch(runtime_dir=run, status=2).stderr.count("\n") == 1


@pytest.mark.parametrize("count", [250_000])
def test_a_watcher_that_does_not_take_costs_bounded_memory(count: int) -> None:
    from mfs.oplog import RECORDS_MAX, OpLog

    log = OpLog([""])
    with log.watching() as watcher:
        for number in range(count):
            log.note("read", 0, "w", start=number, stop=number + 1)
        taken = watcher.take(count)
    assert (len(taken), watcher.dropped_count) == (RECORDS_MAX, count - RECORDS_MAX)
    assert [record["start"] for record in taken[:3]] == [0, 1, 2]
    assert not log.watched
