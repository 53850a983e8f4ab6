"""`mfs diff`: how two revisions differ, tensor by tensor."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from mfs.cli.page import Page, json_option
from mfs.cli.registries import opened_revision, reached, reaching_options
from mfs.cli.text import clean, count, print_json, share, size

if TYPE_CHECKING:
    from mfs.registry.diff import Diff, Row


@click.command(
    cls=Page,
    short_help="Show what two revisions share.",
    sections={
        "Examples": """\
mfs diff mfs+s3://models/registry/llama:v3 mfs+s3://models/registry/llama-ft:v7
mfs diff mfs+file:///srv/reg/llama:v3 mfs+file:///srv/reg/llama:v4 --data --json""",
    },
)
@click.argument("first")
@click.argument("second")
@click.option("--data", is_flag=True, help="Read all of the tensors that differ, not a sample of each.")
@reaching_options
@json_option
def diff(first: str, second: str, data: bool, as_json: bool, **reaching: Any) -> None:
    """Compare two revisions by the digests of their tensors, and say how far those that differ do.

    Where a sample was read the share of elements that differ is of that sample, marked '~'. Tensors that are the same
    are counted, and listed with --json.
    """
    from mfs.registry.bases import read_revision
    from mfs.registry.diff import Side, compare

    options, sides = reached(reaching), []
    with ExitStack() as opened:
        for url in (first, second):
            revision = opened.enter_context(opened_revision(url, options))
            read = read_revision(revision.store, revision.model, revision.manifest_id)
            sides.append(Side(revision.store, read.manifest))
        found = compare(*sides, full=data)
    if as_json:
        print_json(found.as_json())
    else:
        _print(found)


def _print(found: Diff) -> None:
    from mfs.cli.output import print_table
    from mfs.registry.diff import SAME

    rows = [row for row in found.rows if row.state != SAME]
    if rows:
        print_table(
            ("NAME", "STATE", ">SIZE", ">DIFFERS", "SHAPE"),
            [(row.name, row.state, size(row.nbytes), _share(row), _shape(row)) for row in rows],
        )
    same = [row for row in found.rows if row.state == SAME]
    tensors = count(sum(row.kind == "tensor" for row in same), "tensor")
    files = count(sum(row.kind == "file" for row in same), "other file")
    print(clean(f"the same: {tensors} and {files}, {size(found.same_bytes)} of {size(found.second_bytes)}"))
    part = share(found.shared_chunks_bytes, found.second_bytes) or "0 %"
    print(clean(f"stored once: {size(found.shared_chunks_bytes)} ({part} of the second)"))


def _share(row: Row) -> str:
    if row.differing_share is None:
        return ""
    text = f"{100 * row.differing_share:.1f} %"
    return f"~{text}" if row.is_sampled else text


def _shape(row: Row) -> str:
    if row.first and row.second and row.first != row.second:
        return f"{row.first} → {row.second}"
    return row.second or row.first
