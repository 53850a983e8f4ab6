"""`mfs status`: one mount at a glance, all mounts of the machine, or a cache directory without its daemon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfs.cli.page import Page, json_option
from mfs.cli.targets import TREE_PATH
from mfs.cli.text import clean, count, print_json, share, size, when
from mfs.control.api import Json
from mfs.errors import AccessError, MfsError, TransientStoreError, UsageError
from mfs.shown import mask_url
from mfs.units import format_duration

if TYPE_CHECKING:
    from mfs.control.client import Client
    from mfs.control.runtime import Served

_LIST_TIMEOUT_S = 3.0  # a list of mounts must come although one of them hangs
_RATE_OVER_S = 0.3


@click.command(
    cls=Page,
    short_help="How a mount, all mounts or a cache are doing.",
    sections={
        "Examples": """\
mfs status                          all mounts of this machine
mfs status /mnt/models              one mount at a glance
mfs status --watch /mnt/models      the same, kept up to date
mfs status --json /mnt/models       every counter, exactly
mfs status --cache-dir /nvme/mfs    what a cache holds, also with no daemon running"""
    },
)
@click.argument("path", required=False, type=TREE_PATH)
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Read a cache directory's tables instead.")
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@json_option
def status(path: str | None, cache_dir: Path | None, watch: bool, as_json: bool) -> None:
    """Show how a mount is doing: tiers, where bytes came from, the origin, warnings."""
    if cache_dir is not None:
        if path is not None or watch:
            raise UsageError("--cache-dir stands alone: it reads a directory, not a mount")
        _offline(cache_dir, as_json)
    elif path is None:
        if watch:
            raise UsageError("--watch needs a PATH: the mount to watch")
        _all_mounts(as_json)
    else:
        _one_mount(path, watch, as_json)


def _one_mount(path: str, watch: bool, as_json: bool) -> None:
    from mfs.cli.targets import targets

    (target,) = targets([path])
    if as_json:
        print_json(target.client.status())
        return
    from mfs.cli.output import console, print_plain
    from mfs.cli.panel import render

    out = console()
    log_file = target.served.record.log_file if target.served.record else None
    if not watch:
        print_plain(out, render(*_with_rate(target.client), log_file))
        return
    from rich.live import Live

    before = target.client.status()
    with Live(render(before, None, log_file), console=out, auto_refresh=False, screen=out.is_terminal) as live:
        while True:
            now = _later(target.client, 1.0)
            live.update(render(now, _rate(before, now), log_file), refresh=True)
            before = now


def _with_rate(client: Client) -> tuple[Json, float | None]:
    """The status, and bytes a second from the origin where anything is moving."""
    first = client.status()
    if not first["origin"]["inflight"] and not first["prefetch"]["queued_bytes"]:
        return first, None
    second = _later(client, _RATE_OVER_S)
    return second, _rate(first, second)


def _later(client: Client, seconds: float) -> Json:
    time.sleep(seconds)
    return client.status()


def _rate(before: Json, after: Json) -> float | None:
    """By the daemon's own clock, so that a slow answer does not distort it."""
    seconds = after["uptime_s"] - before["uptime_s"]
    return (after["origin"]["fetched_bytes"] - before["origin"]["fetched_bytes"]) / seconds if seconds > 0 else None


def _all_mounts(as_json: bool) -> None:
    from mfs.control.runtime import list_mounts

    rows = [_summary(served) for served in list_mounts()]
    if as_json:
        print_json(rows)
        return
    if not rows:
        print("no mfs mounts on this machine; 'mfs mount --help' shows how to make one")
        return
    from mfs.cli.output import print_table

    print_table(
        ("MOUNT", "STATE", "UP", ">PID", ">SSD", ">RAM", "SOURCES"),
        [
            (
                row["mountpoint"],
                row["state"],
                format_duration(time.time() - row["started_at"]) if row["started_at"] else "",
                str(row["pid"] or ""),
                size(row["status"]["ssd"]["used_bytes"]) if row["status"] else "",
                size(row["status"]["ram"]["used_bytes"]) if row["status"] else "",
                ", ".join(row["sources"]),
            )
            for row in rows
        ],
    )


def _summary(served: Served) -> Json:
    """One mount for the list; what cannot be asked is None."""
    from mfs.cli.targets import connect, is_listening

    record = served.record
    row: dict[str, Any] = {
        "mountpoint": served.mountpoint,
        "state": "serving",
        "pid": record.pid if record else None,
        "started_at": record.started_at if record else None,
        "sources": list(record.sources) if record else [],
        "log_file": record.log_file if record else None,
        "status": None,
    }
    try:
        if is_listening(served):
            row["status"] = connect(served, timeout_s=_LIST_TIMEOUT_S).status()
        else:
            row["state"] = "unreachable" if record is None else "starting" if record.is_alive else "dead"
    except TransientStoreError:
        row["state"] = "not answering"
    except AccessError:
        row["state"] = "another user's"
    except MfsError:
        row["state"] = "dead"
    return row


def _offline(cache_dir: Path, as_json: bool) -> None:
    from mfs.cache.residency import scan  # numpy: only where it is needed

    found = sorted(scan(cache_dir), key=lambda item: item.last_used_at, reverse=True)
    if as_json:
        keys = ("source", "path", "size", "version", "digest", "ssd_bytes", "last_used_at", "pinned")
        print_json([{key: getattr(item, key) for key in keys} | {"source": mask_url(item.source)} for item in found])
        return
    from mfs.cli.output import print_table

    print_table(
        (">SIZE", ">SSD", "PIN", "LAST USED", "NAME"),
        [
            (
                size(item.size),
                share(item.ssd_bytes, item.size),
                "pin" if item.pinned else "",
                when(item.last_used_at),
                f"{mask_url(item.source)}/{item.path}" if item.source else item.cache_id,
            )
            for item in found
        ],
    )
    total = size(sum(item.ssd_bytes for item in found))
    print(clean(f"{count(len(found), 'file')}, {total} resident in {cache_dir}"))
