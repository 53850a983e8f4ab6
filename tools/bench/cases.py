"""The other cases of throughput, cold: systems that do not mount, capped links, the stub; shuffled tensors all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers.process import ServerError
from tools.bench import downloads, link
from tools.bench.machine import drop_page_cache
from tools.bench.mounts import Ours, ZeroFuse
from tools.bench.origin import Origin
from tools.bench.processes import BenchError, run
from tools.bench.results import Goal, Results, Row
from tools.bench.workload import MODEL, Model, read

LINKS_GBIT_S = (1.0, 2.5)
PEERS = ("boto3", "runai")
CASES = ("downloads", "link", "zeros")


@dataclass
class Throughput:
    """The passes of a round. Every pass: fresh caches, page cache dropped, memory pre-touched by the reader."""

    folder: Path
    origin: Origin
    model: Model
    peers: tuple[str, ...]
    cases: tuple[str, ...]
    results: Results
    say: Callable[[str], None]
    _dropped_peers: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._ours = Ours(self.folder / "ours", f"{self.origin.url}/{MODEL}", self.origin.environ)

    def round(self, number: int) -> None:
        """Every chosen case once. Odd rounds go the other way round, so that no system always comes after the same."""
        steps: list[Callable[[int], None]] = []
        if "downloads" in self.cases:
            steps.append(lambda n: self._ours_cold("cold/mfs", n))
            steps += [lambda n, peer=peer: self._download(peer) for peer in self.peers]  # type: ignore[misc]
            steps.append(lambda n: self._ceiling("cold/store"))
        if "zeros" in self.cases:
            steps.append(self._zeros)
        if "link" in self.cases:
            for gbit_s in LINKS_GBIT_S:
                steps.append(lambda n, g=gbit_s: self._link(g, n))  # type: ignore[misc]
        for step in reversed(steps) if number % 2 else steps:
            step(number)

    def _ours_cold(self, name: str, number: int) -> None:
        self._ours.forget()
        with self._ours as system:
            drop_page_cache()
            self._add(name, read("shuffled", system.mountpoint, self.model, seed=number).gb_s)
            fetched = system.status()["origin"]["fetched_bytes"]
            self.results.add(f"fetched/{name}", fetched / self.model.size_bytes)

    def _download(self, peer: str) -> None:
        if peer in self._dropped_peers:
            return
        measure = {"boto3": downloads.boto3_gb_s, "runai": downloads.runai_gb_s}[peer]
        try:
            drop_page_cache()
            self._add(f"cold/{peer}", measure(self.origin, MODEL, self.model, self.folder / peer))
        except (BenchError, ServerError) as error:
            self._dropped_peers.add(peer)
            self.results.missing.append(f"{peer}: {error}")
            self.say(f"{peer} is left out: {error}")

    def _zeros(self, number: int) -> None:
        with ZeroFuse(self.folder / "zeros", self.model) as system:
            drop_page_cache()
            before = system.cpu_s()
            reading = read("shuffled", system.mountpoint, self.model, seed=number, check=False)
            self._add("zeros", reading.gb_s)
            self.results.add("cpu-zeros", (system.cpu_s() - before) / reading.bytes * 1e9)

    def _link(self, gbit_s: float, number: int) -> None:
        with link.capped(self.origin.port, gbit_s):
            self._ceiling(f"link-{gbit_s:g}/ceiling")
            self._ours_cold(f"link-{gbit_s:g}/mfs", number)

    def _ceiling(self, name: str) -> None:
        """What the origin and the way to it give to plain parallel ranged GETs."""
        found = json.loads(run([sys.executable, "-m", "tools.bench.ranges", *self.origin.shard_urls()], timeout_s=300))
        self._add(name, found["bytes"] / found["seconds"] / 1e9)

    def _add(self, name: str, gb_s: float) -> None:
        self.results.add(name, gb_s)
        self.say(f"{name:<18} {gb_s:6.3f} GB/s")


def goal_rows(results: Results) -> list[Row]:
    """The figures that have goals (issue 2, "Speed")."""
    rows: list[Row] = []
    for gbit_s, least in zip(LINKS_GBIT_S, (0.95, 0.9), strict=True):
        name, title = f"link-{gbit_s:g}", f"cold over {gbit_s:g} Gbit/s: mfs / parallel GETs"
        rows += results.ratio(f"{name}/mfs", [f"{name}/ceiling"], title, Goal(at_least=least))
    return rows


def rate_rows(results: Results) -> list[Row]:
    """Plain GB/s of everything that was read, and what it cost in CPU."""
    rows: list[Row] = []
    for peer in ("mfs", *PEERS):
        note = {"boto3": "download_file to disk, then load", "runai": "no mount: its own loader"}.get(peer, "")
        rows += results.row(f"cold/{peer}", f"radosgw, cold: {peer}", "GB/s", note=note)
    rows += results.row("cold/store", "parallel GETs, no mount", "GB/s", note="what the store gives on this machine")
    rows += results.row("fetched/cold/mfs", "cold: bytes fetched / bytes of the model", "×", note="mfs; 1 is ideal")
    rows += results.row("zeros", "stub FUSE that answers zeros", "GB/s", note="the price of FUSE and pyfuse3 alone")
    rows += results.row("cpu-zeros", "CPU: stub FUSE", "s/GB")
    for gbit_s in LINKS_GBIT_S:
        for system in ("mfs", "ceiling"):
            rows += results.row(f"link-{gbit_s:g}/{system}", f"{gbit_s:g} Gbit/s: {system}", "GB/s")
    return rows
