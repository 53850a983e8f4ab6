"""A tmpfs of our own that nobody else can reach, with huge pages and without swap: where the RAM tier's files stand.

Mounting one takes root. It is detached before anybody could look, and lives as long as the two directory descriptors.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from contextlib import ExitStack

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096  # sys/mount.h
_MNT_DETACH = 2
_FLAGS = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class PrivateTmpfs:
    """See above."""

    def __init__(self, size_bytes: int) -> None:
        """Raises: OSError if this process may not mount."""
        # huge=: memfd gets huge pages only where shmem_enabled allows it, mostly nowhere, but a tmpfs may ask for them
        # by itself (Documentation/filesystems/tmpfs.rst). Measured on two cores: page faults and page pinning fall from
        # a quarter of the workers' time to nothing.
        options = f"huge=always,size={size_bytes},nr_inodes=0,mode=0700"
        with tempfile.TemporaryDirectory(prefix="mfs-ram-") as folder, ExitStack() as stack:
            writable, readable = (os.path.join(folder, name) for name in ("rw", "ro"))
            os.mkdir(writable)
            os.mkdir(readable)
            try:
                _mount(b"mfs-ram", writable, b"tmpfs", _FLAGS, f"{options},noswap".encode())
                self.may_swap = False
            except OSError as error:
                if error.errno != errno.EINVAL:  # else Linux before 6.4
                    raise
                _mount(b"mfs-ram", writable, b"tmpfs", _FLAGS, options.encode())
                self.may_swap = True
            stack.callback(_libc.umount2, os.fsencode(writable), _MNT_DETACH)
            _mount(os.fsencode(writable), readable, None, _MS_BIND, None)
            stack.callback(_libc.umount2, os.fsencode(readable), _MNT_DETACH)
            _mount(None, readable, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _FLAGS, None)
            self._writable = os.open(writable, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._readable = os.open(readable, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def create(self, name: str) -> int:
        """A descriptor to read and write a new file by. Raises: OSError."""
        return os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._writable)

    def open_to_read(self, name: str) -> int:
        """A descriptor for strangers. It cannot be opened again for writing through /proc/self/fd, whoever tries
        (EROFS), and the mount it came by belongs to no namespace any more, so that nobody can make another of it.

        Raises: OSError.
        """
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._readable)

    def remove(self, name: str) -> None:
        """Its memory goes with the last descriptor or mapping of it, anybody's."""
        os.unlink(name, dir_fd=self._writable)

    @property
    def used_bytes(self) -> int:
        """Of all files that somebody still has, removed ones too."""
        found = os.fstatvfs(self._writable)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def close(self) -> None:
        os.close(self._writable)
        os.close(self._readable)


def _mount(source: bytes | None, place: str, kind: bytes | None, flags: int, data: bytes | None) -> None:
    """mount(2). Raises: OSError."""
    if _libc.mount(source, os.fsencode(place), kind, flags, data):
        raise OSError(ctypes.get_errno(), f"mount at {place}: {os.strerror(ctypes.get_errno())}")
