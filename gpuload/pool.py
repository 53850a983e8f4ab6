"""The pool path: tensors' bytes straight out of the mount daemon's RAM slots, without FUSE and without the page cache.

`PoolSource` is a `Source` for files under an mfs mount whose slots we may map (the same user as the mount's, or root).
Each reading thread has a connection of its own. Elsewhere `open_source` gives a `FileSource`, and nobody sees a
difference but speed: tests/gpuload/test_pool.py holds both to equal bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpuload.shards import Shard
from gpuload.source import FileSource, Source
from mfs.control import slots_client
from mfs.control.slots_client import SlotReader
from mfs.errors import ChangedError, MfsError

log = logging.getLogger(__name__)


def open_source(shards: Sequence[Shard]) -> Source:
    """The best source for these files: their mount's slots if all stand on one mount that lends them, else the
    files.
    """
    places = [slots_client.find(os.path.abspath(shard.path)) for shard in shards]
    doors = {place[0] for place in places if place is not None}
    if len(doors) == 1 and all(places):
        with contextlib.suppress(MfsError):  # the daemon is going or full: its files are still there to be read
            return PoolSource(shards, doors.pop(), [place[1] for place in places if place])
    return FileSource(shards)


class PoolSource:
    """Files of one mount, read in place in its slots. Does not own the descriptors."""

    def __init__(self, shards: Sequence[Shard], door: Path, paths: Sequence[str]) -> None:
        """paths: of each shard, from the mount's root. Raises: StoreError if the door is shut."""
        self._door = door
        self._paths = tuple(paths)
        self._inodes = [os.fstat(shard.fd).st_ino for shard in shards]
        self._sizes = [shard.header.file_bytes for shard in shards]
        self._local = threading.local()
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._connection()

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        """See `Source.read_into`; each byte is copied once, from the slot to its place."""
        connection = self._connection()
        waiting = iter(views)
        target = memoryview(b"")
        stop = start + sum(len(view) for view in views)
        for piece in self._pieces(connection, shard, start, stop):
            while len(piece):
                while not len(target):
                    target = next(waiting)
                count = min(len(piece), len(target))
                target[:count] = piece[:count]
                piece, target = piece[count:], target[count:]

    def _pieces(self, connection: _Connection, shard: int, start: int, stop: int) -> Iterator[memoryview]:
        file = connection.file(shard, self._paths[shard], self._inodes[shard], self._sizes[shard])
        step = connection.reader.lease_bytes_max
        for first in range(start, stop, step):
            with connection.reader.lease(file, first, min(first + step, stop)) as pieces:
                yield from pieces

    def _connection(self) -> _Connection:
        connection: _Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _Connection(SlotReader(self._door))
            with self._lock:
                self._connections.append(connection)
        return connection

    def close(self) -> None:
        """Give everything back. No call may be under way."""
        with self._lock:
            for connection in self._connections:
                connection.reader.close()
            self._connections = []


class _Connection:
    """One thread's connection and the files it has open there."""

    def __init__(self, reader: SlotReader) -> None:
        self.reader = reader
        self._files: dict[int, int] = {}

    def file(self, shard: int, path: str, inode: int, size: int) -> int:
        number = self._files.get(shard)
        if number is None:
            number, found, _ = self.reader.open(path, inode)
            if found != size:
                raise ChangedError(f"{path} has {found} bytes on its mount, {size} when it was opened; open it again")
            self._files[shard] = number
        return number
