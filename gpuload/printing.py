"""What the commands print: one JSON object with --json, else a few lines or a table. Names of strangers are escaped."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from gpuload.doctor import Finding


def size(nbytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    raise AssertionError


def show_json_or(reply: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(reply) if as_json else text)


def show_report(reply: dict[str, Any], as_json: bool) -> None:
    report = reply["report"]
    seconds = max(report["seconds"], 1e-9)
    lines = [
        f"{reply['model']} on {reply['device']}: {size(report['bytes_total'])} in {report['seconds']:.3f} s"
        f" ({report['bytes_total'] / seconds / 1e9:.1f} GB/s), generation {reply['generation']}",
        f"  kept in place {size(report['bytes_kept'])}, moved inside the device {size(report['bytes_moved_inside'])},"
        f" copied {size(report['bytes_copied'])}",
    ]
    if report["bytes_hashed"]:
        lines.append(f"  read and hashed, since nothing was known of them: {size(report['bytes_hashed'])}")
    if report["evicted"]:
        lines.append(f"  evicted: {', '.join(report['evicted'])}")
    show_json_or(reply, as_json, "\n".join(lines))


@contextlib.contextmanager
def progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal: call it with (bytes done, bytes in all), from any thread."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show_digests(found: dict[str, Any], as_json: bool) -> None:
    lines = [
        f"{found['model']}: {size(found['bytes_known'])} known, {size(found['bytes_hashed'])} hashed in"
        f" {found['seconds']:.2f} s"
    ]
    lines += [f"  not kept: {f['path']}: {f['reason']}" for f in found["files"] if f["reason"]]
    show_json_or(found, as_json, "\n".join(lines))


def show_unloaded(reply: dict[str, Any], as_json: bool) -> None:
    after = "released" if reply["released"] else f"released when {reply['leases']} leases end"
    show_json_or(reply, as_json, f"{reply['model']} on {reply['device']}: {after}")


def show_status(reply: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(reply))
        return
    console = _console()
    for device in reply["devices"]:
        used = device["arena_bytes"] - device["arena_free_bytes"]
        console.print(
            f"{device['device']}: arena {size(device['arena_bytes'])}, used {size(used)}; loads {device['loads']};"
            f" device free {size(device['device_free_bytes'])} of {size(device['device_bytes'])}"
        )
        if not device["models"]:
            console.print("  nothing resident")
            continue
        table = _table("model", "bytes", "leases", "pinned", "generation", "from")
        for m in device["models"]:
            name = m["model"] or "(retired)"
            pinned = "yes" if m["pinned"] else ""
            row = (name, _here(m, device), str(m["leases"]), pinned, str(m["generation"]), m["label"])
            table.add_row(*map(escape, row))
        console.print(table)


def _here(model: dict[str, Any], device: dict[str, Any]) -> str:
    """Its bytes on this device, and where else it stands."""
    others = [name for name in model["devices"] if name != device["device"]]
    return size(model["bytes_here"]) + (f", the rest on {', '.join(others)}" if others else "")


def show_plan(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    console = _console()
    console.print(
        escape(f"{found['model']}: {size(found['bytes_total'])} in {found['tensors_count']} tensors,")
        + f" {found['shards_count']} files"
    )
    table = _table("dtype", "bytes")
    for dtype, n in found["bytes_by_dtype"].items():
        table.add_row(dtype, size(n))
    console.print(table)
    ranks = ", ".join(f"{world}: {size(n)}" for world, n in found["rank_bytes"].items())
    console.print(f"per rank of a tensor-parallel size of {ranks}")
    if found["kv_cache_tokens"]:
        console.print(f"key-value cache of {found['kv_cache_tokens']} tokens: {size(found['kv_cache_bytes'])}")
    table = _table("target", "needs", "in use there", "has", "verdict")
    for t in found["targets"]:
        world = t["tensor_parallel"]
        verdict = "fits" if t["fits"] else f"short by {size(t['shortfall_bytes'])}"
        if not t["fits"] and t["may_be_cut"]:
            verdict += f"; fits with tensor parallel {world}" if world else "; fits with none of 1 to 16"
        in_use = size(t["resident_bytes"] + t["others_bytes"])
        table.add_row(t["target"], size(t["needed_bytes"]), in_use, size(t["device_bytes"]), verdict)
    console.print(table)


def show_findings(findings: Sequence[Finding], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"findings": [asdict(f) for f in findings]}))
        return
    table = _table("what", "state", "detail")
    for f in findings:
        table.add_row(escape(f.what), f.state, escape(f.detail))
    _console().print(table)


def show_bench(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    console = _console()
    console.print(escape(f"{found['machine']}; {size(found['bytes'])} on {found['device']}"))
    table = _table("what", "seconds", "GB/s", "of the bare copy")
    for row in found["rows"]:
        rate = f"{row['gb_s']:.2f}" if row["gb_s"] else ""
        share = f"{row['of_ceiling']:.2f}" if row["of_ceiling"] else ""
        table.add_row(row["what"], f"{row['seconds']:.4f}", rate, share)
    console.print(table)


def _console() -> Console:
    """As wide as the terminal; wide enough for whole paths where the output goes to a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=240)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
