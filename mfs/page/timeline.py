"""One load as a drawing: its phases as a bar, and below it, on the same seconds, the waits of its readers. Pure.

A load is what `GET /v1/loads` says of one:

    {model, began_at: seconds since the epoch, seconds, left_out: reads that are not in it,
     phases: {PHASES: seconds}, which add up to `seconds`; strip: {step_s, phases: [the phase of each step in time]},
     reads: [{at: seconds after the beginning, waited_s, on: one of CAUSES, path, start, stop}],
     bytes: {origin, ssd, ram}}

What is missing counts as nothing: drawing never fails for what a load lacks. Without a strip the phases stand side by
side, each as wide as it is long. The SVG needs nothing from elsewhere, has a
title and a description for those who do not see it, and follows light and dark.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from mfs.shown import clean
from mfs.units import format_size

CAUSES = ("open", "header", "origin", "ssd", "decode", "slot", "share")
"""What a reader may wait for, in the order of the lanes."""
PHASES = {
    "open": "opening files",
    "header": "tensor tables",
    "origin": "waiting for the origin",
    "ssd": "waiting for the SSD",
    "decode": "decoding",
    "slot": "waiting for room in RAM",
    "share": "waiting for its share of RAM",
    "page_cache": "page cache, reader at work",
    "other": "other waits",
}
"""Each phase in words, in the order of the bar without a strip."""

STYLE = """\
.tl{font:13px/1.4 system-ui,sans-serif;fill:#1c2330}
.tl-strong{font-weight:600;font-size:15px}
.tl-quiet{fill:#596273}
.tl-line{stroke:#d5d9e0;stroke-width:1}
.tl-band{fill:#f3f5f8}
.tl-open{fill:#7c8593}.tl-header{fill:#8b66d6}.tl-origin{fill:#d1495b}.tl-ssd{fill:#2f7ed8}.tl-decode{fill:#c27a00}
.tl-slot{fill:#12908e}.tl-share{fill:#b0569f}.tl-page_cache{fill:#4c9a2a}.tl-other{fill:#a9b0bb}
.tl-wait{fill-opacity:.85}
@media (prefers-color-scheme:dark){
.tl{fill:#e6e9ef}.tl-quiet{fill:#a3acba}.tl-line{stroke:#363d4a}.tl-band{fill:#1f2530}
.tl-origin{fill:#ef6f80}.tl-ssd{fill:#5a9ff0}.tl-decode{fill:#e0a030}.tl-slot{fill:#2fb5b2}.tl-header{fill:#a78bf0}
.tl-share{fill:#d07fc0}.tl-page_cache{fill:#6cbf48}.tl-open{fill:#959eac}.tl-other{fill:#6b7482}}
"""
"""Of the classes in the drawing, for a page that shows it `bare`."""

STEPS_MAX = 2000
READS_MAX = 2000
"""More are not drawn: the longest are kept. A browser still scrolls smoothly, and the file stays below 1 MB."""
_WIDTH, _LEFT, _RIGHT = 960.0, 76.0, 12.0
_BAR_TOP, _BAR_HEIGHT, _ROW, _ROWS_MAX = 34.0, 30.0, 7.0, 8
_LEGEND_ROW, _LEGEND_COLUMNS = 21.0, 3
_STEPS = (1, 2, 5)


class _Wait(NamedTuple):
    """A read that waited, as far as it is drawn."""

    at: float
    seconds: float
    path: str
    start: int
    stop: int


def timeline_svg(load: Mapping[str, Any], *, bare: bool = False) -> str:
    """The load as one `<svg>` element, without a line for the XML's version.

    bare: without the `<style>` in it, for a page that has `STYLE` and forbids styles of other origin than files.
    """
    seconds = max(_number(load.get("seconds")), 1e-6)
    lanes, left_out = _lanes(load)
    body = list(_bar(load, seconds))
    legend, bottom = _legend(load, seconds, _BAR_TOP + _BAR_HEIGHT + 10)
    body += legend
    if lanes:
        drawn, bottom = _waits(lanes, seconds, bottom + 14)
        body += drawn
    body.append(_text(_LEFT, bottom + 18, _facts(load, left_out), "tl-quiet"))
    height = bottom + 28
    title, described = _title(load), _description(load, seconds, lanes, left_out)
    name = f"tl{zlib.crc32(repr((title, described)).encode('utf-8', 'replace')):08x}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:.0f}" width="100%" class="tl" '
        f'role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{_safe(title)}</title><desc id="{name}-d">{_safe(described)}</desc>'
    )
    style = "" if bare else f"<style>{STYLE}</style>"
    return "\n".join([head + style, _text(_LEFT, 20, title, "tl-strong"), *body, "</svg>"])


# -- the parts of the drawing


def _bar(load: Mapping[str, Any], seconds: float) -> Iterator[str]:
    """The phases: when each was, where that is known, and as wide as they are long."""
    yield _text(_LEFT - 10, _BAR_TOP + _BAR_HEIGHT / 2 + 4, "phases", "tl-quiet", "end")
    x, scale = _LEFT, (_WIDTH - _LEFT - _RIGHT) / seconds
    for phase, spent in list(_strip(load)) or _phases(load):
        width = min(spent * scale, _WIDTH - _RIGHT - x)
        yield _rect(x, _BAR_TOP, width, _BAR_HEIGHT, f"tl-{phase}", f"{PHASES[phase]}: {_seconds(spent)}")
        x += width


def _legend(load: Mapping[str, Any], seconds: float, top: float) -> tuple[list[str], float]:
    """What the colours of the bar mean, with numbers; and where it ends."""
    parts, phases = list[str](), list(_phases(load))
    rows = -(-len(phases) // _LEGEND_COLUMNS)
    column_width = (_WIDTH - _LEFT - _RIGHT) / _LEGEND_COLUMNS
    for place, (phase, spent) in enumerate(phases):
        column, row = divmod(place, rows)
        x, y = _LEFT + column * column_width, top + row * _LEGEND_ROW
        parts.append(_rect(x, y + 3, 12, 12, f"tl-{phase}"))
        share = f"{100 * spent / seconds:.0f} %" if spent / seconds >= 0.005 else "< 1 %"
        parts.append(_text(x + 18, y + 13, f"{PHASES[phase]}, {_seconds(spent)} ({share})"))
    return parts, top + rows * _LEGEND_ROW


def _waits(lanes: Mapping[str, Sequence[_Wait]], seconds: float, top: float) -> tuple[list[str], float]:
    """A lane for each cause over the seconds of the load; and where they end."""
    parts, scale, y = list[str](), (_WIDTH - _LEFT - _RIGHT) / seconds, top
    for number, (cause, waits) in enumerate(lanes.items()):
        rows = _stacked(waits)
        height = (1 + max(row for row, _ in rows)) * _ROW + 8
        if number % 2 == 0:
            parts.append(_rect(_LEFT, y, _WIDTH - _LEFT - _RIGHT, height, "tl-band"))
        parts.append(_text(_LEFT - 10, y + height / 2 + 4, cause, "tl-quiet", "end"))
        for row, wait in rows:
            x = _LEFT + min(wait.at, seconds) * scale
            width = min(max(wait.seconds * scale, 1.0), _WIDTH - _RIGHT - x)
            part = f"{wait.path}, {format_size(wait.stop - wait.start)} at {format_size(wait.start)}"
            said = f"{part}: {_seconds(wait.seconds)} on {cause}, from {_seconds(wait.at)} on"
            parts.append(_rect(x, y + 4 + row * _ROW, width, _ROW - 1, f"tl-{cause} tl-wait", said))
        y += height + 2
    grid = list[str]()
    for tick in _ticks(seconds):
        x = _LEFT + tick * scale
        grid.append(f'<line class="tl-line" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{y + 4:.1f}"/>')
        where = "end" if x > _WIDTH - 40 else "middle" if tick else "start"
        grid.append(_text(x, y + 19, f"{tick:g} s", "tl-quiet", where))
    bands = [part for part in parts if "tl-band" in part]
    return [*bands, *grid, *(part for part in parts if "tl-band" not in part)], y + 22


def _stacked(waits: Sequence[_Wait]) -> list[tuple[int, _Wait]]:
    """Waits of readers side by side, each with its row; beyond the last row they lie over each other."""
    free_at, placed = list[float](), list[tuple[int, _Wait]]()
    for wait in sorted(waits):
        row = next((row for row, free in enumerate(free_at) if free <= wait.at), len(free_at))
        if row == len(free_at) and row < _ROWS_MAX:
            free_at.append(0.0)
        row = min(row, _ROWS_MAX - 1)
        free_at[row] = max(free_at[row], wait.at + wait.seconds)
        placed.append((row, wait))
    return placed


def _ticks(seconds: float) -> Iterator[float]:
    """Round times, four to ten of them."""
    decade = 10.0 ** math.floor(math.log10(seconds))
    steps = (step * decade * factor for factor in (0.1, 1) for step in _STEPS)
    step = next(step for step in steps if seconds / step <= 10)
    for number in range(int(seconds / step) + 1):
        yield round(number * step, 9)


# -- what is drawn


def _phases(load: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    given = load.get("phases")
    for phase in PHASES:
        spent = _number(given.get(phase)) if isinstance(given, Mapping) else 0.0
        if spent > 0:
            yield phase, spent


def _strip(load: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What followed on what: each phase with the seconds that it went on."""
    given = load.get("strip")
    if not isinstance(given, Mapping) or not isinstance(given.get("phases"), Sequence):
        return
    step_s = _number(given.get("step_s"))
    steps = [step if step in PHASES else "other" for step in given["phases"][:STEPS_MAX]]
    for phase, group in groupby(steps):
        yield phase, step_s * len(list(group))


def _lanes(load: Mapping[str, Any]) -> tuple[dict[str, list[_Wait]], int]:
    """The waits by cause, and how many more there were."""
    reads = [read for read in load.get("reads") or () if isinstance(read, Mapping) and read.get("on") in CAUSES]
    reads.sort(key=lambda read: _number(read.get("waited_s")), reverse=True)
    left_out = int(_number(load.get("left_out"))) + len(reads[READS_MAX:])
    lanes: dict[str, list[_Wait]] = {cause: [] for cause in CAUSES}
    for read in reads[:READS_MAX]:
        at, waited, start, stop = (_number(read.get(name)) for name in ("at", "waited_s", "start", "stop"))
        lanes[read["on"]].append(_Wait(at, waited, str(read.get("path", "")), int(start), int(max(start, stop))))
    return {cause: waits for cause, waits in lanes.items() if waits}, left_out


def _title(load: Mapping[str, Any]) -> str:
    began = _number(load.get("began_at"))
    when = time.strftime(", %Y-%m-%d %H:%M:%S", time.localtime(min(began, 1 << 40))) if began else ""
    return f"{load.get('model') or 'a load'}: {_seconds(_number(load.get('seconds')))}{when}"


def _facts(load: Mapping[str, Any], left_out: int) -> str:
    given = load.get("bytes")
    facts = list[str]()
    for name, words in (("origin", "from the origin"), ("ssd", "from SSD"), ("ram", "from RAM")):
        value = int(_number(given.get(name))) if isinstance(given, Mapping) else 0
        if value:
            facts.append(f"{format_size(value)} {words}")
    if left_out:
        facts.append(f"{left_out:,} shorter waits are not drawn")
    return "; ".join(facts)


def _description(load: Mapping[str, Any], seconds: float, lanes: Mapping[str, Sequence[_Wait]], left_out: int) -> str:
    phases = ", ".join(f"{PHASES[phase]} {_seconds(spent)}" for phase, spent in _phases(load)) or "none are known"
    longest = max((wait for waits in lanes.values() for wait in waits), key=lambda wait: wait.seconds, default=None)
    count = sum(map(len, lanes.values())) + left_out
    waits = f" {count:,} reads waited." if count else " No read waited."
    if longest is not None:
        waits += f" The longest wait was {_seconds(longest.seconds)} for {longest.path}."
    return f"Of {_seconds(seconds)}: {phases}.{waits} {_facts(load, 0)}".strip()


# -- XML


def _rect(x: float, y: float, width: float, height: float, names: str, said: str = "") -> str:
    told = f"><title>{_safe(said)}</title></rect>" if said else "/>"
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}"'
    return f'<rect class="{escape(names)}" {size}{told}'


def _text(x: float, y: float, text: str, names: str = "", anchor: str = "start") -> str:
    named = f' class="{escape(names)}"' if names else ""
    placed = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}"{placed}>{_safe(text)}</text>'


def _safe(text: str) -> str:
    """Names of files come from strangers: nothing in them is markup, nothing is no XML."""
    return escape(clean(text), quote=False)


def _number(value: object) -> float:
    """What a load says, if it is a number that can be drawn; else nothing."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        return 0.0
    return float(value)


def _seconds(value: float) -> str:
    """'12.4 s', '0.31 s', '4.2 ms'."""
    if value >= 10:
        return f"{value:.1f} s"
    return f"{value:.2f} s" if value >= 0.1 or not value else f"{1000 * value:.1f} ms"
