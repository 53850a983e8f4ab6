"""`mfs ls` and `mfs stat`: what is there and where its bytes are."""

from __future__ import annotations

from typing import Any

import click

from mfs.cli.page import Page, json_option
from mfs.cli.targets import TREE_PATH, Target, paths_argument, targets
from mfs.cli.text import clean, print_json, share, size, when
from mfs.control.api import Json


@click.command(
    cls=Page,
    short_help="List directories with what is resident.",
    sections={
        "Examples": """\
mfs ls /mnt/models                  the models and what is resident of them
mfs ls --json . | jq '.[].path'     from inside the mount
mfs ls /mnt/models/llama/*.safetensors""",
        "Columns": """\
SIZE      of the file; of a directory, all below it that was listed so far
SSD, RAM  how much of that is resident in the tier
PIN       'pin' where protected from eviction ('mfs pin'); of a directory, all below it""",
    },
)
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=TREE_PATH)
@json_option
def ls(paths: tuple[str, ...], as_json: bool) -> None:
    """List directories of a mount with what is resident of each entry.

    Without PATH, the current directory. Asks the daemon, not the file system: nothing is fetched by looking.
    """
    listings = [
        (given, path, target, _list(target, path))
        for target in targets(paths or (".",))
        for given, path in zip(target.given, target.paths, strict=True)
    ]
    if as_json:
        print_json([row for *_, rows in listings for row in rows])
        return
    for number, (given, _, _, rows) in enumerate(listings):
        if len(listings) > 1:
            print(("\n" if number else "") + clean(given) + ":")
        _print_rows(rows)


def _list(target: Target, path: str) -> list[Json]:
    """The rows of one path, each with its whole path added."""
    rows = target.client.ls(path)
    may_be_file = [row["name"] for row in rows] == [path.rpartition("/")[2]]
    is_directory = not may_be_file or target.client.stat(path)["kind"] == "directory"
    for row in rows:
        name = row["name"]
        row["path"] = target.full("/".join(filter(None, (path, name)))) if is_directory else target.full(path)
    return rows


def _print_rows(rows: list[Json]) -> None:
    from mfs.cli.output import print_table

    print_table(
        (">SIZE", ">SSD", ">RAM", "PIN", "MODIFIED", "NAME"),
        [
            (
                size(row["size"]) if row["kind"] == "file" or row["size"] else "",
                _resident(row, "ssd_bytes"),
                _resident(row, "ram_bytes"),
                "pin" if row["pinned"] else "",
                when(row["mtime"]),
                clean(row["name"]) + {"directory": "/", "symlink": "@"}.get(row["kind"], ""),
            )
            for row in rows
        ],
    )


def _resident(row: Json, key: str) -> str:
    return share(row[key], row["size"]) if row["kind"] != "symlink" else ""


@click.command(
    cls=Page,
    short_help="Say everything about files.",
    sections={
        "Examples": """\
mfs stat /mnt/models/llama/model.safetensors
mfs stat --json /mnt/models/llama/* | jq -r '.[] | [.path, .ssd_bytes] | @tsv'"""
    },
)
@paths_argument
@json_option
def stat(paths: tuple[str, ...], as_json: bool) -> None:
    """Say everything about files of a mount: source, revision, digest, what is resident."""
    found = [
        target.client.stat(path) | {"path": target.full(path)} for target in targets(paths) for path in target.paths
    ]
    if as_json:
        print_json(found)
        return
    for number, value in enumerate(found):
        if number:
            print()
        _print_stat(value)


def _print_stat(value: Json) -> None:
    for label, text in _stat_lines(value):
        print(f"{label + ':':<10} {clean(text)}")


def _stat_lines(value: Json) -> list[tuple[str, str]]:
    total = value["size"]

    def resident(key: str) -> str:
        bytes_count = value[key]
        return f"{size(bytes_count)} ({bytes_count:,} bytes, {share(bytes_count, total)})" if bytes_count else "nothing"

    lines: list[tuple[str, Any]] = [("Path", value["path"]), ("Kind", value["kind"])]
    if value["kind"] == "file":
        lines += [("Size", f"{size(total)} ({total:,} bytes, {value['chunks_count']:,} chunks)")]
        lines += [("Modified", when(value["mtime"]))]
        lines += [("Source", value["source"]), ("Key", value["source_path"])]
        lines += [("Revision", value["revision"]), ("Digest", value["digest"]), ("Part of", value["model_revision"])]
        lines += [("On SSD", resident("ssd_bytes")), ("In RAM", resident("ram_bytes"))]
    else:
        lines += [("Modified", when(value["mtime"])), ("Size", f"{size(total)} below it, as far as it was listed")]
        lines += [("On SSD", resident("ssd_bytes")), ("In RAM", resident("ram_bytes"))]
    lines += [("Pinned", "yes" if value["pinned"] else "no"), ("Open", f"{value['open_handles']} times")]
    lines += [("Inode", value["inode"])]
    return [(label, str(text)) for label, text in lines if text not in (None, "")]
