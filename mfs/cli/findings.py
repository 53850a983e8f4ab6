"""How the findings of both doctors are printed."""

from __future__ import annotations

from collections.abc import Sequence

from mfs.cli.text import count, print_json
from mfs.findings import Finding, Level

_STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.FAULT: "bold red"}


def show_findings(findings: Sequence[Finding], as_json: bool) -> None:
    """One JSON object, or an aligned table and a line that sums it up."""
    if as_json:
        counts = {level.value: sum(found.level is level for found in findings) for level in Level}
        print_json({"findings": [found.shown() for found in findings], "counts": counts})
        return
    from rich.text import Text

    from mfs.cli.output import print_table

    rows = []
    for found in findings:
        shown = found.shown()
        level = Text(shown["level"], style=_STYLES[found.level])
        rows.append((shown["what"], level, shown["value"], shown["advice"]))
    print_table(("WHAT", "LEVEL", "VALUE", "WHAT TO DO"), rows)
    print(summary(findings))


def summary(findings: Sequence[Finding]) -> str:
    """'42 looked at: 1 fault, 2 warnings'."""
    numbers = {level: sum(found.level is level for found in findings) for level in reversed(Level)}
    parts = [count(number, level.value) for level, number in numbers.items() if number and level is not Level.OK]
    return f"{len(findings)} looked at: {', '.join(parts) or 'all well'}"
