"""`mfs sign`, and `mfs verify` of a revision in a registry."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mfs.cli.page import Page, json_option
from mfs.cli.registries import Revision, full, opened_revision, reached, reaching_options
from mfs.cli.run import Failed, warn
from mfs.cli.text import clean, count, print_json, size
from mfs.control.api import Json

if TYPE_CHECKING:
    from mfs.registry.manifest import Manifest
    from mfs.registry.signing import Signer
    from mfs.sources.options import SourceOptions

PASSWORD_VARIABLE = "MFS_KEY_PASSWORD"


def signer(key: Path) -> Signer:
    """The private key in a file, opened by the password in the environment where it has one. Raises: ConfigError."""
    from mfs.registry.signing import Signer

    return Signer(key, os.environ.get(PASSWORD_VARIABLE) or None)


@click.command(
    cls=Page,
    short_help="Vouch for a revision with a key.",
    sections={
        "Examples": """\
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out team.key
openssl pkey -in team.key -pubout -out team.pub
mfs sign --key team.key mfs+s3://models/registry/llama@sha256:0123…
mfs mount --require-signature team.pub mfs+s3://models/registry /mnt/models
mfs verify --key team.pub mfs+s3://models/registry/llama:prod""",
        "Environment": f"""\
{PASSWORD_VARIABLE}   of a private key that is protected by a password
AWS_*              as for 'mfs mount'""",
    },
)
@click.argument("url")
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="KEY",
    help="Private key (PEM, on P-256, P-384 or P-521).",
)
@reaching_options
@json_option
def sign(url: str, key: Path, as_json: bool, **reaching: str | None) -> None:
    """Sign the revision URL names, in the format of OpenSSF Model Signing, and store that beside its manifest.

    URL is …/MODEL@sha256:…, or …/MODEL:TAG for what the tag means now. No file is read: sign what you pushed, or have
    verified, and by its digest where others may move the tag. 'mfs push --sign' signs before anybody sees the tag.
    """
    from mfs.registry.chunk_io import IO_S
    from mfs.registry.verifying import read_manifest

    made = signer(key)
    with opened_revision(url, reached(reaching)) as revision:
        body, manifest = read_manifest(revision.store, revision.model, revision.manifest_id)
        stored = made.put(revision.store, revision.model, body, deadline_s=time.monotonic() + IO_S)
    if as_json:
        manifest_id = full(revision.manifest_id)
        print_json({"model": revision.model, "manifest": manifest_id, "signed_by": made.fingerprint, "key": stored})
    else:
        print(clean(f"{revision.name}: {_extent(manifest)} signed by {key} ({made.fingerprint[:12]})"))


def verify_revision(
    url: str, key: Path | None, bundle_file: Path | None, as_json: bool, options: SourceOptions
) -> None:
    """Check one revision and print the verdict: all bytes of all files, and who vouches for it where a key is given.

    Raises: Failed where anything is bad; MfsError where it cannot be looked at, is not signed or was changed.
    """
    from mfs.cli.progress import follow
    from mfs.registry.signing import Verifier
    from mfs.registry.verifying import check_signature, read_manifest

    verifier = Verifier(key) if key is not None else None
    with opened_revision(url, options) as revision:
        body, manifest = read_manifest(revision.store, revision.model, revision.manifest_id, verifier)
        if verifier is not None:
            bundle = check_signature(revision.store, revision.model, body, manifest, verifier)
            if bundle_file is not None:
                bundle_file.write_bytes(bundle)
        last = follow(_progress(revision, manifest), "checking")
    bad = last["bad"]
    if as_json:
        signed_by = verifier.fingerprint if verifier else None
        print_json({"model": revision.model, "manifest": full(revision.manifest_id), "signed_by": signed_by,
                    "checked_bytes": last["checked_bytes"], "bad": bad})  # fmt: skip
    else:
        trust = f"signed by {key}" if verifier else "whether it is signed was not asked (--key)"
        verdict = f"{count(len(bad), 'fault')} found" if bad else "all good"
        print(clean(f"{revision.name}: {_extent(manifest)} checked: {verdict}; {trust}"))
    for fault in bad:
        chunk = f"chunk {fault['chunk'][:12]}: " if fault["chunk"] else ""
        warn(f"{fault['path']}: {chunk}{fault['reason']}")
    if bad:
        raise Failed


def _progress(revision: Revision, manifest: Manifest) -> Iterator[Json]:
    from mfs.registry.verifying import verify

    bad: list[Json] = []
    for step in verify(revision.store, revision.model, revision.manifest_id, manifest):
        bad += [fault._asdict() for fault in step.faults]
        yield {"total_bytes": manifest.nbytes, "done_bytes": step.done_bytes, "path": step.path}
    yield {"done": True, "checked_bytes": manifest.nbytes, "bad": bad}


def _extent(manifest: Manifest) -> str:
    return f"{count(len(manifest.files), 'file')}, {size(manifest.nbytes)}"
