"""The RAM tier's memory: sparse files on a tmpfs of our own or, without root, memfds.

A *slot* is room for one chunk, and stands in one of two kinds of files. The *common* file is nobody's: pieces of it go
from one chunk to the next with their memory, since memory that is new, or was free for a moment, is zeroed first and
may have to be found by a hypervisor, at up to ten times the price of the bytes that are to be there. Chunks that others
shall have as a file, borrowers or the kernel, stand in their object's *own* file, which is exactly the object: its
bytes at their own offsets. From there a chunk's memory goes when its piece is punched out.

Workers are sent pieces, by descriptors (`pieces`). Which bytes of a piece mean anything is `chunk_cache`'s business.
Nothing here does I/O, and nothing blocks.

Memory that goes with a whole file (see `RamFile.given`) is there until its last reader elsewhere is gone, so it
counts against the budget until the tmpfs says that it is.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import resource
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mfs import limits
from mfs.cache.tmpfs import PrivateTmpfs
from mfs.errors import ConfigError, StoreError, TransientStoreError
from mfs.mapping import map_file, punch_hole
from mfs.types import CHUNK_BYTES

SLOTS_COUNT_MIN = 16
"""Fewer cannot hold the readers, fills and SSD writes of even one stream."""

_WARM_MAX = 256  # pieces kept without a user
_WARM_AHEAD_MAX = 160  # touched for the first load: at 1 GiB what it takes before its chunks are on SSD and read
_SLACK_BYTES = 64 << 20  # of the tmpfs beyond the budget: a borrower who touches what he was not lent takes memory
_OTHER_DESCRIPTORS = 512  # of the daemon: sockets, workers, logs
_MAPPINGS_MAX = 65530  # vm.max_map_count's default

PROCESS_BYTES = 64 << 20
"""What a daemon or a worker takes beside the slots: 27 MB at rest, 55 with botocore, and what is under way."""


@dataclass(frozen=True)
class RamConfig:
    """Size of the RAM tier."""

    budget_bytes: int
    """Rounded down to whole slots."""
    beside_bytes: int = 0
    """What the mount's processes need beside the slots: must be available as well."""
    coming_bytes: int = 0
    """What will be available before the slots are used: the memory of a daemon that hands its mount over."""
    serves: bool = False
    """The mount serves already: what does not fit now is done without, down to SLOTS_COUNT_MIN."""


class Place(NamedTuple):
    """Where a chunk's slot is."""

    file: RamFile
    start: int
    slot: int
    """Its number, no other's ever: where the number is another, so is the memory or whoever used it."""


class RamFile:
    """A file in memory, and this process's mapping of it. Made by `RamTier.open`."""

    def __init__(self, fd: int, name: str | None, size: int) -> None:
        """Raises: OSError if it cannot be mapped."""
        self.fd = fd
        self.name = name
        """On the tmpfs; None for a memfd."""
        self.slots_count = 0
        self.holders = 0
        """Who needs the file itself, also with nothing in it: borrowers that have it mapped."""
        self.stays = False
        """It is there for as long as the tier is: the common file."""
        self.given = False
        """The kernel or others read the whole file by themselves: nothing may be punched out of it any more."""
        self._view = map_file(fd, size, writable=True) if size else memoryview(b"")  # only address space

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes [start, stop) of the file, writable; valid while their chunks have slots."""
        return self._view[start:stop]

    def forget(self) -> None:
        """Close the descriptor, and unmap with the last view."""
        os.close(self.fd)
        self._view = memoryview(b"")


class RamTier:
    """`slots_count` slots and the files they are in. All methods belong to the trio thread."""

    def __init__(self, config: RamConfig) -> None:
        """Raises: ConfigError if the budget is too small, or more than can be had and the mount does not serve yet."""
        self.slots_count = config.budget_bytes // CHUNK_BYTES
        if self.slots_count < SLOTS_COUNT_MIN:
            raise ConfigError(
                f"RAM budget of {config.budget_bytes} bytes is too small: expected at least "
                f"{SLOTS_COUNT_MIN * CHUNK_BYTES} bytes ({SLOTS_COUNT_MIN} slots of {CHUNK_BYTES}); raise --ram-size"
            )
        self.size_bytes = self.slots_count * CHUNK_BYTES
        self.shortage = ""
        """Why there are fewer slots than the budget says; '' if there are as many."""
        found = limits.available()
        available_bytes = found.free_bytes + config.coming_bytes
        if self.size_bytes + config.beside_bytes > available_bytes:
            beside = f", and the mount's processes need {config.beside_bytes} beside it" if config.beside_bytes else ""
            misfit = (
                f"RAM budget of {self.size_bytes} bytes does not fit: {found.bound_by} has {available_bytes} bytes "
                f"available{beside}"
            )
            if not config.serves:
                raise ConfigError(f"{misfit}; lower --ram-size, raise the limit or free memory")
            fitting_count = (available_bytes - config.beside_bytes) // CHUNK_BYTES
            self.slots_count = min(self.slots_count, max(SLOTS_COUNT_MIN, fitting_count))
            self.size_bytes = self.slots_count * CHUNK_BYTES
            self.shortage = f"{misfit}; going on with {self.size_bytes} bytes until it is mounted anew or handed over"
        largest = _raised(resource.RLIMIT_FSIZE)
        if largest < self.size_bytes and not config.serves:
            raise ConfigError(
                f"RAM budget of {self.size_bytes} bytes does not fit: ulimit -f allows files of {largest} bytes, and "
                f"memory is one file, as each model's file is; ulimit -f unlimited (systemd: LimitFSIZE=)"
            )
        self.objects_max = _objects_max()
        """Files at once. Each costs a descriptor, a mapping and, however small it is, a page of 2 MiB."""
        self._tmpfs: PrivateTmpfs | None = None
        with suppress(OSError):
            self._tmpfs = PrivateTmpfs(self.size_bytes + _SLACK_BYTES)
        self.note = ""
        """What the memory lacks; '' if it has huge pages and is never swapped out."""
        if self._tmpfs is None:
            self.note = "ordinary pages, which may be swapped out: only root can mount a tmpfs"
        elif self._tmpfs.may_swap:
            self.note = "may be swapped out: Linux 6.4 or newer can forbid that"
        self.slots_used = 0
        self._serials = itertools.count(1)
        self._objects: set[RamFile] = set()
        self._held_bytes = 0
        self._common: RamFile | None = None
        self._warm: deque[int] = deque()
        """Pieces of the common file that have memory and no user, the last used last: where each begins."""
        self._warming: set[int] = set()
        """Slots that `warm_up` gave."""
        self._cold: list[int] = []
        """Those that had memory once and have none."""
        self._touched = 0
        """Where the part of the common file begins that was never used."""
        self._is_cooled = False
        """Memory without a user is given back until somebody takes a slot again."""

    # -- files

    def open(self, size: int) -> RamFile:
        """A new file for an object of that size.

        Raises: TransientStoreError if there are `objects_max`, StoreError if it cannot be had.
        """
        if len(self._objects) >= self.objects_max:
            raise TransientStoreError(f"the RAM tier has {self.objects_max} files already")
        name = None if self._tmpfs is None else str(next(self._serials))
        fd = -1
        try:
            if self._tmpfs is None or name is None:
                fd = os.memfd_create("mfs-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.fchmod(fd, 0o400)  # else whoever is handed the reading end could open it again for writing
            else:
                fd = self._tmpfs.create(name)
            os.ftruncate(fd, size)
            if name is None:
                # Who is handed the file must not be able to shrink it under us: that would be SIGBUS in the daemon.
                # Not F_SEAL_FUTURE_WRITE: workers map it anew for each order.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            obj = RamFile(fd, name, size)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
                if self._tmpfs is not None and name is not None:
                    self._tmpfs.remove(name)
            raise StoreError(f"RAM tier: a file of {size} bytes in memory cannot be had: {error}") from error
        self._objects.add(obj)
        return obj

    def lend(self, obj: RamFile) -> int:
        """A descriptor by which strangers can read an object and never write; the caller closes it. Raises: OSError."""
        if self._tmpfs is None or obj.name is None:
            return os.open(f"/proc/self/fd/{obj.fd}", os.O_RDONLY | os.O_CLOEXEC)
        return self._tmpfs.open_to_read(obj.name)

    def hold(self, obj: RamFile) -> None:
        """Keep the file, whatever stands in it, until `unhold`. Raises: TransientStoreError if too many are held."""
        if not obj.holders and sum(1 for other in self._objects if other.holders) >= self.objects_max // 2:
            raise TransientStoreError(f"{self.objects_max // 2} files of the RAM tier are lent already")
        obj.holders += 1

    def unhold(self, obj: RamFile) -> None:
        """End a `hold`."""
        obj.holders -= 1

    def close_if_unused(self, obj: RamFile) -> bool:
        """Remove the file if nothing stands in it and nobody holds it; whether it is gone."""
        if obj.slots_count or obj.holders:
            return False
        self._objects.remove(obj)
        obj.forget()
        if self._tmpfs is not None and obj.name is not None:
            self._tmpfs.remove(obj.name)
        return True

    # -- slots

    def has_room(self, obj: RamFile | None) -> bool:
        """Whether there is a slot, in that file or, with None, in a new one."""
        if obj is None and len(self._objects) >= self.objects_max:
            return False
        room_bytes = self.size_bytes - (self.slots_used + 1) * CHUNK_BYTES
        return room_bytes >= self._held_bytes or room_bytes >= self.held_bytes

    def take(self, obj: RamFile, start: int) -> Place:
        """A slot in an object's own file, for the chunk that begins at `start`."""
        self.slots_used += 1
        obj.slots_count += 1
        if self._warm:  # one goes for it, so that it finds memory that the machine has at hand
            self._cool(min(self.slots_free, len(self._warm) - 1))
        return Place(obj, start, next(self._serials))

    def take_common(self) -> Place:
        """A slot in the common file. Raises: StoreError if that cannot be had."""
        self._is_cooled = False
        return self._in_common(warm=True)

    @property
    def common(self) -> RamFile | None:
        """The common file; None before somebody took a slot there."""
        return self._common

    def _in_common(self, *, warm: bool) -> Place:
        if self._common is None:
            self._common = self.open(self.size_bytes)
            self._common.stays = True
        start = self._warm.pop() if warm and self._warm else self._cold_piece()
        self.slots_used += 1
        self._common.slots_count += 1
        return Place(self._common, start, next(self._serials))

    def give(self, place: Place, *, is_clean: bool = True) -> None:
        """A slot is free. is_clean: nobody can write there any more; else the memory goes, and whoever writes on does
        so into pages that are in no file.
        """
        assert not place.file.given
        self._leave(place.file, 1)
        self._warming.discard(place.slot)
        is_kept = is_clean and not self._is_cooled and len(self._warm) < min(_WARM_MAX, self.slots_free)
        if place.file is self._common and is_kept:
            self._warm.append(place.start)
            return
        _punch(place.file, place.start)
        if place.file is self._common:
            self._cold.append(place.start)

    def give_whole(self, obj: RamFile) -> None:
        """All slots of a given object are free, and its file is removed. Nothing is punched: who reads it elsewhere
        goes on, and its memory counts until the last of them has gone.
        """
        if self._tmpfs is not None:
            self._held_bytes = self.held_bytes + os.fstat(obj.fd).st_blocks * 512
        self._leave(obj, obj.slots_count)

    def _leave(self, obj: RamFile, count: int) -> None:
        self.slots_used -= count
        obj.slots_count -= count

    @property
    def held_bytes(self) -> int:
        """Memory of removed files that readers elsewhere still have; at most what the tmpfs says."""
        if self._held_bytes and self._tmpfs is not None:
            ours = sum(os.fstat(obj.fd).st_blocks for obj in self._objects) * 512
            self._held_bytes = max(0, min(self._held_bytes, self._tmpfs.used_bytes - ours))
        return self._held_bytes

    @property
    def used_bytes(self) -> int:
        """Of chunks, and of what readers elsewhere still have."""
        return (self.slots_used - len(self._warming)) * CHUNK_BYTES + self.held_bytes

    @property
    def slots_free(self) -> int:
        taken_bytes = self.used_bytes + len(self._warming) * CHUNK_BYTES
        return max(0, (self.size_bytes - taken_bytes) // CHUNK_BYTES)

    # -- memory without a user

    def warm_up(self) -> Place | None:
        """A piece of the common file to be touched for whoever takes a slot next; None if there are enough of them.

        It is to be given back by `give`. Raises: StoreError if that file cannot be had.
        """
        used_count = self._common.slots_count if self._common is not None else 0
        if self._is_cooled or len(self._warm) >= min(_WARM_AHEAD_MAX - used_count, self.slots_free):
            return None
        place = self._in_common(warm=False)
        self._warming.add(place.slot)
        return place

    @property
    def warm_bytes(self) -> int:
        """Memory without a user."""
        return (len(self._warm) + len(self._warming)) * CHUNK_BYTES

    def cool_down(self) -> None:
        """Give back the memory that nobody uses, also what will be given back, until somebody takes a slot again."""
        self._is_cooled = True
        self._cool(0)

    def _cool(self, kept_count: int) -> None:
        while len(self._warm) > kept_count:
            assert self._common is not None
            self._cold.append(self._warm.popleft())
            _punch(self._common, self._cold[-1])

    def _cold_piece(self) -> int:
        if self._cold:
            return self._cold.pop()
        self._touched += CHUNK_BYTES
        return self._touched - CHUNK_BYTES

    def close(self) -> None:
        """Give the memory back, as far as nobody has a view of it."""
        for obj in self._objects:
            obj.forget()
        self._objects.clear()
        if self._tmpfs is not None:
            self._tmpfs.close()


def _punch(file: RamFile, start: int) -> None:
    with suppress(OSError):
        punch_hole(file.fd, start, CHUNK_BYTES)  # 12 us of 4 MiB


def _objects_max() -> int:
    """What descriptors and mappings allow."""
    mappings = _MAPPINGS_MAX
    with suppress(OSError, ValueError):
        mappings = int(Path("/proc/sys/vm/max_map_count").read_text())
    descriptors = int(min(mappings, _raised(resource.RLIMIT_NOFILE) - _OTHER_DESCRIPTORS))
    return max(SLOTS_COUNT_MIN, min(mappings // 2, descriptors))


def _raised(limit: int) -> float:
    """A limit of this process and of the workers to come, once its soft one is raised to the hard one."""
    soft, hard = resource.getrlimit(limit)
    if soft != hard:
        resource.setrlimit(limit, (hard, hard))
    return math.inf if hard == resource.RLIM_INFINITY else hard


def write(place: Place, content: memoryview) -> None:
    """Put bytes where a slot is, from its beginning. Raises: StoreError."""
    position = place.start
    while content:
        try:
            count = os.pwrite(place.file.fd, content, position)
        except OSError as error:
            raise StoreError(f"RAM tier: no memory for a chunk: {error.strerror}") from error
        content, position = content[count:], position + count
