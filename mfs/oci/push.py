"""A folder becomes an artifact of an OCI registry: a ModelPack, or with `modelcar` an image that containerd mounts.

    scan, validate   what is there, and whether it may be published: as for our own registry
    access           whether the registry answers and lets us push: before hours of hashing
    hash             every layer once
    blobs            those that the registry lacks
    referrers        the card and signatures, hung on a manifest that is not there yet
    manifest         last, under its tag: from here on all of it is there, before it nothing

A push that dies leaves blobs that nothing names, which the registry's own garbage collection removes; run again, it
finds what has come whole. Of two at once under one tag the later is what the tag means, and both are whole. A card that
the registry will not have is an extra, and warned of; a signature that it will not have is an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mfs.errors import AccessError, MfsError, NotFoundError, TransientStoreError, UsageError
from mfs.fetch.retry import TRANSIENT_STATUSES
from mfs.fetch.told import telling
from mfs.oci import image, media
from mfs.oci.artifact import Descriptor, digest_of
from mfs.oci.blob import Blob, blob_of
from mfs.oci.client import RegistryClient
from mfs.oci.documents import Layer, make_documents
from mfs.oci.reference import Reference, parse_reference
from mfs.oci.referrers import BUNDLE, CARD, Hung, encoded, push_referrer, put_manifest, see_indexed
from mfs.oci.upload import How, Uploader
from mfs.registry.parallel import for_each
from mfs.registry.push import Step, Told
from mfs.registry.scan import Scan, scan
from mfs.registry.validate import validate
from mfs.sources.options import SourceOptions
from mfs.types import ObjectId

if TYPE_CHECKING:
    from mfs.registry.signing import Signer

UPLOADS_AT_ONCE = 4
"""Each holds a piece in memory."""
BASE_S = 45.0
"""Until it is known whether the base is there."""
CARD_BYTES_MAX = 8 << 20
TIMES_VARIABLE = "SOURCE_DATE_EPOCH"
"""Of the environment: the times of an image's files, 1970 where it is not set. Source: reproducible-builds.org."""
_CARD_NAMES = ("README.md", "readme.md", "Readme.md")


@dataclass(frozen=True)
class Pushed:
    """What is in the registry now, and what it took."""

    reference: str
    """'oci://host/repository:tag@sha256:…'."""
    digest: str
    """Of the manifest, or of the index of images."""
    files_count: int
    nbytes: int
    """Of all layers."""
    sent_bytes: int
    reused_bytes: int
    """The repository had them."""
    mounted_bytes: int
    """Taken over from another repository of the registry."""
    referrers: tuple[str, ...] = ()
    """Digests of what was hung on it."""
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def push(
    folder: str | Path,
    url: str,
    *,
    options: SourceOptions | None = None,
    modelcar: bool = False,
    annotations: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
    base: str | None = None,
    signer: Signer | None = None,
    told: Told = lambda step: None,
) -> Pushed:
    """Push `folder` to the tag that `url` names, oci://host/repository:tag.

    modelcar: as images of linux on amd64 and arm64, files under /models/, instead of a ModelPack.
    annotations: of the manifest. base: an oci:// address, or 'repository:tag' of the same registry, whose layers are
        taken over where they are the same. signer: whose signature is hung on it, of all files and of this manifest.
    told: what is done, and why something is tried again; from several threads.
    Raises: UsageError for what may not be pushed, NotFoundError for a base that is not there, before anything is
        hashed; AccessError, ChangedError, StoreError.
    """
    reference = parse_reference(url)
    if reference.tag is None or reference.digest is not None:
        raise UsageError(f"{reference}: a push needs a tag and no digest: {reference.identity}:TAG")
    found = scan(str(folder))
    checked = validate(found, allow_pickle=allow_pickle)
    client = RegistryClient(reference, connections_max=(options or SourceOptions()).connections_max)

    def waits(error: TransientStoreError) -> None:
        told(Step("waiting", f"{error}; trying again", 0, 0))

    try:
        with telling(waits):
            unhashed = _planned(found, modelcar=modelcar)
            make = partial(make_documents, files=found.files, reference=reference, annotations=annotations or {},
                           is_image=modelcar)  # fmt: skip
            make(unhashed)  # it is too long before its digests are known as after that
            uploader = Uploader(client, found.source())
            uploader.check_access()
            warnings = [*checked.warnings, *_mount_from(base, uploader, client)]
            layers = _hashed(unhashed, found, uploader, told)
            documents = make(layers)
            bytes_by = _upload(uploader, layers, told, waits)
            for blob in documents.configs:
                uploader.bring(blob)
            for body, media_type in documents.inner:
                put_manifest(client, uploader, body, digest_of(body), media_type)
            subject = Descriptor(documents.media_type, digest_of(documents.body), len(documents.body))
            bundles = _signatures(signer, found, layers, reference, subject)
            hung: list[Hung] = []
            for kind, media_type, title, content in _hangers(found, bundles):
                with _spared(kind, warnings):
                    layer = (media_type, title, content)
                    hung.append(push_referrer(client, uploader, found.source(), subject, kind, [layer]))
            put_manifest(client, uploader, documents.body, reference.tag, documents.media_type)
            for referrer, is_listed in hung:
                if not is_listed:
                    with _spared(referrer.artifact_type, warnings):
                        see_indexed(client, uploader, subject.digest, referrer)
            return Pushed(
                f"{reference}@{subject.digest}",
                subject.digest,
                len(found.files),
                sum(bytes_by.values()),
                bytes_by[How.SENT],
                bytes_by[How.REUSED],
                bytes_by[How.MOUNTED],
                tuple(referrer.digest for referrer, _ in hung),
                tuple(warnings),
                found.left_out,
            )
    finally:
        client.close()


def _planned(found: Scan, *, modelcar: bool) -> list[Layer]:
    """The layers, their digests yet unknown."""
    if modelcar:
        return [_unhashed(pieces, path, media.OCI_TAR, {}) for path, pieces in image.layers(found.files, _times_s())]
    layers = []
    for file in found.files:
        kind, is_known = media.layer_type(file.path, file.size)
        status = os.stat(f"{found.root}/{file.path}")
        metadata = {
            "name": file.path.rpartition("/")[2], "mode": status.st_mode & 0o777, "uid": 0, "gid": 0, "size": file.size,
            "mtime": datetime.fromtimestamp(int(status.st_mtime), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "typeflag": 48,
        }  # fmt: skip
        notes = {media.FILEPATH[0]: file.path, media.TITLE: file.path, media.METADATA[0]: encoded(metadata).decode()}
        if not is_known:
            notes[media.UNTESTED] = "true"
        layers.append(_unhashed((file,), file.path, kind, notes))
    return layers


def _unhashed(pieces: tuple[bytes | ObjectId, ...], path: str, media_type: str, notes: Mapping[str, str]) -> Layer:
    nbytes = sum(piece.size if isinstance(piece, ObjectId) else len(piece) for piece in pieces)
    return Layer(Blob(pieces, nbytes, f"sha256:{'0' * 64}", path), media_type, notes)


def _times_s() -> int:
    """What an image says of when its files were written: equal files make equal layers, whenever they were copied.

    Raises: UsageError.
    """
    stated = os.environ.get(TIMES_VARIABLE) or "0"
    if not re.fullmatch(r"[0-9]{1,11}", stated):
        raise UsageError(f"{TIMES_VARIABLE}: expected seconds since 1970, got {stated!r:.60}")
    return int(stated)


def _hashed(layers: Sequence[Layer], found: Scan, uploader: Uploader, told: Told) -> list[Layer]:
    source = found.source()
    total = sum(layer.blob.nbytes for layer in layers)
    told(Step("hashing", "", 0, total))
    hashed: dict[int, Layer] = {}

    def one(item: tuple[int, Layer]) -> None:
        number, layer = item
        path = layer.blob.path

        def advance(count: int) -> None:
            uploader.check_going(path)
            told(Step("hashing", path, count, total, layer.blob.nbytes))

        hashed[number] = replace(layer, blob=blob_of(layer.blob.pieces, source, path, advance))

    for_each(list(enumerate(layers)), one, at_once=os.cpu_count() or 2, stop=uploader.stop)
    return [hashed[number] for number in range(len(layers))]


def _upload(
    uploader: Uploader, layers: Sequence[Layer], told: Told, waits: Callable[[TransientStoreError], None]
) -> dict[How, int]:
    """Bytes by how they came; equal layers are brought once, and count as reused then."""
    once = {layer.blob.digest: layer.blob for layer in layers}
    total = sum(blob.nbytes for blob in once.values())
    found = dict.fromkeys(How, 0)
    found[How.REUSED] = sum(layer.blob.nbytes for layer in layers) - total
    lock = threading.Lock()
    told(Step("sending", "", 0, total))

    def one(blob: Blob) -> None:
        def advance(count: int) -> None:
            told(Step("sending", blob.path, count, total, blob.nbytes))

        with telling(waits):
            how = uploader.bring(blob, advance)
        if how is not How.SENT:
            advance(blob.nbytes)
        with lock:
            found[how] += blob.nbytes

    biggest_first = sorted(once.values(), key=lambda blob: -blob.nbytes)
    for_each(biggest_first, one, at_once=UPLOADS_AT_ONCE, stop=uploader.stop)
    return found


@contextlib.contextmanager
def _spared(kind: str, warnings: list[str]) -> Iterator[None]:
    """What fails of a card is warned of, so that no registry's ideas of extras keep a model out of it."""
    try:
        yield
    except MfsError as error:
        if kind != CARD:
            raise
        warnings.append(f"the card could not be hung on the model, which is pushed all the same: {error}")


def _mount_from(base: str | None, uploader: Uploader, client: RegistryClient) -> list[str]:
    """Have blobs mounted from the base's repository, if it is of this registry; what is to be said of it else.

    base: an address, or only what stands behind the registry in it.
    Raises: NotFoundError if it is not there; UsageError, StoreError.
    """
    if base is None:
        return []
    registry = client.reference.registry
    other = parse_reference(base if "://" in base else f"oci://{registry}/{base}")
    if other.registry != registry:
        return [f"--base {other}: a registry mounts only what it has itself; of {other.registry} it takes nothing over"]
    url = f"{client.reference.base_url}/v2/{other.repository}/"
    url += f"manifests/{other.name}" if other.name else "tags/list?n=1"
    deadline_s = time.monotonic() + BASE_S

    def is_readable() -> bool:
        scopes = (f"repository:{other.repository}:pull",)
        try:
            reply = client.send("GET", url, scopes, headers={"Accept": media.ACCEPTED}, deadline_s=deadline_s)
        except AccessError:
            return False
        if reply.status == 404:
            raise NotFoundError(f"--base {other}: is not there")
        if reply.status in TRANSIENT_STATUSES:
            raise client.error_of(reply, f"--base {other}")
        return reply.status == 200

    if not client.retried(is_readable, f"--base {other}", deadline_s):
        return [f"--base {other}: cannot be read, so nothing is taken over from it: `docker login {registry}`"]
    uploader.mount_from(other.repository)
    return []


def _signatures(
    signer: Signer | None, found: Scan, layers: Sequence[Layer], reference: Reference, subject: Descriptor
) -> list[bytes]:
    """The bundle, if somebody signs."""
    if signer is None:
        return []
    known = {layer.annotations[media.FILEPATH[0]]: layer.blob.digest for layer in layers if layer.annotations}
    source = found.source()
    files = [
        (file.path, (known.get(file.path) or blob_of([file], source, file.path).digest).removeprefix("sha256:"))
        for file in found.files
    ]
    model = reference.identity
    return [signer.sign_files(model, files, {"mfs.model": model, "mfs.manifest": subject.digest})]


def _hangers(found: Scan, bundles: Sequence[bytes]) -> list[tuple[str, str, str, bytes]]:
    """(artifactType, media type, title, content) of what is hung on the manifest."""
    hung: list[tuple[str, str, str, bytes]] = []
    by_path = {file.path: file for file in found.files}
    card = next((by_path[name] for name in _CARD_NAMES if name in by_path), None)
    if card is not None and 0 < card.size <= CARD_BYTES_MAX:
        blob = Blob((card,), card.size, "", card.path)
        hung.append((CARD, "text/markdown", card.path, bytes(blob.read(found.source(), 0, card.size))))
    hung += [(BUNDLE, BUNDLE, "model.sig", bundle) for bundle in bundles]
    return hung
