"""Flat names from a registry become directories here: what no tree can hold stays out, clashes are settled, both are
said once. A name that cannot be leaves the directories above it, as a listing one directory at a time would.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from mfs.errors import StoreError
from mfs.sources import bounds
from mfs.sources.base import Page, name_fault
from mfs.types import Entry, EntryKind

log = logging.getLogger(__name__)

_BOTH = "is both a file and a directory: the directory is served"


class TreeBuilder:
    """Collects the files of one listing and gives them back directory by directory. One thread only."""

    def __init__(self, origin: str, root: str) -> None:
        """origin: who is blamed in warnings. root: the directory listed; it exists even when nothing is in it."""
        self._origin = origin
        self._root = root
        self._directories: dict[str, dict[str, Entry]] = {root: {}}
        self._count = 0
        self._left_out = bounds.LeftOut()
        self._notes: dict[str, bounds.LeftOut] = {}

    def __len__(self) -> int:
        """Entries of all kinds collected so far."""
        return self._count

    def add_file(self, path: str, entry: Entry) -> None:
        """Add a file at `path` below the root ('a/b.bin'); the entry's name is taken from it.

        Raises: StoreError, as the other two, for more names than any tree has (`bounds.ENTRIES_MAX`).
        """
        folder, _, name = path.rpartition("/")
        directory = self._directory_above(folder, path) if "/" in path else self._root
        if directory is None:
            return
        fault = name_fault(name) or bounds.path_fault(_join(directory, name)) or bounds.value_fault(entry)
        if fault:
            self.leave_out(path, fault)
            return
        entries = self._directories[directory]
        known = entries.get(name)
        if known and known.kind is EntryKind.DIRECTORY:
            self.note(path, _BOTH)
            return
        if known and (known.size, known.version, known.digest) != (entry.size, entry.version, entry.digest):
            self.note(path, "is named twice: what is said last holds")
        self._count_one(known)
        entries[name] = entry._replace(name=name, mtime_ns=bounds.shown_ns(entry.mtime_ns))

    def add_directory(self, path: str) -> None:
        """Add a directory below the root, whether or not anything lies in it."""
        self._directory_above(path, path)

    def add_unlisted_directory(self, path: str) -> None:
        """Add a directory whose entries somebody else will list: it gets no page of its own."""
        folder, _, name = path.rpartition("/")
        directory = self._directory_above(folder, path) if "/" in path else self._root
        if directory is None:
            return
        if fault := name_fault(name) or bounds.path_fault(_join(directory, name)):
            self.leave_out(path, fault)
        else:
            self._enter(directory, name)

    def leave_out(self, what: str, why: str) -> None:
        """Say, with all else, that something of the listing is not in the tree."""
        self._left_out.note(what, why)

    def note(self, what: str, why: str) -> None:
        """Say what is odd about something that is in the tree: a line for each `why`, of which there are few."""
        self._notes.setdefault(why, bounds.LeftOut()).note(what)

    @property
    def left_out(self) -> bounds.LeftOut:
        """What was left out and not yet said."""
        return self._left_out

    def pages(self) -> Iterator[Page]:
        """One page per directory, in the order that costs the daemon least: each after the one it stands in, the names
        sorted. Warns, the first time, of what was left out.
        """
        self._left_out.say(self._origin)
        for why, odd in self._notes.items():
            log.warning("%s: %s: %s", self._origin, why, str(odd))
        self._notes = {}
        paths = sorted(self._directories, key=lambda path: path.split("/"))
        yield from ((path, sorted(self._directories[path].values())) for path in paths)

    def _directory_above(self, path: str, whole: str) -> str | None:
        """The directory at `path` below the root, made with all above it; None if one of them cannot be.

        whole: what is said to be left out then.
        """
        directory = _join(self._root, path)
        if path and directory in self._directories:  # '' is a name that cannot be, not the root
            return directory
        fault = bounds.path_fault(directory)
        directory = self._root
        for part in path.split("/") if fault is None else ():
            fault = name_fault(part)
            if fault:
                break
            directory = self._enter(directory, part)
            if directory not in self._directories:
                self._directories[directory] = {}
                if len(self._directories) > bounds.DIRECTORIES_MAX:
                    raise StoreError(
                        f"{self._origin}: more than {bounds.DIRECTORIES_MAX} directories in one listing: "
                        f"mount what lies below it in parts"
                    )
        if fault:
            self.leave_out(whole, fault)
            return None
        return directory

    def _enter(self, directory: str, name: str) -> str:
        inner = _join(directory, name)
        known = self._directories[directory].get(name)
        if known and known.kind is EntryKind.FILE:
            self.note(inner, _BOTH)
        if not known or known.kind is EntryKind.FILE:
            self._count_one(known)
            self._directories[directory][name] = Entry(name, EntryKind.DIRECTORY)
        return inner

    def _count_one(self, known: Entry | None) -> None:
        self._count += known is None
        if self._count > bounds.ENTRIES_MAX:
            raise StoreError(
                f"{self._origin}: more than {bounds.ENTRIES_MAX} names in one listing: "
                f"mount what lies below it in parts"
            )


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name
