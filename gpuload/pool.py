"""The pool path: tensors' bytes straight out of the mount daemon's RAM slots, without FUSE and without the page cache.

`PoolSource` is a `Source` for files under an mfs mount whose slots we may map (the same user as the mount's, or root).
It lends the bytes in place where somebody can copy from there, and copies them out itself where not. Elsewhere
`open_source` gives a `FileSource`, and nobody sees a difference but speed: tests/gpuload/test_pool.py holds both to
equal bytes. Who keeps the mapping, and has it page-locked, over many loads is `kept.KeptSlots`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpuload.shards import Shard
from gpuload.source import FileSource, Loan, Source, copy_out
from mfs.control import slots_client
from mfs.control.slots_client import SlotReader, Slots
from mfs.errors import ChangedError, MfsError, StoreError, TransientStoreError

log = logging.getLogger(__name__)


class Mapper:
    """Maps a mount's slots for the sources of one load. `kept.KeptSlots` is another that keeps them over loads."""

    def map(self, fd: int, size_bytes: int, door: Path) -> Slots:
        """The slots behind a descriptor that a door gave out. Raises: StoreError."""
        return Slots(fd, size_bytes)

    def touched(self, slots: Slots, offset: int, nbytes: int) -> None:
        """Bytes of these slots were lent."""

    def unmap(self, slots: Slots) -> None:
        """The source that got them from `map` needs them no more."""
        slots.close()


def open_source(shards: Sequence[Shard], mapper: Mapper | None = None) -> Source:
    """The best source for these files: their mount's slots if all stand on one mount that lends them, else the
    files.
    """
    places = [slots_client.find(os.path.abspath(shard.path)) for shard in shards]
    doors = {place[0] for place in places if place is not None}
    if len(doors) == 1 and all(places):
        with contextlib.suppress(MfsError):  # the daemon is going or full: its files are still there to be read
            return PoolSource(shards, doors.pop(), [place[1] for place in places if place], mapper or Mapper())
    return FileSource(shards)


class PoolSource:
    """Files of one mount, read in place in its slots. Does not own the descriptors.

    Every call that is under way has a connection of its own; there are as many as ever were under way at once.
    """

    def __init__(self, shards: Sequence[Shard], door: Path, paths: Sequence[str], mapper: Mapper) -> None:
        """paths: of each shard, from the mount's root. Raises: StoreError if the door is shut."""
        self._door = door
        self._paths = tuple(paths)
        self._inodes = [os.fstat(shard.fd).st_ino for shard in shards]
        self._sizes = [shard.header.file_bytes for shard in shards]
        self._files = FileSource(shards)
        self._mapper = mapper
        self._slots: Slots | None = None
        self._is_interrupted = False
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._idle: list[_Connection] = []
        with self._connection() as first:
            self._lease_bytes_max = first.reader.lease_bytes_max

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        """See `Source.borrow`."""
        if stop - start > self._lease_bytes_max:
            return None
        if self._is_interrupted:
            raise StoreError(f"{self._paths[shard]}: the load was stopped")
        try:
            with self._connection() as connection:
                slots = connection.reader.slots
                lent = connection.reader.borrow(self._file(connection, shard), start, stop)
        except TransientStoreError as error:  # others hold all that is lent, say
            if self._is_interrupted:
                raise StoreError(f"{self._paths[shard]}: the load was stopped") from None
            log.info("%s; reading the file instead", error)
            return None
        for offset, nbytes in lent.pieces:
            self._mapper.touched(slots, offset, nbytes)
        return _SlotLoan(lent, slots.address)

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        """See `Source.read_into`; each byte is copied once, from the slot to its place."""
        for group in _cut(views, self._lease_bytes_max):
            stop = start + sum(len(view) for view in group)
            loan = self.borrow(shard, start, stop)
            if loan is None:
                self._files.read_into(shard, start, group)
            else:
                try:
                    copy_out(loan.runs, group)
                finally:
                    loan.release()
            start = stop

    def interrupt(self) -> None:
        """See `Source.interrupt`: the daemon gives up what we wait for, which may be what we hold ourselves."""
        self._is_interrupted = True
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.reader.stop()

    def close(self) -> None:
        """Give everything back, leases too. No call may be under way."""
        with self._lock:
            connections, self._connections, self._idle = self._connections, [], []
            slots, self._slots = self._slots, None
        for connection in connections:
            connection.reader.close()
        if slots is not None:
            self._mapper.unmap(slots)

    @contextmanager
    def _connection(self) -> Iterator[_Connection]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = _Connection(SlotReader(self._door, self._map))
            with self._lock:
                self._connections.append(connection)
        try:
            yield connection
        finally:
            with self._lock:
                self._idle.append(connection)

    def _map(self, fd: int, size_bytes: int) -> Slots:
        with self._lock:
            if self._slots is None:
                self._slots = self._mapper.map(fd, size_bytes, self._door)
            elif self._slots.key != slots_client.slots_key(fd):
                raise StoreError(f"{self._paths[0]}: the mount was started anew while it was loaded; load it again")
            return self._slots

    def _file(self, connection: _Connection, shard: int) -> int:
        number = connection.files.get(shard)
        if number is None:
            path, size = self._paths[shard], self._sizes[shard]
            number, found, _ = connection.reader.open(path, self._inodes[shard])
            if found != size:
                raise ChangedError(f"{path} has {found} bytes on its mount, {size} when it was opened; open it again")
            connection.files[shard] = number
        return number


class _Connection:
    """One connection and the files it has open there."""

    def __init__(self, reader: SlotReader) -> None:
        self.reader = reader
        self.files: dict[int, int] = {}
        """Shard -> the daemon's number for it."""


class _SlotLoan:
    """See `source.Loan`."""

    def __init__(self, lent: slots_client.Loan, address: int) -> None:
        self._lent = lent
        self.runs = [(address + offset, nbytes) for offset, nbytes in lent.pieces]

    def release(self) -> None:
        self._lent.release()


def _cut(views: Sequence[memoryview], step: int) -> Iterator[list[memoryview]]:
    """The views in groups of `step` bytes; the last one may be shorter."""
    group: list[memoryview] = []
    room = step
    for view in views:
        rest = view
        while len(rest):
            group.append(rest[:room])
            rest = rest[len(group[-1]) :]
            room -= len(group[-1])
            if not room:
                yield group
                group, room = [], step
    if group:
        yield group
