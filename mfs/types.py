"""Nouns every room shares. Pure values: this module imports nothing of ours and does no I/O."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

CHUNK_BYTES = 4 << 20
"""The caching unit: one slot in RAM, one record on SSD. Aligned in the object; the last may be shorter."""

BLOCK_BYTES = 128 << 10
"""The unit that is valid or not inside a chunk, with one checksum each: small random reads stay small."""

SMALL_FILE_BYTES = 1 << 20
"""Files up to this size are brought before they are asked for, and leave the SSD tier last."""

BLOCKS_PER_CHUNK = CHUNK_BYTES // BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Half-open range of bytes [start, stop) of one object."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a byte range: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ObjectId:
    """One immutable file version. Two equal ids have equal bytes for ever."""

    source: str
    """Identity of the source, the same over restarts and machines: 's3://bucket/prefix@endpoint'."""
    path: str
    """Path inside the source, '/'-separated, without a leading slash."""
    size: int
    """Bytes."""
    version: str
    """What the source calls this version: etag, blob id, or 'mtime-size' where it has nothing better. Never a text
    that two versions share: what is cached is found again by it."""
    digest: str | None = None
    """'sha256:<hex>' of the whole object where the source states it, else None."""
    locator: str = field(default="", compare=False)
    """Whatever the source needs, beside the path, to find this version again (a commit, say). No part of identity."""

    @property
    def voucher(self) -> str:
        """Who states `digest`: a Hub or an OCI registry for all its repositories, a registry's chunks for whoever has
        the same, any other source for itself alone.

        Nobody checks a digest before the whole object was read, so what one states binds no other: a web folder whose
        manifest is wrong must not name bytes of a Hub, nor one author's manifest those of another's model. But the
        version of a registry's file is a digest of its chunks' ids (`registry.revisions`), each of which is compared
        with the bytes that come: it says what they are, in whichever model, revision and registry they stand.
        """
        if self.source.startswith("mfs+"):
            return f"chunks@{self.version}"
        scheme, _, rest = self.source.partition("://")
        if scheme in ("oci", "oci+http", "oci+https"):  # a registry takes a blob only under the digest of its bytes
            return f"{scheme}@{rest.partition('/')[0]}"
        if not self.source.startswith("hf://"):
            return self.source
        return "hf@" + self.source.partition("#")[0].partition("@")[2]

    @cached_property
    def cache_id(self) -> str:
        """40 hex digits naming these bytes in the SSD cache: by content where a digest is stated, else by origin."""
        if self.digest:
            identity = f"{self.digest}\0{self.size}\0{self.voucher}"
        else:
            identity = f"{self.source}\0{self.path}\0{self.size}\0{self.version}"
        return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:40]

    @property
    def chunks_count(self) -> int:
        return -(-self.size // CHUNK_BYTES)

    def chunk_range(self, index: int) -> ByteRange:
        """The bytes of the object that chunk `index` holds."""
        start = index * CHUNK_BYTES
        return ByteRange(start, min(start + CHUNK_BYTES, self.size))

    def __str__(self) -> str:
        return f"{self.source}/{self.path} (version {self.version})"


class EntryKind(IntEnum):
    """What a name in a source's directory stands for."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3


class Entry(NamedTuple):
    """One name in a source's directory, as the source reports it."""

    name: str
    kind: EntryKind
    size: int = 0
    """Bytes; 0 for directories and links."""
    mtime_ns: int = 0
    """The source's own modification time; 0 where it has none."""
    version: str = ""
    """See `ObjectId.version`. For links: the target."""
    digest: str | None = None
    """See `ObjectId.digest`."""
    locator: str = ""
    """See `ObjectId.locator`."""

    def object_at(self, source: str, folder: str) -> ObjectId:
        """The object a file's entry stands for. source: its identity. folder: path of the directory it stands in."""
        path = f"{folder}/{self.name}" if folder else self.name
        return ObjectId(source, path, self.size, self.version, self.digest, self.locator)
