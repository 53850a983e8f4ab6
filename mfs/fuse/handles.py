"""Open files by their handles, over the end of the daemon that opened them.

A READ names its node beside its handle. So a handle that another daemon has given is served from the row that the
journal has of its node: one file stands for all such handles of a node. When the last of them goes is counted in that
row. An OPEN is written down before it is answered, a RELEASE afterwards: so a daemon that is killed in between leaves
the count too high and never too low. That heals when the kernel forgets the node, which it does not as long as the file
is open.

How a node is read is one for all its handles (`backing`), and stands in the row as well. Where the kernel reads it by
itself, the row stays for as long as the backing id does, also without handles.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from mfs.fuse.backing import NodeIds
from mfs.fuse.journal import Journal
from mfs.fuse.reader import OpenFile
from mfs.tree.nodes import Node
from mfs.types import EntryKind
from mfs.workers.frames import object_from_wire, object_to_wire


class FileRow(NamedTuple):
    """What the journal says of a node with open handles."""

    kind: int
    handles_count: int
    mtime_ns: int
    path: str
    exported: list[Any]
    """`OpenFile.export`: object, source, whether it is kept whole."""
    backing: int
    """Id of the file that the kernel reads by itself; 0: it asks us."""
    renewals: int
    """Of the inode, so far; see `NodeIds`."""
    is_disowned: bool
    """The backing file is not what it should be: nobody else is given it."""

    def entry(self, node: int) -> Node:
        """The file that it is about."""
        fields, source, _ = self.exported
        obj = object_from_wire(fields)
        return Node(NodeIds.inode_of(node), EntryKind.FILE, obj.size, self.mtime_ns, source, self.path, obj, "")


class OpenFiles:
    """The open files of one mount."""

    def __init__(
        self, journal: Journal, reopen: Callable[[list[Any]], OpenFile], on_closed: Callable[[int, int], None]
    ) -> None:
        """reopen: see `Reader.reopen`. on_closed: told of a node whose last handle has gone, and its backing id."""
        self._journal = journal
        self._reopen = reopen
        self._on_closed = on_closed
        self._files: dict[int, tuple[int, OpenFile]] = {}
        """By handle, those we gave: node and file."""
        self._own: Counter[int] = Counter()
        """Of them, by node."""
        self._inherited: dict[int, OpenFile] = {}
        """By node."""
        self._inherited_counts: dict[int, int] = {}
        self._passed = set[int]()
        """Open nodes that the kernel reads by itself."""
        self.passed_through_count = 0
        """Handles on them."""
        self._handle = time.monotonic_ns()
        """The last one given. No daemon before us has come as far, at less than one a nanosecond."""

    def __len__(self) -> int:
        return len(self._files) + sum(self._inherited_counts.values())

    def way_of(self, node: int) -> int | None:
        """The backing id by which a node is read, 0 if through us; None if it is not open: then either way will do."""
        row = self._journal.row(node) if self._count(node) else None
        return FileRow(*row).backing if row is not None else None

    def nodes_of(self, state: object) -> set[int]:
        """The nodes by which an object is open. state: `OpenFile.state`."""
        own = {node for node, file in self._files.values() if file.state is state}
        return own | {node for node, file in self._inherited.items() if file.state is state}

    def add(self, node: int, entry: Node, file: OpenFile, backing: int, renewals: int) -> int:
        """A handle on a node, written down before the kernel hears of it."""
        self._handle += 1
        self._own[node] += 1
        self._count_passed(node, 1, backing)
        self._note(node, FileRow(entry.kind, 0, entry.mtime_ns, entry.path, file.export(), backing, renewals, False))
        self._files[self._handle] = node, file
        return self._handle

    def note_renewal(self, node: int, renewals: int, *, is_disowned: bool) -> None:
        """Whoever looks the file of an open node up is told another one from now on."""
        row = self._journal.row(node)
        if row is not None:
            self._note(node, FileRow(*row)._replace(renewals=renewals, is_disowned=is_disowned))

    def forget_backing(self, node: int) -> None:
        """The backing id of a node without handles was given back."""
        if not self._count(node):
            self._journal.forget(node)

    def get(self, node: int, handle: int) -> OpenFile | None:
        """The file of a handle, ours or another daemon's."""
        own = self._files.get(handle)
        return own[1] if own is not None else self._inherited.get(node)

    def release(self, node: int, handle: int) -> None:
        """A handle is closed; one that nobody knows is none."""
        own = self._files.pop(handle, None)
        if own is not None:
            own[1].close()
            self._own[node] -= 1
            self._count_passed(node, -1)
        elif node in self._inherited:
            self._inherited_counts[node] -= 1
            self._count_passed(node, -1)
            if self._inherited_counts[node] <= 0:
                self._drop_inherited(node)
        else:
            return
        self._note_again(node)

    def forget(self, node: int) -> None:
        """The kernel knows nothing of a node any more: no handle of another daemon is left."""
        if node in self._inherited:
            self._drop_inherited(node)
            self._note_again(node)

    def of_entry(self, node: int, entry: Node) -> OpenFile:
        """The file of a handle that even the journal does not know."""
        assert entry.object is not None, "only files are read"
        exported = [object_to_wire(entry.object), entry.source, False]
        self.inherit(node, FileRow(entry.kind, 1, entry.mtime_ns, entry.path, exported, 0, 0, False))
        return self._inherited[node]

    def inherit(self, node: int, row: FileRow) -> None:
        """Handles of another daemon."""
        file = self._inherited[node] = self._reopen(row.exported)
        self._inherited_counts[node] = row.handles_count
        self._count_passed(node, row.handles_count, row.backing)
        if row.backing:
            file.pass_through()

    def close_all(self) -> None:
        """The mount is gone, or another daemon's."""
        for file in (*(file for _, file in self._files.values()), *self._inherited.values()):
            file.close()
        self._files.clear()
        self._own.clear()
        self._inherited.clear()
        self._inherited_counts.clear()
        self._passed.clear()
        self.passed_through_count = 0

    def _drop_inherited(self, node: int) -> None:
        self._inherited.pop(node).close()
        self._count_passed(node, -self._inherited_counts.pop(node))

    def _count(self, node: int) -> int:
        return self._own[node] + self._inherited_counts.get(node, 0)

    def _count_passed(self, node: int, more: int, backing: int = 0) -> None:
        if backing:
            self._passed.add(node)
        if node in self._passed:
            self.passed_through_count += more

    def _note_again(self, node: int) -> None:
        row = self._journal.row(node)
        backing = FileRow(*row).backing if row is not None else 0
        if row is not None and (backing or self._count(node)):
            self._note(node, FileRow(*row))
        else:
            self._journal.forget(node)
        if not self._count(node):
            del self._own[node]
            self._passed.discard(node)
            self._on_closed(node, backing)

    def _note(self, node: int, row: FileRow) -> None:
        kind, _, *rest = row
        self._journal.note(node, [kind, self._count(node), *rest])
