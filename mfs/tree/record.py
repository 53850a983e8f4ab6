"""What directories showed when they were last mounted: kept in the cache directory, so that times outlive a remount.

A server that remembers the latest time of a tree (Triton does) must see neither a change where there is none nor miss
one that came about while nothing was mounted. One row per directory, in <cache>/v2/tree.sqlite, shared by all mounts of
a cache directory:

    tree   source TEXT, path TEXT   identity of the source and path inside it: the key
           mtime_ns INTEGER         the directory's own time
           fingerprint BLOB         `Listing.fingerprint` of what it showed
           times BLOB               the times of its entries in the order of the listing, uint64 each
    shown  source TEXT, path TEXT   likewise
           listing BLOB             `Listing.export` of it in MessagePack: what a mount shows whose origin is away

Everything here blocks: call it from a thread. A record that cannot be read or written costs times, never a mount.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from mfs.cache.directory import root_of
from mfs.sources.bounds import MTIME_NS_MAX
from mfs.tree.listing import Drafts, Listing

logger = logging.getLogger(__name__)

_BUSY_S = 5.0  # that another mount may take to write its rows
_LATEST_NS = MTIME_NS_MAX + 10**15  # as late as a listing lets a date be, and publications that are later
_LISTING_BYTES_MAX = 32 << 20
"""Of one directory, some 250,000 names; a larger one is listed at its source or not at all."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS tree (
    source TEXT NOT NULL, path TEXT NOT NULL, mtime_ns INTEGER NOT NULL, fingerprint BLOB NOT NULL, times BLOB NOT NULL,
    PRIMARY KEY (source, path)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shown (
    source TEXT NOT NULL, path TEXT NOT NULL, listing BLOB NOT NULL, PRIMARY KEY (source, path)
);
"""


class Record(NamedTuple):
    """What one directory showed."""

    mtime_ns: int
    fingerprint: bytes
    times: bytes
    """8 bytes an entry, native order."""


Row = tuple[str, str, int, bytes, bytes]
"""(identity of the source, path, then the fields of Record)."""
Shown = tuple[str, str, list[Any]]
"""(identity of the source, path, `Listing.export`)."""


class TreeRecord:
    """The record of one cache directory."""

    def __init__(self, cache_directory: Path) -> None:
        self._file = root_of(cache_directory) / "tree.sqlite"

    def load(self, identities: Sequence[str]) -> tuple[dict[tuple[int, str], Record], int]:
        """The records of these sources by (number of the source, path), and the latest time in them.

        A file that is none of ours, or damaged, is thrown away.
        """
        found: dict[tuple[int, str], Record] = {}
        latest_ns = 0
        try:
            with self._open() as database:
                for number, identity in enumerate(identities):
                    for path, *fields in database.execute(
                        "SELECT path, mtime_ns, fingerprint, times FROM tree WHERE source = ?", (identity,)
                    ):
                        record = Record(*fields)
                        times = (record.mtime_ns, *array("Q", record.times))
                        if not 0 <= min(times) <= max(times) <= _LATEST_NS:
                            raise ValueError(f"{path} has a time beyond the year 2262")
                        found[number, path] = record
                        latest_ns = max(latest_ns, *times)
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): directories may show other times than before", self._file, error)
            if not isinstance(error, sqlite3.OperationalError | OSError):  # else it may be right another time
                with contextlib.suppress(OSError):
                    self._file.unlink()
            return {}, 0
        return found, latest_ns

    def shown(self, identity: str) -> dict[str, Listing]:
        """What the directories of a source showed, by path, from the top; unpublished. What is damaged is left out."""
        found: dict[str, Listing] = {}
        try:
            with self._open() as database:
                rows = database.execute("SELECT path, listing FROM shown WHERE source = ?", (identity,)).fetchall()
        except (sqlite3.Error, OSError) as error:
            logger.warning("%s cannot be read (%s): what was shown before is not known", self._file, error)
            return {}
        for path, packed in sorted(rows, key=lambda row: row[0].split("/")):
            try:
                listing = Listing.restored(msgpack.unpackb(packed))
                drafts = Drafts(path)  # checks every name anew
                drafts.add(path, map(listing.entry, range(len(listing))))
                found[path] = drafts.finish()[path]
            except (ValueError, TypeError, IndexError, KeyError, msgpack.UnpackException) as error:
                logger.warning("%s: what %r showed is damaged (%s)", self._file, path, error)
        return found

    def save(self, rows: Sequence[Row], absent: Sequence[tuple[str, str]] = (), shown: Sequence[Shown] = ()) -> bool:
        """Write rows, replacing those of the same directories. Returns whether that went well; if not, says so.

        absent: (identity of the source, path) of directories that are no more. One of `rows` may have come after it.
        """
        try:
            with self._open() as database, database:
                database.executemany("DELETE FROM tree WHERE source = ? AND path = ?", absent)
                # What another mount published holds for all: of the same content earlier, of other content later.
                database.executemany(
                    "INSERT INTO tree VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET mtime_ns = excluded.mtime_ns, "
                    "fingerprint = excluded.fingerprint, times = excluded.times "
                    "WHERE fingerprint != excluded.fingerprint AND mtime_ns < excluded.mtime_ns",
                    rows,
                )
                database.executemany("DELETE FROM shown WHERE source = ? AND path = ?", absent)
                for source, path, exported in shown:
                    packed = msgpack.packb(exported)
                    if len(packed) <= _LISTING_BYTES_MAX:
                        database.execute("REPLACE INTO shown VALUES (?, ?, ?)", (source, path, packed))
                    else:
                        database.execute("DELETE FROM shown WHERE source = ? AND path = ?", (source, path))
        except (sqlite3.Error, OSError) as error:
            logger.warning("%s cannot be written (%s): a remount may show other directory times", self._file, error)
            return False
        return True

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._file, timeout=_BUSY_S)
        try:
            # No fsync: a power cut may damage the file, which then is thrown away.
            database.execute("PRAGMA synchronous = OFF")
            database.executescript(_SCHEMA)
            yield database
        finally:
            database.close()
