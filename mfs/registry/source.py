"""Models in a registry of ours: `mfs+s3://bucket/registry`, and below it `…/model`, `…/model:tag`, `…/model@sha256:…`.

A registry shows its models, a model its tags, a tag the revision that it means now. Version of a file: a digest of its
chunks' ids, so equal files of two tags, models or registries stand in the cache once, whoever pushed them.
Requests for a first listing: one for the models, one for the tags of a model, and for a revision, all of whose
directories come at once, its manifest beside what its tag costs (`tags`). A revision once read is remembered.

A tag that moves shows with the next listing, a model at a time; what is open keeps its revision, which the registry
keeps too. Bytes are verified frame by frame (`frames`) against what the manifest names, which its own name proves; and
where a signature is required (`signing`), no manifest is looked into that lacks it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path

from mfs.cache.chunk_places import Content
from mfs.errors import IntegrityError, MfsError, NotFoundError, StoreError, TransientStoreError
from mfs.registry import layout
from mfs.registry.chunk import DEPTH_MAX
from mfs.registry.frames import FrameReader
from mfs.registry.layout import Address
from mfs.registry.manifest import Chunk
from mfs.registry.opening import Place, open_address, store_at
from mfs.registry.parallel import Beside
from mfs.registry.resident import Resident
from mfs.registry.revisions import FileOfRevision, Part, Revision, Revisions
from mfs.registry.signing import Verifier
from mfs.registry.store import Store
from mfs.registry.tags import Move, Tags
from mfs.sources import open_source
from mfs.sources.base import Moved, Page
from mfs.sources.options import SourceOptions
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, Entry, EntryKind, ObjectId

PARALLEL = 16
"""Chunks fetched at once beside those that callers fetch themselves: a range of small chunks costs few round trips."""

PARTS_ALONE_MAX = 2
"""Chunks of one range that its caller fetches one after the other, as where a range crosses from one large chunk into
the next: who reads ahead has many ranges under way, and each further thread costs a third more CPU."""


class RegistrySource:
    """A registry, one of its models, or one revision. Thread-safe."""

    def __init__(self, address: Address, options: SourceOptions) -> None:
        self._verifier = Verifier(Path(options.require_signature)) if options.require_signature else None
        self.identity = _identity(address, options, self._verifier)
        self._address = address
        self._options = options
        self._place: Place | None = None
        self._tags: Tags
        """Set with `_place`."""
        self._opening = threading.Lock()
        self._revisions = Revisions(self._store, self._check)
        self._frames = FrameReader(self._store)
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="chunks")
        self._noted: set[str] = set()
        """Revisions whose chunks this node was told of."""
        self._closed = False

    @property
    def address(self) -> str:
        """That of the store below; see `Source.address`."""
        return open_source(self._address.place, self._options).address

    def take_from(self, resident: Resident) -> None:
        """Take bytes of chunks from what the node has, where it has them."""
        self._frames.resident = resident

    # -- what there is

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield the models, the tags of a model, or all directories of a revision at or below `path`; see `Source`."""
        place = self._opened(deadline_s)
        names = path.split("/") if path else []
        model = place.model or (names.pop(0) if names else None)
        if model is None:
            yield "", [_directory(name) for name in self._models(place.store, deadline_s)]
            return
        manifest_id = self._address.manifest
        if manifest_id is None:
            found = self._tags.read(model, deadline_s=deadline_s)
            was_removed = not found and any(place.store.names(f"tags/{model}/", deadline_s=deadline_s))
            if not found and (names or self._address.tag or not was_removed):
                raise NotFoundError(f"{self.identity}: no model {model!r} that has a tag")
            tag = self._address.tag or (names.pop(0) if names else None)
            if tag is None:
                yield path, [_directory(name) for name in sorted(found)]
                return
            manifest_id = _meant(found, model, tag)
        revision = self._revisions.get(model, manifest_id, deadline_s=deadline_s)
        root = path.removesuffix("/".join(names)).rstrip("/")
        pages = [page for page in _tree(revision, self.identity, root).pages() if _is_below(page[0], path)]
        if not pages:
            raise NotFoundError(f"{revision.name}: no directory {'/'.join(names)!r}")
        yield from pages

    def _models(self, store: Store, deadline_s: float) -> Iterable[str]:
        """The models of the registry, also those whose tags were all removed, which are shown empty: what tags mean is
        read of a model that is looked at.
        """
        return (name for name in store.names("tags/", deadline_s=deadline_s) if layout.is_name(name))

    # -- bytes

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> Moved:
        """Fill `out` with frames of the chunks that the file's revision names; see `Source.get_range`."""
        if time.monotonic() >= deadline_s:
            raise TransientStoreError(f"{obj}: bytes {span.start}-{span.stop} not asked for before the deadline")
        revision, file, where = self.find(obj, deadline_s=deadline_s)
        if span.stop > file.size:
            raise IntegrityError(f"{where}: has {file.size} bytes, asked for {span.start}-{span.stop}")
        if not span:
            return Moved()
        self._note(revision)
        parts = list(revision.parts(file, span))
        views, start = [], 0
        for part in parts:
            views.append(out[start : start + len(part.span)])
            start += len(part.span)

        def read(part: Part, view: memoryview) -> Moved:
            try:
                return self._frames.read(part, view, deadline_s=deadline_s)
            except TransientStoreError as error:
                raise TransientStoreError(f"{where}: {error}", retry_after_s=error.retry_after_s) from error
            except MfsError as error:
                raise type(error)(f"{where}: {error}") from error

        moved = Moved()
        if len(parts) <= PARTS_ALONE_MAX:
            for part, view in zip(parts, views, strict=True):
                moved += read(part, view)
            return moved
        others: list[Beside[Moved]] = []
        try:
            for part, view in zip(parts[1:], views[1:], strict=True):
                others.append(Beside(partial(copy_context().run, read, part, view)))  # in the order's trace
                self._pool.submit(others[-1])
            moved += read(parts[0], views[0])
        except BaseException:
            for other in others:
                other.withdraw()
            raise
        finally:
            for other in others:  # `out` must be left alone by all when this returns
                other.wait()
        found = [moved, *(other.result() for other in others)]
        decode_s = max(one.decode_s for one in found)  # side by side
        for one in found[1:]:
            moved += one
        moved.decode_s = decode_s
        return moved

    def find(self, obj: ObjectId, *, deadline_s: float) -> tuple[Revision, FileOfRevision, str]:
        """The revision that holds a file of this version, the file in it, and how both are called in messages.

        Raises: IntegrityError if it has none; StoreError, AccessError.
        """
        model, _, manifest_id = obj.locator.partition("/")
        if not layout.is_name(model) or not layout.is_id(manifest_id):
            raise StoreError(f"{obj}: expected model/manifest as its locator, got {obj.locator!r:.200}")
        revision = self._revisions.get(model, manifest_id, deadline_s=deadline_s)
        path = "/".join(obj.path.split("/")[self._depth(deadline_s) :])
        where = f"{revision.name}/{path}"
        file = revision.files.get(path)
        if file is None or file.content != obj.version:
            raise IntegrityError(f"{where}: the revision has no such file of version {obj.version[:12]}")
        return revision, file, where

    def stands_on(self, chunk: Chunk, *, deadline_s: float) -> tuple[Chunk, ...]:
        """The chunks that this one is stored as a difference to, uppermost first; their tables are read.

        Raises: MfsError.
        """
        found: tuple[Chunk, ...] = ()
        table = self._frames.table(chunk, deadline_s=deadline_s)
        while table.base is not None and len(found) < DEPTH_MAX:
            table = self._frames.table(Chunk(table.base, chunk.plain_bytes, 0), deadline_s=deadline_s)
            found += (Chunk(table.id, table.plain_bytes, table.stored_bytes),)
        return found

    def close(self) -> None:
        """Drop connections; see `Source.close`."""
        self._closed = True
        if self._place is not None:
            self._place.store.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _note(self, revision: Revision) -> None:
        """Tell the node once what the revision's files are made of."""
        if revision.id in self._noted:
            return
        self._noted.add(revision.id)
        self._frames.resident.note([
            Content(_entry(revision, file).object_at(self.identity, "").cache_id, file.size,
                    [revision.id_bytes(index) for index in file.chunks], file.starts)
            for file in revision.files.values() if file.size
        ])  # fmt: skip

    # -- the registry

    def _opened(self, deadline_s: float) -> Place:
        """The registry, looked for when it is first needed: whether an address names a registry or a model its marker
        tells.
        """
        if self._place is not None and not self._closed:
            return self._place
        if not self._opening.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise TransientStoreError(f"{self.identity}: its marker was not read before the deadline")
        try:
            if self._closed:
                raise StoreError(f"{self.identity}: the source was closed")
            if self._place is None:
                place = open_address(self._address, self._options, deadline_s=deadline_s)
                self._tags = Tags(place.store)
                self._place = place
            return self._place
        finally:
            self._opening.release()

    def _store(self, deadline_s: float) -> Store:
        return self._opened(deadline_s).store

    def _check(self, model: str, body: bytes, deadline_s: float) -> None:
        """See that a revision may be shown. Raises: AccessError, IntegrityError, StoreError."""
        if self._verifier is not None:
            self._verifier.check(self._store(deadline_s), model, body, deadline_s=deadline_s)

    def _depth(self, deadline_s: float) -> int:
        """How many names of a path inside the source come before those of the revision."""
        if self._address.tag or self._address.manifest:
            return 0
        return 1 if self._opened(deadline_s).model else 2


def _identity(address: Address, options: SourceOptions, verifier: Verifier | None) -> str:
    """What the address says, since only the registry's marker tells more: the same over restarts and machines.

    Where signatures are required it is another place: what is remembered of mounts without, or with another key, says
    nothing of what may be shown here.
    """
    named = f":{address.tag}" if address.tag else f"@sha256:{address.manifest}" if address.manifest else ""
    trusting = f"#trusting={verifier.fingerprint[:16]}" if verifier else ""
    return f"{store_at(address.place, options).identity}{named}{trusting}"


def _meant(tags: Mapping[str, Move], model: str, tag: str) -> str:
    """The manifest that a tag means."""
    move = tags.get(tag)
    if move is None or move.manifest is None:
        raise NotFoundError(f"{model}:{tag}: no such tag")
    return move.manifest


def _tree(revision: Revision, identity: str, root: str) -> TreeBuilder:
    """All directories of a revision. root: where it stands inside the source."""
    tree = TreeBuilder(f"{identity}: {revision.name}", root)
    for path, file in revision.files.items():
        tree.add_file(path, _entry(revision, file))
    return tree


def _entry(revision: Revision, file: FileOfRevision) -> Entry:
    return Entry("", EntryKind.FILE, file.size, revision.created_ns, file.content, f"sha256:{file.sha256}",
                 f"{revision.model}/{revision.id}")  # fmt: skip


def _directory(name: str) -> Entry:
    return Entry(name, EntryKind.DIRECTORY)


def _is_below(path: str, folder: str) -> bool:
    return not folder or path == folder or path.startswith(f"{folder}/")


def open_url(url: str, options: SourceOptions) -> RegistrySource:
    """The registry, model or revision that an mfs+…:// URL names. Raises: UsageError."""
    return RegistrySource(layout.parse_address(url), options)
