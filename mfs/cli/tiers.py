"""`mfs prefetch`, `evict`, `pin`, `unpin`, `refresh` and `verify`: what moves or guards bytes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from mfs.cli.page import Page, json_option
from mfs.cli.registries import is_registry, reached, reaching_options
from mfs.cli.run import Failed, warn
from mfs.cli.targets import TREE_PATH, Target, paths_argument, targets
from mfs.cli.text import clean, count, print_json, rate, size
from mfs.control.api import EvictTier, Json, Tier
from mfs.errors import UsageError
from mfs.units import format_duration

KEY = click.Path(path_type=Path, dir_okay=False)


@click.command(
    cls=Page,
    short_help="Bring files into a tier before anyone reads them.",
    sections={
        "Examples": """\
mfs prefetch /mnt/models/llama                     and wait, with a progress bar
mfs prefetch --no-wait /mnt/models/llama           it goes on in the background
mfs prefetch --tier ram /mnt/models/llama/model-00001-of-00004.safetensors"""
    },
)
@paths_argument
@click.option(
    "--tier", type=click.Choice(["ssd", "ram"]), default="ssd", show_default=True, help="Bring bytes up to here."
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until all is there, or only start it.")
@json_option
def prefetch(paths: tuple[str, ...], tier: Tier, wait: bool, as_json: bool) -> None:
    """Bring files, or all files below directories, into a tier before anyone reads them.

    What a reader waits for goes first. Ctrl-C stops the work; what has arrived stays.
    """
    from mfs.cli.progress import follow

    totals: Json = {"files_count": 0, "total_bytes": 0, "done_bytes": 0, "failed": []}
    started_at = time.monotonic()
    for target in targets(paths):
        last = follow(target.client.prefetch(target.paths, tier, wait=wait), "fetching")
        for key in ("files_count", "total_bytes", "done_bytes"):
            totals[key] += last[key]
        totals["failed"] += [fault | {"path": target.full(fault["path"])} for fault in last["failed"]]
    seconds = time.monotonic() - started_at
    if as_json:
        print_json(totals | {"tier": tier, "waited": wait, "elapsed_s": round(seconds, 3)})
    elif wait:
        good = totals["files_count"] - len(totals["failed"])
        took = f"{format_duration(seconds)}, {rate(totals['done_bytes'], seconds)}" if seconds >= 1 else "at once"
        print(f"{count(good, 'file')}, {size(totals['done_bytes'])} now in the {tier.upper()} tier ({took})")
    else:
        print(
            f"{count(totals['files_count'], 'file')}, {size(totals['total_bytes'])} queued; 'mfs status' shows the rest"
        )
    for fault in totals["failed"]:
        warn(f"{fault['path']}: {fault['error']}")
    if totals["failed"]:
        raise Failed


@click.command(
    cls=Page,
    short_help="Drop what is resident.",
    sections={
        "Examples": """\
mfs evict /mnt/models/old-model
mfs evict --tier ram /mnt/models"""
    },
)
@paths_argument
@click.option(
    "--tier", type=click.Choice(["ssd", "ram", "all"]), default="all", show_default=True, help="Drop bytes from here."
)
@json_option
def evict(paths: tuple[str, ...], tier: EvictTier, as_json: bool) -> None:
    """Drop what is resident of files, except what is pinned or being read."""
    totals = _sum(targets(paths), lambda target: target.client.evict(target.paths, tier))
    if as_json:
        print_json(totals)
        return
    freed = f"{size(totals['ssd_bytes'])} on SSD, {size(totals['ram_bytes'])} in RAM"
    print(f"{count(totals['files_count'], 'file')} evicted: {freed} freed")
    if totals["kept_pinned_count"]:
        print(f"{count(totals['kept_pinned_count'], 'pinned file')} kept; 'mfs unpin' first")
    if totals["kept_open_count"]:
        print(f"{count(totals['kept_open_count'], 'open file')} kept: whoever has it open would hold its space")


_PIN_EXAMPLES = {"Examples": "mfs pin /mnt/models/llama\nmfs unpin /mnt/models/llama"}


@click.command(cls=Page, short_help="Protect files from eviction.", sections=_PIN_EXAMPLES)
@paths_argument
@json_option
def pin(paths: tuple[str, ...], as_json: bool) -> None:
    """Protect files from eviction from the SSD tier. Does not fetch them: 'mfs prefetch' does."""
    totals = _sum(targets(paths), lambda target: target.client.pin(target.paths))
    print_json(totals) if as_json else print(f"{count(totals['files_count'], 'file')} pinned, {size(totals['bytes'])}")


@click.command(cls=Page, short_help="Let files be evicted again.", sections=_PIN_EXAMPLES)
@paths_argument
@json_option
def unpin(paths: tuple[str, ...], as_json: bool) -> None:
    """Let files be evicted again."""
    totals = _sum(targets(paths), lambda target: target.client.unpin(target.paths))
    print_json(totals) if as_json else print(
        f"{count(totals['files_count'], 'file')} unpinned, {size(totals['bytes'])}"
    )


@click.command(
    cls=Page, short_help="Publish what changed at the sources.", sections={"Examples": "mfs refresh /mnt/models"}
)
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=TREE_PATH)
@json_option
def refresh(paths: tuple[str, ...], as_json: bool) -> None:
    """Look at the sources again and publish what changed, for the whole mount.

    Without PATH, the mount of the current directory. Files that are open keep the version they were opened with.
    """
    found = targets(paths or (".",))
    answers = [(target, target.client.refresh()) for target in found]
    errors = [error for _, answer in answers for error in answer["errors"]]
    if as_json:
        print_json([answer | {"mountpoint": target.served.mountpoint} for target, answer in answers])
    else:
        for target, answer in answers:
            changes = ", ".join(f"{answer[f'{word}_count']:,} {word}" for word in ("added", "changed", "removed"))
            print(f"{clean(target.served.mountpoint)}: {changes}")
    for error in errors:
        warn(str(error))
    if errors:
        raise Failed


@click.command(
    cls=Page,
    short_help="Check what is resident, or a revision in a registry.",
    usages=("[OPTIONS] PATH...", "[OPTIONS] URL"),
    sections={
        "Examples": """\
mfs verify /mnt/models
mfs verify --key team.pub mfs+s3://models/registry/llama:prod
mfs verify --key team.pub --bundle llama.sig mfs+s3://models/registry/llama:prod
model_signing verify key /mnt/models/llama/prod --signature llama.sig --public_key team.pub"""
    },
)
@paths_argument
@click.option("--key", type=KEY, metavar="KEY", help="URL: public key that the revision must be signed with.")
@click.option(
    "--bundle", "bundle_file", type=KEY, metavar="FILE", help="URL: save the signature, for other tools to verify."
)
@reaching_options
@json_option
def verify(
    paths: tuple[str, ...], key: Path | None, bundle_file: Path | None, as_json: bool, **reaching: str | None
) -> None:
    """Read what the SSD tier holds of files again, check it, drop and report what is bad.

    With the URL of a revision in a registry (…/MODEL:TAG or …/MODEL@sha256:…): read all of it there, compare every
    chunk with its id, every file with its sha256, and with --key who vouches for it. Nothing is dropped.

    Exits with 1 if anything was bad; what was bad on SSD will be fetched again when it is next read.
    """
    if any(map(is_registry, paths)):
        from mfs.cli.sign import verify_revision

        if len(paths) > 1:
            raise UsageError("one revision at a time: expected a single URL, or paths under mounts")
        if bundle_file is not None and key is None:
            raise UsageError("--bundle needs --key: which signature is meant")
        verify_revision(paths[0], key, bundle_file, as_json, reached(reaching))
        return
    given = {"--key": key, "--bundle": bundle_file} | {
        f"--{name.replace('_', '-')}": reaching[name] for name in reaching
    }
    for option in (option for option, value in given.items() if value is not None):
        raise UsageError(f"{option} is for the URL of a revision in a registry")
    from mfs.cli.progress import follow

    totals: Json = {"checked_bytes": 0, "bad": []}
    for target in targets(paths):
        last = follow(target.client.verify(target.paths), "checking")
        totals["checked_bytes"] += last["checked_bytes"]
        totals["bad"] += [fault | {"path": target.full(fault["path"])} for fault in last["bad"]]
    if as_json:
        print_json(totals)
    else:
        verdict = f"{count(len(totals['bad']), 'bad chunk')} dropped" if totals["bad"] else "all good"
        print(f"{size(totals['checked_bytes'])} checked: {verdict}")
    for fault in totals["bad"]:
        warn(f"{fault['path']}: chunk {fault['chunk']}: {fault['reason']}")
    if totals["bad"]:
        raise Failed


def _sum(found: list[Target], ask: Any) -> Json:
    """The answers of several mounts added up."""
    totals: Json = {}
    for target in found:
        for key, value in ask(target).items():
            totals[key] = totals.get(key, 0) + value
    return totals
