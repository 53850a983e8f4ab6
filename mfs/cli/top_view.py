"""What `mfs top` shows: mounts as they were seen last, and the screen made of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mfs.cli.output import table
from mfs.cli.panel import bar
from mfs.cli.text import ago, clean, count, share, size
from mfs.control.api import Json
from mfs.control.rows import ORDERS
from mfs.errors import AccessError, MfsError, StoreError, TransientStoreError
from mfs.units import format_duration

if TYPE_CHECKING:
    from rich.console import ConsoleDimensions

    from mfs.control.runtime import Served

_PATIENCE_S = 2.0
_SPARKS = " ▁▂▃▄▅▆▇█"
_SPARKS_COUNT = 20
_FETCHES_MAX = 6
_ORDER_WORDS = {
    "recent": "by what is going on", "name": "by name", "size": "by size", "ssd": "most on SSD first",
    "ram": "most in RAM first", "origin": "most fetched first",
}  # fmt: skip
_WIDE_COLUMNS = ("RESIDENT", ">FETCHED", "USED")
"""Of the models: where the terminal is narrow their names need the room."""
_HELP = "q quit   order: a going on, n name, z size, s SSD, r RAM, o origin"


class Watched:
    """One mount, and what it said the last two times."""

    def __init__(self, served: Served, below: str = "") -> None:
        """below: show only models with this in their path."""
        self.served = served
        self.state = "serving"
        """Or why it cannot be asked, in two words; `fault` says it in a line."""
        self.fault = ""
        self.seen: Json | None = None
        self._before: Json | None = None
        self._below = below
        self.history: deque[float] = deque(maxlen=_SPARKS_COUNT)
        """Bytes a second from the origin."""

    def look(self, sort: str, rows_max: int) -> None:
        """Ask once more; never raises for what a mount does."""
        from mfs.cli.targets import connect

        before = self.seen
        try:
            client = connect(self.served, timeout_s=_PATIENCE_S)
            self.seen = client.overview(sort=sort, match=self._below[:200], count=rows_max)
            self.state, self.fault = "serving", ""
        except AccessError:
            self.state, self.seen = "another user's", None
        except MfsError as error:  # what it said last may still be looked at, where it only does not answer
            is_gone = not isinstance(error, TransientStoreError) and not self.served.is_listening
            self.state, self.fault = "dead" if is_gone else "not answering", str(error)
            self.seen = before if isinstance(error, StoreError) else None
        self._before = before if before is not self.seen else None
        if self._rate_s is not None:
            self.history.append(self.rates()["origin"])

    @property
    def _rate_s(self) -> float | None:
        """Seconds between the two looks, by the daemon's clock; None where there is nothing to compare."""
        if self._before is None or self.seen is None:
            return None
        before, after = self._before["status"], self.seen["status"]
        seconds = float(after["uptime_s"] - before["uptime_s"])
        return seconds if seconds > 0 and before["pid"] == after["pid"] else None

    def _rate(self, *names: str) -> float:
        seconds, before, after = self._rate_s, self._before, self.seen
        if seconds is None:
            return 0.0
        for name in names:
            before, after = (before or {}).get(name), (after or {}).get(name)
        return max(0.0, (after - before) / seconds) if before is not None and after is not None else 0.0  # type: ignore[operator]

    def rates(self) -> dict[str, float]:
        """Bytes a second, by where they come from."""
        names = {"origin": ("origin", "fetched_bytes"), "ssd": ("ssd", "hits_bytes"), "ram": ("ram", "hits_bytes")}
        return {name: self._rate("status", *where) for name, where in names.items()}

    def waits(self) -> dict[str, float]:
        """How many readers stood waiting on average, by what for."""
        return {cause: self._rate("waits", cause, "seconds") for cause in (self.seen or {}).get("waits", ())}

    def rows(self) -> Iterator[Json]:
        """The models, each with `now`, bytes a second, and `waiting`."""
        seconds = self._rate_s
        old = {row["path"]: row for row in self._before["models"]["rows"]} if self._before else {}
        for row in self.seen["models"]["rows"] if self.seen else ():
            was = old.get(row["path"])
            known = {"now": 0.0, "waiting": 0.0}
            if was is not None and seconds is not None:
                known = {
                    "now": max(0.0, (row["origin_bytes"] - was["origin_bytes"]) / seconds),
                    "waiting": max(0.0, (row["waited_s"] - was["waited_s"]) / seconds),
                }
            yield row | known

    def as_json(self) -> Json:
        return {
            "mountpoint": self.served.mountpoint, "state": self.state, "fault": self.fault or None,
            "rates": self.rates(), "waiting": self.waits(),
            "models": list(self.rows()), "overview": self.seen,
        }  # fmt: skip


def render(
    mounts: Sequence[Watched], sort: str, *, rows_max: int, size: ConsoleDimensions | None = None
) -> RenderableType:
    """The screen. size: of the terminal, which it must fit; None: as long as it gets."""
    warnings = list(_warnings(mounts))
    fetches = [(mount, row) for mount in mounts if mount.seen for row in mount.seen["fetches"]["rows"]]
    fetches.sort(key=lambda found: -found[1]["since_s"])
    wide = size is None or size.width >= 110
    if size is not None:
        fetches_shown = min(len(fetches), _FETCHES_MAX)
        used = 4 + len(mounts) + 2 + (fetches_shown + 2 if fetches_shown else 0) + len(warnings) + 2
        rows_max = max(3, min(rows_max, size.height - used - 2))
    parts: list[RenderableType] = [_head(mounts, sort), Text(), _mounts_table(mounts, wide), _waits(mounts), Text()]
    parts.append(_models(mounts, sort, rows_max, wide))
    if fetches:
        parts += [Text(), _fetches(fetches, mounts)]
    if warnings:
        parts += [
            Text(),
            *(Text(f"! {clean(text)}", style="yellow", no_wrap=True, overflow="ellipsis") for text in warnings),
        ]
    if size is not None:
        parts += [Text(), Text(_HELP, style="dim")]
    return Group(*parts)


def _head(mounts: Sequence[Watched], sort: str) -> Text:
    models = sum(mount.seen["models"]["count"] for mount in mounts if mount.seen)
    text = Text("mfs top", style="bold")
    what = (
        f"{time.strftime('%H:%M:%S')}   {count(len(mounts), 'mount')}, {count(models, 'model')}, {_ORDER_WORDS[sort]}"
    )
    return text.append(f"   {what}", style="not bold dim")


def _mounts_table(mounts: Sequence[Watched], wide: bool) -> Table:
    columns = ["MOUNT", "SSD", "RAM", ">FROM ORIGIN", ">WAITING", ">OPEN", "UP"]
    if wide:
        columns[4:4] = [f"{'LAST ' + str(_SPARKS_COUNT) + ' S':<{_SPARKS_COUNT}}", ">FROM SSD", ">FROM RAM"]
    rows: list[list[str | Text]] = []
    for mount in mounts:
        name = clean(mount.served.mountpoint)
        if mount.seen is None:
            rows.append([Text(name), *[""] * (len(columns) - 2), Text(clean(mount.state), style="red")])
            continue
        status, rates = mount.seen["status"], mount.rates()
        waiting = status["reads"]["waiting"]
        row: list[str | Text] = [
            Text(name, style="bold"), _tier(status["ssd"], "blue", wide, status["cache_dir"] is None),
            _tier(status["ram"], "cyan", wide), _rate_text(rates["origin"], "red"),
            Text(f"{waiting:,}", style="yellow" if waiting else "dim"), f"{status['open_files']:,}",
            format_duration(status["uptime_s"]) if mount.state == "serving" else Text(clean(mount.state), style="red"),
        ]  # fmt: skip
        if wide:
            row[4:4] = [
                Text(sparkline(mount.history), style="red"), _rate_text(rates["ssd"], "blue"),
                _rate_text(rates["ram"], "cyan"),
            ]  # fmt: skip
        rows.append(row)
    made = table(columns, rows)
    for column in made.columns[1:]:
        column.no_wrap = True  # numbers stay whole; a long path is what gives way
    return made


def sparkline(values: Sequence[float]) -> str:
    """A column for each value, the highest of them full; something is never nothing."""
    most = max(values, default=0.0)
    if most <= 0:
        return "·" * len(values)
    return "".join(_SPARKS[max(1, round(8 * value / most))] if value > 0 else "·" for value in values)


def _tier(tier: Json, style: str, wide: bool, is_off: bool = False) -> Text:
    if is_off:
        return Text("off", style="dim")
    if not wide:
        return Text(size(tier["used_bytes"]), style=style)
    text = Text(bar(tier["used_bytes"], tier["budget_bytes"], 10), style=style)
    return text.append(f" {size(tier['used_bytes'])} of {size(tier['budget_bytes'])}", style="default")


def _rate_text(value: float, style: str) -> Text:
    return Text(f"{size(round(value))}/s", style=style) if value >= 1 else Text("–", style="dim")


def _waits(mounts: Sequence[Watched]) -> Text:
    total: dict[str, float] = {}
    for mount in mounts:
        for cause, readers in mount.waits().items():
            total[cause] = total.get(cause, 0.0) + readers
    some = [f"{cause} {readers:.1f}" for cause, readers in total.items() if readers >= 0.05]
    if not some:
        return Text("no reader had to wait", style="dim")
    return Text("readers waiting for: ", style="yellow").append(", ".join(some), style="default")


def _models(mounts: Sequence[Watched], sort: str, rows_max: int, wide: bool) -> RenderableType:
    is_one = len(mounts) == 1
    rows: list[Json] = []
    for mount in mounts:
        prefix = "" if is_one else f"{mount.served.mountpoint}/"
        for row in mount.rows():
            name = row["path"] if row["is_model"] else f"{row['path']}/*".lstrip("/")
            rows.append(row | {"path": f"{prefix}{name}"})
    rows.sort(key=ORDERS[sort])
    if not rows:
        return Text("no model is listed yet", style="dim")
    columns = [">SIZE", "RESIDENT", ">SSD", ">RAM", ">FETCHED", ">NOW", ">WAITING", ">OPEN", "USED", "MODEL"]
    picked = [number for number, title in enumerate(columns) if wide or title not in _WIDE_COLUMNS]
    shown = [[cells[number] for number in picked] for cells in map(_model_cells, rows[:rows_max])]
    made = table([columns[number] for number in picked], shown)
    for column in made.columns[:-1]:
        column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    made.columns[-1].overflow, made.columns[-1].no_wrap = "ellipsis", True
    left = sum(m.seen["models"]["matched_count"] for m in mounts if m.seen) - len(shown)
    return Group(made, Text(f"{left:,} more", style="dim")) if left > 0 else made


def _model_cells(row: dict[str, Any]) -> list[str | Text]:
    whole = row["size"] or 0
    used = ago(row["last_used_at"]) if row["last_used_at"] else ""
    return [
        size(whole) if row["size"] is not None else Text("?", style="dim"),
        Text(bar(min(row["ssd_bytes"], whole), whole, 16), style="blue"),
        share(row["ssd_bytes"], whole) if whole else "",
        size(row["ram_bytes"]) if row["ram_bytes"] else "",
        size(row["origin_bytes"]) if row["origin_bytes"] else "",
        Text(f"{size(round(row['now']))}/s", style="bold red") if row["now"] >= 1 else "",
        Text(f"{row['waiting']:.1f}", style="yellow") if row["waiting"] >= 0.05 else "",
        f"{row['open_count']:,}" if row["open_count"] else "",
        Text(used, style="dim"),
        Text(clean(row["path"]) or ".", style="bold" if row["fetching_count"] else ""),
    ]  # fmt: skip


def _fetches(fetches: Sequence[tuple[Watched, Json]], mounts: Sequence[Watched]) -> RenderableType:
    rows: list[list[str | Text]] = []
    for mount, row in fetches[:_FETCHES_MAX]:
        late = "red" if row["since_s"] > 5 else ""
        rows.append([
            Text(f"{row['since_s']:.1f}s", style=late), row["from"], "ahead" if row["ahead"] else "waited for",
            f"{size(row['stop'] - row['start'])} at {size(row['start'])}",
            row["path"] if len(mounts) == 1 else f"{mount.served.mountpoint}/{row['path']}",
        ])  # fmt: skip
    of_all = [mount.seen["fetches"] for mount in mounts if mount.seen]
    said = f"{count(sum(one['count'] for one in of_all), 'fetch', 'fetches')} under way"
    if queued := sum(one["queued_count"] for one in of_all):
        said += f", {queued:,} queued"
    return Group(Text(said, style="dim"), table((">SINCE", "FROM", "", ">BYTES", "FILE"), rows))


def _warnings(mounts: Sequence[Watched]) -> Iterator[str]:
    for mount in mounts:
        if mount.fault:
            yield mount.fault
        if mount.seen is None:
            continue
        status = mount.seen["status"]
        prefix = "" if len(mounts) == 1 else f"{mount.served.mountpoint}: "
        failing = [f"{s['name'] or s['url']}: {s['last_error']}" for s in status["sources"] if s["last_error"]]
        remarks = [*failing, *status["warnings"], status["ram"]["note"], *status["kernel"]["notes"]]
        for remark in dict.fromkeys(filter(None, remarks)):
            yield f"{prefix}{remark}"
