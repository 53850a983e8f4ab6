"""Which bytes a file holds, as far as can be told without reading them: what a digest may be remembered under.

A remembered digest lets a swap keep resident bytes without reading the file, so a name that two contents can share
would serve wrong weights. Only these are trusted; of every other file nothing is remembered and its bytes are
hashed each time:

- on an mfs mount of our own user or root: the sha256 of a file on a Hub, whose addresses are by content (equal files in
  any repository of that Hub, under any name, on any mount are one), the place and MD5 etag of an object in S3, or the
  chunks of a file in a registry of ours, whose digests every byte was compared with: equal files are one everywhere
- on a file system that stamps every change with a time no program can choose: device, inode, size, mtime and ctime

Not trusted: what a manifest states and its web server does not check; times, sizes, and etags made of these, of HTTP
servers and of folders behind a mount; FUSE in general; and images (squashfs, erofs, whatever is mounted read-only as a
whole; overlays, which may stand on one), where two builds can have every number in common.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
from dataclasses import dataclass

from mfs.control import mountinfo

_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")
"""What S3 gives: of the bytes, or of the parts' own; random with some encryptions, which is as good."""

_CHUNKS = re.compile(r"[0-9a-f]{64}")
"""What a mount calls the version of a registry's file: a digest of its chunks' own."""

_HUB = re.compile(r"hf://[^@]*@(https?://[^/]+)")
"""A Hub that is not huggingface.co stands in the source's name. What one Hub says of its files binds no other."""

_NFS = 0x6969
CHANGE_STAMPED = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0x01021994, _NFS}
"""ext2-4, xfs, btrfs, f2fs, zfs, tmpfs, NFS: f_type of statfs(2), linux/magic.h; zfs: its own sources."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Version:
    """One file as it was found."""

    stamp: tuple[int, ...]
    """Device, inode, size, mtime and ctime: another one later means that the file changed meanwhile."""
    key: bytes | None
    """What its digests are remembered under, for ever; None: they are not."""
    changed_ns: int = 0
    """When the file last changed, by its file system's clock; 0 where the key says all."""


def look(fd: int) -> Version:
    """What an open file is now. Asks its file system and, on a mount, its daemon: not for an event loop."""
    status = os.fstat(fd)
    stamp = stamp_of(status)
    kind = _file_system(fd)
    mount = _mount_of(status)
    if kind in CHANGE_STAMPED and not (mount is not None and "ro" in mount.options.split(",")):
        numbers = (kind, os.statvfs(fd).f_fsid, *stamp)
        return Version(stamp, b"file\0" + repr(numbers).encode(), max(status.st_mtime_ns, status.st_ctime_ns))
    return Version(stamp, _key_by_mount(fd, status, mount))


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def is_open_for_writing(fd: int) -> bool:
    """Whether somebody may be changing the file with no trace in its times, as stores into a mapped page do.

    Told by asking for a read lease, which the kernel refuses while a writer has the file open or mapped (fcntl(2),
    F_SETLEASE); false where that cannot be asked (somebody else's file, NFS).
    """
    if _file_system(fd) == _NFS:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # of a writer who comes just now; SIGIO would end this process
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        fcntl.fcntl(fd, fcntl.F_SETSIG, 0)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return False


def _mount_of(status: os.stat_result) -> mountinfo.Mount | None:
    """The mount with that file system; None if this process does not see it (btrfs numbers its parts otherwise)."""
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    return next((m for m in mountinfo.read() if m.device == device), None)


def _key_by_mount(fd: int, status: os.stat_result, mount: mountinfo.Mount | None) -> bytes | None:
    if mount is None or not mount.is_mfs or mount.user_id not in (0, os.geteuid()):
        return None
    source, digest, etag = (_attribute(fd, name) for name in ("source", "digest", "revision"))
    if source.startswith("hf://") and digest.startswith("sha256:"):
        hub = _HUB.match(source)
        return f"content\0{hub[1] if hub else ''}\0{digest}\0{status.st_size}".encode()
    if source.startswith("mfs+") and _CHUNKS.fullmatch(etag):
        return f"chunks\0{etag}\0{status.st_size}".encode()
    if source.startswith("s3://") and _MD5_ETAG.fullmatch(etag):
        return f"origin\0{source}\0{etag}\0{status.st_size}".encode("utf-8", "surrogateescape")
    return None


def _attribute(fd: int, name: str) -> str:
    try:
        return os.fsdecode(os.getxattr(fd, f"user.mfs.{name}"))
    except OSError:
        return ""


def _file_system(fd: int) -> int:
    """f_type of fstatfs(2); its first field, a long, on every 64-bit Linux."""
    buffer = (ctypes.c_long * 32)()
    return buffer[0] if _libc.fstatfs(fd, ctypes.byref(buffer)) == 0 else 0
