"""What loads and swaps cost: figures read from results files of `tools/bench` and `tools/gpu`, and published ones.

Every figure says where it comes from, and a run writes those that it used into its output. Times go with bytes: a model
of another size takes its bytes over the rate, and of a fine-tune whose base is there only the bytes that differ.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfs.errors import UsageError

RESULTS = Path(__file__).parents[1] / "bench" / "results"
MOUNT_FILE = "mount-2-cores.json"
GPULOAD_FILE = "gpuload-cpu-2-cores.json"


@dataclass(frozen=True)
class Figure:
    """A number, and where it stands."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Way:
    """How weights come onto a card. Rates in bytes/s, end to end, from where a copy stands to the card."""

    name: str
    origin: Figure
    ssd: Figure | None
    """None: nothing is kept on the node's disk; every load goes to the origin."""
    ram: Figure | None
    start_s: Figure
    """What a new server process takes beside its weights: container, imports, engine."""
    swap_s: Figure
    """The same for a model that comes onto a card whose server runs."""

    def figures(self) -> list[Figure]:
        return [each for each in (self.origin, self.ssd, self.ram, self.start_s, self.swap_s) if each is not None]


_ENGINE = "vllm#48193, read Nov 2026: engine ready in 9.4 s (23.9 s before that change); its author's number"
ENGINE_START = Figure(9.4, "s", _ENGINE)
WAKE = Figure(0.59, "s", "vllm#48193, read Nov 2026: wake of a sleeping engine; its author's number")


def measured_ways(folder: Path = RESULTS, gpuload_file: str = GPULOAD_FILE) -> dict[str, Way]:
    """From this repository's own results. Raises: UsageError naming the file and row that is not there.

    Two shared cores and no GPU: rates are those of a small VM's store, disk and memory, not of a GPU node. What an
    engine takes to start or wake is published by others: none was timed here.
    """
    mount, gpuload = _Rows(folder / MOUNT_FILE), _Rows(folder / gpuload_file)
    origin, ssd = mount.rate("cold: mfs"), mount.rate("ssd: mfs")
    process = gpuload.bench_rate("fresh process: gpuload load_file")
    swap = gpuload.bench_rate("server: swap, 1 of 10 differs, digests known", "server: bytes a swap copied")
    return {
        "download": Way("download", mount.rate("cold: boto3"), None, None, ENGINE_START, ENGINE_START),
        "mfs": Way("mfs", slower(origin, process), slower(ssd, process), process, ENGINE_START, ENGINE_START),
        "gpuload": Way("gpuload", slower(origin, swap), slower(ssd, swap), swap, ENGINE_START, WAKE),
    }


def published_ways() -> dict[str, Way]:
    """From others' machines with GPUs; their numbers, not reproduced here."""
    origin = Figure(
        15e9 / 4.9, "B/s", "Run:ai Model Streamer 0.15.9, docs/src/benchmarks.md, S3 to A10G: 15 GB in 4.9 s"
    )
    ssd = Figure(16e9 / 0.7, "B/s", "ServerlessLLM README, read 2026, H100 and NVMe: Llama-8B (16 GB) in 0.7 s")
    ram = Figure((64 << 30) / 3.0, "B/s", "llm-d fast-model-actuation 0.6.4, read Nov 2026: 64 GiB wake in about 3 s")
    plain = Figure(
        15e9 / 47, "B/s", "Run:ai Model Streamer 0.15.9, docs/src/benchmarks.md: safetensors' own loader, 15 GB in 47 s"
    )
    return {
        "download": Way("download", plain, None, None, ENGINE_START, ENGINE_START),
        "mfs": Way("mfs", origin, ssd, ssd, ENGINE_START, ENGINE_START),
        "gpuload": Way("gpuload", origin, ssd, ram, ENGINE_START, WAKE),
    }


WAYS = {"measured": measured_ways, "published": published_ways}


def slower(one: Figure, other: Figure) -> Figure:
    """Two hops of a pipeline: the slower one is its rate."""
    return min(one, other, key=lambda figure: figure.value)


class _Rows:
    """The rows of one results file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._document: Any = json.loads(path.read_text())
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be read: {error.strerror}; tools/bench/run and tools/gpu/run write it"
            ) from None
        except ValueError as error:
            raise UsageError(f"{path}: expected a results file of tools/bench or tools/gpu: {error}") from None

    def rate(self, title: str) -> Figure:
        """Median of a row of `tools/bench/run mount` in GB/s."""
        row = self._row(self._list("rows"), "title", title)
        if row.get("unit") != "GB/s" or not isinstance(row.get("values"), list) or not row["values"]:
            raise UsageError(f"{self._path}: row {title!r}: expected values in GB/s, got {str(row)[:80]}")
        return self._figure(statistics.median(row["values"]) * 1e9, title)

    def bench_rate(self, what: str, moved: str | None = None) -> Figure:
        """A row of `gpuload bench`: all its bytes over its seconds; moved: the row that says that there were fewer."""
        rows = self._list("bench", "rows")
        seconds: Any = self._row(rows, "what", what).get("seconds")
        moved_bytes: Any = (
            self._row(rows, "what", moved).get("bytes") if moved else self._document["bench"].get("bytes")
        )
        if not (_is_positive(seconds) and _is_positive(moved_bytes)):
            raise UsageError(
                f"{self._path}: row {what!r}: expected seconds and bytes above 0, got {seconds}, {moved_bytes}"
            )
        return self._figure(moved_bytes / seconds, what)

    def _list(self, *keys: str) -> list[dict[str, Any]]:
        found = self._document
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, list):
            raise UsageError(f"{self._path}: expected a list {'.'.join(keys)!r} of rows, got {type(found).__name__}")
        return [row for row in found if isinstance(row, dict)]

    def _row(self, rows: Sequence[dict[str, Any]], key: str, name: str) -> dict[str, Any]:
        found = next((row for row in rows if row.get(key) == name), None)
        if found is None:
            raise UsageError(f"{self._path}: expected a row {name!r}, got {len(rows)} others: measure it again")
        return found

    def _figure(self, value: float, title: str) -> Figure:
        return Figure(value, "B/s", f"tools/bench/results/{self._path.name}: row '{title}'")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
