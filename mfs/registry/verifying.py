"""A revision read whole, as a reader would read it, and compared with everything that is said of it.

Each frame by its chunk's id, each file by its sha256, and a bundle's list of files by the manifest's: what proves one
revision to whoever is about to serve it. For a whole registry there is `fsck`.
"""

from __future__ import annotations

import hashlib
import json
import time
from base64 import b64decode
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from mfs.errors import IntegrityError
from mfs.registry import layout
from mfs.registry.chunk_io import IO_S
from mfs.registry.frames import FrameReader
from mfs.registry.manifest import Manifest, check_id, parse_manifest
from mfs.registry.revisions import FileOfRevision, Part, Revision
from mfs.registry.signing import Verifier, signed_files
from mfs.registry.store import Store
from mfs.types import ByteRange

AHEAD = 8
"""Chunks on their way at once: at most 64 MiB of them."""


class Fault(NamedTuple):
    """Something that is not what it should be."""

    path: str
    chunk: str
    """Its id; '' where the whole file is meant."""
    reason: str


class Step(NamedTuple):
    """How far it is."""

    path: str
    done_bytes: int
    faults: tuple[Fault, ...] = ()
    """Found since the last step."""


def read_manifest(
    store: Store, model: str, manifest_id: str, verifier: Verifier | None = None
) -> tuple[bytes, Manifest]:  # fmt: skip
    """A manifest, checked; verifier: what vouches for it is checked first, see `check_signature`.

    Raises: NotFoundError, AccessError, IntegrityError, StoreError.
    """
    deadline_s = time.monotonic() + IO_S
    body = store.read(layout.manifest_key(model, manifest_id), deadline_s=deadline_s)
    check_id(body, manifest_id)
    if verifier is not None:
        verifier.check(store, model, body, deadline_s=deadline_s)
    return body, parse_manifest(body)


def check_signature(store: Store, model: str, body: bytes, manifest: Manifest, verifier: Verifier) -> bytes:
    """The bundle by which a key vouches for a manifest, seen to list the same files.

    Raises: as `Verifier.check`; IntegrityError if it lists others.
    """
    bundle = verifier.check(store, model, body, deadline_s=time.monotonic() + IO_S)
    statement = json.loads(b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
    resources = statement["predicate"]["resources"]
    if sorted((item["name"], item["digest"]) for item in resources) != sorted(signed_files(manifest)):
        raise IntegrityError(f"{model}: its signature lists other files than its manifest: sign it again")
    return bundle


def verify(store: Store, model: str, manifest_id: str, manifest: Manifest) -> Iterator[Step]:
    """Read every file of a revision and compare it; a step for each chunk. Raises: AccessError, StoreError."""
    revision = Revision(model, manifest_id, manifest)
    reader = FrameReader(lambda deadline_s: store)
    with ThreadPoolExecutor(AHEAD) as pool:
        done = 0
        for path, file in revision.files.items():
            digest = hashlib.sha256()
            is_good = True
            for part, plain in _read_ahead(pool, reader, revision, file):
                done += len(part.span)
                if isinstance(plain, IntegrityError):
                    is_good = False
                    yield Step(path, done, (Fault(path, part.chunk.id, str(plain)),))
                else:
                    digest.update(plain)
                    yield Step(path, done)
            if is_good and digest.hexdigest() != file.sha256:
                reason = (
                    f"its chunks are good, but its sha256 is {digest.hexdigest()}, and the manifest says {file.sha256}"
                )
                yield Step(path, done, (Fault(path, "", reason),))


def _read_ahead(
    pool: ThreadPoolExecutor, reader: FrameReader, revision: Revision, file: FileOfRevision
) -> Iterator[tuple[Part, bytearray | IntegrityError]]:
    """The chunks of a file in order, each with its bytes or what is wrong with it; some are fetched ahead."""

    def read(part: Part) -> bytearray | IntegrityError:
        out = bytearray(len(part.span))
        try:
            reader.read(part, memoryview(out), deadline_s=time.monotonic() + IO_S)
        except IntegrityError as error:
            return error
        return out

    parts = revision.parts(file, ByteRange(0, file.size)) if file.size else iter(())
    coming: deque[tuple[Part, Future[bytearray | IntegrityError]]] = deque()
    try:
        for part in parts:
            coming.append((part, pool.submit(read, part)))
            if len(coming) == AHEAD:
                first, result = coming.popleft()
                yield first, result.result()
        while coming:
            first, result = coming.popleft()
            yield first, result.result()
    finally:
        for _, result in coming:
            result.cancel()
