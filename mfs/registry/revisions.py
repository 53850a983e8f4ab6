"""Revisions as a reader wants them: manifests fetched once, kept in a compact form, within a bound.

A manifest of 100 GB is some 5 MB of JSON, of Python objects ten times that; here it is 44 bytes a chunk.
"""

from __future__ import annotations

import calendar
import threading
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from mfs.errors import IntegrityError, NotFoundError, TransientStoreError
from mfs.registry import layout
from mfs.registry.manifest import Chunk, Manifest, check_id, parse_manifest
from mfs.registry.store import Store
from mfs.types import ByteRange

REVISIONS_BYTES_MAX = 64 << 20
"""Compact revisions kept in one process: of some 8 TB of weights. The one in use stays, however large it is."""

_CONTENT_PREFIX = b"mfs-file-1\0"

Check = Callable[[str, bytes, float], None]
"""(model, a manifest's bytes, deadline): raises what keeps it from being served."""


class Part(NamedTuple):
    """What a range takes from one chunk."""

    chunk: Chunk
    span: ByteRange
    """Plain bytes of the chunk."""


@dataclass(frozen=True, slots=True)
class FileOfRevision:
    """One file of a revision."""

    size: int
    sha256: str
    content: str
    """64 hex digits that say what the bytes are: a digest of its chunks' ids, each of which is proven by whoever reads
    it. (The sha256 is only stated, and nobody can check it before the whole file is there.)"""
    chunks: array[int]
    """Indexes into the revision's chunks."""
    starts: array[int]
    """Where each begins in the file."""


class Revision:
    """A manifest, compact. Immutable."""

    def __init__(self, model: str, manifest_id: str, manifest: Manifest) -> None:
        self.model = model
        self.id = manifest_id
        self.created_ns = calendar.timegm(time.strptime(manifest.created_at, "%Y-%m-%dT%H:%M:%SZ")) * 10**9
        self.has_differences = bool(manifest.requires)
        """Whether some chunks are stored as differences to chunks of other revisions."""
        self._ids = b"".join(bytes.fromhex(chunk.id) for chunk in manifest.chunks)
        self._plain = array("I", (chunk.plain_bytes for chunk in manifest.chunks))
        self._stored = array("Q", (chunk.stored_bytes for chunk in manifest.chunks))
        self.files = {file.path: FileOfRevision(
            file.size, file.sha256, self._content(file.size, file.chunks), array("I", file.chunks),
            array("Q", manifest.starts(file)[:-1]),
        ) for file in manifest.files}  # fmt: skip
        per_file = (300 + 2 * len(path) + 12 * len(file.chunks) for path, file in self.files.items())
        self.nbytes = 44 * len(self._plain) + sum(per_file)
        """What it takes in memory, about."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model}@sha256:{self.id[:12]}"

    def chunk(self, index: int) -> Chunk:
        """One of its chunks."""
        return Chunk(self.id_bytes(index).hex(), self._plain[index], self._stored[index])

    def id_bytes(self, index: int) -> bytes:
        """The id of one of its chunks, as 32 bytes."""
        return self._ids[32 * index : 32 * index + 32]

    def parts(self, file: FileOfRevision, span: ByteRange) -> Iterator[Part]:
        """What a range of a file, inside of it and not empty, is made of; in order."""
        at = bisect_right(file.starts, span.start) - 1
        while at < len(file.chunks) and file.starts[at] < span.stop:
            chunk, start = self.chunk(file.chunks[at]), file.starts[at]
            stop = min(span.stop, start + chunk.plain_bytes) - start
            yield Part(chunk, ByteRange(max(span.start - start, 0), stop))
            at += 1

    def _content(self, size: int, chunks: tuple[int, ...]) -> str:
        ids = b"".join(map(self.id_bytes, chunks))
        return blake3(_CONTENT_PREFIX + size.to_bytes(8, "little") + ids).hexdigest()


class Revisions:
    """The revisions that one process reads. Thread-safe."""

    def __init__(self, store: Callable[[float], Store], check: Check = lambda model, body, deadline_s: None) -> None:
        """store: gives the store, by a deadline. check: asked of each manifest before it is used."""
        self._store = store
        self._check = check
        self._known: OrderedDict[tuple[str, str], Revision] = OrderedDict()
        self._asking: dict[tuple[str, str], threading.Lock] = {}
        """Held by who fetches a manifest; others that want the same one wait for him, and do not parse it as well."""
        self._lock = threading.Lock()
        """Around changes of both tables, never while the store is asked."""

    def get(self, model: str, manifest_id: str, *, deadline_s: float) -> Revision:
        """A revision. Raises: NotFoundError, IntegrityError, AccessError, StoreError, and what `check` does."""
        key = (model, manifest_id)
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
            asking = self._asking.setdefault(key, threading.Lock())
        if not asking.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise TransientStoreError(f"{model}@sha256:{manifest_id[:12]}: its manifest had not come by the deadline")
        try:
            revision = self._known.get(key) or self._fetch(model, manifest_id, deadline_s)
            with self._lock:
                self._known[key] = revision
                while len(self._known) > 1 and sum(item.nbytes for item in self._known.values()) > REVISIONS_BYTES_MAX:
                    self._known.popitem(last=False)
            return revision
        finally:
            with self._lock:
                self._asking.pop(key, None)  # who waits has it still, who comes now finds the revision
            asking.release()

    def _fetch(self, model: str, manifest_id: str, deadline_s: float) -> Revision:
        where = f"{model}@sha256:{manifest_id[:12]}"
        try:
            body = self._store(deadline_s).read(layout.manifest_key(model, manifest_id), deadline_s=deadline_s)
        except NotFoundError as error:
            raise NotFoundError(f"{where}: its manifest is gone, 'mfs fsck' says what else: {error}") from None
        try:
            check_id(body, manifest_id)
            self._check(model, body, deadline_s)  # before anything is made of what strangers may have written
            return Revision(model, manifest_id, parse_manifest(body))
        except IntegrityError as error:
            raise IntegrityError(f"{where}: {error}; 'mfs fsck' says what else is damaged") from None
