"""The RAM tier's memory: chunk-sized, page-locked slots in one memfd that other processes can map.

Slots are touched and locked once, at start and piece by piece, and recycled for ever: first touch of guest memory was
the largest single CPU cost of the prototype. Only memory stands here; which chunk a slot holds is `chunk_cache`'s
business. Nothing here does I/O, and nothing but `populate` blocks (in a thread).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from mfs.errors import ConfigError
from mfs.types import CHUNK_BYTES

SLOTS_COUNT_MIN = 16
"""Fewer cannot hold the readers, fills and SSD writes of even one stream."""

_PIECE_BYTES = 64 << 20  # one mlock call: about 30 ms of page clearing, so a start never waits long for its first slots
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MNT_DETACH = 2, 4, 8, 2
_libc = ctypes.CDLL(None, use_errno=True)
for _function in (_libc.mlock, _libc.madvise):
    _function.restype = ctypes.c_int
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class RamConfig:
    """Size of the RAM tier."""

    budget_bytes: int
    """Rounded down to whole slots."""
    page_lock: bool = True
    """Keep the slots in physical memory (mlock), as DMA and steady latency want."""


class SlotMemory:
    """`slots_count` slots of CHUNK_BYTES in one shared memfd.

    `free` lists the slots nobody uses; it grows while `populate` runs. All methods belong to the trio thread.
    """

    def __init__(self, config: RamConfig) -> None:
        """Raises: ConfigError if the budget is too small or more than this machine can give."""
        self.slots_count = config.budget_bytes // CHUNK_BYTES
        if self.slots_count < SLOTS_COUNT_MIN:
            raise ConfigError(
                f"RAM budget of {config.budget_bytes} bytes is too small: expected at least "
                f"{SLOTS_COUNT_MIN * CHUNK_BYTES} bytes ({SLOTS_COUNT_MIN} slots of {CHUNK_BYTES}); raise --ram-size"
            )
        self.size_bytes = self.slots_count * CHUNK_BYTES
        available_bytes = memory_available_bytes()
        if self.size_bytes > available_bytes:
            raise ConfigError(
                f"RAM budget of {self.size_bytes} bytes does not fit: this machine has {available_bytes} bytes "
                f"available; lower --ram-size or free memory"
            )
        self.fd, self.huge_pages = _create_file(self.size_bytes)
        self._mmap = mmap.mmap(self.fd, self.size_bytes)
        self._view = memoryview(self._mmap)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))
        _libc.madvise(self._address, self.size_bytes, _MADV_HUGEPAGE)  # a hint; shmem_enabled=never is no error
        self.free: deque[int] = deque()
        self.usable_count = 0
        """Slots touched so far; `slots_count` once `populate` is done."""
        self.on_more: Callable[[], None] | None = None
        """Told when slots became usable."""
        self.locked_bytes = 0
        self.note = "" if config.page_lock else "page locking is switched off"
        self._lock_wanted = config.page_lock

    def view(self, slot: int, length: int = CHUNK_BYTES) -> memoryview:
        """The first `length` bytes of a slot, writable; valid as long as the caller holds the slot."""
        start = slot * CHUNK_BYTES
        return self._view[start : start + length]

    async def populate(self, stop_count: int | None = None) -> None:
        """Touch and lock slots until `stop_count` (default: all) are usable, adding them to `free` as they come.

        Cancellation: between pieces; what was added stays usable.
        """
        target = self.slots_count if stop_count is None else min(stop_count, self.slots_count)
        while self.usable_count < target:
            first = self.usable_count
            count = min(_PIECE_BYTES // CHUNK_BYTES, self.slots_count - first)
            refused = await trio.to_thread.run_sync(self._touch, first, count, self._lock_wanted)
            if self._lock_wanted and not refused:
                self.locked_bytes += count * CHUNK_BYTES
            if refused:
                self._lock_wanted = False
                self.note = refused
            self.free.extend(range(first, first + count))
            self.usable_count += count
            if self.on_more is not None:
                self.on_more()

    def _touch(self, first: int, count: int, lock: bool) -> str:
        """Fault in (and lock) some slots; returns why locking was refused, '' if it was not. Runs in a thread."""
        address, length = self._address + first * CHUNK_BYTES, count * CHUNK_BYTES
        if lock:
            soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            if soft != hard:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
            if _libc.mlock(address, length) == 0:
                return ""
            cause = errno.errorcode.get(ctypes.get_errno(), "?")
            _libc.madvise(address, length, _MADV_POPULATE_WRITE)
            limit = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard} bytes"
            return (
                f"slots could not be page-locked ({cause} after {self.locked_bytes} of {self.size_bytes} bytes; "
                f"RLIMIT_MEMLOCK is {limit}): run 'ulimit -l unlimited' before the mount, set LimitMEMLOCK=infinity in "
                f"the systemd unit, or grant CAP_IPC_LOCK; serving goes on from ordinary memory"
            )
        _libc.madvise(address, length, _MADV_POPULATE_WRITE)
        return ""

    def close(self) -> None:
        """Give the memory back. Views handed out before must be gone."""
        self._view.release()
        try:
            self._mmap.close()
        except BufferError:  # the ctypes export lives as long as the mapping; the memfd goes with the process
            pass
        os.close(self.fd)


def _create_file(size_bytes: int) -> tuple[int, bool]:
    """A file in memory of that size, and whether it is made of huge pages where they can be had.

    memfd gets huge pages only where /sys/kernel/mm/transparent_hugepage/shmem_enabled allows it, mostly nowhere; a
    tmpfs of our own may ask for them by itself (Documentation/filesystems/tmpfs.rst, huge=). Mounting one takes root;
    it is detached before anybody could look, and lives as long as the descriptor. Measured on two cores: page faults
    and page pinning fall from a quarter of the workers' time to nothing.
    """
    try:
        fd = _open_in_huge_tmpfs()
        huge = True
    except OSError:
        fd = os.memfd_create("mfs-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        huge = False
    os.ftruncate(fd, size_bytes)
    if not huge:
        # A process that is handed the file must not be able to shrink it under us: that would be SIGBUS in the daemon.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd, huge


def _open_in_huge_tmpfs() -> int:
    with tempfile.TemporaryDirectory(prefix="mfs-slots-") as place:
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        if _libc.mount(b"mfs-slots", os.fsencode(place), b"tmpfs", flags, b"huge=always,size=100%,mode=0700"):
            raise OSError(ctypes.get_errno(), "no tmpfs of our own")
        try:
            return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        finally:
            _libc.umount2(os.fsencode(place), _MNT_DETACH)


def memory_available_bytes() -> int:
    """What this process may still take: MemAvailable, or less where the control group allows less."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit_path) as limit, open(used_path) as used:
                available = min(available, max(0, int(limit.read()) - int(used.read())))
        except (OSError, ValueError):  # no such controller, or 'max'
            continue
    return available
