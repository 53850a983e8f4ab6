"""Memory and idle CPU of the daemon once the whole of a large registry has been listed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tools.bench.mounts import Ours
from tools.bench.processes import cpu_seconds, resident_bytes, run, tree, wait_for
from tools.bench.results import Goal, Results, Row

SHARDS_COUNT = 30
_IDLE_S = 10.0
_SHARD_BYTES = 4 << 30  # sparse


def measure(folder: Path, models_count: int, results: Results, say: Callable[[str], None]) -> None:
    """List `models_count` models of SHARDS_COUNT shards (a folder of sparse files) through a mount, with `find`."""
    registry = folder / "registry"
    files_count = models_count * SHARDS_COUNT
    try:
        say(f"making {files_count:,} empty files")
        _make_registry(registry, models_count)
        with Ours(folder / "ours-listing", str(registry), {}, ram_bytes=64 << 20) as ours:
            start = time.perf_counter()
            found = run(
                ["find", ours.mountpoint, "-type", "f", "-name", "*.safetensors", "-printf", "%s\\n"], timeout_s=300
            )
            seconds = time.perf_counter() - start
            if found.count(f"{_SHARD_BYTES}\n") != files_count:
                raise AssertionError(f"find saw {found.count(chr(10))} files, expected {files_count}")
            results.add("listing/files_s", files_count / seconds)
            kinds = resident_bytes(ours.pid)
            daemon_mb = (kinds["VmRSS"] - kinds["RssShmem"]) / 1e6
            results.add("listing/daemon_mb", daemon_mb)
            workers = [resident_bytes(pid) for pid in tree(ours.pid)[1:]]
            results.add("listing/workers_mb", sum(kind["VmRSS"] - kind["RssShmem"] for kind in workers) / 1e6)
            say(f"{files_count:,} files listed in {seconds:.1f} s; daemon {daemon_mb:.0f} MB")
            _measure_idle(ours, results)
    finally:
        shutil.rmtree(registry, ignore_errors=True)


def _measure_idle(ours: Ours, results: Results) -> None:
    wait_for(lambda: not ours.status()["reads"]["waiting"], "the mount is idle")
    time.sleep(1)
    pids = tree(ours.pid)
    before = cpu_seconds(pids)
    time.sleep(_IDLE_S)
    results.add("idle/percent", (cpu_seconds(pids) - before) / _IDLE_S * 100)


def _make_registry(registry: Path, models_count: int) -> None:
    for model in range(models_count):
        folder = registry / f"org-{model % 100:02d}" / f"model-{model:05d}"
        folder.mkdir(parents=True)
        for shard in range(1, SHARDS_COUNT + 1):
            with open(folder / f"model-{shard:05d}-of-{SHARDS_COUNT:05d}.safetensors", "wb") as file:
                file.truncate(_SHARD_BYTES)


def rows(results: Results, models_count: int) -> list[Row]:
    """The two figures with goals."""
    note = f"{models_count:,} models of {SHARDS_COUNT} shards listed; all resident memory but the slots"
    found = results.row("listing/daemon_mb", "daemon memory", "MB", Goal(at_most=150), note)
    return found + results.row("idle/percent", "idle CPU", "%", Goal(at_most=1), "daemon and workers, of one core")


def rate_rows(results: Results) -> list[Row]:
    """How fast the listing went, and what the workers hold."""
    found = results.row("listing/files_s", "find through the mount", "files/s", note="first time, with sizes")
    return found + results.row("listing/workers_mb", "both workers' memory", "MB", note="beyond the slots")
