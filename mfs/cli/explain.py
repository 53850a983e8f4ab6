"""`mfs explain`: which reads of a load waited, how long and on what; where its time went; its time line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from mfs.cli.page import Page, json_option
from mfs.cli.targets import TREE_PATH, Target, targets
from mfs.cli.text import print_json
from mfs.control.api import Json
from mfs.errors import NotFoundError, StoreError, UsageError


@click.command(
    cls=Page,
    short_help="Where the time of a load went.",
    sections={
        "Examples": """\
mfs explain /mnt/models/llama                     its last load
mfs explain /mnt/models/llama --last 5            the last five, oldest first
mfs explain /mnt/models --json | jq '.loads[].phases'
mfs explain /mnt/models/llama --html llama.html   one file, to send to somebody""",
        "Loads": """\
A load is what is read of one model from its first open until all its files are closed, or
nothing was read for ten seconds. The daemon keeps the last 32, each with its 64 longest
waits, and forgets them when it ends.""",
        "Phases": """\
open        an open waited for a whole file: --materialize, or to have it from SSD
header      an open waited for the file's header
origin      reads waited for the origin, or for a connection to it
ssd         for the SSD tier
decode      for bytes that had come, to be unpacked and verified
slot        for room in RAM
share       for the model's own share of that room, or of what is lent
page_cache  nobody waited for us: the kernel had the bytes, or the program was at something else
other       a wait of another kind
Each instant counts once: for what most readers waited for then. So the phases add up to
the time of the load, however many threads read.""",
    },
)
@click.argument("path", metavar="PATH", type=TREE_PATH)
@click.option("--last", "count", default=1, show_default=True, metavar="N", type=click.IntRange(1), help="How many.")
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page with the time line there.")
@json_option
def explain(path: str, count: int, html: Path | None, as_json: bool) -> None:
    """Say where the time of the last load of PATH's model went.

    PATH is a model, a file of one, or what lies above them: a source or the mount.
    """
    if html is not None and as_json:
        raise UsageError("--html and --json: give one of them")
    (target,) = targets([path])
    loads = target.client.loads(target.paths[0])["loads"][-count:]
    _check_exists(target, loads)
    if as_json:
        print_json({"loads": loads})
        return
    if not loads:
        raise NotFoundError(f"{path}: nothing was read there since the daemon began, or it was long ago")
    if html is not None:
        from mfs.cli.explained import as_html

        try:
            html.write_text(as_html(loads), encoding="utf-8")
        except OSError as error:
            raise StoreError(f"{html}: {error.strerror}") from error
        return
    from mfs.cli.explained import render
    from mfs.cli.output import console, print_plain

    out = console()
    for number, load in enumerate(loads):
        if number:
            print()
        if sys.stdout.isatty():
            out.print(render(load, out.width))
        else:
            print_plain(out, render(load, None))


def _check_exists(target: Target, loads: Sequence[Json]) -> None:
    """Raises: NotFoundError if the path is neither in the tree nor that of a load, whose model may be gone."""
    path = target.paths[0]
    if any(f"{load['model']}/".startswith(f"{path}/") for load in loads) or not path:
        return
    with suppress(StoreError):  # its origin is away: nobody knows, and loads are explained without
        target.client.stat(path)
