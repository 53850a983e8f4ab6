"""Models in a local (or network-mounted) folder: `file:///dir` or `/dir`.

Version: 'mtime_ns-size-inode' from fstat, taken before and after each read, so that what
changed in between is never handed out.
Requests for a first listing: one scandir per directory, nothing ahead.

Traps: a file changed within the file system's clock tick and of equal size keeps its version; some network file systems
renumber inodes on remount, which costs a refetch. Nothing outside the root is named to readers: a link that stays
inside is reported as a link, one that leads outside is served as what it points to, because the operator put it there.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from mfs.errors import AccessError, ChangedError, IntegrityError, MfsError, NotFoundError, StoreError, UsageError
from mfs.errors import TransientStoreError as Transient
from mfs.sources.base import Page, name_fault
from mfs.sources.options import SourceOptions
from mfs.types import ByteRange, Entry, EntryKind, ObjectId

log = logging.getLogger(__name__)

READ_BYTES_MAX = 4 << 20
"""One preadv at most, so that the deadline is looked at in between."""


class FolderSource:
    """A directory tree. Thread-safe: each call opens what it needs."""

    def __init__(self, root: str) -> None:
        """root: absolute path of the folder; looked at only when used."""
        self._root = os.path.normpath(root)
        self.identity = f"file://{self._root}"

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield the entries of one directory; see `mfs.sources.base.Source.list`."""
        directory = self._resolve(path)
        real_root = os.path.realpath(self._root)
        entries: list[Entry] = []
        left_out: list[str] = []
        try:
            with os.scandir(directory) as found:
                for item in found:
                    if time.monotonic() >= deadline_s:
                        raise Transient(f"{directory}: listing not done before the deadline")
                    fault = name_fault(item.name)
                    entry = None if fault else self._entry(item, path, real_root)
                    if entry is None:
                        left_out.append(f"{item.name!r} ({fault or 'no regular file, directory or valid link'})")
                    else:
                        entries.append(entry)
        except OSError as e:
            raise _translate(e, directory) from e
        if left_out:
            log.warning("%s: left out %d names, such as %s", directory, len(left_out), left_out[0])
        yield path, entries

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Fill `out` from the file; see `mfs.sources.base.Source.get_range`."""
        path = self._resolve(obj.path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as e:
            raise _translate(e, path) from e
        try:
            _check_version(fd, obj)
            filled = 0
            while filled < len(out):
                if time.monotonic() >= deadline_s:
                    raise Transient(f"{path}: reading bytes {span.start}-{span.stop - 1} not done before the deadline")
                count = os.preadv(fd, [out[filled : filled + READ_BYTES_MAX]], span.start + filled)
                if not count:
                    break
                filled += count
            _check_version(fd, obj)
        except OSError as e:
            raise _translate(e, path) from e
        finally:
            os.close(fd)
        if filled < len(out):
            raise IntegrityError(
                f"{path}: expected {len(span)} bytes at {span.start}, got {filled}, though its size says otherwise"
            )

    def close(self) -> None:
        """Nothing is held open."""

    def _resolve(self, path: str) -> str:
        """The real path of a listed name. Links are followed here, once, so that O_NOFOLLOW can hold afterwards.

        Raises: NotFoundError for names that cannot have come from a listing, or are gone.
        """
        if path and any(name_fault(part) for part in path.split("/")):
            raise NotFoundError(f"{self._root}: no such name: {path!r}")
        try:
            return os.path.realpath(os.path.join(self._root, path) if path else self._root, strict=True)
        except OSError as e:
            raise _translate(e, os.path.join(self._root, path) if path else self._root) from e

    def _entry(self, item: os.DirEntry[str], path: str, real_root: str) -> Entry | None:
        """The entry of a name in directory `path`, or None for one that cannot be served."""
        try:
            status = item.stat(follow_symlinks=True)
            if item.is_symlink() and (target := _inside_target(item, status, real_root)):
                return Entry(item.name, EntryKind.SYMLINK, version=target)
            if stat.S_ISDIR(status.st_mode):
                if item.is_symlink() and self._leads_around(item, path):
                    return None
                return Entry(item.name, EntryKind.DIRECTORY, mtime_ns=status.st_mtime_ns)
        except OSError:
            return None  # dangling, looping, or gone since scandir saw it
        if stat.S_ISREG(status.st_mode):
            return Entry(item.name, EntryKind.FILE, status.st_size, status.st_mtime_ns, _version(status))
        return None

    def _leads_around(self, item: os.DirEntry[str], path: str) -> bool:
        """Whether a link leads to a directory that holds one on the way down to it: a tree without end."""
        target = os.path.realpath(item.path)
        parts = path.split("/") if path else []
        way_down = (os.path.join(self._root, *parts[:depth]) for depth in range(len(parts) + 1))
        return any(_is_inside(os.path.realpath(above), target) for above in way_down)


def _inside_target(item: os.DirEntry[str], status: os.stat_result, real_root: str) -> str | None:
    """The relative target of a link that stays below the root, else None: then the thing is served, not the link.

    The target is rewritten against the link's real place, so that no step of it can lead outside.
    """
    target = os.path.realpath(item.path)
    place = os.path.realpath(os.path.dirname(item.path))
    if not _is_inside(target, real_root) or not _is_inside(place, real_root):
        return None  # a place outside means that a directory above was itself linked from outside
    relative = os.path.relpath(target, place)
    is_served = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    if not is_served or any(name_fault(part) for part in relative.split("/") if part not in ("..", ".")):
        raise FileNotFoundError(target)  # would dangle in the tree
    return relative


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"


def _check_version(fd: int, obj: ObjectId) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or _version(status) != obj.version:
        raise ChangedError(f"{obj.source}/{obj.path}: opened as {obj.version}, is {_version(status)} now")


def _translate(error: OSError, path: str) -> MfsError:
    match error.errno:
        case errno.ENOENT:
            return NotFoundError(f"{path}: no such file or directory")
        case errno.ENOTDIR:
            return NotFoundError(f"{path}: not a directory")
        case errno.ELOOP:
            return ChangedError(f"{path}: became a symbolic link while it was opened")
        case errno.EACCES | errno.EPERM:
            return AccessError(f"{path}: not readable for uid {os.geteuid()}; check its mode and those above it")
        case errno.EIO | errno.ESTALE | errno.ETIMEDOUT | errno.EAGAIN | errno.EMFILE | errno.ENFILE:
            return Transient(f"{path}: {error.strerror}")
        case _:
            return StoreError(f"{path}: {error.strerror}")


def open_url(url: str, options: SourceOptions) -> FolderSource:
    """The folder a file URL or absolute path names. Raises: UsageError."""
    return FolderSource(_path_of(url))


def _path_of(url: str) -> str:
    """The absolute path a file URL or a plain path names. Raises: UsageError."""
    if url.startswith("/"):
        return url
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise UsageError(f"{url!r}: expected file:///absolute/path")
    return unquote(parts.path)
