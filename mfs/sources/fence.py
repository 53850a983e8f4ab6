"""Where a folder ends although its directories go on: at mounts of ours, and at the cache of its own mount.

A folder that shows its own mount, or two folders that show each other's, is a tree without end; one that shows the
cache grows by being read. Mounts are known by the kernel's table, never by looking at them: one whose daemon hangs, or
waits for us, would keep us too.
"""

from __future__ import annotations

import os
from typing import NamedTuple

_FSTYPE = " - fuse.mfs "
"""How our mounts appear in mountinfo (proc_pid_mountinfo(5)); `control.mountinfo` says more of them."""

CACHE_MARKER = "mfs-cache.json"
"""What each cache directory of ours holds; see `cache.ssd`."""


class Fence(NamedTuple):
    """What stands where at one moment."""

    mounts: frozenset[str]
    """Mount points of ours, real paths."""
    cache: tuple[int, int] | None
    """(device, inode) of the source's own cache, under whatever path it is reached."""

    def mount_of(self, path: str) -> str | None:
        """The mount point of ours that a real path is, or lies below; None if there is none."""
        while self.mounts and path:
            if path in self.mounts:
                return path
            path = path.rpartition("/")[0]
        return None

    def is_cache(self, status: os.stat_result) -> bool:
        """Whether this is the directory of the source's own cache."""
        return (status.st_dev, status.st_ino) == self.cache


def look(mountpoint: str, cache_directory: str) -> Fence:
    """The fence now.

    mountpoint: where the source's own mount stands, or will in a moment; real path, or ''.
    cache_directory: its own, or ''.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        ours = {_unescaped(line.split(" ", 5)[4]) for line in table if _FSTYPE in line}
    cache = None
    if cache_directory:
        try:
            status = os.stat(cache_directory)
            cache = status.st_dev, status.st_ino
        except OSError:
            pass  # not there, so nothing shows it
    return Fence(frozenset(ours | {mountpoint} - {""}), cache)


def _unescaped(field: str) -> str:
    for character in " \t\n#\\":  # the backslash last: it is what escapes the others
        field = field.replace(f"\\{ord(character):03o}", character)
    return field
