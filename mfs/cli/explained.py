"""A load as a screen, and as a page of its own. Pure: what the daemon says in, something that rich prints out."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from mfs.cli.output import table
from mfs.cli.text import clean, count, share, size, when
from mfs.control.api import Json

_COLUMNS = 72
_READS = 12
"""Waits shown; --json has more."""

LOOKS = {
    "open": ("n", "white on blue"), "header": ("h", "white on cyan"), "origin": ("o", "white on red"),
    "ssd": ("s", "black on yellow"), "decode": ("d", "white on magenta"), "slot": ("r", "black on bright_red"),
    "share": ("m", "black on bright_magenta"), "page_cache": ("·", "white on green"), "other": ("?", "white on black"),
    "read": ("·", "white on green"), "hash": ("x", "black on bright_cyan"), "copy": ("c", "black on bright_green"),
    "turn": ("t", "black on bright_blue"),
}  # fmt: skip
"""By phase: a letter, for where there are no colours, and a style. The last ones are gpuload's."""


def render(load: Json, width: int | None) -> RenderableType:
    """width: of the terminal; None in a pipe."""
    parts: list[RenderableType] = [_head(load), Text(), phases_table(load["phases"], load["seconds"])]
    columns = min(_COLUMNS, (width or _COLUMNS + 2) - 2)
    parts += [Text(), *strip(load["strip"]["phases"], columns, load["seconds"])]
    if load["reads"]:
        parts += [Text(), _reads(load)]
    return Group(*parts)


def _head(load: Json) -> Text:
    state = "" if load["is_over"] else ", still under way"
    text = Text(clean(load["model"] or "."), style="bold")
    bytes_ = load["bytes"]
    details = (
        f"  {when(load['began_at'])}, {load['seconds']:.3f} s{state}; {count(load['files_count'], 'open')}; "
        f"origin {size(bytes_['origin'])}, SSD {size(bytes_['ssd'])}, RAM {size(bytes_['ram'])}"
    )
    return text.append(details, style="not bold dim")


def phases_table(phases: dict[str, float], seconds: float) -> RenderableType:
    """Each phase that took any time, and the sum."""
    rows: list[Sequence[str | Text]] = [
        (name, f"{took:.3f}", share(round(1000 * took), round(1000 * seconds))) for name, took in phases.items() if took
    ]
    return table(("PHASE", ">SECONDS", ">SHARE"), [*rows, (Text("in all", style="bold"), f"{seconds:.3f}", "")])


def strip(steps: Sequence[str], columns: int, seconds: float) -> list[RenderableType]:
    """The time line in so many columns, and what its letters mean."""
    if not steps:
        return []
    line = Text()
    shown = [steps[len(steps) * column // columns] for column in range(columns)]
    for phase, run in groupby(shown):
        letter, style = LOOKS.get(phase, LOOKS["other"])
        line.append(letter * len(list(run)), style=style)
    legend = Text("  ".join(f"{LOOKS.get(p, LOOKS['other'])[0]} {p}" for p in dict.fromkeys(shown)), style="dim")
    scale = Text(f"0{f'{seconds:.3f} s':>{columns - 1}}", style="dim")
    return [line, scale, legend]


def _reads(load: Json) -> RenderableType:
    longest = sorted(load["reads"], key=lambda read: -float(read["waited_s"]))[:_READS]
    rows: list[Sequence[str | Text]] = [
        (f"{read['at']:.3f}", f"{read['waited_s']:.3f}", read["on"], _where(read)) for read in longest
    ]
    more = load["waits_count"] - len(longest)
    title = Text("The longest waits" + (f", of {load['waits_count']:,}" if more > 0 else ""), style="dim")
    return Group(title, table((">AT", ">WAITED", "ON", "READ"), rows))


def _where(read: Json) -> str:
    if not read["stop"]:
        return str(clean(read["path"]))
    return f"{clean(read['path'])} {size(read['start'])}+{size(read['stop'] - read['start'])}"


def as_html(loads: Sequence[Json]) -> str:
    """One page that needs nothing else."""
    from mfs.page.timeline import timeline_svg

    parts = [_PAGE_HEAD]
    for load in loads:
        parts.append(f"<h1>{html.escape(clean(load['model'] or '.'))}</h1><p>{html.escape(when(load['began_at']))}, "
                     f"{load['seconds']:.3f} s</p>{timeline_svg(load)}")  # fmt: skip
        rows = [(name, f"{took:.3f}") for name, took in load["phases"].items() if took]
        parts.append(_html_table(("phase", "seconds"), [*rows, ("in all", f"{load['seconds']:.3f}")]))
        waits = [(f"{r['at']:.3f}", f"{r['waited_s']:.3f}", r["on"], clean(r["path"]), str(r["start"]), str(r["stop"]))
                 for r in load["reads"]]  # fmt: skip
        parts.append(_html_table(("at", "waited", "on", "file", "start", "stop"), waits))
    return "".join([*parts, "</body></html>\n"])


_PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mfs explain</title><style>
:root{color-scheme:light dark}
body{font:14px/1.4 system-ui,sans-serif;margin:2em;max-width:70em}svg{max-width:100%;height:auto}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.1em .8em .1em 0;text-align:left}
td:nth-child(-n+2){font-variant-numeric:tabular-nums}
</style></head><body>
"""


def _html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
