"""`mfs watch`: what a program, or everybody, does to a mount, and what of it the origin had to send."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import IO

import click

from mfs.cli.page import Page
from mfs.cli.run import warn
from mfs.cli.targets import TREE_PATH, targets
from mfs.cli.text import clean, print_json, share, size
from mfs.cli.watched import Uses
from mfs.control.api import Json

_FULL_COUNT = 500
"""Records of an item that may have left some behind (`control.api`)."""


@click.command(
    cls=Page,
    short_help="Show what readers do to a mount.",
    usages=("[OPTIONS] PATH", "[OPTIONS] PATH COMMAND [ARGUMENT]..."),
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    sections={
        "Examples": """\
mfs watch /mnt/models                                     until Ctrl-C
mfs watch /mnt/models python load.py /mnt/models/llama    while a program runs
mfs watch --log ops.jsonl /mnt/models/llama python load.py /mnt/models/llama
jq -c 'select(.op == "read") | [.file, .start, .stop]' ops.jsonl""",
        "Columns": """\
OPENS   how often the file was opened
READS   what the kernel asked for: page faults, read-ahead, direct reads; a read that the
        page cache answers does not arrive
MEDIAN  size of a read
READ    bytes of all reads; TOUCHED counts each byte once, as a share of the file
ORDER   bytes that began where an earlier read had ended
WAITED  time the reads took, added up over parallel readers
ORIGIN  bytes that came over the network; SSD, from the cache; AHEAD, of both, those
        that came before anybody waited for them""",
        "Exit status": """\
0    done
1    failed; one line on stderr says what and where
2    the command was used wrongly
else that of COMMAND""",
    },
)
@click.argument("path", metavar="PATH", type=TREE_PATH)
@click.argument("command", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--log", metavar="FILE", type=click.File("w", lazy=False), help="Write every record there, as JSON lines."
)
@click.option("--json", "as_json", is_flag=True, help="Print the sums as JSON: exact numbers, for programs.")
def watch(path: str, command: tuple[str, ...], log: IO[str] | None, as_json: bool) -> int:
    """Show what readers do to the files at and below PATH, and add it up per file.

    With COMMAND, while that runs, by whomever; else until Ctrl-C. The mount does this only while it is watched: then it
    costs some microseconds a read. Reads through gpuload's pool path do not appear.
    """
    (target,) = targets([path])
    uses, process, lost_count = Uses(), None, 0
    with log or nullcontext(), closing(target.client.watch()) as items:
        try:
            for item, process in _while_running(items, command):  # noqa: B007
                records = [record for record in item["records"] if _is_below(record["file"], target.paths[0])]
                lost_count = item["dropped_count"]
                uses.add(records)
                if log is not None:
                    log.writelines(json.dumps(record) + "\n" for record in records)
                    log.flush()  # somebody may follow it
        except KeyboardInterrupt:  # which the command got as well
            if process is not None:
                process.wait()
    if as_json:
        print_json([use.summary() for use in uses.files()])
    else:
        _print(uses)
    if lost_count:
        warn(f"{lost_count:,} records came faster than they could be taken and are missing from the sums")
    status = process.returncode if process is not None else 0
    return status if status >= 0 else 128 - status


def _while_running(
    items: Generator[Json, None, None], command: Sequence[str]
) -> Iterator[tuple[Json, subprocess.Popen[bytes] | None]]:
    """The items, and the process once it runs; ends when it has ended and all that came until then was yielded."""
    process, ended_s = None, float("inf")
    for item in items:
        if command and process is None:  # the first item says that watching has begun
            process = subprocess.Popen(command)
        elif process is not None and process.poll() is not None:
            ended_s = min(ended_s, time.monotonic())
        yield item, process
        if item["at_s"] > ended_s and len(item["records"]) < _FULL_COUNT:
            return
    warn("the daemon has ended or handed the mount over: what is read from now on is missing from the sums")
    if process is not None:
        process.wait()


def _is_below(file: str, path: str) -> bool:
    return not path or file == path or file.startswith(f"{path}/")


def _print(uses: Uses) -> None:
    from mfs.cli.output import print_table

    rows = [use.summary() for use in uses.files()]
    if not rows:
        print("nothing was opened or read")
        return
    columns = (">OPENS", ">READS", ">MEDIAN", ">READ", ">TOUCHED", ">ORDER", ">WAITED", ">ORIGIN", ">SSD", ">AHEAD")
    print_table((*columns, "FILE"), [_cells(row) for row in rows])


def _cells(row: Json) -> tuple[str, ...]:
    return (
        f"{row['opens_count']:,}",
        f"{row['reads_count']:,}",
        size(row["read_median_bytes"]),
        size(row["read_bytes"]),
        share(row["touched_bytes"], row["size"]) if row["size"] else "",
        share(round(100 * row["in_order_share"]), 100),
        f"{row['waited_s']:.2f}s",
        size(row["origin_bytes"]),
        size(row["ssd_bytes"]),
        size(row["ahead_bytes"]),
        clean(row["file"]),
    )
