"""The cache directory: whose it is, what it stands on, how much room it has, and how fast its disk is.

What is written to measure has no name, so a kill at any instant leaves nothing.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mfs.cache.directory import look_at_directory
from mfs.control import mountinfo
from mfs.control.mountinfo import Mount
from mfs.errors import MfsError
from mfs.findings import Finding, fault, note, ok, warning
from mfs.mapping import punch_hole
from mfs.planning.wanted import Wanted
from mfs.types import CHUNK_BYTES
from mfs.units import exact_size, format_size

SPEED_BYTES_MAX = 256 << 20
"""Written and read to measure; a sixteenth of the free space where that is less."""
SPEED_SECONDS_MAX = 2.0
"""For each direction; what is under way then is finished."""
SLOW_BYTES_S = 400e6
"""Below it a disk is slower than a link of 4 Gbit/s, and than what an origin usually gives."""

_FLAGS = (
    (os.ST_NOSUID, "nosuid"), (os.ST_NODEV, "nodev"), (os.ST_NOEXEC, "noexec"), (os.ST_SYNCHRONOUS, "sync"),
    (os.ST_NOATIME, "noatime"), (os.ST_RELATIME, "relatime"),
)  # fmt: skip
_PIECES_AT_ONCE = 4  # as workers write
_FICLONE = 0x40049409  # linux/fs.h
_AWAY = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "lustre", "gpfs", "beegfs", "afs", "glusterfs")


@dataclass(frozen=True)
class Speed:
    """Of one disk."""

    write_bytes_s: float
    read_bytes_s: float
    is_direct: bool
    """Past the page cache; else it is the speed of memory that was measured."""


def examine(wanted: Wanted, *, measure: bool = True) -> Iterator[Finding]:
    """measure: also what it can do and how fast, which writes up to SPEED_BYTES_MAX. Nothing is changed otherwise."""
    if wanted.cache_dir is None:
        yield note("cache", "no --cache-dir: every cold read goes to the origin", "name a directory on a local disk")
        return
    directory = Path(os.path.realpath(wanted.cache_dir))
    if (place := mountinfo.locate(str(directory))) is not None:
        yield fault(
            "cache", f"{directory} lies in the mfs mount {place.mount.mountpoint}", "choose a directory on a local disk"
        )
        return
    standing = _standing(directory)
    if standing == directory:
        try:
            look_at_directory(directory, shared=wanted.cache_shared)
        except MfsError as error:
            yield fault("cache", str(error), "name another directory with --cache-dir, or mend this one")
            return
        yield ok("cache", f"{directory} can be used")
    elif os.access(standing, os.W_OK | os.X_OK) and not os.statvfs(standing).f_flag & os.ST_RDONLY:
        yield ok("cache", f"{directory} is not there yet, and can be made in {standing}")
    else:
        yield fault("cache", f"{directory} is not there, or not to be seen, and cannot be made in {standing}",
                    "make it, or name another")  # fmt: skip
        return
    yield _file_system(standing)
    yield from _room(standing, wanted)
    if not measure:
        return
    try:
        yield from _abilities(standing)
    except OSError as error:  # rights and mount allow it, and the disk does not
        yield fault("cache: writing", f"{standing}: {error.strerror}", "free some space, or name another directory")
        return
    yield _speed(standing)


def _standing(directory: Path) -> Path:
    """The directory, or what there is to be seen of the way to it."""
    return next(place for place in (directory, *directory.parents) if os.path.exists(place))


def mount_of(directory: Path) -> Mount | None:
    """The mount that a directory stands on."""
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    below = [m for m in mountinfo.read() if Path(m.mountpoint) in (directory, *directory.parents)]
    same = [m for m in below if m.device == number]  # btrfs and overlays show others to stat
    return max(same or below, key=lambda m: len(m.mountpoint), default=None)


def _file_system(directory: Path) -> Finding:
    mount, what = mount_of(directory), "cache: file system"
    if mount is None:
        return note(what, "not in the table of mounts")
    flags = os.statvfs(directory).f_flag
    options = ",".join([*(name for bit, name in _FLAGS if flags & bit), mount.options])
    value = f"{mount.fstype} at {mount.mountpoint} ({mount.source}; {options})"
    if flags & os.ST_SYNCHRONOUS:
        return warning(what, value, "every write waits for the disk: mount it without 'sync'")
    if mount.fstype == "overlay":
        return warning(
            what, value, "a container's own layer ends with it, and is slow: put the cache on a volume of the node"
        )
    if mount.fstype in ("tmpfs", "ramfs"):
        return warning(what, value, "this is memory, and counts against it: --ram-size is the tier for that")
    if mount.fstype in _AWAY or mount.fstype.startswith("fuse"):
        return warning(what, value, "a cache pays on a disk of this node: choose one")
    return ok(what, value)


def _room(directory: Path, wanted: Wanted) -> Iterator[Finding]:
    found = os.statvfs(directory)
    free, whole = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    value, what = f"{format_size(free)} free of {format_size(whole)}", "cache: free space"
    used = _used(directory, wanted)
    if free + used < CHUNK_BYTES:
        yield fault(what, value, "not one chunk fits: free some, or name another directory")
    elif free + used < wanted.cache_bytes:
        budget = format_size(wanted.cache_bytes)
        fitting = exact_size((free + used) * 9 // 10 >> 20 << 20)
        yield warning(what, f"{value}; --cache-size is {budget}", f"say --cache-size {fitting}, or free some")
    else:
        yield ok(what, f"{value}; --cache-size {format_size(wanted.cache_bytes)} fits")
    if found.f_files and found.f_favail < 10_000:
        yield warning("cache: inodes", f"{found.f_favail:,} free of {found.f_files:,}", "each object takes two files")


def _used(directory: Path, wanted: Wanted) -> int:
    """What a cache there holds already: it is part of the budget."""
    if wanted.cache_dir is None or directory != Path(os.path.realpath(wanted.cache_dir)):
        return 0
    from mfs.cache.residency import scan

    try:
        return sum(item.ssd_bytes for item in scan(directory))
    except (MfsError, OSError):  # none yet, or not ours to read
        return 0


def _abilities(directory: Path) -> Iterator[Finding]:
    """Holes, which eviction needs; reflinks, which nothing here uses."""
    with tempfile.TemporaryFile(dir=directory) as one, tempfile.TemporaryFile(dir=directory) as other:
        try:
            os.pwrite(one.fileno(), bytes(2 * mmap.PAGESIZE), 0)
            os.fsync(one.fileno())
            punch_hole(one.fileno(), 0, mmap.PAGESIZE)
            yield ok("cache: holes", "can be punched: single chunks are evicted")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                yield fault("cache: holes", "the disk is full", "free some, or name another directory")
                return
            yield warning("cache: holes", f"cannot be punched ({error.strerror})",
                          "whole files are evicted: use ext4, xfs or btrfs")  # fmt: skip
        try:
            fcntl.ioctl(other.fileno(), _FICLONE, one.fileno())
            yield ok("cache: reflinks", "possible; not used, what models share is copied")
        except OSError:
            yield ok("cache: reflinks", "not possible; not used either")


def _speed(directory: Path) -> Finding:
    what = "cache: speed"
    try:
        found = measure_speed(directory)
    except OSError as error:
        return fault(what, f"cannot be written: {error.strerror}", "free some space, or name another directory")
    value = f"writes {found.write_bytes_s / 1e9:.2f} GB/s, reads {found.read_bytes_s / 1e9:.2f} GB/s"
    if not found.is_direct:
        return note(what, f"{value}, through the page cache: this file system has no O_DIRECT",
                    "bytes stand twice in memory: use ext4, xfs or btrfs on a local disk")  # fmt: skip
    if min(found.write_bytes_s, found.read_bytes_s) < SLOW_BYTES_S:
        return warning(what, value, "slower than most origins: a faster disk, NVMe say, or no --cache-dir")
    return ok(what, value)


def measure_speed(
    directory: Path, *, bytes_max: int = SPEED_BYTES_MAX, seconds_max: float = SPEED_SECONDS_MAX
) -> Speed:
    """Write chunks to a file without a name and read them back, O_DIRECT where there is such a thing.

    Raises: OSError.
    """
    free = os.statvfs(directory)
    count = max(1, min(bytes_max, free.f_bavail * free.f_frsize // 16) // CHUNK_BYTES)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        fd = file.fileno()
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            is_direct = True
        except OSError:
            is_direct = False
        with mmap.mmap(-1, CHUNK_BYTES * _PIECES_AT_ONCE) as memory:
            memory.write(os.urandom(1 << 20) * (len(memory) >> 20))  # a disk may compress
            views = [memoryview(memory)[at : at + CHUNK_BYTES] for at in range(0, len(memory), CHUNK_BYTES)]

            def write(lane: int, index: int) -> int:
                return os.pwrite(fd, views[lane], index * CHUNK_BYTES)

            def read(lane: int, index: int) -> int:
                return os.preadv(fd, [views[lane]], index * CHUNK_BYTES)

            try:
                began = time.monotonic()
                written = _in_turns(write, count, seconds_max)
                os.fdatasync(fd)
                wrote_s = time.monotonic() - began
                began = time.monotonic()
                got = _in_turns(read, written // CHUNK_BYTES, seconds_max)
                read_s = time.monotonic() - began
            finally:
                for view in views:
                    view.release()
    return Speed(written / max(wrote_s, 1e-9), got / max(read_s, 1e-9), is_direct)


def _in_turns(move: Callable[[int, int], int], count: int, seconds_max: float) -> int:
    """Move chunks 0 to `count`, several at once, until the time is over; the bytes moved. Raises: OSError."""
    until, left = time.monotonic() + seconds_max, iter(range(count))

    def lane(number: int) -> int:
        moved = 0
        for index in left:
            moved += move(number, index)
            if time.monotonic() > until:
                break
        return moved

    with ThreadPoolExecutor(_PIECES_AT_ONCE, thread_name_prefix="disk") as pool:
        return sum(pool.map(lane, range(_PIECES_AT_ONCE)))
