"""The entries of one directory, as columns: what `namespace` publishes. Pure.

300,000 entries as Python objects would take 300 MB; as arrays and byte strings they take about 120 bytes each. They
come page by page (`Drafts`), so that never more than a page stands there in another form.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from xxhash import xxh3_64_intdigest, xxh3_128

from mfs.sources import bounds
from mfs.sources.base import name_fault
from mfs.tree.inodes import entry_key
from mfs.types import Entry, EntryKind

logger = logging.getLogger(__name__)

EPOCH_NS = 10**9
"""Time of a directory whose source has none: the same on every mount, and not zero."""
_UNDATED_NS = 2**50
"""Files without a date get one within these 13 days of 1970."""
_NO_KEYS = array("Q")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*").fullmatch


def shown_mtime_ns(entry: Entry) -> int:
    """The entry's own time. Without one it is made of the version, so that other bytes have another time, on every
    mount the same; it says nothing else.
    """
    if entry.mtime_ns > 0:
        return bounds.shown_ns(entry.mtime_ns)
    if entry.kind is EntryKind.DIRECTORY:
        return EPOCH_NS
    return EPOCH_NS + xxh3_64_intdigest(entry.version.encode("utf-8", "surrogatepass")) % _UNDATED_NS


class _Strings:
    """Many short strings in one buffer."""

    __slots__ = ("_ends", "_text")

    def __init__(self, values: Iterable[bytes] = ()) -> None:
        self._ends = array("I")
        self._text: bytes | bytearray = bytearray()
        for value in values:
            self.append(value)

    def append(self, value: bytes) -> None:
        assert isinstance(self._text, bytearray), "frozen"
        self._text += value
        self._ends.append(len(self._text))

    def freeze(self) -> _Strings:
        """No more are added: gives back what the buffer holds in reserve."""
        self._text = bytes(self._text)
        return self

    def export(self) -> list[bytes]:
        return [self._ends.tobytes(), bytes(self._text)]

    def restore(self, fields: list[bytes]) -> None:
        self._ends.frombytes(fields[0])
        self._text = fields[1]

    def raw(self, index: int) -> bytes:
        return bytes(self._text[self._ends[index - 1] if index else 0 : self._ends[index]])

    def __getitem__(self, index: int) -> str:
        return self.raw(index).decode("utf-8", "surrogatepass")

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self._ends:
            yield bytes(self._text[start:end])
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Strings) and self._text == other._text and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]

    def find(self, value: bytes) -> int:
        """Index of a string among sorted ones, -1 if it is not there. By hand: every LOOKUP comes here, and bisect with
        a key takes twice as long.
        """
        text, ends, low, high = self._text, self._ends, 0, len(self._ends)
        while low < high:
            middle = (low + high) >> 1
            if text[ends[middle - 1] if middle else 0 : ends[middle]] < value:
                low = middle + 1
            else:
                high = middle
        return low if low < len(ends) and self.raw(low) == value else -1

    def feed(self, digest: xxh3_128) -> None:
        """Add the strings to a digest."""
        digest.update(self._ends)
        digest.update(self._text)


class Listing:
    """The entries of one directory, sorted by the bytes of their names. Once published it never changes."""

    __slots__ = ("_digests", "_keys", "_locators", "_versions", "inodes", "kinds", "mtimes", "names", "sizes", "told")

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        """entries: legal and sorted."""
        self.names = _Strings()
        self.kinds: bytes | bytearray = bytearray()
        self.sizes = array("Q")
        self.mtimes = array("Q")
        """As shown: see `shown_mtime_ns`. `namespace` may put others there before it publishes."""
        self.inodes = array("Q")
        """Empty until it is published; 0 for an entry that is not shown (`inodes`)."""
        self.told = bytearray()
        """How often the kernel was told of each entry, once it is published: `places` has the rest."""
        self._keys = array("Q")
        self._versions, self._digests, self._locators = _Strings(), _Strings(), _Strings()
        for entry in entries:
            self._append(entry.name.encode(), entry)

    def _append(self, name: bytes, entry: Entry) -> None:
        self.names.append(name)
        self.kinds += bytes((entry.kind,))
        self.sizes.append(entry.size)
        self.mtimes.append(shown_mtime_ns(entry))
        # versions and locators may hold any text
        version = entry.version.encode("utf-8", "surrogatepass")
        digest = entry.digest.encode("utf-8", "surrogatepass") if entry.digest else b""
        self._versions.append(version)
        self._digests.append(digest)
        self._keys.append(_key(name, entry.kind, entry.size, version, digest))
        self._locators.append(entry.locator.encode("utf-8", "surrogatepass"))

    def _freeze(self) -> Listing:
        self.kinds = bytes(self.kinds)
        for column in (self.names, self._versions, self._digests, self._locators):
            column.freeze()
        return self

    def _picked(self, order: Sequence[int]) -> Listing:
        """The entries at these places, in this order; unpublished."""
        found = Listing()
        found.names = _Strings(map(self.names.raw, order))
        found.kinds = bytes(self.kinds[index] for index in order)
        found.sizes = array("Q", (self.sizes[index] for index in order))
        found.mtimes = array("Q", (self.mtimes[index] for index in order))
        keys = self.keys
        found._keys = array("Q", (keys[index] for index in order))
        found._versions = _Strings(map(self._versions.raw, order))
        found._digests = _Strings(map(self._digests.raw, order))
        found._locators = _Strings(map(self._locators.raw, order))
        return found._freeze()

    def without(self, names: set[bytes]) -> Listing:
        """The same entries less these names; unpublished."""
        return self._picked([index for index in range(len(self)) if self.names.raw(index) not in names])

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def keys(self) -> array[int]:
        """What its inodes are made of: see `inodes.entry_key`."""
        if len(self._keys) == len(self):
            return self._keys
        columns = zip(self.names, self.kinds, self.sizes, self._versions, self._digests, strict=True)
        return array("Q", (_key(*facts) for facts in columns))

    def drop_keys(self) -> None:
        """Give their memory back: it has its inodes, and they can be made again."""
        self._keys = _NO_KEYS

    def export(self) -> list[Any]:
        """All columns as bytes, for `restored`."""
        return [
            bytes(self.kinds), self.sizes.tobytes(), self.mtimes.tobytes(), b"", self.names.export(),
            self._versions.export(), self._digests.export(), self._locators.export(),
        ]  # fmt: skip

    @classmethod
    def restored(cls, fields: list[Any]) -> Listing:
        """The listing that `export` described; unpublished."""
        found = cls()
        found.kinds = fields[0]
        for column, content in zip((found.sizes, found.mtimes, found._keys), fields[1:4], strict=True):
            column.frombytes(content)
        strings = (found.names, found._versions, found._digests, found._locators)
        for texts, content in zip(strings, fields[4:], strict=True):
            texts.restore(content)
        return found

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes."""
        return sum(self.sizes)

    def has_same_content(self, other: Listing) -> bool:
        """Whether both show the same names and versions; times and locators may differ."""
        return (
            self.kinds == other.kinds
            and self.sizes == other.sizes
            and self.names == other.names
            and self._versions == other._versions
            and self._digests == other._digests
        )

    def adopt_locators(self, other: Listing) -> None:
        """Take the locators of a listing with the same content: they are no part of what is shown."""
        if other._locators != self._locators:
            self._locators = other._locators

    def fingerprint(self) -> bytes:
        """16 bytes that tell whether two listings have the same content, also over restarts."""
        digest = xxh3_128()
        digest.update(self.kinds)
        digest.update(self.sizes)
        for column in (self.names, self._versions, self._digests):
            column.feed(digest)
        return digest.digest()

    def find(self, name: bytes) -> int:
        """Index of a name, -1 if it is not there."""
        return self.names.find(name)

    def compared(self, old: Listing) -> list[int]:
        """For each entry its place in an older listing: that of the same version, ~place for another version of the
        name, len(old) for a new name. All at once, since a publication may not give way: 200,000 take 0.2 s.
        """
        names = None if self.names == old.names else dict(zip(old.names, range(len(old)), strict=True))
        places = range(len(old)) if names is None else [names.get(name, len(old)) for name in self.names]
        facts = [*zip(old.kinds, old.sizes, old._versions, old._digests, strict=True)]
        facts.append((0, 0, b"", b""))  # of no name
        found = []
        for place, fact in zip(
            places, zip(self.kinds, self.sizes, self._versions, self._digests, strict=True), strict=True
        ):
            was = facts[place]
            is_same = was == fact or was[0] == fact[0] == EntryKind.DIRECTORY or place == len(old)
            found.append(place if is_same else ~place)
        return found

    def is_same_version(self, index: int, other: Listing, place: int) -> bool:
        """Whether two entries of one name are the same inode: the same version of a file, or both a directory."""
        if self.kinds[index] != other.kinds[place]:
            return False
        return self.kinds[index] == EntryKind.DIRECTORY or (
            self.sizes[index] == other.sizes[place]
            and self._versions.raw(index) == other._versions.raw(place)
            and self._digests.raw(index) == other._digests.raw(place)
        )

    def entry(self, index: int) -> Entry:
        """The entry at a place; its time is the one that is shown."""
        return Entry(
            self.names[index], EntryKind(self.kinds[index]), self.sizes[index], self.mtimes[index],
            self._versions[index], self._digests[index] or None, self._locators[index],
        )  # fmt: skip

    def directories(self) -> Iterator[bytes]:
        """The names of its directories."""
        at = self.kinds.find(EntryKind.DIRECTORY)
        while at >= 0:
            yield self.names.raw(at)
            at = self.kinds.find(EntryKind.DIRECTORY, at + 1)


def _key(name: bytes, kind: int, size: int, version: bytes, digest: bytes) -> int:
    is_directory = kind == EntryKind.DIRECTORY
    facts = b"" if is_directory else b"%d %d %d " % (kind, size, len(version)) + version + digest
    return entry_key(name, facts)


def merged(old: Listing, new: Listing) -> Iterator[tuple[int, int]]:
    """(place in old or -1, place in new or -1) of every name of either, in order."""
    left, right = 0, 0
    while left < len(old) and right < len(new):
        a, b = old.names.raw(left), new.names.raw(right)
        yield (left if a <= b else -1), (right if b <= a else -1)
        left += a <= b
        right += b <= a
    yield from ((index, -1) for index in range(left, len(old)))
    yield from ((-1, index) for index in range(right, len(new)))


class _Draft:
    """A listing of which pages still come: entries that can stand in a directory; others are counted."""

    __slots__ = ("_folder", "_is_sorted", "_last", "_left_out", "_listing", "_prefix")

    def __init__(self, folder: str, begun: Listing | None = None) -> None:
        """begun: entries that came before."""
        self._folder = folder
        self._prefix = f"{folder}/" if folder else ""
        self._listing = Listing([begun.entry(index) for index in range(len(begun))] if begun is not None else ())
        self._is_sorted = True
        self._last = begun.names.raw(len(begun) - 1) if begun is not None and len(begun) else b""
        self._left_out = bounds.LeftOut()

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            fault = self._fault(entry)
            if fault is not None:
                self._left_out.note(entry.name, fault)
                continue
            name = entry.name.encode()
            self._is_sorted = self._is_sorted and name > self._last
            self._last = name
            self._listing._append(name, entry)

    def finish(self) -> Listing:
        """The listing, sorted, each name once: a directory goes before a file, else the first. Says what is left
        out.
        """
        if self._left_out.count:
            logger.warning("%s: cannot be shown: %s", self._folder or "the root", str(self._left_out))
        found = self._listing
        if self._is_sorted:
            return found._freeze()
        by_name: dict[bytes, int] = {}
        for index, name in enumerate(found.names):
            if name not in by_name or found.kinds[index] == EntryKind.DIRECTORY:
                by_name[name] = index
        return found._picked([by_name[name] for name in sorted(by_name)])

    def _fault(self, entry: Entry) -> str | None:
        """Why an entry cannot stand here, None if it can. Sources ask the same; this is for one that does not."""
        plain = len(entry.name) < 64 and _PLAIN(entry.name) is not None  # asked 300,000 times
        fault = (None if plain else name_fault(entry.name)) or bounds.path_fault(self._prefix + entry.name)
        if fault is None and entry.kind is EntryKind.SYMLINK:
            fault = bounds.link_fault(self._folder, entry.version)
        return fault or bounds.value_fault(entry)


class Drafts:
    """What one look at a source brings, directory by directory, page by page.

    Nothing of it may be published before the look is over: a directory may come in several pages.
    """

    def __init__(self, path: str, known: Callable[[str], Listing | None] = lambda path: None) -> None:
        """path: the directory that is looked at, inside its source; it exists even if no page comes.

        known: what a directory shows now. It stands for what is found where that is the same, so that a tree of which
        little changes is not held twice.
        """
        self._path = path
        self._known = known
        self._settled: dict[str, Listing] = {}
        self._latest: list[str] = []
        """The path settled last, in parts."""
        self._is_in_order = True
        self._open_path, self._open = path, _Draft(path)

    def add(self, path: str, entries: Iterable[Entry]) -> None:
        """A page: some of the entries of the directory at `path`, the one looked at or one below it."""
        if path != self._open_path:
            self._settle()
            self._open_path, self._open = path, _Draft(path, self._settled.pop(path, None))
        self._open.add(entries)

    def clear(self) -> None:
        """The look starts over."""
        self._settled.clear()
        self._latest, self._is_in_order = [], True
        self._open_path, self._open = self._path, _Draft(self._path)

    def finish(self) -> dict[str, Listing]:
        """The listings of all directories by path, each after the one it stands in, those below one name of the root
        together. The end of these drafts.
        """
        self._settle()
        if self._is_in_order:  # as workers send them: to sort 100,000 here would hold up readers
            return self._settled
        return dict(sorted(self._settled.items(), key=lambda item: item[0].split("/")))

    def _settle(self) -> None:
        """Pages of another directory come: usually this one is complete."""
        found, known = self._open.finish(), self._known(self._open_path)
        if known is not None and known.has_same_content(found):
            known.adopt_locators(found)
            found = known
        self._settled[self._open_path] = found
        parts = self._open_path.split("/")
        self._is_in_order = self._is_in_order and parts > self._latest
        self._latest = parts
