"""The kernel's table of mounts, and which mfs mount a path lies in.

Nothing here touches a mount point: a `stat` of a mount whose daemon hangs would hang too. So paths are resolved by
walking from the root and stopping at the first component that is an mfs mount.
Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mfs.errors import UsageError

FSTYPE = "fuse.mfs"
"""How our mounts appear: the FUSE subtype is 'mfs'."""

_OCTAL = re.compile(rb"\\([0-7]{3})")
_SYMLINKS_MAX = 40  # as the kernel (MAXSYMLINKS)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    device: str
    """'major:minor' of the file system: equal for a mount and its bind mounts."""
    root: str
    """Which directory of the file system stands at `mountpoint`: '/' unless this is a bind mount of a part."""
    mountpoint: str
    fstype: str
    source: str
    options: str
    """The file system's own options: for FUSE 'rw,user_id=0,group_id=0,...'."""

    @property
    def is_mfs(self) -> bool:
        return self.fstype == FSTYPE

    @property
    def user_id(self) -> int | None:
        """Whoever mounted it: the uid its daemon runs as."""
        match = re.search(r"(?:^|,)user_id=(\d+)", self.options)
        return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class Place:
    """A path taken apart: the mfs mount it lies in and the path from the mount's root."""

    mount: Mount
    path: str
    """'/'-separated from the root of the file system (not of a bind mount), '' for the root itself."""


def parse(table: bytes) -> list[Mount]:
    """The mounts listed in the text of a mountinfo file, in its order; lines that cannot be read are left out."""
    mounts = []
    for line in table.splitlines():
        fields = line.split(b" ")
        try:
            dash = fields.index(b"-", 6)
            texts = [_unescape(field) for field in (*fields[2:5], *fields[dash + 1 : dash + 4])]
            mounts.append(Mount(*texts))
        except (ValueError, TypeError):
            continue
    return mounts


def read() -> list[Mount]:
    """The mounts this process sees."""
    return parse(Path("/proc/self/mountinfo").read_bytes())


def mount_at(mountpoint: str, mounts: Sequence[Mount] | None = None) -> Mount | None:
    """The mount visible at exactly this path (the last one, where several are stacked), or None."""
    for mount in reversed(read() if mounts is None else mounts):
        if mount.mountpoint == mountpoint:
            return mount
    return None


def locate(path: str, mounts: Sequence[Mount] | None = None) -> Place | None:
    """Find the mfs mount that `path` lies in, or None. The path below the mount need not exist.

    Symbolic links outside the mount are followed, inside it they are left to the daemon; '..' inside the mount is
    taken lexically, as a shell does.
    """
    mounts = read() if mounts is None else mounts
    visible = {mount.mountpoint: mount for mount in mounts}
    here, mount = resolve(path, visible)
    if mount is None:
        return None
    below = here[len(mount.mountpoint.rstrip("/")) :].strip("/")
    return Place(mount, f"{mount.root.strip('/')}/{below}".strip("/"))


def real_mountpoint(path: str, mounts: Sequence[Mount] | None = None) -> str:
    """`path` made absolute with its links resolved, like os.path.realpath but never entering an mfs mount."""
    mounts = read() if mounts is None else mounts
    return resolve(path, {mount.mountpoint: mount for mount in mounts})[0]


def resolve(path: str, visible: dict[str, Mount]) -> tuple[str, Mount | None]:
    """The real path, and the mfs mount it ended in. `visible`: mount point -> topmost mount there.

    Raises: UsageError for a circle of links.
    """
    # Not os.path.abspath: it would fold 'link/..' before the link is followed. getcwd asks no file system.
    left = [part for part in _from_root(path).split("/") if part not in ("", ".")]
    left.reverse()
    here, links_count = "", 0
    while left:
        part = left.pop()
        if part == "..":
            here = here.rpartition("/")[0]
            continue
        step = f"{here}/{part}"
        inside = _mfs_mount_of(here, visible)
        target = None
        if inside is None and not (step in visible and visible[step].is_mfs):
            target = _readlink(step)
        if target is None:
            here = step
            continue
        links_count += 1
        if links_count > _SYMLINKS_MAX:
            raise UsageError(f"{path}: more than {_SYMLINKS_MAX} symbolic links on the way, a circle perhaps")
        if target.startswith("/"):
            here = ""
        left.extend(reversed([part for part in target.split("/") if part not in ("", ".")]))
    return here or "/", _mfs_mount_of(here, visible)


def _from_root(path: str) -> str:
    """Raises: UsageError."""
    if path.startswith("/"):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except FileNotFoundError:
        raise UsageError(f"{path}: the current directory was removed; give an absolute path") from None


def _mfs_mount_of(path: str, visible: dict[str, Mount]) -> Mount | None:
    """The innermost mount holding this real path, if it is one of ours."""
    while True:
        mount = visible.get(path or "/")
        if mount is not None:
            return mount if mount.is_mfs else None
        if not path:
            return None
        path = path.rpartition("/")[0]


def _readlink(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:  # not a link, or not there: both mean 'take it as it is written'
        return None


def _unescape(field: bytes) -> str:
    """Undo the kernel's octal escapes of space, tab, newline, backslash and '#'."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))
