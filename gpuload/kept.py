"""The mounts' slots, kept mapped and page-locked over loads; for a process that stays, the resident server.

Page-locking costs about as much as copying the bytes once (16 GiB: 1.6 s at best, NVIDIA/cudf#23457), so nobody waits
for it: pieces that a load touched are locked in the background, loads use staging until they are, and the next load of
anything in those slots copies in place. decisions/0005-pool-path.md has the reasons. A thread per mount does the
locking, and sees when the mount's daemon ends: a dead daemon's slots must not stay in memory.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuload.device.base import Device
from gpuload.errors import DeviceError
from gpuload.pool import Mapper
from mfs.control.slots_client import SlotReader, Slots, slots_key
from mfs.errors import MfsError
from mfs.types import CHUNK_BYTES

log = logging.getLogger("gpuload.server")

PIECE_BYTES = 16 * CHUNK_BYTES
"""Locked in one call: some 6 ms, in which the driver does little else. A multiple of the slot, so that no copy crosses
two pieces, and far below the 512 GiB that driver r580 refuses (xcena-dev/maru#64)."""

WATCH_S = 0.5
"""Between two looks whether the daemon still lives; its memory stays so much longer."""


class KeptSlots(Mapper):
    """Slots of every mount that was loaded from, for the devices of this process. Thread-safe."""

    def __init__(self, devices: Sequence[Device], *, piece_bytes: int = PIECE_BYTES) -> None:
        self._devices = tuple(devices)
        self._piece_bytes = piece_bytes
        self._lock = threading.Lock()
        self._kept: list[_Kept] = []

    def map(self, fd: int, size_bytes: int, door: Path) -> Slots:
        """See `Mapper.map`."""
        key = slots_key(fd)
        with self._lock:
            self._kept = [kept for kept in self._kept if not kept.has_ended]
            for kept in self._kept:
                if kept.slots.key == key and kept.take():
                    return kept.slots
            self._kept.append(_Kept(Slots(fd, size_bytes), door, self._devices, self._piece_bytes))
            return self._kept[-1].slots

    def touched(self, slots: Slots, offset: int, nbytes: int) -> None:
        """See `Mapper.touched`."""
        self._of(slots).want(offset, nbytes)

    def unmap(self, slots: Slots) -> None:
        """See `Mapper.unmap`: the mapping stays while the mount's daemon does."""
        self._of(slots).give_back()

    @property
    def mapped_count(self) -> int:
        """Mounts whose slots are mapped now."""
        with self._lock:
            return sum(not kept.has_ended for kept in self._kept)

    def mounts(self) -> list[dict[str, Any]]:
        """Of every mount whose slots are mapped: {slots: its door's path, slots_bytes, locked_bytes}."""
        with self._lock:
            return [
                {"slots": str(kept.door), "slots_bytes": kept.slots.size_bytes, "locked_bytes": kept.locked_bytes}
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

    def _of(self, slots: Slots) -> _Kept:
        with self._lock:
            return next(kept for kept in self._kept if kept.slots is slots)


class _Kept:
    """One mount's slots and the thread that locks them."""

    def __init__(self, slots: Slots, door: Path, devices: Sequence[Device], piece_bytes: int) -> None:
        self.slots, self.door = slots, door
        self.locked_bytes = 0
        self._devices, self._piece_bytes = devices, piece_bytes
        self._users = 1
        self._changed = threading.Condition()
        self._seen: set[int] = set()  # pieces that are locked, queued or refused
        self._queue: deque[int] = deque()
        self._locked: list[tuple[Device, int]] = []
        self._is_working = False
        self._is_closing = False
        self._is_gone = False
        self._is_refused = False
        self._thread = threading.Thread(target=self._work, args=(door,), name="gpuload-slots", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Unmapped."""
        return not self._thread.is_alive()

    def take(self) -> bool:
        """One more user; False if this mapping is going, then another is to be made."""
        with self._changed:
            if self._is_closing or self._is_gone:
                return False
            self._users += 1
            return True

    def give_back(self) -> None:
        with self._changed:
            self._users -= 1
            self._changed.notify_all()

    def want(self, offset: int, nbytes: int) -> None:
        first, last = offset // self._piece_bytes, (offset + nbytes - 1) // self._piece_bytes
        with self._changed:
            for piece in range(first, last + 1):
                if piece not in self._seen and not self._is_refused:
                    self._seen.add(piece)
                    self._queue.append(piece)
                    self._changed.notify_all()

    def wait_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._is_working)

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self, door: Path) -> None:
        try:
            watch = SlotReader(door, lambda fd, size_bytes: self.slots)
        except MfsError:  # gone already
            watch = None
        try:
            while (piece := self._next(watch)) is not None:
                self._lock_piece(piece)
                with self._changed:
                    self._is_working = False
                    self._changed.notify_all()
        finally:
            if watch is not None:
                watch.close()
            for device, address in self._locked:
                try:
                    device.unregister(address)
                except DeviceError as error:  # the others are unlocked and all is unmapped nevertheless
                    log.warning("%s: memory of a mount that ended may stay page-locked", error)
            self.locked_bytes = 0
            self.slots.close()

    def _next(self, watch: SlotReader | None) -> int | None:
        """The next piece to lock; None when the mapping is to go: on close, or with its daemon and its last user."""
        while True:
            with self._changed:
                if self._is_closing:
                    return None
                if self._queue:
                    self._is_working = True
                    return self._queue.popleft()
                self._changed.wait(WATCH_S)
            if not self._is_gone and (watch is None or watch.is_gone()):
                self._is_gone = True
            with self._changed:
                if self._is_gone and not self._users:
                    return None

    def _lock_piece(self, piece: int) -> None:
        start = piece * self._piece_bytes
        nbytes = min(self._piece_bytes, self.slots.size_bytes - start)
        for device in self._devices:
            try:
                device.register(self.slots.address + start, nbytes)
            except DeviceError as error:
                log.warning("%s: the mount's slots are copied to staging buffers instead of read in place", error)
                with self._changed:
                    self._is_refused = True
                    self._queue.clear()
                return
            self._locked.append((device, self.slots.address + start))
        self.locked_bytes += nbytes
