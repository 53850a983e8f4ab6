"""A source that is a dict of bytes: honest, instant, and changeable while it is read."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping

from mfs.errors import ChangedError, IntegrityError, NotFoundError, StoreError, TransientStoreError
from mfs.sources.base import Page
from mfs.types import ByteRange, Entry, EntryKind, ObjectId


class MemorySource:
    """Files by path. Directories exist while something lies below them. Thread-safe."""

    def __init__(self, files: Mapping[str, bytes] | None = None, *, identity: str = "memory://test") -> None:
        self.identity = identity
        self.address = ""
        self._lock = threading.Lock()
        self._files: dict[str, tuple[bytes, str, int]] = {}  # path -> (content, version, mtime_ns)
        self._writes_count = 0
        self._is_closed = False
        for path, content in (files or {}).items():
            self.put(path, content)

    def put(self, path: str, content: bytes) -> None:
        """Write a file; each write is a new version, even of equal bytes."""
        with self._lock:
            self._writes_count += 1
            self._files[path] = (content, f"v{self._writes_count}", self._writes_count * 1_000_000_000)

    def delete(self, path: str) -> None:
        """Remove a file."""
        with self._lock:
            del self._files[path]

    def object_id(self, path: str) -> ObjectId:
        """The id of what is at `path` now."""
        content, version, _ = self._files[path]
        return ObjectId(self.identity, path, len(content), version, _digest(content))

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield one directory; see `Source.list`."""
        self._check(deadline_s)
        prefix = f"{path}/" if path else ""
        entries: dict[str, Entry] = {}
        with self._lock:
            for key, (content, version, mtime_ns) in self._files.items():
                if not key.startswith(prefix):
                    continue
                name, slash, _ = key[len(prefix) :].partition("/")
                if slash:
                    entries[name] = Entry(name, EntryKind.DIRECTORY)
                else:
                    entries[name] = Entry(name, EntryKind.FILE, len(content), mtime_ns, version, _digest(content))
        if path and not entries:
            raise NotFoundError(f"{self.identity}/{path}: no such directory")
        yield path, list(entries.values())

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Copy bytes out; see `Source.get_range`."""
        self._check(deadline_s)
        if len(out) != len(span):
            raise ValueError(f"out has {len(out)} bytes for a range of {len(span)}")
        with self._lock:
            found = self._files.get(obj.path)
        if found is None:
            raise NotFoundError(f"{obj}: gone")
        content, version, _ = found
        if version != obj.version:
            raise ChangedError(f"{obj}: is version {version} now")
        if span.stop > len(content):
            raise IntegrityError(f"{obj}: has {len(content)} bytes, asked for {span.start}-{span.stop}")
        out[:] = content[span.start : span.stop]

    def close(self) -> None:
        """Later calls fail with StoreError."""
        self._is_closed = True

    def _check(self, deadline_s: float) -> None:
        if self._is_closed:
            raise StoreError(f"{self.identity}: the source has been closed")
        if time.monotonic() >= deadline_s:
            raise TransientStoreError(f"{self.identity}: deadline passed")


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
