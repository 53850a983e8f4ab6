"""Flat names from a registry become directories here: bad names stay out, clashes are settled, both are said once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from mfs.sources.base import Page, name_fault
from mfs.types import Entry, EntryKind

log = logging.getLogger(__name__)


class TreeBuilder:
    """Collects the files of one listing and gives them back directory by directory. One thread only."""

    def __init__(self, origin: str, root: str) -> None:
        """origin: who is blamed in warnings. root: the directory listed; it exists even when nothing is in it."""
        self._origin = origin
        self._root = root
        self._directories: dict[str, dict[str, Entry]] = {root: {}}
        self._faults: dict[str, tuple[int, str]] = {}  # why -> (how many, an example)

    def __len__(self) -> int:
        """Entries of all kinds collected so far."""
        return sum(len(entries) for entries in self._directories.values())

    def add_file(self, path: str, entry: Entry) -> None:
        """Add a file at `path` below the root ('a/b.bin'); the entry's name is taken from it."""
        parts = path.split("/")
        if not self._are_good(parts, path):
            return
        directory = self._make_directories(parts[:-1])
        known = self._directories[directory].get(parts[-1])
        if known and known.kind is EntryKind.DIRECTORY:
            self._fault("is both a file and a directory: the directory is served", path)
        else:
            self._directories[directory][parts[-1]] = entry._replace(name=parts[-1])

    def add_directory(self, path: str) -> None:
        """Add a directory below the root, whether or not anything lies in it."""
        parts = path.split("/")
        if self._are_good(parts, path):
            self._make_directories(parts)

    def add_unlisted_directory(self, path: str) -> None:
        """Add a directory whose entries somebody else will list: it gets no page of its own."""
        parts = path.split("/")
        if self._are_good(parts, path):
            self._enter(self._make_directories(parts[:-1]), parts[-1])

    def pages(self) -> Iterator[Page]:
        """One page per directory, the root first; warns of what was left out."""
        for why, (count, example) in self._faults.items():
            log.warning("%s: %d names such as %r: %s", self._origin, count, example, why)
        yield from ((path, list(entries.values())) for path, entries in self._directories.items())

    def _are_good(self, parts: list[str], path: str) -> bool:
        fault = next((fault for part in parts if (fault := name_fault(part))), None)
        if fault:
            self._fault(f"left out: a part of the name is {fault}" if "empty" in fault else f"left out: {fault}", path)
        return fault is None

    def _make_directories(self, parts: list[str]) -> str:
        """The path of the directory `parts` below the root, made with all above it."""
        directory = self._root
        for part in parts:
            directory = self._enter(directory, part)
            self._directories.setdefault(directory, {})
        return directory

    def _enter(self, directory: str, name: str) -> str:
        inner = f"{directory}/{name}" if directory else name
        known = self._directories[directory].get(name)
        if known and known.kind is EntryKind.FILE:
            self._fault("is both a file and a directory: the directory is served", inner)
        if not known or known.kind is EntryKind.FILE:
            self._directories[directory][name] = Entry(name, EntryKind.DIRECTORY)
        return inner

    def _fault(self, why: str, path: str) -> None:
        count, example = self._faults.get(why, (0, path))
        self._faults[why] = (count + 1, example)
