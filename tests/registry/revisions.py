"""Small revisions made by hand, written around the store under test."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from mfs.registry import layout, tags
from mfs.registry.encode import Base, Effort, encode_chunk
from mfs.registry.manifest import Chunk, File, Manifest, manifest_id
from mfs.registry.store import Store
from mfs.testing.store_suite import Place
from mfs.testing.suite import deadline

DAY_S = 24 * 3600.0


def put_chunk(place: Place, content: bytes, base: bytes | None = None) -> Chunk:
    """Store a chunk; base: the plain bytes of a stored one that this is a difference to."""
    on = None if base is None else Base(encode_chunk(memoryview(base), 1).table.id, 0, memoryview(base))
    encoded = encode_chunk(memoryview(content), 1, Effort.FAST, on)
    assert encoded.table.base == (on.id if on else None)
    place.put(layout.chunk_key(encoded.table.id), encoded.body)
    return Chunk(encoded.table.id, len(content), len(encoded.body))


def manifest_of(
    files: Mapping[str, list[Chunk]], contents: Mapping[str, bytes], requires: tuple[str, ...] = ()
) -> bytes:  # fmt: skip
    """A manifest of stored chunks. contents: of each file."""
    chunks = list(dict.fromkeys(chunk for its in files.values() for chunk in its))
    return Manifest(
        "2026-11-29T12:00:00Z", tuple(chunks),
        tuple(File(path, len(contents[path]), hashlib.sha256(contents[path]).hexdigest(),
                   tuple(chunks.index(chunk) for chunk in files[path])) for path in sorted(files)),
        requires=requires,
    ).encode()  # fmt: skip


def put_revision(
    place: Place,
    model: str,
    files: Mapping[str, list[Chunk]],
    contents: Mapping[str, bytes],
    requires: tuple[str, ...] = (),
) -> str:
    """Store a manifest of stored chunks; its id."""
    body = manifest_of(files, contents, requires)
    place.put(layout.manifest_key(model, manifest_id(body)), body)
    return manifest_id(body)


def put_simple(place: Place, model: str, contents: Mapping[str, bytes]) -> str:
    """A revision whose files are one chunk each."""
    return put_revision(place, model, {path: [put_chunk(place, body)] for path, body in contents.items()}, contents)


def tag(store: Store, model: str, name: str, manifest: str | None) -> None:
    tags.move(store, model, name, manifest, how="push", deadline_s=deadline())


def age(root: Path, age_s: float = 2 * DAY_S) -> None:
    """Make all that lies in a folder older."""
    then = time.time() - age_s
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (then, then))


def chunk_of(content: bytes) -> str:
    return encode_chunk(memoryview(content), 1).table.id


def encoded_of(content: bytes) -> bytes:
    """The object that `put_chunk` stores."""
    return encode_chunk(memoryview(content), 1).body


def chunk_at(content: bytes) -> Chunk:
    """A chunk as a manifest names it."""
    return Chunk(chunk_of(content), len(content), len(encoded_of(content)))
