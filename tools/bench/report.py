"""The tables a run ends with, and the JSON file that keeps it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.results import Results, Row

RESULTS_FOLDER = Path(__file__).parent / "results"


def print_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """A table of median, least and most; with goals and verdicts where rows have any. Rows with columns: see there."""
    _print_columns(console, title, [row for row in rows if row.column])
    rows = [row for row in rows if not row.column]
    if not rows:
        return
    has_goals = any(row.goal for row in rows)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("median", "min", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    if has_goals:
        table.add_column("goal", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    table.add_column("", style="dim")
    for row in rows:
        figures = [f"{_number(value)} {row.unit}".strip() for value in (row.median, min(row.values), max(row.values))]
        verdict = {True: "[green]✓ met[/]", False: "[red]✗ missed[/]", None: ""}[row.is_met]
        goal = [str(row.goal or ""), verdict] if has_goals else []
        table.add_row(row.title, f"[bold]{figures[0]}[/]", *figures[1:], *goal, row.note)
    console.print()
    console.print(table)


def _print_columns(console: Console, title: str, rows: Sequence[Row]) -> None:
    """A line for each title and, for each column, a cell: median (least–most)."""
    if not rows:
        return
    columns = list(dict.fromkeys(row.column for row in rows))
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", *columns):
        table.add_column(name, no_wrap=True)
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(row.title, {})[row.column] = row
    for name, cells in lines.items():
        shown = [_spread(row.values) if row else "" for row in map(cells.get, columns)]
        table.add_row(f"{name}, {next(iter(cells.values())).unit}", *shown)
    console.print()
    console.print(table)


def write(path: Path, command: Sequence[str], machine: dict[str, Any], rows: Sequence[Row], results: Results) -> None:
    """Everything as JSON: the machine, the rows, and every sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "command": list(command),
        "machine": machine,
        "rows": [
            dataclasses.asdict(row)
            | {"median": row.median, "min": min(row.values), "max": max(row.values), "met": row.is_met}
            for row in rows
        ],
        "samples": results.samples,
        "missing": results.missing,
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _spread(values: Sequence[float]) -> str:
    ends = f" ({_number(min(values))}–{_number(max(values))})" if len(values) > 1 else ""
    return f"[bold]{_number(statistics.median(values))}[/]{ends}"


def _number(value: float) -> str:
    """Three significant digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
