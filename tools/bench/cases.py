"""Throughput: cold, from SSD, warm, over capped links; ours and the peers' passes interleaved, round by round."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.servers.process import ServerError
from tools.bench import downloads, link
from tools.bench.machine import drop_page_cache
from tools.bench.mounts import MountedSystem, Ours, Rclone, S3fs, ZeroFuse
from tools.bench.origin import BUCKET, Origin
from tools.bench.processes import BenchError, run
from tools.bench.results import Goal, Results, Row
from tools.bench.workload import Model, read

MODEL = "model"
LINKS_GBIT_S = (1.0, 2.5)
PEERS = ("s3fs", "rclone", "boto3", "runai")
_MOUNT_PEERS = ("s3fs", "rclone")
CASES = ("cold", "ssd", "warm", "link", "zeros")
_WARM_PASSES = 3


@dataclass
class Throughput:
    """The passes of a round. Every cold pass: fresh caches, page cache dropped, memory pre-touched by the reader."""

    folder: Path
    origin: Origin
    model: Model
    peers: tuple[str, ...]
    cases: frozenset[str]
    results: Results
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._ours = Ours(self.folder / "ours", f"s3://{BUCKET}/{MODEL}", self.origin.environ)
        self._dropped_peers: set[str] = set()

    def round(self, number: int) -> None:
        """Every chosen case once. Odd rounds go the other way round, so that no system always comes after the same."""
        steps: list[Callable[[int], None]] = []
        if self.cases & {"cold", "warm"}:
            steps.append(self._ours_cold_and_warm)
        if "cold" in self.cases:
            steps += [lambda n, peer=peer: self._peer_cold(peer, n) for peer in self.peers]  # type: ignore[misc]
            steps.append(self._store)
        if "ssd" in self.cases:
            steps += [self._ours_ssd, self._local_cold]
        if "zeros" in self.cases:
            steps.append(self._zeros)
        if "link" in self.cases:
            for gbit_s in LINKS_GBIT_S:
                steps.append(lambda n, g=gbit_s: self._link(g, n))  # type: ignore[misc]
        for step in reversed(steps) if number % 2 else steps:
            step(number)

    # -- ours

    def _ours_cold_and_warm(self, number: int) -> None:
        self._ours.forget()
        with self._ours:
            self._pass("cold/mfs", self._ours, number, cpu="cpu-cold/mfs")
            if "warm" in self.cases:
                for attempt in range(_WARM_PASSES):
                    self._warm("warm/mfs", self._ours.file, number + attempt)
                    self._warm("warm/local", self.model.path, number + attempt, prime=attempt == 0)

    def _ours_ssd(self, number: int) -> None:
        with self._ours:  # whatever the passes before left of the cache
            self._ours.command("prefetch", self._ours.mountpoint)
        with self._ours:
            self._pass("ssd/mfs", self._ours, number, cpu="cpu-ssd/mfs")

    def _pass(self, name: str, system: MountedSystem, number: int, *, cpu: str) -> None:
        drop_page_cache()
        before = system.cpu_s()
        reading = read(system.file, self.model, seed=number)
        if isinstance(system, Ours):
            system.wait_quiet(self.model.size_bytes)  # what a pass costs includes what it leaves to be written
            fetched = system.status()["origin"]["fetched_bytes"]
            self.results.add(f"fetched/{name}", fetched / self.model.size_bytes)
        self._add(name, reading.gb_s)
        self.results.add(cpu, (system.cpu_s() - before) / self.model.size_bytes * 1e9)
        self.results.add(f"header/{name}", reading.header_s * 1000)

    def _warm(self, name: str, file: Path, number: int, *, prime: bool = False) -> None:
        if prime:
            read(file, self.model, seed=number, check=False)
        self._add(name, read(file, self.model, seed=number, warm=True).gb_s)

    # -- the others

    def _peer_cold(self, peer: str, number: int) -> None:
        if peer in self._dropped_peers:
            return
        try:
            if peer in ("boto3", "runai"):
                drop_page_cache()
                self._add(f"cold/{peer}", self._download(peer))
            else:
                system = {"s3fs": S3fs, "rclone": Rclone}[peer](self.folder / peer, self.origin, MODEL)
                with system:
                    self._pass(f"cold/{peer}", system, number, cpu=f"cpu-cold/{peer}")
        except (BenchError, ServerError) as error:
            self._dropped_peers.add(peer)
            self.results.missing.append(f"{peer}: {error}")
            self.say(f"{peer} is left out: {error}")

    def _download(self, peer: str) -> float:
        if peer == "boto3":
            return downloads.boto3_gb_s(self.origin, MODEL, self.model, self.folder / "boto3")
        return downloads.runai_gb_s(self.origin, MODEL, self.model)

    def _local_cold(self, number: int) -> None:
        drop_page_cache()
        self._add("ssd/local", read(self.model.path, self.model, seed=number).gb_s)

    def _zeros(self, number: int) -> None:
        with ZeroFuse(self.folder / "zeros", self.model) as system:
            drop_page_cache()
            before = system.cpu_s()
            reading = read(system.file, self.model, seed=number, check=False)
            self._add("zeros", reading.gb_s)
            self.results.add("cpu-zeros", (system.cpu_s() - before) / self.model.size_bytes * 1e9)

    def _link(self, gbit_s: float, number: int) -> None:
        with link.capped(self.origin.port, gbit_s):
            self._ceiling(f"link-{gbit_s:g}/ceiling")
            self._ours.forget()
            with self._ours as system:
                drop_page_cache()
                self._add(f"link-{gbit_s:g}/mfs", read(system.file, self.model, seed=number).gb_s)
                fetched = system.status()["origin"]["fetched_bytes"]
                self.results.add(f"fetched/link-{gbit_s:g}", fetched / self.model.size_bytes)

    def _store(self, number: int) -> None:
        self._ceiling("cold/store")

    def _ceiling(self, name: str) -> None:
        """What the origin and the way to it give to plain parallel ranged GETs."""
        argv = [sys.executable, "-m", "tools.bench.ranges", self.origin.presigned_url(MODEL), self.model.size_bytes]
        found = json.loads(run(argv, timeout_s=300))
        self._add(name, found["bytes"] / found["seconds"] / 1e9)

    def _add(self, name: str, gb_s: float) -> None:
        self.results.add(name, gb_s)
        self.say(f"{name:<18} {gb_s:6.3f} GB/s")


def goal_rows(results: Results) -> list[Row]:
    """The figures that have goals (issue 2, "Speed")."""
    mounts = [f"cold/{peer}" for peer in _MOUNT_PEERS]
    rows = results.ratio("cold/mfs", mounts, "cold: mfs / best other mount", Goal(at_least=2.0))
    for gbit_s, least in zip(LINKS_GBIT_S, (0.95, 0.9), strict=True):
        name, title = f"link-{gbit_s:g}", f"cold over {gbit_s:g} Gbit/s: mfs / parallel GETs"
        rows += results.ratio(f"{name}/mfs", [f"{name}/ceiling"], title, Goal(at_least=least))
    note = "daemon and fetchers, with writing to SSD"
    rows += results.row("cpu-cold/mfs", "CPU cold", "s/GB", Goal(at_most=1.2), note)
    rows += results.row("cpu-ssd/mfs", "CPU from SSD", "s/GB", Goal(at_most=0.8), "daemon and fetchers")
    rows += results.ratio(
        "ssd/mfs", ["ssd/local"], "SSD-resident: mfs / local file", Goal(at_least=0.75), "both: page cache dropped"
    )
    rows += results.ratio("warm/mfs", ["warm/local"], "page cache warm: mfs / local file", Goal(at_least=0.95))
    return rows


def rate_rows(results: Results) -> list[Row]:
    """Plain GB/s of everything that was read, and what it cost in CPU."""
    rows: list[Row] = []
    for peer in ("mfs", *PEERS):
        note = {"boto3": "download_file to disk, then load", "runai": "no mount: its own loader"}.get(peer, "")
        rows += results.row(f"cold/{peer}", f"cold: {peer}", "GB/s", note=note)
    rows += results.row("cold/store", "parallel GETs, no mount", "GB/s", note="what the store gives on this machine")
    rows += results.row("fetched/cold/mfs", "cold: bytes fetched / bytes of the model", "×", note="mfs; 1 is ideal")
    rows += results.row("zeros", "stub FUSE that answers zeros", "GB/s", note="the price of FUSE and pyfuse3 alone")
    for case in ("ssd", "warm"):
        for system in ("mfs", "local"):
            rows += results.row(f"{case}/{system}", f"{case}: {system}", "GB/s")
    for gbit_s in LINKS_GBIT_S:
        for system in ("mfs", "ceiling"):
            rows += results.row(f"link-{gbit_s:g}/{system}", f"{gbit_s:g} Gbit/s: {system}", "GB/s")
    for name, title in (
        ("cpu-cold/s3fs", "CPU cold: s3fs"),
        ("cpu-cold/rclone", "CPU cold: rclone"),
        ("cpu-zeros", "CPU: stub FUSE"),
    ):
        rows += results.row(name, title, "s/GB")
    return rows
