"""Which kernel read-ahead is best for shuffled mmap reads: cold and from SSD, with several, interleaved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.bench.machine import drop_page_cache
from tools.bench.mounts import Ours
from tools.bench.origin import BUCKET, Origin
from tools.bench.results import Results, Row
from tools.bench.workload import MODEL, Model, read

CHOICES_KIB = (512, 1024, 2048, 4096, 8192)


def round(
    folder: Path, origin: Origin, model: Model, number: int, results: Results, say: Callable[[str], None]
) -> None:
    """Every choice once, cold and then from SSD; odd rounds in reverse."""
    ours = Ours(folder / "ours", f"s3://{BUCKET}/{MODEL}", origin.environ)
    for kib in reversed(CHOICES_KIB) if number % 2 else CHOICES_KIB:
        ours.forget()
        for case in ("cold", "ssd"):
            with ours:
                ours.set_read_ahead(kib)
                drop_page_cache()
                before = ours.cpu_s()
                reading = read("shuffled", ours.mountpoint, model, seed=number)
                ours.wait_quiet(model.size_bytes)
                results.add(f"{case}/{kib}", reading.gb_s)
                results.add(f"{case}-cpu/{kib}", (ours.cpu_s() - before) / model.size_bytes * 1e9)
                say(f"{case:<5} {kib:>5} KiB  {reading.gb_s:.3f} GB/s")


def rows(results: Results) -> list[Row]:
    """GB/s by case and choice, then CPU."""
    found: list[Row] = []
    for case, unit in (("cold", "GB/s"), ("ssd", "GB/s"), ("cold-cpu", "s/GB"), ("ssd-cpu", "s/GB")):
        for kib in CHOICES_KIB:
            found += results.row(f"{case}/{kib}", f"{case}: read-ahead {kib} KiB", unit)
    return found
