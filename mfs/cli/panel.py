"""The status of one mount as a screen a person reads in five seconds. Pure: a dict in, something rich prints out."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mfs.cli.text import ago, clean, count, rate, share, size
from mfs.control.api import Json
from mfs.units import format_duration

_BAR_COLUMNS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"


def render(status: Json, origin_rate: float | None, log_file: str | None) -> RenderableType:
    """origin_rate: bytes a second right now; None where nothing is moving or it is not known yet."""
    return Group(
        _head(status),
        *_sources(status),
        Text(),
        _tiers(status),
        Text(),
        _facts(status, origin_rate, log_file),
        *_remarks(status),
    )


def bar(part: int, whole: int, columns: int = _BAR_COLUMNS) -> str:
    """A bar of eighths of a column; something is never nothing, and less than all never all."""
    eighths = round(8 * columns * part / whole) if whole > 0 else 0
    if part > 0:
        eighths = max(1, eighths)
    eighths = min(eighths, 8 * columns if part >= whole > 0 else 8 * columns - 1)
    full, rest = divmod(max(0, eighths), 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(columns, "·")


def _head(status: Json) -> Text:
    text = Text(clean(status["mountpoint"]), style="bold")
    details = f"  up {format_duration(status['uptime_s'])}, pid {status['pid']}, mfs {status['version']}"
    return text.append(clean(details), style="not bold dim")


def _sources(status: Json) -> list[RenderableType]:
    grid = Table.grid(padding=(0, 2))
    for _ in range(3):
        grid.add_column(overflow="fold")
    for source in status["sources"]:
        known = count(source["listed_directories"], "directory", "directories")
        grid.add_row(
            Text(clean(f"  {source['name'] or '.'}")),
            Text(clean(source["url"])),
            Text(f"{known}, seen {ago(source['last_refresh_at'])}", style="red" if source["last_error"] else "dim"),
        )
    return [grid]


def _tiers(status: Json) -> Table:
    ssd, ram = status["ssd"], status["ram"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold", style="dim")
    if status["cache_dir"] is None:
        nothing = Text("·" * _BAR_COLUMNS, style="dim")
        grid.add_row("  SSD", nothing, "off", "no --cache-dir: cold reads go to the origin")
    else:
        files, free = _files(ssd), size(ssd["free_disk_bytes"])
        state = "" if ssd["state"] == "ok" else f"{ssd['state']}; "
        grid.add_row("  SSD", _bar(ssd), _of(ssd), Text(clean(f"{state}{files}, {free} free in {status['cache_dir']}")))
    note = ram["note"] or "huge pages, never swapped out"
    warm = f", {size(ram['warm_bytes'])} kept ready" if ram["warm_bytes"] else ""
    grid.add_row("  RAM", _bar(ram), _of(ram), f"{count(ram['slots_leased'], 'slot')} in use{warm}; {note}")
    return grid


def _files(ssd: Json) -> str:
    kinds = (("sealed", "in whole ones"), ("pinned", "pinned"))
    parts = [f"{size(ssd[f'{kind}_bytes'])} {words}" for kind, words in kinds if ssd[f"{kind}_bytes"]]
    return count(ssd["objects_count"], "file") + (f" ({', '.join(parts)})" if parts else "")


def _bar(tier: Json) -> Text:
    return Text(bar(tier["used_bytes"], tier["budget_bytes"]), style="green")


def _of(tier: Json) -> str:
    return f"{size(tier['used_bytes'])} of {size(tier['budget_bytes'])}"


def _facts(status: Json, origin_rate: float | None, log_file: str | None) -> Table:
    origin, reads, prefetch = status["origin"], status["reads"], status["prefetch"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("  served", _served(status))
    now = f"{rate(origin_rate, 1)} now" if origin_rate else "idle"
    if origin["inflight"]:
        now += f", {origin['inflight']:,} in flight"
    facts = f"{now}; {size(origin['fetched_bytes'])} fetched in {count(origin['requests_count'], 'request')}"
    grid.add_row("  origin", _with_errors(facts, origin["errors_count"]))
    if way := _ways(status):
        grid.add_row("", way)
    if shared := origin.get("shared_bytes"):
        grid.add_row("", Text(f"{size(shared)} not fetched again: copied from other models in the SSD tier"))
    facts = f"{count(reads['count'], 'read')} of {size(reads['bytes'])} in all; {reads['waiting']:,} waiting, "
    facts += count(status["open_files"], "open file")
    if through := status["passthrough"]["open_files"]:
        facts += f" ({through} read by the kernel itself)"
    grid.add_row("  reads", _with_errors(facts, reads["errors_count"]))
    if status["passthrough"]["note"]:
        grid.add_row("", Text(f"whole files are read through the daemon: {status['passthrough']['note']}"))
    if prefetch["queued_bytes"] or prefetch["active_objects"]:
        facts = f"{size(prefetch['queued_bytes'])} queued, {count(prefetch['active_objects'], 'file')} under way"
        grid.add_row("  prefetch", facts)
    grid.add_row("  kernel", _kernel(status["kernel"]))
    workers = ", ".join(str(worker["pid"]) for worker in status["workers"])
    restarts = sum(worker["restarts"] for worker in status["workers"])
    if workers:
        grid.add_row("  workers", _with_errors(f"pid {workers}", restarts, "restart"))
    if log_file:
        grid.add_row("  log", Text(clean(log_file)))
    return grid


def _served(status: Json) -> str:
    parts = [("RAM", status["ram"]["hits_bytes"]), ("SSD", status["ssd"]["hits_bytes"])]
    parts.append(("origin", status["origin"]["fetched_bytes"]))
    total = sum(value for _, value in parts)
    if not total:
        return "nothing yet"
    return ", ".join(f"{share(value, total)} from {name} ({size(value)})" for name, value in parts if value)


def _ways(status: Json) -> Text | None:
    """Which way bytes came, where sources have a cache that nodes share."""
    caches = dict.fromkeys(
        f"{'dragonfly' if source['is_dragonfly'] else 'the cache'} {source['via']}"
        for source in status["sources"]
        if source.get("via")
    )
    if not caches:
        return None
    cached, direct, faults = (status["origin"][name] for name in ("cache_bytes", "direct_bytes", "cache_faults"))
    total = cached + direct
    parts = [f"{share(cached, total)} through {', '.join(caches)} ({size(cached)})"]
    parts += [f"{share(direct, total)} past it ({size(direct)})"] if direct else []
    return _with_errors(", ".join(parts), faults, "cache failure")


def _with_errors(facts: str, errors: int, word: str = "error") -> Text:
    text = Text(clean(facts))
    if errors:
        text.append(f", {count(errors, word)}", style="yellow")
    return text


def _kernel(kernel: dict[str, Any]) -> str:
    ahead, background = kernel["read_ahead_kb"], kernel["max_background"]
    known = [f"read-ahead {size(ahead << 10)}"] if ahead is not None else []
    known += [f"max_background {background}"] if background is not None else []
    return ", ".join(known) or "not known"


def _remarks(status: Json) -> list[RenderableType]:
    """Everything that wants a person's attention, each on a line of its own, once."""
    failing = [f"{s['name'] or s['url']}: {s['last_error']}" for s in status["sources"] if s["last_error"]]
    remarks = [*failing, *status["warnings"], status["ram"]["note"], *status["kernel"]["notes"]]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold yellow")
    grid.add_column(overflow="fold")
    for remark in dict.fromkeys(filter(None, remarks)):
        grid.add_row("  !", Text(clean(remark)))
    return [Text(), grid] if grid.row_count else []
