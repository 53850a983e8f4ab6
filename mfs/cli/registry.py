"""`mfs tag`, `rollback`, `log`, `rm`, `gc` and `fsck`: what happens to a registry beside pushing and mounting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mfs.cli.page import Page, json_option
from mfs.cli.registries import full, opened_revision, reached, reaching_options
from mfs.cli.run import Failed, warn
from mfs.cli.text import clean, count, print_json, size
from mfs.cli.values import DURATION
from mfs.control.api import Json
from mfs.errors import NotFoundError, UsageError
from mfs.shown import mask_url

if TYPE_CHECKING:
    from mfs.registry.opening import Place
    from mfs.registry.tags import Move

_IO_S = 120.0

_ADDRESSES = """\
mfs+s3://BUCKET/REGISTRY/MODEL:TAG, mfs+file:///DIRECTORY/MODEL:TAG
…/MODEL@sha256:DIGEST            one revision, whatever tags say
…/MODEL, …/REGISTRY              a model with all its tags; all models"""

_RIGHTS = """\
tag, rollback, rm                read all; write below tags/ and work/
gc, fsck --drop                  read all; write below work/; delete anywhere
log, fsck, gc without --yes      read all
     S3: s3:ListBucket, GetObject, PutObject, DeleteObject on these prefixes.
     A folder: the modes of its directories, which follow those of its root."""


@click.command(
    cls=Page,
    short_help="Move a tag to a revision.",
    sections={
        "Examples": """\
mfs tag mfs+s3://models/registry/llama-ft:v7 prod
mfs tag mfs+file:///srv/reg/llama@sha256:1f0c… stable""",
        "Addresses": _ADDRESSES,
        "Rights": _RIGHTS,
    },
)
@click.argument("address", metavar="REVISION")
@click.argument("tag", metavar="TAG")
@reaching_options
@json_option
def tag(address: str, tag: str, as_json: bool, **reaching: Any) -> None:
    """Let TAG mean what REVISION means now, in the same model. Where there is no such tag, it is made.

    Mounts show it with their next refresh; files that are open keep their bytes. The move stands in 'mfs log', and
    'mfs rollback' takes it back.
    """
    from mfs.registry import layout, retag

    if not layout.is_name(tag):
        raise UsageError(f"{tag!r}: expected a tag of letters, digits, '.', '_' and '-', without its model")
    with opened_revision(address, reached(reaching)) as found:
        note = f"{found.model}:{found.tag}" if found.tag else ""
        moved = retag.retag(found.store, found.model, tag, found.manifest_id, how="tag", note=note, tell=warn)
        _print_move(found.model, tag, moved, as_json)


@click.command(
    cls=Page,
    short_help="Move a tag back to what it meant before.",
    sections={
        "Examples": """\
mfs rollback mfs+s3://models/registry/llama-ft:prod
mfs rollback --steps 2 mfs+s3://models/registry/llama-ft:prod""",
        "Addresses": _ADDRESSES,
        "Rights": _RIGHTS,
    },
)
@click.argument("address", metavar="MODEL:TAG")
@click.option("--steps", type=click.IntRange(min=1), default=1, show_default=True, help="Revisions to go back.")
@reaching_options
@json_option
def rollback(address: str, steps: int, as_json: bool, **reaching: Any) -> None:
    """Let a tag mean the revision that it meant before this one; again, and it goes one further back.

    Nothing is copied: it takes as long as a few small writes, also while 'mfs gc' runs. Also brings back a tag that was
    removed.
    """
    from mfs.registry import retag

    with _opened_tag(address, reaching) as (place, model, its_tag):
        moved = retag.rollback(place.store, model, its_tag, steps_count=steps, tell=warn)
        _print_move(model, its_tag, moved, as_json)


@click.command(
    cls=Page,
    short_help="Remove a tag.",
    sections={
        "Examples": "mfs rm mfs+s3://models/registry/llama-ft:v3",
        "Addresses": _ADDRESSES,
        "Rights": _RIGHTS,
    },
)
@click.argument("address", metavar="MODEL:TAG")
@reaching_options
@json_option
def rm(address: str, as_json: bool, **reaching: Any) -> None:
    """Let a tag mean nothing. Its history stays, so that 'mfs rollback' brings it back, until 'mfs gc' forgets it.

    No bytes are freed: that is what 'mfs gc' does.
    """
    from mfs.registry import tags

    with _opened_tag(address, reaching) as (place, model, its_tag):
        moved = tags.remove(place.store, model, its_tag, deadline_s=_deadline())
        _print_move(model, its_tag, moved, as_json)


@click.command(
    cls=Page,
    short_help="Show who moved which tag when and from what.",
    sections={
        "Examples": """\
mfs log mfs+s3://models/registry/llama-ft:prod
mfs log mfs+s3://models/registry/llama-ft        all its tags
mfs log --json mfs+s3://models/registry          all models""",
        "Addresses": _ADDRESSES,
        "Rights": _RIGHTS,
    },
)
@click.argument("address", metavar="ADDRESS")
@click.option("--max", "count_max", type=click.IntRange(min=1), default=100, show_default=True,
              help="Moves of each tag, the last ones.")  # fmt: skip
@reaching_options
@json_option
def log(address: str, count_max: int, as_json: bool, **reaching: Any) -> None:
    """Print the moves of a tag, of all tags of a model, or of a registry, the last first.

    Time and name are those of whoever moved it: of its clock, and of its user. A move that cannot be read is named on
    standard error.
    """
    from mfs.registry import tags

    with _opened(address, reaching) as place:
        found = [
            (model, its_tag, item)
            for model, its_tag in _named_tags(place)
            for item in tags.entries(place.store, model, its_tag, deadline_s=_deadline(), count_max=count_max)
        ]
    moves = [(model, its_tag, item) for model, its_tag, item in found if isinstance(item, tags.Move)]
    for _, _, item in found:
        if isinstance(item, tags.Damaged):
            warn(f"damaged: {item.what}")
    if not found:
        raise NotFoundError(f"{mask_url(address)}: no tag of that name was ever moved")
    moves.sort(key=lambda item: (item[2].at, item[2].number), reverse=True)
    if as_json:
        print_json([_move_json(model, its_tag, move) for model, its_tag, move in moves])
        return
    from mfs.cli.output import print_table

    print_table(
        ("WHEN", "TAG", "TO", "FROM", "HOW", "WHO", "NOTE"),
        [(move.at, f"{model}:{its_tag}", _short(move.manifest), _short(move.previous), move.how, move.by, move.note)
         for model, its_tag, move in moves],
    )  # fmt: skip


@click.command(
    cls=Page,
    short_help="Delete what no tag leads to.",
    sections={
        "Examples": """\
mfs gc mfs+s3://models/registry                  say what would be deleted
mfs gc --yes mfs+s3://models/registry            delete it
mfs gc --yes --history 10 --grace 1h mfs+s3://models/registry""",
        "What stays": """\
revisions that a tag means, or meant in its last --history moves; those of a removed
tag only as long as --grace
what is younger than --grace by the store's clock, and what a push under way needs
each tag's last move, so that no number is given twice""",
        "Beside pushes": """\
Safe beside any number of pushes and mounts: a push says what it needs, and one that
began too late to be heard waits for the end of the collection. How: FORMAT.md. A mount
keeps what is open; a revision that it still shows, and that was deleted, fails to read.""",
        "Rights": _RIGHTS,
    },
)
@click.argument("address", metavar="REGISTRY")
@click.option("--yes", is_flag=True, help="Delete; without it only say what would be.")
@click.option("--grace", type=DURATION, default="24h", show_default=True, help="Leave what is younger.")
@click.option("--history", type=click.IntRange(min=1), default=20, show_default=True, help="Moves of a tag that stay.")
@reaching_options
@json_option
def gc(address: str, yes: bool, grace: float, history: int, as_json: bool, **reaching: Any) -> None:
    """Find what no tag of the registry leads to any more, and delete it with --yes.

    If a manifest that is needed cannot be read nothing is deleted; if a move of a tag cannot, no manifest of its model
    is. 'mfs fsck' says what is damaged.
    """
    from mfs.registry import gc as collection
    from mfs.registry.reach import shown

    with _opened_whole(address, reaching) as place, _progress() as told:
        found = collection.collect(
            place.store, is_dry=not yes, grace_s=grace, history_count=history, told=lambda what, n: told(what, n, 0)
        )
    if as_json:
        print_json({
            "deleted": yes, "revisions": [f"{model}@sha256:{digest}" for model, digest in found.revisions],
            "chunks_count": len(found.chunks), "bytes": found.bytes, "moves_count": len(found.moves),
            "signatures_count": len(found.signatures), "records_count": len(found.records),
            "kept_revisions_count": found.kept_revisions_count, "kept_chunks_count": found.kept_chunks_count,
            "kept_bytes": found.kept_bytes, "young_chunks_count": found.young_chunks_count,
            "young_bytes": found.young_bytes, "missing": found.missing, "pushes": found.pushes,
            "damaged": found.damaged,
        })  # fmt: skip
    else:
        for revision in found.revisions:
            print(clean(f"{shown(revision)} {'deleted' if yes else 'would be deleted'}"))
        what = f"{count(len(found.revisions), 'revision')}, {count(len(found.chunks), 'chunk')} of {size(found.bytes)}"
        what += f", {count(len(found.moves), 'old move')}"
        print(f"{what} {'deleted' if yes else 'to delete'}; {count(found.kept_revisions_count, 'revision')} with "
              f"{size(found.kept_bytes)} stay, {size(found.young_bytes)} without a revision are too young")  # fmt: skip
        for push in found.pushes:
            print(clean(f"beside a push by {push}, whose chunks stay"))
        if not yes and (found.revisions or found.chunks or found.moves):
            print("nothing was deleted: --yes does it")
    for damaged in found.damaged:
        warn(f"{damaged}; until then all revisions of its model stay")
    for missing in found.missing:
        warn(f"{missing} is not there: 'mfs fsck' says more")


@click.command(
    cls=Page,
    short_help="Find what is missing or damaged in a registry.",
    sections={
        "Examples": """\
mfs fsck mfs+s3://models/registry                that all is there
mfs fsck --data mfs+s3://models/registry         read and verify every chunk
mfs fsck --data --drop mfs+s3://models/registry  and delete those that are damaged""",
        "What to do then": """\
Push a damaged revision again from the files it was made of: what is missing is stored
anew, under the same names. A push looks at each chunk's length and table, and reads no
more of it: so what is damaged behind its table is pushed again only after --data --drop
deleted it. Or let its tags mean another revision ('mfs tag', 'rollback').""",
        "Beside pushes": """\
Safe at any time. --drop reads what looks damaged a second time, deletes what is so then
too, and leaves what a running push relies on; a push waits for its end.""",
        "Rights": _RIGHTS,
        "Exit status": """\
0    all is there, and as it should be
1    something is missing or damaged, or it could not be looked at
2    the command was used wrongly
130  interrupted""",
    },
)
@click.argument("address", metavar="REGISTRY")
@click.option("--data", is_flag=True, help="Read, decode and verify every chunk as well.")
@click.option("--drop", is_flag=True, help="With --data: delete damaged chunks, for a push to store them anew.")
@reaching_options
@json_option
def fsck(address: str, data: bool, drop: bool, as_json: bool, **reaching: Any) -> None:
    """Look a registry through, and name every missing or damaged object with the revisions and files that need it.

    Changes nothing without --drop. Without --data no chunk's content is read: that each is there, and as long as it
    says.
    """
    from mfs.registry import fsck as checking

    if drop and not data:
        raise UsageError("--drop deletes what --data has proven to be damaged: say --data --drop")

    with _opened_whole(address, reaching) as place, _progress() as told:
        checked = checking.check(place.store, data=data, told=told)
        dropped = checking.drop(place.store, checked) if drop and checked.damages else []
    if as_json:
        print_json(asdict(checked) | {"data": data, "dropped": dropped})
    else:
        for damage in checked.damages:
            print(clean(f"{damage.key}: {damage.what}{'; deleted' if damage.key in dropped else ''}"))
            for line in damage.revisions:
                print(clean(f"    needed by {line}"))
            for line in damage.files:
                print(clean(f"    file {line}"))
            if damage.more_files_count:
                print(f"    and {count(damage.more_files_count, 'more file')}")
        what = "read and verified" if data else "looked for"
        print(f"{count(checked.revisions_count, 'revision')}, {count(checked.chunks_count, 'chunk')} of "
              f"{size(checked.stored_bytes)} {what}; {count(len(checked.damages), 'object')} missing or damaged; "
              f"{size(checked.unneeded_bytes)} needed by none")  # fmt: skip
        if checked.damages:
            print("to mend it push what is named above again" if drop or not data else
                  "to mend it: 'mfs fsck --data --drop', then push what is named above again")  # fmt: skip
    if checked.damages:
        raise Failed


@contextmanager
def _opened(address: str, reaching: dict[str, Any]) -> Iterator[Place]:
    from mfs.registry import opening

    place = opening.open_url(address, reached(reaching), deadline_s=_deadline())
    try:
        yield place
    finally:
        place.store.close()


@contextmanager
def _opened_whole(address: str, reaching: dict[str, Any]) -> Iterator[Place]:
    with _opened(address, reaching) as place:
        if place.model is not None:
            raise UsageError(
                f"{mask_url(address)}: models share their chunks: name the registry, {place.store.identity}"
            )
        yield place


@contextmanager
def _opened_tag(address: str, reaching: dict[str, Any]) -> Iterator[tuple[Place, str, str]]:
    with _opened(address, reaching) as place:
        if place.model is None or place.tag is None:
            raise UsageError(f"{mask_url(address)}: expected …/MODEL:TAG")
        yield place, place.model, place.tag


def _named_tags(place: Place) -> Iterator[tuple[str, str]]:
    """(model, tag) of all that an address names, whether or not they mean something now."""
    if place.manifest:
        raise UsageError(f"{place.name}: a revision has no history; name a tag, a model or the registry")
    for model in [place.model] if place.model else list(place.store.names("tags/", deadline_s=_deadline())):
        names = [place.tag] if place.tag else list(place.store.names(f"tags/{model}/", deadline_s=_deadline()))
        yield from ((model, its_tag) for its_tag in names)


def _print_move(model: str, its_tag: str, moved: Move, as_json: bool) -> None:
    if as_json:
        print_json(_move_json(model, its_tag, moved))
    else:
        print(clean(f"{model}:{its_tag}: {_short(moved.previous)} → {_short(moved.manifest)}"))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """What is told of long work: a line on a terminal that goes with the end, nothing elsewhere."""
    from mfs.cli.output import console

    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda what, number, total: None
        return
    with out.status("looking") as status:

        def tell(what: str, number: int, total: int) -> None:
            show = size if what == "bytes" else "{:,}".format
            of = f" of {show(total)}" if total else ""
            status.update(f"{show(number)}{of}{'' if what == 'bytes' else f' {what}'}")

        yield tell


def _move_json(model: str, its_tag: str, move: Move) -> Json:
    """Revisions in it are called as addresses call them, and as 'mfs push --json' does."""
    called = {name: full(manifest) for name in ("manifest", "previous") if (manifest := getattr(move, name))}
    return {"model": model, "tag": its_tag, **asdict(move), **called}


def _short(manifest: str | None) -> str:
    return f"sha256:{manifest[:12]}" if manifest else "-"


def _deadline() -> float:
    return time.monotonic() + _IO_S
