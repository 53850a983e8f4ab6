"""Times of a tree: a directory's moves forward exactly when its visible children change. No I/O.

A file shows its source's time as long as it is the same version. A directory shows its source's, or 1970, until its
children change for the first time; then the time of that publication, later than any time ever shown here, so that
whoever remembers the latest time of a tree sees every change. `mfs.tree.record` carries both over remounts.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from typing import Any

from mfs.tree.listing import Listing
from mfs.tree.nodes import Changes, Directory
from mfs.tree.record import Record


class Times:
    """The times of one namespace."""

    def __init__(self) -> None:
        self._records: dict[tuple[int, str], Record] = {}
        """By (source, path): what directories looked like when they were last mounted, until they are published."""
        self._latest_ns = 0
        """No time shown here was ever later."""

    def adopt(self, records: Mapping[tuple[int, str], Record], latest_ns: int) -> None:
        """Take over the times of an earlier mount: see `Namespace.adopt_records`."""
        self._records = dict(records)
        self.see(latest_ns)

    def recorded(self) -> list[tuple[int, str]]:
        """(source, path) of directories of an earlier mount that were not published yet, from the top."""
        return sorted(self._records, key=lambda place: (place[1].count("/"), place[1] != ""))

    def forget(self, source: int, path: str) -> None:
        """Forget what a directory showed on an earlier mount."""
        self._records.pop((source, path), None)

    def of(self, source: int, path: str, listed_ns: int) -> int:
        """The time of a directory nobody has looked into yet."""
        record = self._records.get((source, path))
        return record.mtime_ns if record else listed_ns

    def see(self, *shown_ns: int) -> None:
        """These are shown."""
        self._latest_ns = max(self._latest_ns, *shown_ns)

    def recall(self, directory: Directory, new: Listing) -> None:
        """A directory is published for the first time: what it showed before holds on if it is unchanged since."""
        record = self._records.pop((directory.source, directory.path), None)
        if record is None:
            return
        if record.fingerprint == new.fingerprint() and len(record.times) == 8 * len(new):
            new.mtimes = array("Q", record.times)
        else:
            directory.mtime_ns = self._later()

    def change(self, directory: Directory, old: Listing, new: Listing, changes: Changes) -> int:
        """Give another listing of a directory its times; name what the kernel must ask again. Returns how many of its
        entries are new versions or new names.
        """
        directory.mtime_ns = self._later()
        places, new_count = new.compared(old), 0
        is_kept = bytearray(len(old) + 1)
        for index, place in enumerate(places):
            if 0 <= place < len(old):
                is_kept[place] = 1
                new.mtimes[index] = old.mtimes[place]
                continue
            new_count += 1
            changes.names.append((directory.inode, new.names[index]))
            if place == len(old):
                changes.added_count += 1
                continue
            is_kept[~place] = 1
            changes.changed_count += 1
            if new.mtimes[index] == old.mtimes[~place]:
                new.mtimes[index] = directory.mtime_ns
        for place in range(len(old)):
            if not is_kept[place]:
                changes.removed_count += 1
                changes.names.append((directory.inode, old.names[place]))
        return new_count

    def export(self) -> list[Any]:
        """For `restore` in another process."""
        return [self._latest_ns, [[*place, *record] for place, record in self._records.items()]]

    def restore(self, state: list[Any]) -> None:
        """Become what `export` described."""
        self._latest_ns, rows = state
        self._records = {(source, path): Record(*fields) for source, path, *fields in rows}

    def _later(self) -> int:
        """A time later than any shown before, now if the clocks agree."""
        self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
        return self._latest_ns
