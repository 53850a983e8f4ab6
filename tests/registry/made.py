"""Registries made by hand, around what pushes: chunks and manifests exactly as a test wants them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mfs.registry import codecs, layout, tags
from mfs.registry.chunk import FRAME_BYTES, Frame, Table, assemble, chunk_id, digests_of
from mfs.registry.encode import Base, encode_chunk
from mfs.registry.manifest import Chunk, File, Manifest, manifest_id, parse_manifest
from mfs.registry.store import Store

CREATED_AT = "2026-11-29T12:00:00Z"


def soon() -> float:
    """A deadline for one request."""
    return time.monotonic() + 20


def put_difference(store: Store, plain: bytes, base: bytes, element_bytes: int) -> Chunk:
    """Store bytes as a difference to others of equal length, which are a chunk."""
    base_id = chunk_id(len(base), digests_of(memoryview(base)))
    encoded = encode_chunk(memoryview(plain), element_bytes, base=Base(base_id, 0, memoryview(base)))
    assert encoded.table.base == base_id
    store.create(layout.chunk_key(encoded.table.id), encoded.body, deadline_s=soon())
    return Chunk(encoded.table.id, len(plain), len(encoded.body))


def put_chunk(store: Store, plain: bytes) -> Chunk:
    """Store bytes as they are; what a manifest says of them."""
    digests = digests_of(memoryview(plain))
    frames = [plain[start : start + FRAME_BYTES] for start in range(0, len(plain), FRAME_BYTES)]
    rows = tuple(Frame(digest, len(frame), codecs.RAW) for digest, frame in zip(digests, frames, strict=True))
    wanted_id = chunk_id(len(plain), digests)
    body = assemble(Table(wanted_id, len(plain), 1, 0, None, rows), frames)
    store.create(layout.chunk_key(wanted_id), body, deadline_s=soon())
    return Chunk(wanted_id, len(plain), len(body))


def put_manifest(store: Store, model: str, manifest: Manifest) -> str:
    """Store a manifest; its id."""
    body = manifest.encode()
    store.create(layout.manifest_key(model, manifest_id(body)), body, deadline_s=soon())
    return manifest_id(body)


def put_revision(
    store: Store, model: str, files: Mapping[str, bytes], *, cuts: Mapping[str, Sequence[int]] | None = None,
    chunk_bytes: int = 1 << 20, created_at: str = CREATED_AT, stated: Mapping[str, str] | None = None,
    base: bytes = b"", element_bytes: int = 1,
) -> str:  # fmt: skip
    """Store files as a revision, uncompressed; its manifest's id.

    cuts: by file where it is cut, instead of evenly. stated: by file the sha256 that is said of it, instead of its own.
    base: what the one file is stored as a difference to, cut alike and pushed before.
    """
    chunks: dict[str, Chunk] = {}
    made = []
    for path, content in sorted(files.items()):
        edges = [0, *(cuts or {}).get(path, range(chunk_bytes, len(content), chunk_bytes)), len(content)]
        found = [
            put_difference(store, content[a:b], base[a:b], element_bytes) if base else put_chunk(store, content[a:b])
            for a, b in pairwise(edges)
            if b > a
        ]
        chunks |= {chunk.id: chunk for chunk in found}
        indexes = tuple(list(chunks).index(chunk.id) for chunk in found)
        sha256 = (stated or {}).get(path) or hashlib.sha256(content).hexdigest()
        made.append(File(path, len(content), sha256, indexes))
    return put_manifest(store, model, Manifest(created_at, tuple(chunks.values()), tuple(made)))


def manifest_of(store: Store, model: str, pushed: str) -> Manifest:
    """A manifest that was stored."""
    return parse_manifest(store.read(layout.manifest_key(model, pushed), deadline_s=soon()), pushed)


class Registry:
    """A registry made by hand on any store."""

    def __init__(self, store: Store, *, chunk_bytes: int = 1 << 20) -> None:
        """chunk_bytes: of which files are cut into."""
        self.store = store
        self.chunk_bytes = chunk_bytes
        store.create(layout.MARKER_KEY, layout.MARKER_BODY, deadline_s=soon())

    def push(self, model: str, tag: str, files: Mapping[str, bytes], **how: Any) -> str:
        """Store files as a revision and have a tag mean it; its manifest's id. how: see `put_revision`."""
        pushed = put_revision(self.store, model, files, **{"chunk_bytes": self.chunk_bytes} | how)
        self.move(model, tag, pushed)
        return pushed

    def move(self, model: str, tag: str, pushed: str) -> None:
        """Have a tag mean a revision."""
        tags.move(self.store, model, tag, pushed, how="tag", deadline_s=soon())

    def remove(self, model: str, tag: str) -> None:
        """Remove a tag."""
        tags.remove(self.store, model, tag, deadline_s=soon())

    def meant(self, model: str, tag: str) -> str:
        """The id of the manifest that a tag means."""
        found = tags.current(self.store, model, tag, deadline_s=soon())
        assert found is not None
        assert found.manifest is not None
        return found.manifest
