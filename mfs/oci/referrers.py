"""What hangs on an artifact without being part of it: its card, its signatures. OCI 1.1's referrers.

A referrer is a manifest whose `subject` is the artifact's. Registries that know of referrers list them by themselves;
where one does not (it then leaves `OCI-Subject` out of its answer), the client keeps an index of them under the tag
`sha256-<hex of the artifact>`. OCI has no compare-and-swap for it: who writes it in the same instant as another takes
out what the other put in. So a push looks twice, after its write and at its end, and puts in again what is missing;
what is lost all the same, pushing again mends. What it does not understand of that index it leaves as it is.

Source: distribution-spec 1.1, "Listing Referrers", "Pushing Manifests with Subject", "Referrers Tag Schema".
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from functools import partial
from urllib.parse import quote

from mfs.errors import IntegrityError, NotFoundError, StoreError, TransientStoreError
from mfs.fetch.links import next_url
from mfs.fetch.transport import Reply
from mfs.oci import media
from mfs.oci.artifact import Descriptor, Index, Manifest, check_digest, digest_of, parse_document
from mfs.oci.blob import Blob, blob_of
from mfs.oci.client import RegistryClient
from mfs.oci.upload import Uploader
from mfs.sources.base import Source
from mfs.sources.bounds import parse_json
from mfs.sources.paging import Trail

CARD = "application/vnd.mfs.model-card.v1"
"""artifactType of a model's card: its README as the one layer, of type text/markdown."""
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
"""artifactType and layer of a signature of OpenSSF model signing, as cosign calls its bundles."""

REFERRERS_MAX = 1000
REFERRER_BYTES_MAX = 64 << 20
Hung = tuple[Descriptor, bool]
"""A referrer, and whether the registry lists it by itself."""
_WRITES_MAX = 8
_PAUSE_S_MAX = 2.0
"""Before looking again at an index that does not show what was written: a cache may stand before it."""
_REQUEST_S = 60.0
_LACKS_MAX = 8
"""Times that a registry may say it lacks a blob it has: docker-registry 2.8 does, for an instant, while somebody else
uploads the same one."""


def fallback_tag(digest: str) -> str:
    """The tag of the index of referrers, where the registry keeps none: 32 characters of the algorithm at most, 64 of
    what it made.
    """
    algorithm, _, made = digest.partition(":")
    return f"{algorithm[:32]}-{made[:64]}"


def list_referrers(client: RegistryClient, digest: str, artifact_type: str, *, deadline_s: float) -> list[Descriptor]:
    """The manifests of this type that refer to an artifact, by the registry's own list or by the tag.

    Raises: AccessError, StoreError.
    """
    where = f"{client.reference.identity}@{digest}: its referrers"

    def ask(url: str) -> Reply | None:
        reply = client.send("GET", url, client.pull_scopes, deadline_s=deadline_s)
        if reply.status == 200:
            return reply
        if reply.status in (400, 404, 405, 501) and url == first:
            return None
        raise client.error_of(reply, where)

    first = f"{client.api}/referrers/{digest}?artifactType={quote(artifact_type, safe='')}"
    url: str | None = first
    found: list[Descriptor] = []
    trail = Trail(where)
    while url and len(found) < REFERRERS_MAX:
        trail.ask(url)
        reply = client.retried(partial(ask, url), where, deadline_s)
        if reply is None:
            entries = _entries(_indexed(client, digest, where, deadline_s), where)
        else:
            entries = _entries(reply.body, where)
            trail.see(reply.body if entries else b"")
        found += [entry for entry in entries if entry.artifact_type == artifact_type]
        url = client.at_home(next_url(reply.headers, url)) if reply is not None else None
    return found[:REFERRERS_MAX]


def read_referrer(client: RegistryClient, referrer: Descriptor, *, deadline_s: float) -> list[bytes]:
    """The layers of a referrer, each checked against its digest. Raises: as `list_referrers`; IntegrityError."""
    where = f"{client.reference.identity}@{referrer.digest}"
    found = parse_document(client.document(referrer.digest, where, deadline_s=deadline_s).body, where)
    if not isinstance(found, Manifest) or sum(layer.size for layer in found.layers) > REFERRER_BYTES_MAX:
        raise StoreError(f"{where}: expected a manifest of at most {REFERRER_BYTES_MAX} bytes of layers")
    bodies: list[bytes] = []
    for layer in found.layers:
        out = bytearray(layer.size)
        if out:
            client.retried(
                lambda layer=layer, out=out: client.read_blob(  # type: ignore[misc]
                    layer.digest, layer.size, 0, memoryview(out), where, deadline_s=deadline_s
                ),
                where,
                deadline_s,
            )
        check_digest(bytes(out), layer.digest, where)
        bodies.append(bytes(out))
    return bodies


def push_referrer(
    client: RegistryClient,
    uploader: Uploader,
    source: Source,
    subject: Descriptor,
    artifact_type: str,
    layers: Sequence[tuple[str, str, bytes]],
) -> Hung:
    """Hang layers of (media type, title, content) on an artifact, which need not be there yet.

    Equal ones have equal digests, so that one is never hung there twice. Raises: AccessError, StoreError.
    """
    empty = blob_of([b"{}"], source, "the empty config")
    blobs: list[Blob] = [blob_of([content], source, title) for _, title, content in layers]
    for blob in (empty, *blobs):
        uploader.bring(blob)
    described = [
        Descriptor(media_type, blob.digest, blob.nbytes, {media.TITLE: title}).to_json()
        for (media_type, title, _), blob in zip(layers, blobs, strict=True)
    ]
    body = encoded({
        "schemaVersion": 2,
        "mediaType": media.OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": Descriptor(media.OCI_EMPTY, empty.digest, empty.nbytes).to_json(),
        "layers": described,
        "subject": Descriptor(subject.media_type, subject.digest, subject.size).to_json(),
    })  # fmt: skip
    referrer = Descriptor(media.OCI_MANIFEST, digest_of(body), len(body), {}, artifact_type)
    is_listed = put_manifest(client, uploader, body, referrer.digest, media.OCI_MANIFEST)
    if not is_listed:
        see_indexed(client, uploader, subject.digest, referrer)
    return referrer, is_listed


def put_manifest(client: RegistryClient, uploader: Uploader, body: bytes, name: str, media_type: str) -> bool:
    """Put a manifest under a tag or its digest; whether the registry said that it lists it as a referrer.

    Raises: AccessError, IntegrityError if the registry holds something else then, StoreError.
    """
    where = f"{client.reference.identity}: the manifest {name}"
    digest = digest_of(body)
    lacks_count = 0

    def attempt() -> bool:
        nonlocal lacks_count
        url = f"{client.api}/manifests/{name}"
        reply = client.send("PUT", url, uploader.scopes, headers={"Content-Type": media_type}, body=body,
                            deadline_s=deadline_s)  # fmt: skip
        if reply.status != 201:
            error = client.error_of(reply, where)
            said = reply.body.decode("utf-8", "replace")[:200]
            if b"BLOB_UNKNOWN" in reply.body and (lacks_count := lacks_count + 1) < _LACKS_MAX:
                raise TransientStoreError(f"{where}: the registry says that it lacks a blob: {said}")
            raise error if isinstance(error, TransientStoreError) else type(error)(f"{error}: {said}")
        stored = reply.headers.get("Docker-Content-Digest", digest)
        if stored != digest:
            raise IntegrityError(f"{where}: expected the registry to store {digest}, it says {stored}")
        return reply.headers.get("OCI-Subject") is not None

    deadline_s = time.monotonic() + _REQUEST_S
    return client.retried(attempt, where, deadline_s)


def encoded(document: dict[str, object]) -> bytes:
    """A manifest or config as it is stored. Equal ones have equal bytes."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8")


def _entries(body: bytes, where: str) -> tuple[Descriptor, ...]:
    found = parse_document(body, where)
    if not isinstance(found, Index):
        raise StoreError(f"{where}: expected an index, got a manifest")
    return found.entries


def _indexed(client: RegistryClient, digest: str, where: str, deadline_s: float) -> bytes:
    """The index under the tag; an empty one where there is none."""
    try:
        return client.document(fallback_tag(digest), where, deadline_s=deadline_s).body
    except NotFoundError:
        return encoded({"schemaVersion": 2, "mediaType": media.OCI_INDEX, "manifests": []})


def see_indexed(client: RegistryClient, uploader: Uploader, subject: str, referrer: Descriptor) -> None:
    """See that the index under the tag names a referrer. Raises: AccessError, StoreError."""
    where = f"{client.reference.identity}: the referrers of {subject}"
    before: bytes | None = None
    unmoved_count = 0
    for _ in range(_WRITES_MAX):
        now = _indexed(client, subject, where, time.monotonic() + _REQUEST_S)
        if any(entry.digest == referrer.digest for entry in _entries(now, where)):
            return
        if now == before:  # nobody replaced ours: it has not come to be there
            unmoved_count += 1
            client.stopped.wait(random.uniform(0, min(_PAUSE_S_MAX, 0.1 * 2**unmoved_count)))
        before = now
        index = parse_json(now)  # all that others wrote there, and one entry more
        index["manifests"] = [*index["manifests"], referrer.to_json()]
        put_manifest(client, uploader, json.dumps(index).encode(), fallback_tag(subject), media.OCI_INDEX)
    if unmoved_count >= _WRITES_MAX // 2:
        raise StoreError(
            f"{where}: the registry took the tag {fallback_tag(subject)} {_WRITES_MAX} times and does not show what "
            "was put there: are its tags immutable, or does a cache stand before it?"
        )
    raise StoreError(f"{where}: others write its index all the time; {_WRITES_MAX} times ours was replaced: push again")
