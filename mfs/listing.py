"""The entries of one directory, as columns: what `namespace` publishes. Pure.

300,000 entries as Python objects would take 300 MB; as arrays and byte strings they take about 120 bytes each.
"""

from __future__ import annotations

import bisect
import logging
import re
from array import array
from collections.abc import Sequence

from mfs.sources.base import name_fault
from mfs.types import Entry, EntryKind

logger = logging.getLogger(__name__)

_MTIME_MAX_NS = 2**63 - 1  # the year 2262; a source may claim any
_SIZE_MAX = 2**63 - 1
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*").fullmatch


class _Strings:
    """Many short strings in one buffer."""

    __slots__ = ("_ends", "_text")

    def __init__(self, values: Sequence[str]) -> None:
        self._ends = array("I")
        parts = [value.encode("utf-8", "surrogatepass") for value in values]  # versions and locators may hold anything
        total = 0
        for part in parts:
            total += len(part)
            self._ends.append(total)
        self._text = b"".join(parts)

    def raw(self, index: int) -> bytes:
        return self._text[self._ends[index - 1] if index else 0 : self._ends[index]]

    def __getitem__(self, index: int) -> str:
        return self.raw(index).decode("utf-8", "surrogatepass")

    def __len__(self) -> int:
        return len(self._ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Strings) and self._text == other._text and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]


class Listing:
    """The entries of one directory, sorted by the bytes of their names, with their inodes. Never changes."""

    __slots__ = ("_digests", "_locators", "_versions", "inodes", "kinds", "mtimes", "names", "sizes")

    def __init__(self, entries: Sequence[Entry], inodes: Sequence[int]) -> None:
        self.names = _Strings([e.name for e in entries])
        self.kinds = bytes(e.kind for e in entries)
        self.sizes = array("Q", [e.size for e in entries])
        self.mtimes = array("Q", [min(max(0, e.mtime_ns), _MTIME_MAX_NS) for e in entries])
        self.inodes = array("Q", inodes)
        self._versions = _Strings([e.version for e in entries])
        self._digests = _Strings([e.digest or "" for e in entries])
        self._locators = _Strings([e.locator for e in entries])

    def __len__(self) -> int:
        return len(self.kinds)

    def adopt(self, entries: Sequence[Entry]) -> bool:
        """Whether these are the same entries; then their locators, which are no part of what is shown, become ours."""
        if (
            len(entries) != len(self)
            or self.kinds != bytes(e.kind for e in entries)
            or self.sizes.tolist() != [e.size for e in entries]
            or self.names != _Strings([e.name for e in entries])
            or self._versions != _Strings([e.version for e in entries])
            or self._digests != _Strings([e.digest or "" for e in entries])
        ):
            return False
        locators = _Strings([e.locator for e in entries])
        if locators != self._locators:
            self._locators = locators
        return True

    def find(self, name: bytes) -> int:
        """Index of a name, -1 if it is not there."""
        index = bisect.bisect_left(range(len(self)), name, key=self.names.raw)
        return index if index < len(self) and self.names.raw(index) == name else -1

    def entry(self, index: int) -> Entry:
        return Entry(
            self.names[index], EntryKind(self.kinds[index]), self.sizes[index], self.mtimes[index],
            self._versions[index], self._digests[index] or None, self._locators[index],
        )  # fmt: skip


def same_version(a: Entry, b: Entry) -> bool:
    """Whether two entries of one name are the same inode: the same version of a file, or both a directory."""
    if a.kind is EntryKind.DIRECTORY or b.kind is EntryKind.DIRECTORY:
        return a.kind is b.kind
    return (a.kind, a.size, a.version, a.digest) == (b.kind, b.size, b.version, b.digest)


def _link_fault(folder: str, target: str) -> str | None:
    """Why a link must not be shown: it could lead out of its source.

    Steps up are allowed at the start alone, so that no directory link on the way makes them lead higher than they look.
    """
    parts = target.split("/")
    up_count = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    if up_count > len(folder.split("/") if folder else []):
        return "leads out of the source"
    if any(name_fault(part) for part in parts[up_count:] if part != "."):
        return f"is a link to {target!r}"
    return None


def legal_entries(folder: str, entries: Sequence[Entry]) -> list[Entry]:
    """Entries that can stand in a directory, sorted by name; others are left out and said once.

    folder: the directory's path inside its source.
    """
    by_name: dict[bytes, Entry] = {}
    refused: list[str] = []
    for entry in entries:
        plain = len(entry.name) < 64 and _PLAIN(entry.name) is not None  # asked 300,000 times
        fault = None if plain else name_fault(entry.name)
        if fault is None and entry.kind is EntryKind.SYMLINK:
            fault = _link_fault(folder, entry.version)
        if fault is None and not 0 <= entry.size <= _SIZE_MAX:
            fault = f"has the size {entry.size}"
        if fault is not None:
            refused.append(f"{entry.name!r} {fault}")
            continue
        name = entry.name.encode()
        if name not in by_name or entry.kind is EntryKind.DIRECTORY:
            by_name[name] = entry
    if refused:
        logger.warning(
            "%s: %d names of the source cannot be shown, for instance %s",
            folder or "the root", len(refused), refused[0],
        )  # fmt: skip
    return [by_name[name] for name in sorted(by_name)]
