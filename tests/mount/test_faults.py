"""Whatever the network and the origin do: right bytes or an error in time, and right bytes once it is over."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from mfs.testing import ramp
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.chaos import ChaosProxy
from tests.servers.liar import LiarServer, Lie
from tests.servers.swift import SwiftServer

MIB = 1 << 20
FILES = {"m/w.bin": ramp(9 * MIB + 5), "m/warm.bin": ramp(5 * MIB + 1, 13), "m/config.json": b"{}"}
TIMEOUT_S = 3.0
PATIENCE_S = 15.0
"""What an answer may take where TIMEOUT_S is the promise: generous, since two cores are shared. A hang is endless."""


def fails_in_time(mount: Any, name: str, *expected: str) -> None:
    start_s = time.monotonic()
    failure = mount.call(touching.read_failure, str(mount.path / name), 5 * MIB, timeout_s=60)
    assert failure in expected
    assert time.monotonic() - start_s < PATIENCE_S


class TestNetwork:
    @pytest.mark.parametrize(
        ("weather", "outcome"),
        [
            ({"reset_after_bytes": 100_000, "faults_count": 2}, "passes"),
            ({"truncate_after_bytes": 100_000, "faults_count": 2}, "passes"),
            ({"refuse": True, "faults_count": 2}, "passes"),
            ({"rate_mb_s": 20, "rtt_ms": 10}, "passes"),
            ({"stall_after_bytes": 0, "faults_count": 1}, "passes"),
            ({"stall_after_bytes": 100_000, "faults_count": 1}, "passes"),
            ({"stall_after_bytes": 0}, "EIO"),
            ({"reset_after_bytes": 0}, "EIO"),
            ({"truncate_after_bytes": 0}, "EIO"),
            # It stays, but each answer brings some, and that counts.
            ({"reset_after_bytes": 100_000}, ""),
            ({"truncate_after_bytes": 100_000}, ""),
            ({"stall_after_bytes": 100_000}, ""),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_bad_weather(
        self,
        swift: SwiftServer,
        s3_bucket: str,
        mounted: Mounted,
        chaos: Callable[[str], ChaosProxy],
        weather: dict[str, Any],
        outcome: str,
    ) -> None:
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all(FILES)
        proxy = chaos(swift.endpoint)
        origin.source = {"endpoint_url": proxy.url}
        mount = mounted(origin, timeout_s=20.0 if outcome == "passes" else TIMEOUT_S)
        assert mount.call(touching.read, str(mount.path / "m/warm.bin")) == FILES["m/warm.bin"]
        proxy.set(**weather)
        if outcome == "passes":
            assert mount.call(touching.read, str(mount.path / "m/w.bin")) == FILES["m/w.bin"]
        else:
            reader = mount.outside()
            reader.start(touching.read_failure, str(mount.path / "m/w.bin"), 5 * MIB)
            # Meanwhile the tree, warm files and the control socket answer.
            names = mount.call(touching.tree, str(mount.path), timeout_s=PATIENCE_S)
            assert names == {name: len(content) for name, content in FILES.items()}
            warm = str(mount.path / "m/warm.bin")
            mount.call(touching.drop_pages, warm)
            assert mount.call(touching.read, warm, timeout_s=PATIENCE_S) == FILES["m/warm.bin"]
            assert mount.client.status()["open_files"] >= 0
            assert reader.finish(timeout_s=PATIENCE_S if outcome else 120) == outcome
            proxy.clear()
        assert mount.call(touching.read, str(mount.path / "m/w.bin")) == FILES["m/w.bin"]

    def test_an_origin_that_is_down_and_comes_back(
        self, swift: SwiftServer, s3_bucket: str, mounted: Mounted, chaos: Callable[[str], ChaosProxy]
    ) -> None:
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all(FILES)
        proxy = chaos(swift.endpoint)
        origin.source = {"endpoint_url": proxy.url}
        mount = mounted(origin, timeout_s=TIMEOUT_S)
        proxy.stop()
        fails_in_time(mount, "m/w.bin", "EIO")
        proxy.start()
        assert mount.call(touching.read, str(mount.path / "m/w.bin")) == FILES["m/w.bin"]

    def test_many_readers_of_a_stalled_origin_all_get_their_error(
        self, swift: SwiftServer, s3_bucket: str, mounted: Mounted, chaos: Callable[[str], ChaosProxy]
    ) -> None:
        """More readers than connections: those that wait in the queue have the same deadline."""
        origin = origins.S3Origin(swift, s3_bucket)
        files = {f"{number}.bin": ramp(1 * MIB, number) for number in range(24)}
        origin.put_all({**files, "warm.bin": ramp(1_000)})
        proxy = chaos(swift.endpoint)
        origin.source = {"endpoint_url": proxy.url}
        mount = mounted(origin, timeout_s=TIMEOUT_S, connections_count=4)
        assert mount.call(touching.read, str(mount.path / "warm.bin")) == ramp(1_000)
        proxy.set(stall_after_bytes=0)
        paths = [str(mount.path / name) for name in files]
        failures = mount.call(touching.read_failures_together, paths, timeout_s=30)
        assert set(failures) == {"EIO"}
        mount.wait_quiet()
        proxy.clear()
        for name, content in list(files.items())[::5]:
            assert mount.call(touching.read, str(mount.path / name)) == content


class TestWaiting:
    """An origin that fails for a while is waited for; one that fails for good is an error once, and no longer."""

    @pytest.mark.parametrize("lie", [Lie.STATUS, Lie.HANG_UP, Lie.SILENCE])
    @pytest.mark.parametrize("how", [touching.read, touching.map_file], ids=["read", "mmap"])
    def test_a_read_waits_and_succeeds_inside_its_deadline(
        self, liar: LiarServer, mounted: Mounted, lie: Lie, how: Callable[..., bytes]
    ) -> None:
        publish(liar, FILES)
        mount = mounted(liar.url, timeout_s=600.0)
        liar.lie(lie, pattern="/m/w.bin", status=500)
        reader = mount.outside()
        reader.start(how, str(mount.path / "m/w.bin"), *(["shared"] if how is touching.map_file else []))
        assert mount.wait_for(lambda: liar.lies_told() >= (1 if lie is Lie.SILENCE else 3))
        assert reader.is_busy()
        liar.tell_truth()
        assert reader.finish(timeout_s=60) == FILES["m/w.bin"]

    def test_a_permanent_failure_is_sigbus_for_a_mapping_and_a_clean_retry_works_at_once(
        self, liar: LiarServer, mounted: Mounted
    ) -> None:
        publish(liar, FILES)
        mount = mounted(liar.url, timeout_s=1.5)
        path = str(mount.path / "m/w.bin")
        liar.lie(Lie.STATUS, pattern="/m/w.bin", status=500)
        reader = mount.outside()
        with pytest.raises(EOFError, match=f"status -{int(signal.SIGBUS)}"):
            reader.call(touching.map_file, path, "shared")
        assert mount.call(touching.read_failure, path, 5 * MIB) == "EIO"
        liar.tell_truth()
        assert mount.call(touching.map_file, path, "shared") == FILES["m/w.bin"]

    def test_a_reader_of_a_dead_origin_waits_for_it_once(self, liar: LiarServer, mounted: Mounted) -> None:
        """The kernel asks again for the page when its reading ahead failed: that finds the answer waiting."""
        publish(liar, {"one-page.bin": b"x" * 4096})
        mount = mounted(liar.url, timeout_s=1.5)
        path = str(mount.path / "one-page.bin")
        liar.lie(Lie.SILENCE, pattern="/one-page.bin")
        assert mount.call(touching.read_failure, path) == "EIO"
        mount.wait_quiet(prefetch=False)
        assert mount.client.status()["reads"]["errors_count"] == 2
        assert mount.client.status()["origin"]["errors_count"] == 1
        assert mount.call(touching.read_failure, path) == "EIO"  # asked anew, not remembered
        mount.wait_quiet(prefetch=False)
        assert mount.client.status()["origin"]["errors_count"] == 2


class TestLies:
    """Each ends in an error or in the truth; what no client could notice is said here."""

    @pytest.mark.parametrize(
        ("lie", "expected"),
        [
            (Lie.LONG_LENGTH, {"EIO"}),
            (Lie.SHORT_LENGTH, {"EIO"}),
            (Lie.NO_LENGTH, {"EIO"}),
            (Lie.TRUNCATED, {"EIO", ""}),  # read on, 1000 bytes at a time, if a second is enough for that
            (Lie.OTHER_RANGE, {"EIO"}),
            (Lie.SHORT_RANGE, {"EIO"}),
            (Lie.OTHER_TOTAL, {"ESTALE", "EIO"}),
            (Lie.NO_CONTENT_RANGE, {"EIO"}),
            (Lie.IGNORES_RANGE, {"EIO", "ESTALE"}),
            (Lie.NEW_ETAGS, {"ESTALE"}),
            (Lie.SHRUNK, {"ESTALE", "EIO"}),
            (Lie.GROWN, {"ESTALE", "EIO"}),
            (Lie.CHANGED, {"ESTALE"}),
            (Lie.STATUS, {"EIO"}),
            (Lie.HANG_UP, {"EIO"}),
            (Lie.NOT_HTTP, {"EIO"}),
            (Lie.ENDLESS_HEADERS, {"EIO"}),
            (Lie.SILENCE, {"EIO"}),
            (Lie.DRIP, {"EIO"}),
        ],
    )
    def test_a_lie_is_an_error_and_the_truth_is_read_afterwards(
        self, liar: LiarServer, mounted: Mounted, lie: Lie, expected: set[str]
    ) -> None:
        publish(liar, FILES)
        mount = mounted(liar.url, timeout_s=1.0, workers_count=1)
        path = str(mount.path / "m/w.bin")
        assert mount.call(touching.pread, path, 4096, 0) == FILES["m/w.bin"][:4096]
        liar.lie(lie, pattern="/m/w.bin", after_bytes=1000, interval_s=0.05)
        fails_in_time(mount, "m/w.bin", *expected)
        assert liar.lies_told() >= 1
        assert mount.call(touching.pread, path, 4096, 0) == FILES["m/w.bin"][:4096]
        assert mount.call(touching.read, str(mount.path / "m/config.json")) == b"{}"
        liar.tell_truth()
        assert mount.wait_for(lambda: mount.call(touching.read_failure, path, 5 * MIB) == "")
        assert mount.call(touching.read, path) == FILES["m/w.bin"]

    def test_a_small_file_is_read_from_a_server_that_answers_ranges_with_all_of_it(
        self, liar: LiarServer, mounted: Mounted
    ) -> None:
        publish(liar, {"small.bin": FILES["m/w.bin"][:3_000_001]})
        mount = mounted(liar.url)
        liar.lie(Lie.IGNORES_RANGE, pattern="/small.bin")
        path = str(mount.path / "small.bin")
        assert mount.call(touching.pread_direct, path, 4096, 2 * MIB) == FILES["m/w.bin"][2 * MIB :][:4096]
        assert mount.call(touching.read, path) == FILES["m/w.bin"][:3_000_001]
        assert liar.lies_told() >= 2

    def test_a_503_that_passes_is_not_noticed(self, liar: LiarServer, mounted: Mounted) -> None:
        (liar.files / "w.bin").write_bytes(FILES["m/w.bin"])
        mount = mounted(liar.url)
        liar.lie(Lie.STATUS, status=503, retry_after_s=0, count=3, pattern="*.bin")
        assert mount.call(touching.read, str(mount.path / "w.bin")) == FILES["m/w.bin"]
        assert liar.lies_told() == 3

    def test_an_object_that_vanished_is_stale(self, liar: LiarServer, mounted: Mounted) -> None:
        (liar.files / "w.bin").write_bytes(FILES["m/w.bin"])
        mount = mounted(liar.url, timeout_s=1.0, workers_count=1)
        mount.call(touching.hold, "h", str(mount.path / "w.bin"))
        (liar.files / "w.bin").unlink()
        assert mount.call(touching.held_outcome, "h", 5 * MIB, 100) in ("ESTALE", "EIO")

    def test_a_wrong_byte_is_found_by_verify_where_a_digest_is_known(self, liar: LiarServer, mounted: Mounted) -> None:
        """A byte changed on the way, with lengths and ETag true: no read of a part can tell. Where the source states
        the sha256 of the whole file, `mfs verify` finds it and drops what it had."""
        publish(liar, {"w.bin": FILES["m/w.bin"]})
        mount = mounted(liar.url)
        path = str(mount.path / "w.bin")
        liar.lie(Lie.WRONG_BYTES, after_bytes=1000, pattern="*.bin", count=1)
        wrong = mount.call(touching.read, path)
        assert sum(a != b for a, b in zip(wrong, FILES["m/w.bin"], strict=True)) == 1
        mount.wait_saved("w.bin")
        [bad] = list(mount.client.verify(["w.bin"]))[-1]["bad"]
        assert "sha256" in bad["reason"]
        mount.call(touching.drop_pages, path)
        assert mount.call(touching.read, path) == FILES["m/w.bin"]
        mount.wait_saved("w.bin")
        assert list(mount.client.verify(["w.bin"]))[-1]["bad"] == []


def publish(liar: LiarServer, files: dict[str, bytes]) -> None:
    """Files and a manifest that names their ETags and digests: then nothing about them is a guess."""
    listed = []
    for name, content in files.items():
        target = liar.files / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        etag = f'"{int(target.stat().st_mtime):x}-{len(content):x}"'
        sha256 = hashlib.sha256(content).hexdigest()
        listed.append({"path": name, "size": len(content), "etag": etag, "sha256": sha256})
    (liar.files / "mfs-manifest.json").write_text(json.dumps({"files": listed}))
