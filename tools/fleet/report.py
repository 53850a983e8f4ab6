"""The tables of a run, and the JSON document that keeps it with all its inputs."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mfs.errors import UsageError
from tools.fleet import scenario as scenarios
from tools.fleet.experiments import Cell, Series, Step, as_json
from tools.fleet.measured import Way
from tools.fleet.scenario import Scenario
from tools.fleet.stats import CONFIDENCE, Estimate

_FIGURES = (
    ("gpu_hours", "GPU-hours", "", 1),
    ("cost", "cost", "", 1),
    ("in_time", "in time", "%", 100),
    ("first_token_p50_s", "first token p50", "s", 1),
    ("first_token_p99_s", "p99", "s", 1),
    ("whole_p50_s", "whole p50", "s", 1),
    ("whole_p99_s", "p99", "s", 1),
    ("cold_starts", "cold starts", "", 1),
    ("swaps", "swaps", "", 1),
    ("cold_requests", "met no copy", "%", 100),
    ("busy", "busy", "%", 100),
    ("moved_gb", "moved", "GB", 1),
)
"""Key, title, unit, factor."""


def document(command: str, scenario: Scenario, results: Any, argv: Sequence[str], **asked: Any) -> dict[str, Any]:
    """Everything that a run needs to be repeated, and what came of it."""
    return {
        "format": scenarios.FORMAT,
        "command": command,
        "argv": list(argv),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "scenario": as_json(scenarios.to_json(scenario)),
        "asked": as_json(asked),
        "confidence": CONFIDENCE,
        "results": as_json(results),
    }


def read_document(path: Path) -> dict[str, Any]:
    """Raises: UsageError if it is not one."""
    try:
        said = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: expected what tools/fleet/run writes: {error}") from None
    if not isinstance(said, dict) or said.get("format") != scenarios.FORMAT or "scenario" not in said:
        raise UsageError(f"{path}: expected what tools/fleet/run writes, format {scenarios.FORMAT}, got something else")
    return said


def print_systems(console: Console, all_series: Sequence[Series]) -> None:
    table = _table("Systems on the same requests")
    table.add_column("", no_wrap=True)
    for series in all_series:
        table.add_column(series.name, justify="right", no_wrap=True)
    baseline = all_series[0]
    for key, title, unit, factor in _FIGURES:
        cells = [told(series.of(key), factor) for series in all_series]
        table.add_row(f"{title}, {unit}" if unit else title, *cells)
        if key == "cost":
            saved = ["", *(told(series.saves(baseline), 100) for series in all_series[1:])]
            table.add_row(f"GPU-hours saved against {baseline.name}, %", *saved)
    console.print()
    console.print(table)


def print_map(console: Console, cells: Sequence[Cell]) -> None:
    table = _table(f"GPUs that keep the SLO for {cells[0].target:.0%}, and GPU-hours saved")
    for name in (
        "utilisation", "burstiness", "dedicated", "shared", "saved, %", "elastic saves, %", "of always on, %",
        "in time: elastic, %", "to zero, %",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(
            f"{cell.utilisation:g}",
            f"{cell.burstiness:g}",
            told(cell.dedicated_gpus),
            told(cell.shared_gpus),
            told(cell.fixed_saving, 100),
            told(cell.elastic_saving, 100),
            told(cell.always_on_saving, 100),
            *(number(100 * share) for share in cell.in_time.values()),
        )
    console.print()
    console.print(table)


def print_growth(console: Console, steps: Sequence[Step]) -> None:
    table = _table("Services and shared GPUs that grow together")
    for name in (
        "services", "GPUs", "in time, %", "first token p50, s", "p99, s", "swaps", "busy, %", "fewest GPUs", "requests",
        "seconds a run",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for step in steps:
        of = step.shared.of
        table.add_row(
            str(step.services), str(step.gpus), told(of("in_time"), 100), told(of("first_token_p50_s")),
            told(of("first_token_p99_s")), told(of("swaps")), told(of("busy"), 100), told(step.fewest),
            told(of("requests")), number(step.seconds),
        )  # fmt: skip
    console.print()
    console.print(table)


def print_ways(console: Console, ways: dict[str, Way], title: str) -> None:
    table = _table(title)
    for name in ("way", "what", "", "from"):
        table.add_column(name, no_wrap=name != "from", overflow="fold")
    for way in ways.values():
        parts = (
            ("origin", way.origin),
            ("SSD", way.ssd),
            ("RAM", way.ram),
            ("start", way.start_s),
            ("swap", way.swap_s),
        )
        for what, figure in parts:
            if figure is None:
                table.add_row(way.name, what, "not kept", "")
            else:
                shown = f"{figure.value / 1e9:.2f} GB/s" if figure.unit == "B/s" else f"{figure.value:g} {figure.unit}"
                table.add_row(way.name, what, shown, figure.source)
    console.print()
    console.print(table)


def told(found: Estimate | None, factor: float = 1) -> str:
    """Mean ± half of its confidence interval."""
    if found is None or not math.isfinite(found.mean):
        return "none"
    width = "" if not math.isfinite(found.half_width) else f" ±{number(found.half_width * factor)}"
    return f"{number(found.mean * factor)}{width}"


def number(value: float) -> str:
    """Three significant digits or so."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _revision() -> str:
    """Of the code that ran; empty outside a checkout."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
