"""Which inode is shown where, how often the kernel was told of it, and what has left the tree.

Where two names meet in one number (`inodes`), the one that comes later is not shown, its inode in the listing being
HIDDEN, and the log says so: the kernel would take one's bytes for the other's. A published entry costs its place in one
table, 70 to 100 bytes. Everything belongs to the trio thread.
"""

from __future__ import annotations

import logging
from array import array

from mfs.tree.inodes import HIDDEN, inodes_of
from mfs.tree.listing import Listing
from mfs.tree.nodes import Directory, Node

logger = logging.getLogger(__name__)

_PLACE_BITS = 32
_INDEX = (1 << _PLACE_BITS) - 1
"""In the place of an index: to be looked for. So most entries share one number, which saves 32 bytes each."""
_LOOKED_FOR_MAX = 128  # entries of a listing; 2 us
_ELSEWHERE = 255
"""In the place of a count in a listing: it stands in a table of larger ones."""


class Places:
    """Of all inodes of one mount."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        """Inode -> number of the directory that shows it, and its index in the listing there."""
        self._owners: dict[int, Directory] = {}
        self._numbers: dict[int, int] = {}
        """Of directories that show something, by inode; never used twice."""
        self._numbers_count = 0
        self._lookups: dict[int, int] = {}
        """How often the kernel was told of an inode and has not forgotten, where `Listing.told` does not say; it may
        know more, from another daemon."""
        self._orphans: dict[int, Node] = {}
        """Files that left the tree and that the kernel still knows."""

    def place(self, inode: int) -> tuple[Directory, int] | None:
        """(directory, index in its listing) of an inode that the tree shows."""
        place = self._places.get(inode)
        if place is None:
            return None
        directory, index = self._owners[place >> _PLACE_BITS], place & _INDEX
        if index == _INDEX:
            assert directory.listing is not None
            index = directory.listing.inodes.index(inode)
        return directory, index

    def orphan(self, inode: int) -> Node | None:
        """A file that is no longer in the tree, but may still be open."""
        return self._orphans.get(inode)

    def show(
        self, directory: Directory, listing: Listing, seed: int, old: Listing | None = None, new_count: int = 0
    ) -> None:
        """Give a listing that is about to be published its inodes.

        old: what the directory has shown; new_count: of how many entries it did not show this version.
        All at once, since a publication may not give way: 300,000 take 0.1 s.
        """
        inodes = inodes_of(listing.keys, seed)
        number = self._numbers.get(directory.inode)
        if number is None:
            number = self._numbers_count = self._numbers[directory.inode] = self._numbers_count + 1
        self._owners[number] = directory
        fresh = set(inodes)
        is_plain = len(fresh) == len(inodes)
        if old is not None:
            before = set(old.inodes)
            gone = before - fresh
            fresh -= before
            is_plain = is_plain and len(fresh) == new_count
        if not (is_plain and self._places.keys().isdisjoint(fresh) and self._orphans.keys().isdisjoint(fresh)):
            self._hide_doubles(directory, listing, inodes, number, old)
        if old is not None:
            for inode in gone:
                self._places.pop(inode, None)
        first = number << _PLACE_BITS
        if len(inodes) <= _LOOKED_FOR_MAX:
            self._places.update(dict.fromkeys(inodes, first | _INDEX))
        else:
            self._places.update(zip(inodes, range(first, first + len(inodes)), strict=True))
        self._places.pop(HIDDEN, None)
        if self._orphans:
            for inode in fresh:
                if inode in self._orphans and inode in self._places:  # a version that came back
                    del self._orphans[inode]
        listing.inodes = inodes
        listing.told = self._counts(listing, fresh, old)
        listing.drop_keys()

    def _counts(self, listing: Listing, fresh: set[int], old: Listing | None) -> bytearray:
        """`Listing.told` of a listing that takes an older one's place."""
        told = bytearray(len(listing))
        if old is not None and any(old.told):
            indexes = {inode: index for index, inode in enumerate(listing.inodes)}
            for index, count in enumerate(old.told):
                if not count:
                    continue
                inode = old.inodes[index]
                if inode in indexes:
                    told[indexes[inode]] = count
                elif count != _ELSEWHERE:
                    self._lookups[inode] = count
        for inode in fresh & self._lookups.keys() if len(self._lookups) < len(fresh) else fresh:
            if inode in self._lookups and inode in self._places:
                told[listing.inodes.index(inode)] = _ELSEWHERE
        return told

    def _hide_doubles(
        self, directory: Directory, listing: Listing, inodes: array[int], number: int, old: Listing | None
    ) -> None:
        seen = set[int]()
        for index, inode in enumerate(inodes):
            place, orphan = self._places.get(inode), self._orphans.get(inode)
            is_taken = inode in seen
            if place is not None and (place >> _PLACE_BITS != number or old is None):
                is_taken = True
            elif place is not None and old is not None:
                was = old.inodes.index(inode)
                is_same = old.names.raw(was) == listing.names.raw(index)
                is_taken = is_taken or not is_same or not listing.is_same_version(index, old, was)
            elif orphan is not None and orphan.object is not None:
                entry = listing.entry(index)
                folder, _, name = orphan.path.rpartition("/")
                was_there = (folder, name) == (directory.path, entry.name) and orphan.source == directory.source
                facts = (orphan.object.size, orphan.object.version, orphan.object.digest)
                is_taken = is_taken or not was_there or facts != (entry.size, entry.version, entry.digest)
            seen.add(inode)
            if is_taken:
                inodes[index] = HIDDEN
                logger.error(
                    "%s in %r is not shown: its inode %d is another's already", listing.names[index], directory.path,
                    inode,
                )  # fmt: skip

    def hide(self, inode: int, orphan: Node | None = None) -> None:
        """An inode leaves the tree; `orphan` stays answerable."""
        count = self._count(inode)
        self._places.pop(inode, None)
        if count:
            self._lookups[inode] = count
        if orphan is not None:
            self._orphans[inode] = orphan

    def drop_directory(self, inode: int) -> None:
        """A directory shows nothing any more; what it has shown was hidden before."""
        number = self._numbers.pop(inode, None)
        if number is not None:
            del self._owners[number]

    def adopt(self, inode: int, orphan: Node | None) -> None:
        """The kernel knows an inode from another daemon; `orphan` is what it stands for, if the tree does not say."""
        place = self.place(inode)
        self._set_count(inode, place, self._count_at(inode, place) or 1)
        if orphan is not None:
            self._orphans[inode] = orphan

    # -- what the kernel knows

    def is_known(self, inode: int) -> bool:
        """Whether the kernel was told of an inode, by us."""
        return self._count(inode) > 0

    def remember(self, inode: int, at: tuple[Listing, int] | None = None) -> bool:
        """The kernel is told of an inode. Returns whether for the first time.

        at: its place, where the caller knows it: (the listing that its directory shows, index).
        """
        if at is not None and (count := at[0].told[at[1]]) < _ELSEWHERE - 1:
            at[0].told[at[1]] = count + 1
            return not count
        place = self.place(inode)
        count = self._count_at(inode, place)
        self._set_count(inode, place, count + 1)
        return not count

    def forget(self, inode: int, count: int) -> bool:
        """The kernel drops `count` of its references. Returns whether it knows nothing of the inode any more."""
        place = self.place(inode)
        left = max(0, self._count_at(inode, place) - count)
        self._set_count(inode, place, left)
        if not left:
            self._orphans.pop(inode, None)
        return not left

    def _count(self, inode: int) -> int:
        return self._count_at(inode, self.place(inode))

    def _count_at(self, inode: int, place: tuple[Directory, int] | None) -> int:
        if place is not None and place[0].listing is not None:
            count = place[0].listing.told[place[1]]
            if count != _ELSEWHERE:
                return count
        return self._lookups.get(inode, 0)

    def _set_count(self, inode: int, place: tuple[Directory, int] | None, count: int) -> None:
        if place is not None and place[0].listing is not None:
            place[0].listing.told[place[1]] = min(count, _ELSEWHERE)
            if count < _ELSEWHERE:
                self._lookups.pop(inode, None)
                return
        if count:
            self._lookups[inode] = count
        else:
            self._lookups.pop(inode, None)
