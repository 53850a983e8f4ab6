"""The pool path: tensors' bytes straight out of the mount daemon's RAM, without FUSE and without the page cache.

`PoolSource` is a `Source` for files under an mfs mount that lends to us (the same user as the mount's, or root).
It lends the bytes in place where somebody can copy from there, and copies them out itself where not. Elsewhere
`open_source` gives a `FileSource`, and nobody sees a difference but speed: tests/gpuload/moving/test_pool.py holds both
to equal bytes. Who keeps the mappings, and has them page-locked, over many loads is `kept.KeptFiles`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from gpuload.moving.shards import Shard
from gpuload.moving.source import FileSource, Loan, Source, copy_out
from mfs.control import borrowing
from mfs.control.borrowing import Borrower, LentFile, Opened, file_key
from mfs.errors import ChangedError, MfsError, StoreError, TransientStoreError
from mfs.types import CHUNK_BYTES

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a lent file is to be had."""

    door: Path
    daemon_pid: int
    path: str
    """From the mount's root."""
    inode: int


class Range(NamedTuple):
    """Bytes of a file on a mount that lends to us."""

    door: Path
    inode: int
    """Names a version of a file, the same on every mount."""
    start: int
    stop: int


def lenders_of(shards: Sequence[Shard]) -> list[Path | None]:
    """The door of the mount that each file stands on; None for those on none. Asks the kernel's mount table."""
    places = [borrowing.find(os.path.abspath(shard.path)) for shard in shards]
    return [None if place is None else place[0] for place in places]


class Mapper:
    """Maps what a mount lends for the sources of one load. `kept.KeptFiles` is another that keeps it over loads."""

    def map(self, fd: int, size: int, place: Place) -> LentFile:
        """The file behind a descriptor that a door gave out. Raises: StoreError."""
        return LentFile(fd, size)

    def touched(self, file: LentFile, start: int, stop: int, slots: Sequence[int]) -> bool:
        """A range of a file is lent. Returns False if pages are locked there that are not its own any more, so that no
        device may copy from there.

        slots: as the lease says them.
        """
        return True

    def unmap(self, file: LentFile) -> None:
        """The source that got it from `map` needs it no more."""
        file.close()


def open_source(shards: Sequence[Shard], mapper: Mapper | None = None, traceparent: str = "") -> Source:
    """The best source for these files: their mount's RAM if all stand on one mount that lends it, else the
    files.

    traceparent: of the trace that the mount is to go on with; '' for none.
    """
    places = [borrowing.find(os.path.abspath(shard.path)) for shard in shards]
    doors = {place[0] for place in places if place is not None}
    if len(doors) == 1 and all(places):
        with contextlib.suppress(MfsError):  # the daemon is going or full: its files are still there to be read
            paths = [place[1] for place in places if place]
            return PoolSource(shards, doors.pop(), paths, mapper or Mapper(), traceparent)
    return FileSource(shards)


class PoolSource:
    """Files of one mount, read in place in its RAM. Does not own the descriptors.

    Every call that is under way has a connection of its own; there are as many as ever were under way at once.
    """

    def __init__(
        self, shards: Sequence[Shard], door: Path, paths: Sequence[str], mapper: Mapper, traceparent: str = ""
    ) -> None:
        """paths: of each shard, from the mount's root. Raises: StoreError if the door is shut."""
        self._door = door
        self._paths = tuple(paths)
        self._inodes = [shard.inode for shard in shards]
        self._sizes = [shard.header.file_bytes for shard in shards]
        self._files = FileSource(shards)
        self._mapper = mapper
        self._traceparent = traceparent
        self._mapped: dict[int, LentFile] = {}  # by shard
        self._is_interrupted = False
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._idle: list[_Connection] = []
        with self._connection() as first:
            self._lease_bytes_max = first.borrower.lease_bytes_max

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        """See `Source.borrow`."""
        loan = self._lent(shard, start, stop)
        if loan is not None and not loan.is_current:
            loan.release()
            return None
        return loan

    def _lent(self, shard: int, start: int, stop: int) -> _PoolLoan | None:
        """A loan whose bytes this process may read; None where it is lent nothing."""
        if stop - start > self._lease_bytes_max:
            return None
        if self._is_interrupted:
            raise StoreError(f"{self._paths[shard]}: the load was stopped")
        try:
            with self._connection() as connection:
                opened = self._open(connection, shard)
                lent = connection.borrower.borrow(opened, start, stop)
        except TransientStoreError as error:  # others hold all that is lent, say
            if self._is_interrupted:
                raise StoreError(f"{self._paths[shard]}: the load was stopped") from None
            log.info("%s; reading the file instead", error)
            return None
        is_current = self._mapper.touched(opened.file, start, stop, lent.slots)
        return _PoolLoan(lent, opened.file.address, start, stop, is_current=is_current)

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        """See `Source.read_into`; each byte is copied once, from RAM to its place."""
        for group in _cut(views, self._lease_bytes_max):
            stop = start + sum(len(view) for view in group)
            loan = self._lent(shard, start, stop)
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
            connection.borrower.stop()

    def close(self) -> None:
        """Give everything back, leases too. No call may be under way."""
        with self._lock:
            connections, self._connections, self._idle = self._connections, [], []
            mapped, self._mapped = self._mapped, {}
        for connection in connections:
            connection.borrower.close()
        for file in mapped.values():
            self._mapper.unmap(file)

    @contextmanager
    def _connection(self) -> Iterator[_Connection]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = _Connection(Borrower(self._door))
            with self._lock:
                self._connections.append(connection)
        try:
            yield connection
        finally:
            with self._lock:
                self._idle.append(connection)

    def _open(self, connection: _Connection, shard: int) -> Opened:
        opened = connection.files.get(shard)
        if opened is None:
            path, inode = self._paths[shard], self._inodes[shard]
            place = Place(self._door, connection.borrower.daemon_pid, path, inode)
            opened = connection.borrower.open(
                path, inode, lambda fd, size: self._map(shard, fd, size, place), traceparent=self._traceparent
            )
            connection.files[shard] = opened
        return opened

    def _map(self, shard: int, fd: int, size: int, place: Place) -> LentFile:
        """One mapping for all connections: the daemon keeps a file as long as one of them has it open."""
        if size != self._sizes[shard]:
            raise ChangedError(
                f"{place.path} has {size} bytes on its mount, {self._sizes[shard]} when it was opened; open it again"
            )
        with self._lock:
            file = self._mapped.get(shard)
            if file is None:
                file = self._mapped[shard] = self._mapper.map(fd, size, place)
            elif file.key != file_key(fd):
                raise StoreError(f"{place.path}: the mount was started anew while it was loaded; load it again")
            return file


class _Connection:
    """One connection and the files it has open there."""

    def __init__(self, borrower: Borrower) -> None:
        self.borrower = borrower
        self.files: dict[int, Opened] = {}
        """By shard."""


class _PoolLoan:
    """See `source.Loan`. Its runs end where pieces end that are page-locked each by itself: no copy may cross two."""

    def __init__(self, lent: borrowing.Loan, address: int, start: int, stop: int, *, is_current: bool) -> None:
        """address: of the file. is_current: as `Mapper.touched` says."""
        self._lent = lent
        self.is_current = is_current
        edges = [start, *range((start // CHUNK_BYTES + 1) * CHUNK_BYTES, stop, CHUNK_BYTES), stop]
        self.runs = [(address + first, last - first) for first, last in pairwise(edges)]

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
