"""FUSE handlers: each says in the kernel's words what the namespace and the reader say in ours. No policy here.

A handler takes the node and the body of a request and returns the body of the answer, or a coroutine where it has to
wait (`loop.Handler`). Those of files stand in `files`.
"""

from __future__ import annotations

import errno
import logging
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import trio

from mfs.fuse import protocol
from mfs.fuse.backing import NodeIds
from mfs.fuse.device import Agreement
from mfs.fuse.files import FileOperations
from mfs.fuse.journal import AGREEMENT, FORMAT, Journal
from mfs.fuse.loop import Body, Handler, RefusedError, Waited
from mfs.fuse.patience import UnknownNodeError, patient
from mfs.fuse.protocol import Opcode
from mfs.fuse.reader import Reader
from mfs.fuse.times import OperationTimes
from mfs.fuse.waiting import Waiting
from mfs.tree.inodes import HIDDEN
from mfs.tree.listing import Listing
from mfs.tree.namespace import Namespace
from mfs.tree.nodes import Directory, Facts, Node
from mfs.types import EntryKind
from mfs.workers.shares import group_of_directory

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 4096
_NAME_BYTES_MAX = 255
_MODES: dict[int, int] = {EntryKind.FILE: stat.S_IFREG | 0o444, EntryKind.DIRECTORY: stat.S_IFDIR | 0o555,
          EntryKind.SYMLINK: stat.S_IFLNK | 0o777}  # fmt: skip
_DIRECTORY = int(EntryKind.DIRECTORY)  # as in `namespace`
_XATTR_PREFIX = "user.mfs."
_NAME_CACHE_S = 60
"""How long the kernel may believe a name without asking. A refresh tells it at once what changed; this bounds the harm
of a notification that gets lost."""
_INODE_CACHE_S = 3600
"""An inode never changes, so its attributes may be believed; directories change and are asked again after a second."""
_DIRECTORY_CACHE_S = 1
_ENTRIES_MAX = 256
"""Of one answer to readdir, about 2 ms: the kernel has room for thousands (10,000 took up to 148 ms) and asks again."""


@dataclass(frozen=True)
class OwnerConfig:
    """Who owns the files, as seen from outside."""

    uid: int
    gid: int
    umask: int = 0
    """Bits taken away from 0444 and 0555."""


@dataclass
class _OpenDirectory:
    directory: Directory
    listing: Listing


class Operations:
    """One mounted tree."""

    def __init__(self, namespace: Namespace, reader: Reader, owner: OwnerConfig, *, timeout_s: float) -> None:
        """timeout_s: as long as a question about a node that we do not know yet may wait until the tree has settled."""
        self._timeout_s = timeout_s
        self._namespace = namespace
        self._reader = reader
        self._owner = owner
        self._modes = {int(kind): (mode & ~owner.umask, 1 + (kind == _DIRECTORY)) for kind, mode in _MODES.items()}
        """By kind: mode and links."""
        self.journal = Journal.create()
        self._node_ids = NodeIds()
        self._waiting = Waiting()
        self.files = FileOperations(namespace, reader, self._node_ids, self.journal, self._waiting)
        self._open_directories: dict[int, _OpenDirectory] = {}
        self._directory_handle = time.monotonic_ns()  # as in `handles`
        self.settled = trio.Event()
        """Set when what the tree shows is as new as the sources say; one that took a mount over may have to look."""
        self.settled.set()
        self.handlers: dict[Opcode, Handler] = {
            Opcode.LOOKUP: self.lookup, Opcode.FORGET: self.forget, Opcode.BATCH_FORGET: self.batch_forget,
            Opcode.GETATTR: self.getattr, Opcode.READLINK: self.readlink, Opcode.ACCESS: self.access,
            Opcode.OPENDIR: self.opendir, Opcode.READDIR: self.readdir, Opcode.READDIRPLUS: self.readdirplus,
            Opcode.RELEASEDIR: self.releasedir, Opcode.OPEN: self.files.open, Opcode.READ: self.files.read,
            Opcode.FLUSH: self.files.flush, Opcode.RELEASE: self.files.release, Opcode.STATFS: self.statfs,
            Opcode.LISTXATTR: self.listxattr, Opcode.GETXATTR: self.getxattr, Opcode.DESTROY: self.destroy,
        }  # fmt: skip
        """All there is to ask of a read-only tree."""
        self.times = OperationTimes(self.handlers)
        self.generation, self.crashes_count = 1, 0
        """Which daemon of this mount we are, the first being 1, and how many before us were killed or failed."""

    # -- names

    def lookup(self, node: int, body: memoryview) -> Body | Waited:
        """The child of a directory by its name."""
        parent, name = self._directory(node), bytes(body[:-1])
        if len(name) > _NAME_BYTES_MAX:  # newer kernels send such names on (fs/fuse/dir.c, name_max)
            raise RefusedError(errno.ENAMETOOLONG)
        if name == b".":
            return self._entry(self._facts(node))
        if name == b"..":
            return self._entry(self._facts((parent.parent or parent).inode))
        if parent.listing is None:
            return self._lookup_unlisted(parent, name)
        return self._child(parent, parent.listing, name)

    async def _lookup_unlisted(self, parent: Directory, name: bytes) -> Body:
        return self._child(parent, await self._listing(parent), name)

    def _child(self, parent: Directory, listing: Listing, name: bytes) -> Body:
        index = listing.find(name)
        if index < 0 or listing.inodes[index] == HIDDEN:
            raise RefusedError(errno.ENOENT)
        is_current = listing is parent.listing
        return self._entry(self._namespace.facts_at(parent, listing, index), (listing, index) if is_current else None)

    def _entry(self, facts: Facts, at: tuple[Listing, int] | None = None) -> Body:
        self._remember(facts, at)
        return (self._entry_answer(facts),)

    def _remember(self, facts: Facts, at: tuple[Listing, int] | None) -> None:
        """at: see `Namespace.remember`."""
        inode, kind, _, _ = facts
        if self._namespace.remember(inode, at) and kind == _DIRECTORY:
            directory = self.files.entry(inode)
            if directory.source >= 0:
                self.journal.note(inode, [kind, directory.source, directory.path, directory.mtime_ns])

    def _entry_answer(self, facts: Facts) -> bytes:
        known_as = self._node_ids.node_of(facts[0])
        return protocol.entry_answer(known_as, _NAME_CACHE_S, _attributes_valid_s(facts), self._attributes(facts))

    def forget(self, node: int, body: memoryview) -> Body:
        """The kernel drops references of one node."""
        self._forget(node, *protocol.FORGET_IN.unpack_from(body))
        return ()

    def batch_forget(self, node: int, body: memoryview) -> Body:
        """And of several."""
        for forgotten, count in protocol.forgotten(body):
            self._forget(forgotten, count)
        return ()

    def _forget(self, node: int, count: int) -> None:
        inode = self._node_ids.inode_of(node)
        if self._namespace.forget(inode, count):
            self.files.forget(node)
            row = self.journal.row(inode)
            if row is not None and row[0] == EntryKind.DIRECTORY:
                self.journal.forget(inode)

    def getattr(self, node: int, body: memoryview) -> Body:
        """What stat(2) shows."""
        facts = self._facts(node)
        return (protocol.attributes_answer(_attributes_valid_s(facts), self._attributes(facts)),)

    def readlink(self, node: int, body: memoryview) -> Body:
        """The target of a link."""
        return (self.files.entry(node).target.encode(),)

    def access(self, node: int, body: memoryview) -> Body:
        """Nothing beyond the modes, which the kernel has checked."""
        return ()

    # -- directories

    def opendir(self, node: int, body: memoryview) -> Body | Waited:
        """A handle on a directory as it is now."""
        directory = self._directory(node)
        if directory.listing is None:
            return self._opendir_unlisted(directory)
        return self._opened_directory(directory, directory.listing)

    async def _opendir_unlisted(self, directory: Directory) -> Body:
        return self._opened_directory(directory, await self._listing(directory))

    def _opened_directory(self, directory: Directory, listing: Listing) -> Body:
        self._directory_handle += 1
        self._open_directories[self._directory_handle] = _OpenDirectory(directory, listing)
        return (protocol.open_answer(self._directory_handle, 0),)

    async def _listing(self, directory: Directory) -> Listing:
        with self._waiting.for_(group_of_directory(directory.source, directory.path)):
            return await self._namespace.listing(directory)

    def readdir(self, node: int, body: memoryview) -> Body | Waited:
        """Names, from an offset on, as many as fit."""
        return self._entries(node, body, plus=False)

    def readdirplus(self, node: int, body: memoryview) -> Body | Waited:
        """Names with what LOOKUP would say of each."""
        return self._entries(node, body, plus=True)

    def _entries(self, directory_node: int, body: memoryview, *, plus: bool) -> Body | Waited:
        handle, offset, room = protocol.READ_IN.unpack_from(body)
        opened = self._open_directories.get(handle)
        if opened is None:
            return self._entries_of_another(directory_node, handle, bytes(body), plus=plus)
        answer: list[bytes] = []
        directory, listing = opened.directory, opened.listing
        is_current = listing is directory.listing
        for index in range(offset, len(listing)):
            facts = self._namespace.facts_at(directory, listing, index)
            inode, kind, _, _ = facts
            if inode == HIDDEN:
                continue
            entry = protocol.directory_entry(inode, index + 1, _MODES[kind], listing.names.raw(index))
            if plus:
                entry = self._entry_answer(facts) + entry
            room -= len(entry)
            if room < 0 or len(answer) == _ENTRIES_MAX:
                break
            answer.append(entry)
            if plus:
                self._remember(facts, (listing, index) if is_current else None)
        return (b"".join(answer),)

    async def _entries_of_another(self, node: int, handle: int, body: bytes, *, plus: bool) -> Body:
        """The handle is another daemon's: the directory as it is now stands for it, from here on unchanged."""
        directory = self._directory(node)
        opened = _OpenDirectory(directory, await self._listing(directory))
        self._open_directories.setdefault(handle, opened)
        answer = self._entries(node, memoryview(body), plus=plus)
        assert isinstance(answer, tuple)
        return answer

    def releasedir(self, node: int, body: memoryview) -> Body:
        """The handle is closed."""
        (handle,) = protocol.RELEASE_IN.unpack_from(body)
        self._open_directories.pop(handle, None)
        return ()

    # -- from one daemon to the next

    def export(self) -> dict[str, Any]:
        """What the journal does not say, for `restore` in another process."""
        return {
            "directories": [
                [handle, opened.directory.inode, opened.listing.export()]
                for handle, opened in self._open_directories.items()
                if opened.listing is not opened.directory.listing
            ],
            "files": self.files.export(),
        }

    def hold(self) -> None:
        """Leave journal and backing files as `export` and the journal say, for another daemon takes them over."""
        self.journal.hold()
        self.files.passthrough.hold()

    def go_on(self) -> None:
        """Nobody has taken over."""
        self.journal.go_on()
        self.files.passthrough.go_on()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with open directories as they were; the namespace is restored and the journal inherited already."""
        for handle, inode, fields in state["directories"]:
            if (directory := self._namespace.directory(inode)) is not None:
                listing = self._namespace.listing_once_shown(directory, fields)
                self._open_directories[handle] = _OpenDirectory(directory, listing)
        self.files.restore(state["files"])

    def inherit(self, journal: Journal) -> list[tuple[int, str]]:
        """Go on where the daemon stopped whose journal this is, before anything is answered.

        Returns the names that the kernel may have to be told of: (inode of the directory, name).
        """
        self.journal.close()
        self.journal = journal
        for _, row in journal.rows():
            if row[0] == EntryKind.DIRECTORY:
                self._namespace.adopt_directory(*row[1:])
        renewed = self.files.inherit(journal)
        for opcode, handler in self.handlers.items():
            self.handlers[opcode] = patient(handler, lambda: self.settled, self._timeout_s)
        return renewed

    def note_agreement(self, agreement: Agreement, identities: Sequence[str], *, after_crash: bool) -> None:
        """Write down what was said at INIT, of which sources the tree is and how many daemons it has had, for whoever
        comes next.

        after_crash: the daemon before us has failed.
        """
        before = self.journal.row(AGREEMENT)
        if before is not None:
            self.generation, self.crashes_count = before[4:6] or (1, 0)  # an earlier version does not count
            self.generation += 1
            self.crashes_count += after_crash
        counts = [self.generation, self.crashes_count]
        self.journal.note(AGREEMENT, [FORMAT, agreement.request, agreement.reply, list(identities), *counts])

    def close_all(self) -> None:
        """Give back what the kernel will not release any more: the mount is gone."""
        self.files.close_all()
        self._open_directories.clear()

    # -- the rest

    def statfs(self, node: int, body: memoryview) -> Body:
        """How large all that was listed is."""
        blocks = self._namespace.listed_bytes // _BLOCK_BYTES
        return (protocol.statfs_answer(blocks, self._namespace.files_count, _NAME_BYTES_MAX),)

    def listxattr(self, node: int, body: memoryview) -> Waited:
        """The names of the user.mfs.* attributes."""
        (room,) = protocol.GETXATTR_IN.unpack_from(body)
        return self._xattr_names(self.files.entry(node), room)

    async def _xattr_names(self, node: Node, room: int) -> Body:
        names = await self._reader.attributes(node)
        return _fitting(b"".join(f"{_XATTR_PREFIX}{key}\0".encode() for key in names), room)

    def getxattr(self, node: int, body: memoryview) -> Waited:
        """One of them."""
        (room,) = protocol.GETXATTR_IN.unpack_from(body)
        name = bytes(body[protocol.GETXATTR_IN.size : -1]).decode("utf-8", "replace")
        if not name.startswith(_XATTR_PREFIX):  # security.*, system.posix_acl_*: asked often, never there
            raise RefusedError(errno.ENODATA)
        return self._xattr(self.files.entry(node), name.removeprefix(_XATTR_PREFIX), room)

    async def _xattr(self, node: Node, key: str, room: int) -> Body:
        value = (await self._reader.attributes(node)).get(key)
        if value is None:
            raise RefusedError(errno.ENODATA)
        return _fitting(value.encode(), room)

    def destroy(self, node: int, body: memoryview) -> Body:
        """The last that is asked before an orderly end."""
        return ()

    # -- helpers

    def _directory(self, node: int) -> Directory:
        directory = self._namespace.directory(self._node_ids.inode_of(node))
        if directory is None:
            self.files.entry(node)
            raise RefusedError(errno.ENOTDIR)
        return directory

    def _facts(self, node: int) -> Facts:
        """Raises: UnknownNodeError."""
        facts = self._namespace.facts(self._node_ids.inode_of(node))
        if facts is None:
            raise UnknownNodeError
        return facts

    def _attributes(self, facts: Facts) -> bytes:
        inode, kind, size, mtime_ns = facts
        mode, links = self._modes[kind]
        return protocol.attributes(inode, mode, links, size, mtime_ns, self._owner.uid, self._owner.gid)


def _attributes_valid_s(facts: Facts) -> int:
    return _DIRECTORY_CACHE_S if facts[1] == _DIRECTORY else _INODE_CACHE_S


def _fitting(value: bytes, room: int) -> Body:
    """The value of an attribute, or how long it is where that was asked."""
    if not room:
        return (protocol.xattr_size_answer(len(value)),)
    if len(value) > room:
        raise RefusedError(errno.ERANGE)
    return (value,)
