"""The tree: paths to directories and objects. No bytes, no FUSE, no I/O of its own (listings come through a callable).

A directory is listed when somebody first looks into it, and published whole. A refresh lists again and publishes the
difference: what is unchanged keeps its inode, changed bytes get a new one, and a directory's mtime moves forward
exactly when its visible children change. Once published, metadata never fails: a failed refresh leaves the old tree.

Inode numbers are never reused. Listings are columns, not objects: about 120 bytes a file, so that 300,000 shards fit
into 40 MB. Everything belongs to the trio thread.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from mfs.errors import MfsError, NotFoundError
from mfs.listing import Listing, legal_entries, same_version
from mfs.types import Entry, EntryKind, ObjectId

logger = logging.getLogger(__name__)

ROOT_INODE = 1
_EPOCH_NS = 10**9  # mtime of a directory whose source has none: the same on every mount, and not zero
_TURN_S = 0.005  # of publishing without giving way to readers
_REFRESH_PARALLEL = 4

Page = tuple[str, list[Entry]]
Lister = Callable[[int, str], AsyncIterator[Page]]
"""(source number, path inside the source) -> pages as `sources.base.Source.list` gives them."""
Identity = Callable[[int], str]
"""Source number -> its identity, as ObjectIds carry it."""


class Node(NamedTuple):
    """One inode, as FUSE and the control plane want to see it."""

    inode: int
    kind: EntryKind
    size: int
    mtime_ns: int
    source: int
    """Number of the source, -1 above all sources."""
    path: str
    """Path inside the source."""
    object: ObjectId | None
    """For files."""
    target: str
    """For links."""


class Directory:
    """A directory of the tree; its listing is None until somebody looks."""

    __slots__ = ("inode", "listing", "loading", "mtime_ns", "name", "parent", "path", "published", "removed", "source")

    def __init__(self, inode: int, parent: Directory | None, name: str, source: int, path: str, mtime_ns: int) -> None:
        self.inode = inode
        self.parent = parent
        self.name = name
        self.source = source
        self.path = path
        self.mtime_ns = mtime_ns or _EPOCH_NS
        self.listing: Listing | None = None
        self.loading: _Loading | None = None
        self.removed = False
        self.published = 0
        """When its listing was published, counted in publications of the mount."""

    @property
    def full_path(self) -> str:
        """Path from the root of the mount."""
        if self.parent is None:
            return ""
        return f"{self.parent.full_path}/{self.name}" if self.parent.parent else self.name


class _Loading:
    """One listing under way; `error` is set before `done` if it failed."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: MfsError | None = None


@dataclass
class Changes:
    """What a refresh published."""

    added_count: int = 0
    changed_count: int = 0
    removed_count: int = 0
    errors: list[str] = field(default_factory=list)
    names: list[tuple[int, str]] = field(default_factory=list)
    """(directory inode, name) of everything whose old lookup is no longer right."""


class Namespace:
    """All directories of one mount.

    mounts: names of the sources below the root, or [''] for one source that is the root.
    """

    def __init__(self, mounts: Sequence[str], lister: Lister, identity: Identity) -> None:
        self._lister = lister
        self._identity = identity
        self._owner = array("Q", [0, 0])
        """By inode: inode of the directory whose listing has it."""
        self._index = array("I", [0, 0])
        """By inode: its place in that listing."""
        self._lookups = array("I", [0, 0])
        """By inode: how often the kernel was told of it and has not forgotten."""
        self._orphans: dict[int, Node] = {}
        """Files that left the tree and that the kernel still knows."""
        self._directories: dict[int, Directory] = {}
        self._refreshing = trio.Lock()
        self._published_count = 0
        single = list(mounts) == [""]
        self.root = self._directories[ROOT_INODE] = Directory(ROOT_INODE, None, "", 0 if single else -1, "", 0)
        if not single:
            numbers = {name: number for number, name in enumerate(mounts)}
            entries = [Entry(name, EntryKind.DIRECTORY) for name in mounts]
            listing = self._publish(self.root, entries, Changes())
            for i, inode in enumerate(listing.inodes):
                name = listing.names[i]
                self._directories[inode] = Directory(inode, self.root, name, numbers[name], "", 0)

    # -- looking

    def node(self, inode: int) -> Node | None:
        """What an inode stands for, also after it left the tree while the kernel knows it; None if it never was."""
        directory = self._directories.get(inode)
        if directory is not None:
            return Node(inode, EntryKind.DIRECTORY, 0, directory.mtime_ns, directory.source, directory.path, None, "")
        if inode in self._orphans:
            return self._orphans[inode]
        if not ROOT_INODE < inode < len(self._owner) or not self._owner[inode]:
            return None
        owner = self._directories.get(self._owner[inode])
        if owner is None or owner.listing is None:
            return None
        return self._node_at(owner, owner.listing, self._index[inode])

    def _node_at(self, owner: Directory, listing: Listing, index: int) -> Node:
        entry, inode = listing.entry(index), listing.inodes[index]
        path = f"{owner.path}/{entry.name}" if owner.path else entry.name
        if entry.kind is EntryKind.DIRECTORY:
            known = self._directories.get(inode)
            mtime_ns = known.mtime_ns if known else entry.mtime_ns or _EPOCH_NS
            return Node(inode, entry.kind, 0, mtime_ns, owner.source, path, None, "")
        if entry.kind is EntryKind.SYMLINK:
            size = len(entry.version.encode())
            return Node(inode, entry.kind, size, entry.mtime_ns or _EPOCH_NS, owner.source, path, None, entry.version)
        obj = ObjectId(self._identity(owner.source), path, entry.size, entry.version, entry.digest, entry.locator)
        return Node(inode, entry.kind, entry.size, entry.mtime_ns or _EPOCH_NS, owner.source, path, obj, "")

    def directory(self, inode: int) -> Directory | None:
        """The directory with this inode, None if it is none."""
        known = self._directories.get(inode)
        if known is None:
            node = self.node(inode)
            if node is None or node.kind is not EntryKind.DIRECTORY:
                return None
            owner = self._directories[self._owner[inode]]
            name = node.path.rpartition("/")[2]
            known = self._directories[inode] = Directory(inode, owner, name, owner.source, node.path, node.mtime_ns)
        return known

    def directory_at(self, source: int, path: str) -> Directory | None:
        """The listed directory at a path inside a source, None if nobody has looked there."""
        tops = [d for d in self._directories.values() if d.source == source and d.path == ""]
        return self._below(tops[0], path) if tops and path else tops[0] if tops else None

    async def lookup(self, parent: Directory, name: bytes) -> Node | None:
        """The child with this name, None if there is none. Lists the directory if nobody has."""
        listing = await self.listing(parent)
        index = listing.find(name)
        return None if index < 0 else self._node_at(parent, listing, index)

    def nodes(self, parent: Directory, listing: Listing, start: int) -> Iterator[tuple[int, bytes, Node]]:
        """(index, name, node) of a listing from `start` on, for readdir."""
        for index in range(start, len(listing)):
            yield index, listing.names.raw(index), self._node_at(parent, listing, index)

    async def resolve(self, path: str) -> Node:
        """The node at a path from the mount's root ('' is the root), links not followed. Raises NotFoundError."""
        directory, node = self.root, self.node(ROOT_INODE)
        for part in (part for part in path.split("/") if part):
            current = self.directory(node.inode) if node else None
            found = await self.lookup(current, part.encode("utf-8", "surrogatepass")) if current else None
            if found is None:
                raise NotFoundError(f"{path}: no such file or directory in the mount (looking for {part!r})")
            directory, node = current or directory, found
        assert node is not None
        return node

    async def walk(self, node: Node, path: str) -> AsyncIterator[tuple[str, Node]]:
        """(path, file) of all files at and below a node, links left out."""
        if node.kind is EntryKind.FILE:
            yield path, node
        directory = self.directory(node.inode)
        if directory is None:
            return
        for _, name, child in list(self.nodes(directory, await self.listing(directory), 0)):
            below = f"{path}/{name.decode()}" if path else name.decode()
            async for found in self.walk(child, below):
                yield found

    # -- what the kernel knows

    def remember(self, inode: int) -> None:
        """The kernel was told of an inode."""
        if inode < len(self._lookups):
            self._lookups[inode] += 1

    def forget(self, inode: int, count: int) -> None:
        """The kernel dropped `count` of its references."""
        if inode == ROOT_INODE or inode >= len(self._lookups):
            return
        self._lookups[inode] = max(0, self._lookups[inode] - count)
        if self._lookups[inode] == 0:
            self._orphans.pop(inode, None)
            directory = self._directories.get(inode)
            if directory is not None and directory.removed:
                self._orphan_children(directory)
                del self._directories[inode]

    # -- listing

    async def listing(self, directory: Directory) -> Listing:
        """The directory's listing, fetched once however many ask.

        Raises: MfsError. Cancellation: the others that wait start over.
        """
        while directory.listing is None:
            if directory.loading is not None:
                loading = directory.loading
                await loading.done.wait()
                if loading.error is not None:
                    raise loading.error
                continue
            loading = directory.loading = _Loading()
            try:
                await self._load(directory, Changes(), set())
            except MfsError as error:
                loading.error = error
                raise
            finally:
                directory.loading = None
                loading.done.set()
        return directory.listing

    async def _load(self, directory: Directory, changes: Changes, seen: set[int]) -> None:
        """List a directory at its source and publish it, and whatever came along below it."""
        started = self._published_count
        pages: dict[str, list[Entry]] = {directory.path: []}
        async for path, entries in self._lister(directory.source, directory.path):
            pages.setdefault(path, []).extend(entries)
        # No checkpoint within what stands in one child of the directory, a model say: a reader sees the old one or the
        # new. Between them there may be: 300,000 files at once would hold up every read for seconds.
        child, turn_ends = "", time.monotonic() + _TURN_S
        for path in sorted(pages, key=lambda path: path.split("/")):
            top = path[len(directory.path) :].lstrip("/").partition("/")[0]
            if top != child and time.monotonic() > turn_ends:
                await trio.lowlevel.checkpoint()
                turn_ends = time.monotonic() + _TURN_S
            child = top
            target = directory if path == directory.path else self._below(directory, path)
            # Somebody may have looked for himself meanwhile, later than we did.
            if target is not None and not target.removed and target.published <= started:
                self._publish(target, pages[path], changes)
                seen.add(target.inode)

    def _below(self, top: Directory, path: str) -> Directory | None:
        """The directory at a path of top's source; its parents are published."""
        current: Directory | None = top
        for part in path[len(top.path) :].strip("/").split("/"):
            if current is None or current.listing is None:
                return None
            index = current.listing.find(part.encode())
            current = self.directory(current.listing.inodes[index]) if index >= 0 else None
        return current

    async def refresh(self) -> Changes:
        """List again what was listed, publish what changed. A source that fails keeps its old tree and is named.

        Cancellation: what was published stays.
        """
        changes, seen = Changes(), set[int]()
        async with self._refreshing:  # of two at once, the one that looked first could publish last
            by_depth: dict[int, list[Directory]] = {}
            for directory in self._directories.values():
                if directory.listing is not None and directory.source >= 0:
                    by_depth.setdefault(directory.path.count("/") + bool(directory.path), []).append(directory)
            # Parents first: a source may bring all below a directory along, and a child that is gone is not asked for.
            for depth in sorted(by_depth):
                await self._refresh_all(by_depth[depth], changes, seen)
        return changes

    async def _refresh_all(self, pending: list[Directory], changes: Changes, seen: set[int]) -> None:
        async def worker() -> None:
            while pending:
                directory = pending.pop()
                if directory.inode in seen or directory.removed:
                    continue
                seen.add(directory.inode)
                try:
                    await self._load(directory, changes, seen)
                except MfsError as error:
                    changes.errors.append(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(min(_REFRESH_PARALLEL, len(pending))):
                nursery.start_soon(worker)

    # -- publishing

    def _publish(self, directory: Directory, entries: Sequence[Entry], changes: Changes) -> Listing:
        """Make these the directory's entries. No checkpoint."""
        kept = legal_entries(directory.path, entries)
        old = directory.listing
        self._published_count += 1
        directory.published = self._published_count
        if old is not None and old.adopt(kept):  # by far the most common, and the only one that must be fast
            return old
        inodes: list[int] = []
        gone = set(old.inodes) if old else set()
        moved = False
        replaced: set[str] = set()
        for index, entry in enumerate(kept):
            place = old.find(entry.name.encode()) if old else -1
            before = old.entry(place) if old and place >= 0 else None
            if old and before is not None and same_version(before, entry):
                inode = old.inodes[place]
                gone.discard(inode)
                kept[index] = before._replace(locator=entry.locator)
            else:
                inode = self._new_inode()
                moved = True
                if before is None:
                    changes.added_count += old is not None
                else:
                    changes.changed_count += 1
                    replaced.add(entry.name)
                if old is not None:
                    changes.names.append((directory.inode, entry.name))
            inodes.append(inode)
        if old is not None:
            for inode in gone:
                name = old.names[self._index[inode]]
                self._orphan(inode)
                if name not in replaced:
                    changes.removed_count += 1
                    changes.names.append((directory.inode, name))
            if moved or gone:
                directory.mtime_ns = max(directory.mtime_ns + 1, time.time_ns())
        listing = directory.listing = Listing(kept, inodes)
        for index, inode in enumerate(inodes):
            self._owner[inode] = directory.inode
            self._index[inode] = index
        return listing

    def _new_inode(self) -> int:
        inode = len(self._owner)
        self._owner.append(0)
        self._index.append(0)
        self._lookups.append(0)
        return inode

    def _orphan(self, inode: int) -> None:
        """An inode leaves the tree; what the kernel still knows stays answerable."""
        node = self.node(inode)
        known = self._lookups[inode] and node is not None and node.kind is EntryKind.DIRECTORY
        directory = self.directory(inode) if known else self._directories.get(inode)
        if directory is not None:
            directory.removed = True
            self._orphan_children(directory)
            if not self._lookups[inode]:
                del self._directories[inode]
        elif node is not None and self._lookups[inode]:
            self._orphans[inode] = node
        self._owner[inode] = 0

    def _orphan_children(self, directory: Directory) -> None:
        for inode in directory.listing.inodes if directory.listing else ():
            self._orphan(inode)
        directory.listing = Listing([], [])

    @property
    def listed_count(self) -> int:
        """Directories with a listing."""
        return sum(1 for d in self._directories.values() if d.listing is not None)

    @property
    def listed_bytes(self) -> int:
        """Sum of the sizes in all listings."""
        return sum(sum(d.listing.sizes) for d in self._directories.values() if d.listing is not None)

    @property
    def files_count(self) -> int:
        """Entries in all listings."""
        return sum(len(d.listing) for d in self._directories.values() if d.listing is not None)
