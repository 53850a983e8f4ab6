"""What mounts lend, kept mapped and page-locked over loads; for a process that stays, the resident server.

Page-locking costs about as much as copying the bytes once (16 GiB: 1.6 s at best, NVIDIA/cudf#23457), so nobody waits
for it: pieces that a load touched are locked in the background, loads use staging until they are, and the next load of
them copies in place. decisions/0005-pool-path.md has the reasons. A thread per mount does the locking, and lets go of
what the daemon drops, or leaves when it ends: locked pages stay in memory, whoever removes them from their file.

A piece is locked only while it is leased, and with the number of its slot: where a later lease has another number, the
locked pages are not the file's any more, and nothing may be copied from there before they are locked anew.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpuload.device.base import Device
from gpuload.errors import DeviceError
from gpuload.moving.pool import Mapper, Place, Range
from mfs.control.borrowing import Borrower, LentFile, Opened, file_key
from mfs.errors import MfsError, StoreError, TransientStoreError
from mfs.types import CHUNK_BYTES

log = logging.getLogger("gpuload.server")

PIECE_BYTES = CHUNK_BYTES
"""Locked in one call: what the mount drops and brings back as one, so that it is whole or gone."""

WATCH_S = 0.5
"""Between two looks whether the daemon still lives, and what it has dropped; its memory stays so much longer."""


class KeptFiles(Mapper):
    """Files of every mount that was loaded from, for the devices of this process. Thread-safe."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = tuple(devices)
        self._lock = threading.Lock()
        self._kept: list[_KeptMount] = []

    def map(self, fd: int, size: int, place: Place) -> LentFile:
        """See `Mapper.map`."""
        with self._lock:
            self._kept = [kept for kept in self._kept if not kept.has_ended]
            for kept in self._kept:
                file = kept.take(fd, size, place) if kept.serves(place) else None
                if file is not None:
                    return file
            self._kept.append(_KeptMount(place, self._devices))
            file = self._kept[-1].take(fd, size, place)
            assert file is not None
            return file

    def touched(self, file: LentFile, start: int, stop: int, slots: Sequence[int]) -> bool:
        """See `Mapper.touched`."""
        return self._of(file).want(file, start, stop, slots)

    def unmap(self, file: LentFile) -> None:
        """See `Mapper.unmap`: the mapping stays while anything of it is page-locked."""
        self._of(file).give_back(file)

    def holds(self, ranges: Sequence[Range]) -> bool:
        """Whether all of these bytes are page-locked here now, so that a load would copy them in place."""
        with self._lock:
            kept = list(self._kept)
        return bool(ranges) and all(any(one.holds(wanted) for one in kept) for wanted in ranges)

    @property
    def mapped_count(self) -> int:
        """Mounts of which files may be mapped now."""
        with self._lock:
            return sum(not kept.has_ended for kept in self._kept)

    def mounts(self) -> list[dict[str, Any]]:
        """Of every mount that is kept: {door: its socket's path, mapped_bytes, locked_bytes}."""
        with self._lock:
            return [
                {"door": str(kept.door), "mapped_bytes": kept.mapped_bytes, "locked_bytes": kept.locked_bytes}
                for kept in self._kept
                if not kept.has_ended
            ]

    @property
    def locked_bytes(self) -> int:
        """Page-locked now, over all mounts."""
        with self._lock:
            return sum(kept.locked_bytes for kept in self._kept)

    def wait_idle(self) -> None:
        """Until everything touched so far is locked, or refused."""
        with self._lock:
            waiting = list(self._kept)
        for kept in waiting:
            kept.wait_idle()

    def close(self) -> None:
        """Unlock and unmap all; no source may be open."""
        with self._lock:
            kept, self._kept = self._kept, []
        for one in kept:
            one.close()

    def _of(self, file: LentFile) -> _KeptMount:
        with self._lock:
            return next(kept for kept in self._kept if kept.has(file))


@dataclass(eq=False)
class _KeptFile:
    """One file, mapped."""

    file: LentFile
    place: Place
    fd: int
    """Ours, to ask what stands in the file."""
    is_named: bool
    """It has a name at the daemon, which goes when the daemon removes it."""
    users: int = 0
    locked: dict[int, int] = field(default_factory=dict)
    """By piece: the number of the slot whose pages are locked."""
    queued: set[int] = field(default_factory=set)
    blocks_count: int = 0
    """Of its memory, when last looked at."""

    def dropped(self) -> list[int]:
        """Locked pieces that the daemon has dropped, as far as the file tells: nothing stands there."""
        found = os.fstat(self.fd)
        if self.is_named and not found.st_nlink:
            return [] if self.users else list(self.locked)
        if found.st_blocks == self.blocks_count:
            return []
        self.blocks_count = found.st_blocks
        return [piece for piece in self.locked if not self._has_memory(piece * PIECE_BYTES)]

    def _has_memory(self, start: int) -> bool:
        try:
            return os.lseek(self.fd, start, os.SEEK_DATA) < start + PIECE_BYTES
        except OSError as error:
            if error.errno != errno.ENXIO:  # else there is nothing up to the end
                raise
            return False


class _Wanted(NamedTuple):
    """A piece to lock, and what of it was lent."""

    kept: _KeptFile
    piece: int
    start: int
    stop: int


class _KeptMount:
    """One daemon's files, and the thread that locks them."""

    def __init__(self, place: Place, devices: Sequence[Device]) -> None:
        self.door = place.door
        self._pid = place.daemon_pid
        self._devices = devices
        self._changed = threading.Condition()
        self._files: dict[tuple[int, int], _KeptFile] = {}
        self._queue: deque[_Wanted] = deque()
        self._is_working = False
        self._is_closing = False
        self._is_gone = False
        self._is_refused = False
        self._thread = threading.Thread(target=self._work, name="gpuload-kept", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Nothing is mapped any more, or ever will be."""
        return not self._thread.is_alive()

    @property
    def mapped_bytes(self) -> int:
        with self._changed:
            return sum(kept.file.size for kept in self._files.values())

    @property
    def locked_bytes(self) -> int:
        with self._changed:
            return sum(_locked_bytes(kept.file, piece) for kept in self._files.values() for piece in kept.locked)

    def holds(self, wanted: Range) -> bool:
        """See `KeptFiles.holds`."""
        pieces = range(wanted.start // PIECE_BYTES, -(-wanted.stop // PIECE_BYTES))
        with self._changed:
            if self._is_gone or self._is_closing or self.door != wanted.door:
                return False
            files = (kept for kept in self._files.values() if kept.place.inode == wanted.inode)
            return any(all(piece in kept.locked for piece in pieces) for kept in files)

    def serves(self, place: Place) -> bool:
        return (self.door, self._pid) == (place.door, place.daemon_pid)

    def has(self, file: LentFile) -> bool:
        with self._changed:
            return any(kept.file is file for kept in self._files.values())

    def take(self, fd: int, size: int, place: Place) -> LentFile | None:
        """One more user of a file; None if all of this mount is going. Raises: StoreError."""
        with self._changed:
            if self._is_closing or self._is_gone:
                return None
            key = file_key(fd)
            kept = self._files.get(key)
            if kept is None:
                file = LentFile(fd, size)
                try:
                    own = os.dup(fd)
                except OSError as error:
                    raise StoreError(f"{place.path} cannot be kept mapped: {error}") from error
                kept = self._files[key] = _KeptFile(file, place, own, bool(os.fstat(fd).st_nlink))
            kept.users += 1
            return kept.file

    def give_back(self, file: LentFile) -> None:
        with self._changed:
            self._files[file.key].users -= 1
            self._changed.notify_all()

    def want(self, file: LentFile, start: int, stop: int, slots: Sequence[int]) -> bool:
        """See `Mapper.touched`."""
        is_current = True
        with self._changed:
            kept = self._files[file.key]
            for piece, slot in enumerate(slots, start // PIECE_BYTES):
                locked = kept.locked.get(piece)
                is_current = is_current and locked in (None, slot)
                if locked != slot and piece not in kept.queued and not self._is_refused:
                    kept.queued.add(piece)
                    first = piece * PIECE_BYTES
                    self._queue.append(_Wanted(kept, piece, max(start, first), min(stop, first + PIECE_BYTES)))
                    self._changed.notify_all()
        return is_current

    def wait_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._is_working)

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    # -- the thread

    def _work(self) -> None:
        watch: Borrower | None = None
        try:
            watch = Borrower(self.door)
        except MfsError:  # gone already
            pass
        try:
            while self._wait(watch):
                self._lock_queued()
                with self._changed:
                    self._is_working = False
                    self._changed.notify_all()
        finally:
            if watch is not None:
                watch.close()
            for kept in list(self._files.values()):
                self._let_go(kept)

    def _wait(self, watch: Borrower | None) -> bool:
        """Until there is something to lock; False when all is to go: on close, or with the daemon and the last user."""
        while True:
            with self._changed:
                if self._is_closing:
                    return False
                if self._queue:
                    self._is_working = True
                    return True
                self._changed.wait(WATCH_S)
            if not self._is_gone and (watch is None or watch.daemon_pid != self._pid or watch.is_gone()):
                self._is_gone = True
            with self._changed:
                files = list(self._files.values())
                if self._is_gone and not any(kept.users for kept in files):
                    return False
                dropped = [(kept, piece) for kept in files for piece in kept.dropped()]
            for kept, piece in dropped:
                self._unlock(kept, piece)
            for kept in files:
                if not kept.locked and not kept.queued:
                    self._let_go(kept)

    def _lock_queued(self) -> None:
        """Lock what was touched, over a connection of its own: the daemon keeps what is open at one."""
        try:
            with closing(Borrower(self.door)) as borrower:
                if borrower.daemon_pid != self._pid:
                    raise StoreError("the mount is another daemon's by now")
                opened: dict[_KeptFile, Opened] = {}
                while (wanted := self._next_wanted()) is not None:
                    self._lock_wanted(borrower, opened, wanted)
        except MfsError as error:
            log.info("%s: %s; what was loaded is not page-locked", self.door, error)
            self._forget_queued()

    def _next_wanted(self) -> _Wanted | None:
        with self._changed:
            return self._queue.popleft() if self._queue and not self._is_closing else None

    def _forget_queued(self) -> None:
        with self._changed:
            for wanted in self._queue:
                wanted.kept.queued.discard(wanted.piece)
            self._queue.clear()

    def _lock_wanted(self, borrower: Borrower, opened: dict[_KeptFile, Opened], wanted: _Wanted) -> None:
        """Lock one piece, if RAM still has what was lent of it. Raises: MfsError if the daemon says no more."""
        kept, piece, start, stop = wanted
        is_over = True
        try:
            if kept not in opened:
                place = kept.place
                opened[kept] = borrower.open(place.path, place.inode, lambda fd, size: _same(kept, fd))
            try:
                loan = borrower.borrow(opened[kept], start, stop, here=True)
            except TransientStoreError:  # loads hold all that is lent now
                is_over = False
                with self._changed:
                    self._queue.append(wanted)
                    self._changed.wait(WATCH_S / 10)
                return
            try:
                self._lock(kept, piece, loan.slots[0])
            finally:
                loan.release()
        except MfsError:  # dropped meanwhile, or another version by now
            if borrower.is_closed:
                raise
        finally:
            if is_over:
                with self._changed:
                    kept.queued.discard(piece)

    def _lock(self, kept: _KeptFile, piece: int, slot: int) -> None:
        """Page-lock a leased piece for all devices."""
        if kept.locked.get(piece) == slot or self._is_refused:
            return
        if piece in kept.locked:
            self._unlock(kept, piece)
        address, nbytes = kept.file.address + piece * PIECE_BYTES, _locked_bytes(kept.file, piece)
        done: list[Device] = []
        try:
            for device in self._devices:
                device.register(address, nbytes)
                done.append(device)
        except DeviceError as error:
            log.warning("%s: what the mount lends is copied to staging buffers instead of read in place", error)
            for device in done:
                device.unregister(address)
            self._is_refused = True
            self._forget_queued()
            return
        with self._changed:
            kept.locked[piece] = slot

    def _unlock(self, kept: _KeptFile, piece: int) -> None:
        for device in self._devices:
            try:
                device.unregister(kept.file.address + piece * PIECE_BYTES)
            except DeviceError as error:  # the others are unlocked and all is unmapped nevertheless
                log.warning("%s: memory of a mount may stay page-locked", error)
        with self._changed:
            del kept.locked[piece]  # last: until then a lease of other pages finds that it is not current

    def _let_go(self, kept: _KeptFile) -> None:
        """Unlock and unmap a file, unless somebody uses it."""
        with self._changed:
            if kept.users and not self._is_closing:
                return
            del self._files[kept.file.key]
        for piece in list(kept.locked):
            self._unlock(kept, piece)
        kept.file.close()
        os.close(kept.fd)


def _same(kept: _KeptFile, fd: int) -> LentFile:
    """The mapping there is, if that is the file's. Raises: StoreError."""
    if file_key(fd) != kept.file.key:
        raise StoreError(f"{kept.place.path} stands in another file by now")
    return kept.file


def _locked_bytes(file: LentFile, piece: int) -> int:
    nbytes = min(PIECE_BYTES, file.size - piece * PIECE_BYTES)
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
