"""`mfs top`: what all mounts do at this moment, until q."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click

from mfs.cli.page import Page, json_option
from mfs.cli.targets import TREE_PATH
from mfs.cli.text import print_json
from mfs.control.rows import ORDERS

if TYPE_CHECKING:
    from mfs.cli.top_view import Watched

_EVERY_S = 1.0
_ONCE_OVER_S = 0.5
_ROWS_MAX = 200
_KEYS = {"a": "recent", "n": "name", "z": "size", "s": "ssd", "r": "ram", "o": "origin"}


@click.command(
    cls=Page,
    short_help="What all mounts do at this moment.",
    sections={
        "Examples": """\
mfs top                         all mounts of this machine
mfs top /mnt/models             one mount
mfs top --once --sort ram       once, for a log
mfs top --json | jq '.mounts[].rates.origin'""",
        "Keys": """\
q            quit
a n z s r o  order of the models: what is going on, name, size, most on SSD, most
             in RAM, most fetched from the origin""",
        "Columns": """\
FETCHED   bytes of the model that came from the origin since the mount began
NOW       bytes a second that come for it from the origin
WAITING   how many of its readers stood waiting, on average over the last second
OPEN      handles on its files""",
    },
)
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=TREE_PATH)
@click.option("--sort", type=click.Choice(list(ORDERS)), default="recent", help="Order of the models.  [recent]")
@click.option("--once", is_flag=True, help="Print it once and end; also where the output is no terminal.")
@json_option
def top(paths: tuple[str, ...], sort: str, once: bool, as_json: bool) -> None:
    """Show tiers, throughput, models, running fetches and what readers wait for, once a second.

    Of all mounts, or of those that PATHs lie in. Each is asked once a second; a mount that nobody looks at pays
    nothing. What the kernel reads by itself from files that are whole does not appear.
    """
    from mfs.cli.output import console, print_plain
    from mfs.cli.top_view import render

    mounts = _mounts(paths)
    if not mounts and not as_json:
        print("no mfs mounts on this machine; 'mfs mount --help' shows how to make one")
        return
    out = console()
    with ThreadPoolExecutor(max(1, min(len(mounts), 32))) as pool:
        if once or as_json or not out.is_terminal:
            for pause_s in (_ONCE_OVER_S, 0):
                _look(pool, mounts, sort)
                time.sleep(pause_s if mounts else 0)
            if as_json:
                print_json({"mounts": [mount.as_json() for mount in mounts]})
            else:
                print_plain(out, render(mounts, sort, rows_max=_ROWS_MAX))
            return
        from rich.live import Live

        from mfs.cli.keys import Keys

        with Keys() as keys, Live(console=out, auto_refresh=False, screen=True) as live:
            while True:
                until = time.monotonic() + _EVERY_S
                _look(pool, mounts, sort)
                live.update(render(mounts, sort, rows_max=_ROWS_MAX, size=out.size), refresh=True)
                while (left := until - time.monotonic()) > 0:
                    key = keys.wait(left)
                    if key == "q":
                        return
                    if key in _KEYS:
                        sort = _KEYS[key]
                        break


def _mounts(paths: Sequence[str]) -> list[Watched]:
    from mfs.cli.targets import targets
    from mfs.cli.top_view import Watched
    from mfs.control.runtime import list_mounts

    if not paths:
        return [Watched(served) for served in list_mounts()]
    return [Watched(target.served, target.paths[0] if len(target.paths) == 1 else "") for target in targets(paths)]


def _look(pool: ThreadPoolExecutor, mounts: Sequence[Watched], sort: str) -> None:
    """Ask all mounts at once: one that hangs holds up none."""
    for done in [pool.submit(mount.look, sort, _ROWS_MAX) for mount in mounts]:
        done.result()
