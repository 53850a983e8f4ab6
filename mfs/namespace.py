"""The tree: paths to directories and objects. No bytes, no FUSE, no I/O of its own (listings come through a callable).

A directory is listed when somebody first looks into it, and published whole; `mfs.refresh` lists again. What is
unchanged then keeps its inode, changed bytes get a new one, and a directory's time moves forward exactly when its
visible children change. Once published, metadata never fails.

Times. A file shows its source's time as long as it is the same version. A directory shows its source's, or 1970, until
its children change for the first time; then the time of that publication, later than any time ever shown here, so that
whoever remembers the latest time of a tree sees every change. `mfs.tree_record` carries both over remounts.

Inode numbers are never reused. Listings are columns, not objects: about 120 bytes a file, so that 300,000 shards fit
into 40 MB. Everything belongs to the trio thread.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import trio

from mfs.errors import MfsError, NotFoundError
from mfs.listing import Drafts, Listing, merged
from mfs.nodes import Changes, Directory, Loading, Node
from mfs.tree_record import Record
from mfs.types import Entry, EntryKind
from mfs.workers.frames import object_from_wire, object_to_wire

ROOT_INODE = 1
_TURN_S = 0.005  # of publishing without giving way to readers

Lister = Callable[[int, str, Drafts], Awaitable[None]]
"""(source number, path inside the source, what to fill): see `sources.base.Source.list`. Raises: MfsError."""
Identity = Callable[[int], str]
"""Source number -> its identity, as ObjectIds carry it."""


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
        self._records: dict[tuple[int, str], Record] = {}
        """By (source, path): what directories looked like when they were last mounted, until they are published."""
        self._latest_ns = 0
        """No time shown here was ever later."""
        self._published_count = 0
        self.listed_bytes = 0
        """Sum of the sizes in all listings."""
        self.files_count = 0
        """Entries in all listings."""
        self.on_published: Callable[[Directory], None] | None = None
        """Told of a directory that was listed for the first time, shows something new, or was listed and is removed."""
        single = list(mounts) == [""]
        self.root = self._directories[ROOT_INODE] = Directory(ROOT_INODE, None, "", 0 if single else -1, "", 0)
        if not single:
            numbers = {name: number for number, name in enumerate(mounts)}
            entries = [Entry(name, EntryKind.DIRECTORY) for name in mounts]
            drafts = Drafts("")
            drafts.add("", entries)
            listing = self.publish(self.root, drafts.finish()[""], Changes())
            for i, inode in enumerate(listing.inodes):
                name = listing.names[i]
                self._directories[inode] = Directory(inode, self.root, name, numbers[name], "", 0)

    def adopt_records(self, records: Mapping[tuple[int, str], Record], latest_ns: int) -> None:
        """Take over the times of an earlier mount, before anything is listed.

        records: by (source, path). latest_ns: the latest time among them.
        """
        self._records = dict(records)
        self._latest_ns = max(self._latest_ns, latest_ns)
        for directory in self._directories.values():
            directory.mtime_ns = self._time_of(directory.source, directory.path, directory.mtime_ns)

    def recorded(self) -> list[tuple[int, str]]:
        """(source, path) of directories that were looked into on an earlier mount and not on this one, from the top."""
        return sorted(self._records, key=lambda place: (place[1].count("/"), place[1] != ""))

    def forget_record(self, source: int, path: str) -> bool:
        """Forget what a directory showed on an earlier mount, if what is published says that there is none any more.
        Returns whether that is so.
        """
        current = next((top for top in self.tops() if top.source == source), None)
        for name in filter(None, path.split("/")):
            if current is None or current.listing is None:
                return False
            index = current.listing.find(name.encode())
            current = self.directory(current.listing.inodes[index]) if index >= 0 else None
            if current is None:
                self._records.pop((source, path), None)
                return True
        return False

    def _time_of(self, source: int, path: str, listed_ns: int) -> int:
        """The time of a directory nobody has looked into yet."""
        record = self._records.get((source, path))
        return record.mtime_ns if record else listed_ns

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
            mtime_ns = known.mtime_ns if known else self._time_of(owner.source, path, entry.mtime_ns)
            return Node(inode, entry.kind, 0, mtime_ns, owner.source, path, None, "")
        if entry.kind is EntryKind.SYMLINK:
            size = len(entry.version.encode())
            return Node(inode, entry.kind, size, entry.mtime_ns, owner.source, path, None, entry.version)
        obj = entry.object_at(self._identity(owner.source), owner.path)
        return Node(inode, entry.kind, entry.size, entry.mtime_ns, owner.source, path, obj, "")

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
        return next((self.below(top, path) for top in self.tops() if top.source == source), None)

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
        """(path, file) of all files at and below a node, links left out. Gives way to readers. Raises: MfsError."""
        levels, turn_ends = [iter([(path, node)])], time.monotonic() + _TURN_S  # no recursion: sources may be deep
        while levels:
            found = next(levels[-1], None)
            if found is None:
                levels.pop()
                continue
            if time.monotonic() > turn_ends:
                await trio.lowlevel.checkpoint()
                turn_ends = time.monotonic() + _TURN_S
            path, node = found
            if node.kind is EntryKind.FILE:
                yield path, node
            directory = self.directory(node.inode)
            if directory is not None:
                levels.append(self._paths(path, directory, await self.listing(directory)))

    def _paths(self, path: str, parent: Directory, listing: Listing) -> Iterator[tuple[str, Node]]:
        for _, name, node in self.nodes(parent, listing, 0):
            yield (f"{path}/{name.decode()}" if path else name.decode()), node

    # -- from one daemon to the next

    def export(self) -> dict[str, Any]:
        """The whole tree with its inodes, for `restore` in another process. No checkpoint."""
        return {
            "owner": self._owner.tobytes(), "index": self._index.tobytes(), "lookups": self._lookups.tobytes(),
            "published": self._published_count, "latest_ns": self._latest_ns,
            "records": [[*place, *record] for place, record in self._records.items()],
            "orphans": [
                [node.inode, node.kind, node.size, node.mtime_ns, node.source, node.path,
                 object_to_wire(node.object) if node.object else None, node.target]
                for node in self._orphans.values()
            ],
            "directories": [
                [d.inode, d.parent.inode if d.parent else 0, d.name, d.source, d.path, d.mtime_ns, d.removed,
                 d.published, d.listing.export() if d.listing is not None else None]
                for d in self._directories.values()
            ],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Become the tree that `export` described, in place of this one."""
        self._owner = array("Q", state["owner"])
        self._index = array("I", state["index"])
        self._lookups = array("I", state["lookups"])
        self._published_count, self._latest_ns = state["published"], state["latest_ns"]
        self._records = {(source, path): Record(*fields) for source, path, *fields in state["records"]}
        self._orphans = {}
        for inode, kind, size, mtime_ns, source, path, fields, target in state["orphans"]:
            obj = object_from_wire(fields) if fields else None
            self._orphans[inode] = Node(inode, EntryKind(kind), size, mtime_ns, source, path, obj, target)
        self._directories = {ROOT_INODE: self.root}
        self.listed_bytes = self.files_count = 0
        parents: dict[int, int] = {}
        for inode, parent, name, source, path, mtime_ns, removed, published, listing in state["directories"]:
            directory = self._directories.setdefault(inode, Directory(inode, None, name, source, path, mtime_ns))
            directory.mtime_ns, directory.removed, directory.published = mtime_ns, removed, published
            directory.listing = Listing.restored(listing) if listing is not None else None
            if directory.listing is not None:
                self._count(directory.listing, +1)
            parents[inode] = parent
        for inode, parent in parents.items():
            if inode != ROOT_INODE:  # the parent of one that left the tree may be gone itself
                self._directories[inode].parent = self._directories.get(parent, self.root)

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
            loading = directory.loading = Loading()
            try:
                await self._load(directory)
            except MfsError as error:
                loading.error = error
                raise
            finally:
                directory.loading = None
                loading.done.set()
        return directory.listing

    async def _load(self, directory: Directory) -> None:
        """List a directory at its source and publish it, and whatever came along below it."""
        started, drafts = self._published_count, Drafts(directory.path)
        await self._lister(directory.source, directory.path, drafts)
        # No checkpoint within what stands in one child of the directory, a model say. Between them there may be:
        # 300,000 files at once would hold up every read for seconds.
        child, turn_ends = "", time.monotonic() + _TURN_S
        for path, listing in drafts.finish().items():
            top = path[len(directory.path) :].lstrip("/").partition("/")[0]
            if top != child and time.monotonic() > turn_ends:
                await trio.lowlevel.checkpoint()
                turn_ends = time.monotonic() + _TURN_S
            child = top
            target = self.below(directory, path)
            if target is not None and not self.is_newer(target, started):
                self.publish(target, listing, Changes())

    def below(self, top: Directory, path: str) -> Directory | None:
        """The directory at a path of top's source, top itself or one below; None if nothing published leads there."""
        current: Directory | None = top
        for part in [part for part in path[len(top.path) :].split("/") if part]:
            if current is None or current.listing is None:
                return None
            index = current.listing.find(part.encode())
            current = self.directory(current.listing.inodes[index]) if index >= 0 else None
        return current

    def tops(self) -> list[Directory]:
        """The directories that stand for sources."""
        if self.root.source >= 0:
            return [self.root]
        assert self.root.listing is not None
        return [self._directories[inode] for inode in self.root.listing.inodes]

    @property
    def published_count(self) -> int:
        """How many listings were published so far."""
        return self._published_count

    def is_listed(self, inode: int) -> bool:
        """Whether this is a directory that has a listing."""
        directory = self._directories.get(inode)
        return directory is not None and directory.listing is not None

    def is_newer(self, directory: Directory, published_count: int) -> bool:
        """Whether a listing asked for when `published_count` were published comes too late for a directory: it is gone,
        or somebody has looked for himself meanwhile.
        """
        return directory.removed or directory.published > published_count

    # -- publishing

    def publish(self, directory: Directory, new: Listing, changes: Changes) -> Listing:
        """Make this the directory's listing; returns the one that counts. No checkpoint."""
        old = directory.listing
        self._published_count += 1
        directory.published = self._published_count
        if old is None:
            self._recall(directory, new)
            new.inodes = self._new_inodes(len(new))
            if len(new):  # all at once: a loop over 300,000 would hold up readers
                first = new.inodes[0]
                self._owner[first:] = array("Q", (directory.inode,)) * len(new)
                self._index[first:] = array("I", range(len(new)))
        elif new is old or old.has_same_content(new):  # by far the most common, and the only one that must be fast
            old.adopt_locators(new)
            return old
        else:
            self._replace(directory, old, new, changes)
            for index, inode in enumerate(new.inodes):
                self._owner[inode] = directory.inode
                self._index[inode] = index
        self._latest_ns = max(self._latest_ns, max(new.mtimes, default=0), directory.mtime_ns)
        directory.listing = new
        self._count(new, +1)
        if self.on_published is not None and directory.source >= 0:
            self.on_published(directory)
        return new

    def _recall(self, directory: Directory, new: Listing) -> None:
        """A directory is published for the first time: what it showed before holds on if it is unchanged since."""
        record = self._records.pop((directory.source, directory.path), None)
        if record is None:
            return
        if record.fingerprint == new.fingerprint() and len(record.times) == 8 * len(new):
            new.mtimes = array("Q", record.times)
        else:
            directory.mtime_ns = self._later()

    def _replace(self, directory: Directory, old: Listing, new: Listing, changes: Changes) -> None:
        """Give the new listing its inodes and times; name what the kernel must ask again."""
        directory.mtime_ns = self._later()
        inodes = array("Q")
        for place, index in merged(old, new):
            if index < 0:
                changes.removed_count += 1
                changes.names.append((directory.inode, old.names[place]))
                self._orphan(old.inodes[place])
            elif place >= 0 and old.is_same_version(place, new, index):
                inodes.append(old.inodes[place])
                new.mtimes[index] = old.mtimes[place]
            else:
                inodes.extend(self._new_inodes(1))
                changes.names.append((directory.inode, new.names[index]))
                if place < 0:
                    changes.added_count += 1
                    continue
                changes.changed_count += 1
                self._orphan(old.inodes[place])
                if new.mtimes[index] == old.mtimes[place]:
                    new.mtimes[index] = directory.mtime_ns
        new.inodes = inodes
        self._count(old, -1)

    def _later(self) -> int:
        """A time later than any shown before, now if the clocks agree."""
        self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
        return self._latest_ns

    def _count(self, listing: Listing, sign: int) -> None:
        self.listed_bytes += sign * listing.total_bytes
        self.files_count += sign * len(listing)

    def _new_inodes(self, count: int) -> array[int]:
        first = len(self._owner)
        for column in (self._owner, self._index, self._lookups):
            column.frombytes(bytes(count * column.itemsize))
        return array("Q", range(first, first + count))

    def _orphan(self, inode: int) -> None:
        """An inode leaves the tree with all below it; what the kernel still knows stays answerable."""
        leaving = [inode]  # no recursion: sources may be deep
        for parent in leaving:
            directory = self._directories.get(parent)
            if directory is not None and directory.listing is not None:
                leaving += directory.listing.inodes
        for leaver in reversed(leaving):  # a child is looked up in its parent's listing
            self._leave(leaver)

    def _leave(self, inode: int) -> None:
        node = self.node(inode)
        known = self._lookups[inode] and node is not None and node.kind is EntryKind.DIRECTORY
        directory = self.directory(inode) if known else self._directories.get(inode)
        if directory is not None:
            directory.removed = True
            if directory.listing is not None:
                self._count(directory.listing, -1)
                if self.on_published is not None:
                    self.on_published(directory)
            directory.listing = Listing()
            if not self._lookups[inode]:
                del self._directories[inode]
        elif node is not None and self._lookups[inode]:
            self._orphans[inode] = node
        self._owner[inode] = 0

    @property
    def listed_count(self) -> int:
        """Directories with a listing."""
        return sum(1 for d in self._directories.values() if d.listing is not None)
