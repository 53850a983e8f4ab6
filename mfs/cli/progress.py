"""Progress of a stream of updates: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mfs.cli.standard import tell
from mfs.cli.text import clean, rate, share, size
from mfs.control.api import Json
from mfs.errors import StoreError
from mfs.units import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_EVERY_S = 5.0


def follow(updates: Iterator[Json], verb: str) -> Json:
    """Show the updates of `prefetch` or `verify` on stderr as they come; returns the last, which has 'done'.

    Raises: StoreError if the stream ends without one. Ctrl-C closes the stream, which cancels the work.
    """
    try:
        last = _bar(updates, verb) if sys.stderr.isatty() else _lines(updates, verb)
    finally:
        close = getattr(updates, "close", None)
        if close is not None:
            close()
    if not last.get("done"):
        raise StoreError("the daemon ended in the middle of the work; its log says more")
    return last


def _lines(updates: Iterator[Json], verb: str) -> Json:
    last: Json = {}
    started_at = said_at = time.monotonic()
    for last in updates:
        now = time.monotonic()
        if "path" in last and not last.get("done") and now - said_at >= _LINE_EVERY_S:
            said_at = now
            tell(clean(_line(last, verb, now - started_at)))
    return last


def _line(update: Json, verb: str, seconds: float) -> str:
    done, total = update["done_bytes"], update["total_bytes"]
    speed = done / seconds
    left = f", {format_duration((total - done) / speed)} left" if speed else ""
    return f"{verb} {size(done)} of {size(total)} ({share(done, total) or '0 %'}), {rate(done, seconds)}{left}"


def make_bar() -> Progress:
    """A bar on stderr with bytes done, of how many, how fast and how long still; gone when it ends."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    from mfs.cli.output import console

    class Numbers(ProgressColumn):
        def render(self, task: Task) -> Text:
            total = int(task.total or 0)
            speed = task.finished_speed or task.speed
            parts = [f"{size(int(task.completed)):>6} of {size(total):>6}", f"{size(int(speed or 0)):>6}/s"]
            if task.time_remaining is not None and not task.finished:
                parts.append(f"{format_duration(task.time_remaining)} left")
            return Text("  ".join(parts))

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), Numbers())
    return Progress(*columns, console=console(stderr=True), transient=True, expand=True)


def _bar(updates: Iterator[Json], verb: str) -> Json:
    last: Json = {}
    with make_bar() as progress:
        task = progress.add_task(verb, total=None)
        for last in updates:
            if last.get("done"):
                break
            name = clean(os.path.basename(last["path"]))
            description = f"{verb} {name if len(name) <= 32 else name[:15] + '…' + name[-16:]}"
            progress.update(task, total=last["total_bytes"], completed=last["done_bytes"], description=description)
    return last
