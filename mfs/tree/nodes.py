"""What the tree is made of: nodes as others see, directories, what a refresh changed. `namespace` has the rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from mfs.errors import MfsError
from mfs.tree.listing import EPOCH_NS, Listing
from mfs.types import EntryKind, ObjectId


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


Facts = tuple[int, int, int, int]
"""Of a node, what stat(2) shows: inode, kind, size, mtime_ns. Path and object take as long as all else of an answer."""


class Directory:
    """A directory of the tree; its listing is None until somebody looks."""

    __slots__ = ("inode", "listing", "loading", "mtime_ns", "name", "parent", "path", "published", "removed", "source")

    def __init__(self, inode: int, parent: Directory | None, name: str, source: int, path: str, mtime_ns: int) -> None:
        self.inode = inode
        self.parent = parent
        self.name = name
        self.source = source
        self.path = path
        self.mtime_ns = mtime_ns or EPOCH_NS
        self.listing: Listing | None = None
        self.loading: Loading | None = None
        self.removed = False
        self.published = 0
        """When its listing was published, counted in publications of the mount."""

    @property
    def full_path(self) -> str:
        """Path from the root of the mount."""
        names, current = list[str](), self
        while current.parent is not None:
            names.append(current.name)
            current = current.parent
        return "/".join(reversed(names))


class Loading:
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
