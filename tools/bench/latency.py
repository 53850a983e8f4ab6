"""From `mfs mount` being asked to the first list of tensors, in round trips: the same with and without latency."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.servers.chaos import ChaosProxy
from tools.bench.mounts import Ours
from tools.bench.origin import BUCKET, Origin
from tools.bench.processes import run
from tools.bench.results import Goal, Results, Row
from tools.bench.workload import SHARD_NAMES

RTTS_MS = (20, 500)
"""20 is what the goal names. 500 magnifies: a process that starts 100 ms late is 5 round trips at 20 ms, 0.2 at 500."""


def measure(
    folder: Path, origin: Origin, name: str, repeats: int, results: Results, say: Callable[[str], None]
) -> None:
    """Add, per repeat and latency, (time with latency - time without) / latency."""
    with ChaosProxy(origin.endpoint, folder) as proxy:
        env = {**origin.environ, "AWS_ENDPOINT_URL": proxy.url}
        _mount_and_list(folder / "ours-latency", name, env)  # programs and libraries come from the disk once
        for _ in range(repeats):
            took_s = {}
            for rtt_ms in (0, *RTTS_MS):
                proxy.set(rtt_ms=rtt_ms)
                took_s[rtt_ms] = _mount_and_list(folder / "ours-latency", name, env)
                results.add(f"first-list/{rtt_ms}", took_s[rtt_ms] * 1000)
            for rtt_ms in RTTS_MS:
                trips = (took_s[rtt_ms] - took_s[0]) * 1000 / rtt_ms
                results.add(f"trips/{rtt_ms}", trips)
                say(f"mount to first tensor list at {rtt_ms} ms RTT: {trips:.1f} round trips")


def _mount_and_list(folder: Path, name: str, env: dict[str, str]) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    ours = Ours(folder, f"s3://{BUCKET}/{name}", env, ram_bytes=64 << 20)
    try:
        start = time.perf_counter()
        ours.start()
        run([sys.executable, "-m", "tools.bench.reader", "header", ours.mountpoint / SHARD_NAMES[0]], timeout_s=60)
        return time.perf_counter() - start
    finally:
        ours.stop()


def rows(results: Results) -> list[Row]:
    """Round trips. The goal stands on the magnified figure: at 20 ms what the programs' start varies by is larger."""
    plain, magnified = RTTS_MS
    title = "mount to tensor list"
    found = results.row(f"trips/{plain}", f"{title}, {plain} ms RTT", "RTT", note="start of programs varies by more")
    note = "the same, magnified"
    return found + results.row(f"trips/{magnified}", f"{title}, {magnified} ms RTT", "RTT", Goal(at_most=4), note)


def rate_rows(results: Results) -> list[Row]:
    """The whole times, most of which is starting Python."""
    found: list[Row] = []
    for rtt_ms in (0, *RTTS_MS):
        found += results.row(f"first-list/{rtt_ms}", f"mount to tensor list at {rtt_ms} ms", "ms")
    return found
