"""`mfs push`: a directory becomes a revision of a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mfs.cli.page import Page, json_option
from mfs.cli.registries import reached, reaching_options
from mfs.cli.run import warn
from mfs.cli.text import clean, count, print_json, share, size
from mfs.errors import UsageError
from mfs.shown import mask_url

if TYPE_CHECKING:
    from mfs.registry.push import Pushed, Sign
    from mfs.sources.options import SourceOptions

_OPEN_S = 60.0


@click.command(
    cls=Page,
    short_help="Publish a directory as a revision of a model.",
    sections={
        "Addresses": """\
mfs+s3://BUCKET/REGISTRY/MODEL[:TAG]    a registry in a bucket; TAG is 'latest' if left out
mfs+file:///DIRECTORY/MODEL[:TAG]       a registry in a folder
oci://HOST/REPOSITORY:TAG               an OCI registry, as a CNCF ModelPack;
                                        oci+http:// for one without TLS
     Where no registry is found on the way up, the first push makes the parent
     of MODEL its root.""",
        "Examples": """\
mfs push ./llama-ft mfs+s3://models/registry/llama-ft:v7 --base llama:v3
mfs push ./llama mfs+file:///srv/reg/llama:v1 --annotate dataset=fineweb --sign key.pem
mfs push ./llama oci://harbor.example/team/llama:v3""",
        "What is stored": """\
Tensors that the registry has, in whichever model, are not sent. Those that
differ little from the base's are stored as differences, the others as what is
smallest. A push that was interrupted goes on when it is run again. Names that
begin with a dot are left out; links to files count as the files.""",
    },
)
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.argument("address")
@click.option(
    "--base",
    metavar="MODEL:TAG",
    help="Store differences to this revision; one is found by itself if not. For oci://: REPOSITORY[:TAG] of the same "
    "registry, whose equal layers are not sent.",
)
@click.option("--no-base", is_flag=True, help="Store no differences.")
@click.option(
    "--compress",
    type=click.Choice(["fast", "small", "none"]),
    default="fast",
    show_default=True,
    help="small: one or two per cent less of float32 and texts, ten times as slow; none: as it is.",
)
@click.option(
    "--annotate", metavar="KEY=VALUE", multiple=True, help="Say what trained it, metrics, licence; repeatable."
)
@click.option("--allow-pickle", is_flag=True, help="Publish pickles, which run code in whoever loads them.")
@click.option(
    "--sign",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="KEY",
    help="Have this private key vouch for it, before the tag moves: 'mfs sign --help'.",
)
@click.option("--modelcar", is_flag=True, help="oci://: as an image with files under /models/, for containerd.")
@reaching_options
@json_option
def push(
    directory: str,
    address: str,
    base: str | None,
    no_base: bool,
    compress: str,
    annotate: tuple[str, ...],
    allow_pickle: bool,
    sign: Path | None,
    modelcar: bool,
    as_json: bool,
    **reaching: Any,
) -> None:
    """Publish DIRECTORY as the revision that ADDRESS names, and move its tag there.

    Nothing of it is visible before all of it is there. Files are checked first: safetensors strictly, pickles are
    refused.
    """
    from mfs.registry.manifest import annotations_fault

    if base and no_base:
        raise UsageError("--base and --no-base exclude each other")
    annotations = dict(map(_annotation, annotate))
    if fault := annotations_fault(annotations):  # before an hour of hashing
        raise UsageError(f"--annotate: {fault}")
    options = reached(reaching)
    if address.partition("://")[0].lower() in ("oci", "oci+http", "oci+https"):
        if compress != "fast" or no_base:
            raise UsageError("--compress and --no-base are for mfs+…:// addresses")
        from mfs.cli.sign import signer as opened

        signer = opened(sign) if sign else None  # a wrong key is said before anything is sent
        _push_oci(directory, address, options, as_json, modelcar=modelcar, annotations=annotations, base=base,
                  allow_pickle=allow_pickle, signer=signer)  # fmt: skip
        return
    if modelcar:
        raise UsageError("--modelcar is for oci:// addresses")
    from mfs.cli.transfers import TransferProgress
    from mfs.registry import layout, opening
    from mfs.registry import push as pushing
    from mfs.registry.encode import Effort

    signing = _signer(sign) if sign else None  # a wrong key is said before anything is sent
    said = pushing.Options(Effort(compress), "" if no_base else base, annotations, allow_pickle, signing)
    parsed = layout.parse_address(address)
    if parsed.manifest is not None:
        raise UsageError(f"{mask_url(address)}: a push makes a revision and moves a tag to it: expected …/MODEL:TAG")
    examined = pushing.examine(directory, said)  # before a registry is made for nothing
    place = opening.open_or_create(parsed, options, deadline_s=time.monotonic() + _OPEN_S)
    try:
        with TransferProgress() as told:
            done = pushing.push(place, *examined, said, told)
    finally:
        place.store.close()
    _warn_of(done.warnings, done.left_out)
    if as_json:
        print_json(done.as_json())
    else:
        print("\n".join(clean(line) for line in summary(done)))


def summary(done: Pushed) -> list[str]:
    """What a push did, for people."""
    manifest = done.revision.manifest
    total, sent = manifest.nbytes, done.sent
    state = "new revision" if done.is_new else "a revision that was there"
    moved = "" if done.is_moved else ", which the tag meant already"
    lines = [
        f"{done.model}:{done.tag} is sha256:{done.revision.manifest_id} ({state}{moved})",
        f"  {count(len(manifest.files), 'file')}, {size(total)} in {count(len(manifest.chunks), 'chunk')}",
    ]
    saved = sent.plain_bytes - sent.alone_bytes
    rows = [
        ("reused", total - sent.plain_bytes, "the registry had it, or the files have it twice"),
        ("compressed away", max(0, saved), ""),
        ("headers added", max(0, -saved), "what does not compress is stored as it is"),
        ("differences saved", sent.alone_bytes - sent.stored_bytes, _against(done)),
        ("stored", sent.stored_bytes, count(sent.chunks_count, "new chunk")),
    ]
    lines += [
        f"  {title:17} {size(nbytes):>7} {share(nbytes, total):>6}  {why}".rstrip()
        for title, nbytes, why in rows
        if nbytes or title == "stored"
    ]
    return lines


def _against(done: Pushed) -> str:
    if done.base is None:
        return ""
    return (
        f"{count(done.sent.differences_count, 'chunk')} against {done.base.model}@sha256:{done.base.manifest_id[:12]}"
    )


def _warn_of(warnings: Sequence[str], left_out: Sequence[str]) -> None:
    for warning in warnings:
        warn(warning)
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        warn(f"left out, since their names begin with a dot: {', '.join(left_out[:3])}{more}")


def _annotation(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--annotate {text!r:.100}: expected KEY=VALUE")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--annotate {text!r:.100}: expected UTF-8") from None
    return key.strip(), value


def _signer(key: Path) -> Sign:
    """What stores a signature by this key beside a manifest. Raises: ConfigError."""
    from mfs.cli.sign import signer

    made = signer(key)
    return lambda store, model, body: made.put(store, model, body, deadline_s=time.monotonic() + _OPEN_S)


def _push_oci(directory: str, address: str, options: SourceOptions, as_json: bool, **more: Any) -> None:
    from mfs.cli.transfers import TransferProgress
    from mfs.oci.push import push as push_artifact

    with TransferProgress() as told:
        done = push_artifact(directory, address, options=options, told=told, **more)
    _warn_of(done.warnings, done.left_out)
    if as_json:
        import dataclasses

        print_json(dataclasses.asdict(done))
    else:
        there = size(done.reused_bytes + done.mounted_bytes)
        what = f"{count(done.files_count, 'file')}, {size(done.nbytes)}"
        print(clean(f"{mask_url(done.reference)}: {what}; {size(done.sent_bytes)} sent, {there} there already"))
