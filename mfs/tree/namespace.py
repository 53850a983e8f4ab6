"""The tree: paths to directories and objects. No bytes, no FUSE, no I/O of its own (listings come through a callable).

A directory is listed when somebody first looks into it, and published whole; `mfs.tree.refresh` lists again. An inode
stands for one version of a file, or for one path (`inodes`): what is unchanged keeps it, changed bytes have another. A
directory's time moves forward exactly when its visible children change. Once published, metadata never fails.

Listings are columns, not objects: about 110 bytes a file beside its inode's place. Everything belongs to the trio
thread.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import trio

from mfs.errors import MfsError, NotFoundError
from mfs.tree.inodes import HIDDEN, ROOT_INODE, directory_seed, entry_key, inode_of, inodes_of
from mfs.tree.listing import Drafts, Listing
from mfs.tree.nodes import Changes, Directory, Facts, Loading, Node
from mfs.tree.places import Places
from mfs.tree.record import Record
from mfs.tree.times import Times
from mfs.types import Entry, EntryKind

_TURN_S = 0.005  # of publishing without giving way to readers
_MODEL_TURN_S = 0.1  # ... within one model, which would be whole otherwise

_FILE, _DIRECTORY = int(EntryKind.FILE), int(EntryKind.DIRECTORY)  # members of an enum take a while to come by

_NOTHING = Listing()  # what is in a directory that is gone

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
        self._mounts = list(mounts)
        self._places = Places()
        self._directories: dict[int, Directory] = {}
        self._listed: dict[tuple[int, str], Directory] = {}
        """Directories of the tree that have a listing, by (source, path)."""
        self._times = Times()
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
        self._times.adopt(records, latest_ns)
        for directory in self._directories.values():
            directory.mtime_ns = self._times.of(directory.source, directory.path, directory.mtime_ns)

    def recorded(self) -> list[tuple[int, str]]:
        """(source, path) of directories that were looked into on an earlier mount and not on this one, from the top."""
        return self._times.recorded()

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
                self._times.forget(source, path)
                return True
        return False

    # -- looking

    def node(self, inode: int) -> Node | None:
        """What an inode stands for, also after it left the tree while the kernel knows it; None if it never was."""
        directory = self._directories.get(inode)
        if directory is not None:
            return Node(inode, EntryKind.DIRECTORY, 0, directory.mtime_ns, directory.source, directory.path, None, "")
        if (orphan := self._places.orphan(inode)) is not None:
            return orphan
        place = self._places.place(inode)
        if place is None or place[0].listing is None:
            return None
        return self._node_at(place[0], place[0].listing, place[1])

    def _node_at(self, owner: Directory, listing: Listing, index: int) -> Node:
        entry, inode = listing.entry(index), listing.inodes[index]
        path = f"{owner.path}/{entry.name}" if owner.path else entry.name
        if entry.kind is EntryKind.DIRECTORY:
            known = self._directories.get(inode)
            mtime_ns = known.mtime_ns if known else self._times.of(owner.source, path, entry.mtime_ns)
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
            place = self._places.place(inode)
            assert place is not None
            owner = place[0]
            name = node.path.rpartition("/")[2]
            known = self._directories[inode] = Directory(inode, owner, name, owner.source, node.path, node.mtime_ns)
        return known

    def directory_at(self, source: int, path: str) -> Directory | None:
        """The listed directory at a path inside a source, None if nobody has looked there."""
        return next((self.below(top, path) for top in self.tops() if top.source == source), None)

    async def lookup(self, parent: Directory, name: bytes) -> Node | None:
        """The child with this name, None if there is none. Lists the directory if nobody has."""
        return self.child(parent, await self.listing(parent), name)

    def child(self, parent: Directory, listing: Listing, name: bytes) -> Node | None:
        """The entry with this name in a listing of `parent`, None if there is none."""
        index = listing.find(name)
        return None if index < 0 or listing.inodes[index] == HIDDEN else self._node_at(parent, listing, index)

    def nodes(self, parent: Directory, listing: Listing, start: int) -> Iterator[tuple[int, bytes, Node]]:
        """(index, name, node) of a listing from `start` on."""
        for index in range(start, len(listing)):
            if listing.inodes[index] == HIDDEN:
                continue
            yield index, listing.names.raw(index), self._node_at(parent, listing, index)

    def facts(self, inode: int) -> Facts | None:
        """What stat(2) shows of an inode, None where `node` is."""
        directory = self._directories.get(inode)
        if directory is not None:
            return inode, _DIRECTORY, 0, directory.mtime_ns
        if (orphan := self._places.orphan(inode)) is not None:
            return inode, orphan.kind, orphan.size, orphan.mtime_ns
        place = self._places.place(inode)
        if place is None or place[0].listing is None:
            return None
        return self.facts_at(place[0], place[0].listing, place[1])

    def facts_at(self, owner: Directory, listing: Listing, index: int) -> Facts:
        """And of the entry at a place in a listing of `owner`; its inode may be HIDDEN."""
        kind = listing.kinds[index]
        if kind == _FILE:
            return listing.inodes[index], kind, listing.sizes[index], listing.mtimes[index]
        node = self._node_at(owner, listing, index)
        return node.inode, kind, node.size, node.mtime_ns

    async def resolve(self, path: str) -> Node:
        """The node at a path from the mount's root ('' is the root), links not followed. Raises NotFoundError."""
        directory, node = self.root, self.node(ROOT_INODE)
        for part in (part for part in path.split("/") if part):
            current = self.directory(node.inode) if node else None
            found = await self.lookup(current, part.encode("utf-8", "surrogatepass")) if current else None
            if found is None:
                where = "" if part == path else f" (there is no {part!r})"
                raise NotFoundError(f"{path}: no such file or directory in the mount{where}")
            directory, node = current or directory, found
        assert node is not None
        return node

    async def walk(self, node: Node, path: str, *, lists: bool = True) -> AsyncIterator[tuple[str, Node]]:
        """(path, file) of all files at and below a node, links left out. Gives way to readers. Raises: MfsError.

        lists: ask for the listing of what nobody has looked into; else that is left out.
        """
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
            if directory is not None and (lists or directory.listing is not None):
                levels.append(self._paths(path, directory, await self.listing(directory)))

    def _paths(self, path: str, parent: Directory, listing: Listing) -> Iterator[tuple[str, Node]]:
        for _, name, node in self.nodes(parent, listing, 0):
            yield (f"{path}/{name.decode()}" if path else name.decode()), node

    # -- from one daemon to the next

    def export(self) -> dict[str, Any]:
        """What the tree shows, for `restore` in another process. No checkpoint."""
        return {
            "times": self._times.export(),
            "directories": [
                [d.source, d.path, d.mtime_ns, d.listing.export()] for d in self._listed.values()
                if d.listing is not None
            ],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Show what `export` described, in a tree that shows nothing yet."""
        self._times.restore(state["times"])
        tops = {top.source: top for top in self.tops()}
        for source, path, mtime_ns, listing in sorted(state["directories"], key=lambda row: row[1].split("/")):
            directory = self.below(tops[source], path) if source >= 0 else self.root
            if directory is None:
                continue
            directory.mtime_ns = mtime_ns
            if directory.listing is None:
                self._show(directory, Listing.restored(listing), None, 0)

    def listing_once_shown(self, directory: Directory, exported: list[Any]) -> Listing:
        """What a directory showed when somebody began to read it: `Listing.export` of it."""
        listing = Listing.restored(exported)
        listing.inodes = inodes_of(listing.keys, self._seed(directory))
        return listing

    def adopt_directory(self, source: int, path: str, mtime_ns: int) -> None:
        """The kernel knows a directory from another daemon: it can be looked into before what it stands in is listed.

        mtime_ns: as it was shown, for want of anything newer.
        """
        self._places.adopt(self._adopted(source, path, mtime_ns).inode, None)

    def _adopted(self, source: int, path: str, mtime_ns: int) -> Directory:
        current = next(top for top in self.tops() if top.source == source)
        for name in filter(None, path.split("/")):
            inode = inode_of(entry_key(name.encode("utf-8", "surrogatepass"), b""), self._seed(current))
            below = f"{current.path}/{name}" if current.path else name
            known = self.directory(inode)
            if known is None:
                time_ns = self._times.of(source, below, mtime_ns if below == path else 0)
                known = self._directories[inode] = Directory(inode, current, name, source, below, time_ns)
            current = known
        return current

    def adopt_file(self, node: Node) -> None:
        """The kernel knows a file from another daemon, which the tree need not show any more."""
        self._places.adopt(node.inode, None if self._places.place(node.inode) else node)

    def adopted_name(self, node: Node) -> tuple[int, str]:
        """Where such a file was looked up: (inode of the directory, name)."""
        directory, _, name = node.path.rpartition("/")
        return self._adopted(node.source, directory, 0).inode, name

    # -- what the kernel knows

    def remember(self, inode: int, at: tuple[Listing, int] | None = None) -> bool:
        """The kernel was told of an inode. Returns whether for the first time."""
        return self._places.remember(inode, at)

    def forget(self, inode: int, count: int) -> bool:
        """The kernel dropped `count` of its references. Returns whether it knows nothing of the inode any more."""
        if inode == ROOT_INODE or not self._places.forget(inode, count):
            return False
        directory = self._directories.get(inode)
        if directory is not None and directory.removed:
            del self._directories[inode]
        return True

    def names_of(self, inode: int) -> list[tuple[int, str]]:
        """Where a file of the tree can be looked up: (inode of the directory, name); none for what has left it."""
        directory, index = self._places.place(inode) or (None, 0)
        if directory is None or directory.listing is None:
            return []
        return [(directory.inode, directory.listing.names[index])]

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
        # No checkpoint within what stands in one child of the directory, a model say, unless it is too much. Between
        # them there may be: 300,000 files at once would hold up every read for seconds.
        child, turn_began = "", time.monotonic()
        for path, listing in drafts.finish().items():
            top = path[len(directory.path) :].lstrip("/").partition("/")[0]
            if time.monotonic() - turn_began > (_TURN_S if top != child else _MODEL_TURN_S):
                await trio.lowlevel.checkpoint()
                turn_began = time.monotonic()
            child = top
            target = self.below(directory, path)
            if target is not None and not self.is_newer(target, started):
                self.publish(target, listing, Changes())

    def below(self, top: Directory, path: str) -> Directory | None:
        """The directory at a path of top's source, top itself or one below; None if nothing published leads there."""
        if path == top.path:
            return top
        if known := self._listed.get((top.source, path)):
            return known
        above, _, name = path.rpartition("/")
        parent = self._listed.get((top.source, above))
        index = parent.listing.find(name.encode()) if parent is not None and parent.listing is not None else -1
        return self.directory(parent.listing.inodes[index]) if index >= 0 else None  # type: ignore[union-attr]

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
        directory.published, new_count = self._published_count, 0
        if old is None:
            self._times.recall(directory, new)
        elif new is old or old.has_same_content(new):  # by far the most common, and the only one that must be fast
            old.adopt_locators(new)
            return old
        else:
            new_count = self._times.change(directory, old, new, changes)
        self._show(directory, new, old, new_count)
        if self.on_published is not None and directory.source >= 0:
            self.on_published(directory)
        return new

    def _show(self, directory: Directory, new: Listing, old: Listing | None, new_count: int) -> None:
        """Put a listing in an older one's place."""
        self._places.show(directory, new, self._seed(directory), old, new_count)
        if old is not None:
            self._orphan(directory, old, new)
            self._count(old, -1)
        for inode in self._inodes_of_directories(new):
            known = self._directories.get(inode)
            if known is not None and known.removed:  # it is there again; who looks now gets another
                del self._directories[inode]
        directory.listing = new
        self._listed[directory.source, directory.path] = directory
        self._times.see(max(new.mtimes, default=0), directory.mtime_ns)
        self._count(new, +1)

    def _seed(self, directory: Directory) -> int:
        source = directory.source
        if source < 0:
            return directory_seed("", "", "")
        return directory_seed(self._mounts[source], self._identity(source), directory.path)

    @staticmethod
    def _inodes_of_directories(listing: Listing) -> Iterator[int]:
        at = listing.kinds.find(EntryKind.DIRECTORY)
        while at >= 0:
            yield listing.inodes[at]
            at = listing.kinds.find(EntryKind.DIRECTORY, at + 1)

    def _count(self, listing: Listing, sign: int) -> None:
        self.listed_bytes += sign * listing.total_bytes
        self.files_count += sign * len(listing)

    def _orphan(self, parent: Directory, old: Listing, new: Listing) -> None:
        """What a directory shows no longer leaves the tree, with all below it; what the kernel knows of it stays
        answerable.
        """
        staying = set(new.inodes)
        leaving = [(parent, old, index) for index, inode in enumerate(old.inodes) if inode and inode not in staying]
        for _, listing, index in leaving:  # no recursion: sources may be deep
            directory = self._directories.get(listing.inodes[index])
            if directory is not None and directory.listing is not None:
                below = directory.listing
                leaving += [(directory, below, place) for place in range(len(below)) if below.inodes[place]]
        for owner, listing, index in reversed(leaving):
            self._leave(owner, listing, index)

    def _leave(self, owner: Directory, listing: Listing, index: int) -> None:
        inode = listing.inodes[index]
        is_known = self._places.is_known(inode)
        if listing.kinds[index] != EntryKind.DIRECTORY:
            self._places.hide(inode, self._node_at(owner, listing, index) if is_known else None)
            return
        directory = self._directories.get(inode)
        if directory is None and is_known:
            node = self._node_at(owner, listing, index)
            directory = Directory(inode, owner, listing.names[index], owner.source, node.path, node.mtime_ns)
            self._directories[inode] = directory
        self._places.hide(inode)
        if directory is None:
            return
        directory.removed = True
        if self._listed.get((directory.source, directory.path)) is directory:
            del self._listed[directory.source, directory.path]
        self._places.drop_directory(inode)
        if directory.listing is not None:
            self._count(directory.listing, -1)
            if self.on_published is not None:
                self.on_published(directory)
        directory.listing = _NOTHING
        if not is_known:
            del self._directories[inode]

    def listed(self) -> list[Directory]:
        """Directories of the tree that have a listing."""
        return list(self._listed.values())

    @property
    def listed_count(self) -> int:
        """Directories with a listing."""
        return sum(1 for d in self._directories.values() if d.listing is not None)
