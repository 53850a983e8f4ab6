"""Models in a local (or network-mounted) folder: `file:///dir` or `/dir`.

Version: 'mtime_ns-size-inode' from fstat, taken before and after each read, so that what
changed in between is never handed out.
Requests for a first listing: one scandir per directory, nothing ahead.

Traps: a file changed within the file system's clock tick and of equal size keeps its version; some network file systems
renumber inodes on remount, which costs a refetch. Nothing outside the root is named to readers: a link that stays
inside is reported as a link, one that leads outside is served as what it points to, because the operator put it there.
Where a stranger may have (`beneath`), what leads out of that directory is not there: it is opened step by step, without
a link on the way, so that whoever changes one in the meantime leads nowhere.
Mounts of ours and caches below the root are not shown (`mfs.sources.fence`).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from mfs.errors import AccessError, ChangedError, IntegrityError, MfsError, NotFoundError, StoreError, UsageError
from mfs.errors import TransientStoreError as Transient
from mfs.sources import bounds, fence
from mfs.sources.base import Page, name_fault
from mfs.sources.options import SourceOptions
from mfs.types import ByteRange, Entry, EntryKind, ObjectId

READ_BYTES_MAX = 4 << 20
"""One preadv at most, so that the deadline is looked at in between."""

PASSING = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE})
"""Errors of a file system after which it may go well another time."""

_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class FolderSource:
    """A directory tree. Thread-safe: each call opens what it needs."""

    def __init__(self, root: str, *, mountpoint: str = "", cache_directory: str = "", beneath: str = "") -> None:
        """root: absolute path of the folder; looked at only when used. The others: see `SourceOptions`."""
        self._root = os.path.normpath(root)
        self._mountpoint, self._cache_directory, self._beneath = mountpoint, cache_directory, beneath
        # What is remembered of mounts that showed more says nothing of what may be shown here.
        self.identity = f"file://{self._root}" + ("#beneath" if beneath else "")

    @property
    def address(self) -> str:
        """None; see `Source.address`."""
        return ""

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield the entries of one directory; see `mfs.sources.base.Source.list`."""
        around = fence.look(self._mountpoint, self._cache_directory)
        # First as written: to resolve it would ask the daemon of a mount, which may be waiting for us.
        if mountpoint := around.mount_of(os.path.join(self._root, path)):
            yield self._not_ours_to_show(path, f"in the mfs mount {mountpoint}")
            return
        directory = self._resolve(path)
        if mountpoint := around.mount_of(directory):
            yield self._not_ours_to_show(path, f"in the mfs mount {mountpoint}")
            return
        real_root = os.path.realpath(self._root)
        entries: list[Entry] = []
        left_out = bounds.LeftOut()
        try:
            with self._scanned(directory) as found:
                for item in found:
                    if time.monotonic() >= deadline_s:
                        raise Transient(f"{directory}: listing not done before the deadline")
                    if item.name == fence.CACHE_MARKER:
                        yield self._not_ours_to_show(path, "the cache of a mount")
                        return
                    entry = self._entry(item, path, directory, real_root, around)
                    if isinstance(entry, str):
                        left_out.note(item.name, entry)
                    elif len(entries) == bounds.ENTRIES_MAX:
                        raise StoreError(f"{directory}: more than {bounds.ENTRIES_MAX} names in one directory")
                    else:
                        entries.append(entry)
        except OSError as e:
            raise _translate(e, directory) from e
        left_out.say(directory)
        yield path, sorted(entries)

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Fill `out` from the file; see `mfs.sources.base.Source.get_range`."""
        path = self._resolve(obj.path)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = open_beneath(self._beneath, path, flags) if self._beneath else os.open(path, flags)
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

        Raises: NotFoundError for names that cannot have come from a listing, are gone, or lead where none may.
        """
        if path and any(name_fault(part) for part in path.split("/")):
            raise NotFoundError(f"{self._root}: no such name: {path!r}")
        place = os.path.join(self._root, path) if path else self._root
        try:
            real = os.path.realpath(place, strict=True)
        except OSError as e:
            raise _translate(e, place) from e
        if self._beneath and not _is_inside(real, self._beneath):
            raise NotFoundError(f"{place}: leads out of {self._beneath}")
        return real

    @contextmanager
    def _scanned(self, directory: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        """The names in a real path. Raises: OSError."""
        if not self._beneath:
            with os.scandir(directory) as found:
                yield found
            return
        fd = open_beneath(self._beneath, directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(fd) as found:
                yield found
        finally:
            os.close(fd)

    def _not_ours_to_show(self, path: str, what: str) -> Page:
        """The page of a directory that turns out to be one of ours: empty. Raises: StoreError if it is the root."""
        if not path:
            raise StoreError(f"{self._root} is {what}, and no source of models; name what that one shows")
        left_out = bounds.LeftOut()
        left_out.note(path, f"what it holds: it is {what}")
        left_out.say(self._root)
        return path, []

    def _entry(
        self, item: os.DirEntry[str], path: str, directory: str, real_root: str, around: fence.Fence
    ) -> Entry | str:
        """The entry of a name in directory `path`, or why it cannot be served."""
        fault = name_fault(item.name) or bounds.path_fault(f"{path}/{item.name}" if path else item.name)
        if fault:
            return fault
        place = f"{directory.rstrip('/')}/{item.name}"
        if place in around.mounts:  # not looked at: its daemon may be waiting for us
            return "an mfs mount"
        nothing = "no regular file, directory or valid link"
        try:
            is_link = item.is_symlink()
            target = os.path.realpath(place) if is_link else ""
            if is_link and self._beneath and not _is_inside(target, self._beneath):
                return f"leads out of {self._beneath}"
            status = self._status(item, target)
            if is_link:
                if around.mount_of(target):
                    return "leads into an mfs mount"
                if self._is_in_cache(target, around):
                    return "leads into the mount's own cache"
                if (link := _inside_target(place, target, status, real_root)) is not None:
                    return Entry(item.name, EntryKind.SYMLINK, version=link)
            if stat.S_ISDIR(status.st_mode):
                if around.is_cache(status):
                    return "the mount's own cache"
                if is_link and self._leads_around(target, path):
                    return nothing
                return Entry(item.name, EntryKind.DIRECTORY, mtime_ns=bounds.shown_ns(status.st_mtime_ns))
        except OSError:
            return nothing  # dangling, looping, or gone since scandir saw it
        if not stat.S_ISREG(status.st_mode):
            return nothing
        shown_ns = bounds.shown_ns(status.st_mtime_ns)
        entry = Entry(item.name, EntryKind.FILE, status.st_size, shown_ns, file_version(status))
        return bounds.value_fault(entry) or entry

    def _status(self, item: os.DirEntry[str], target: str) -> os.stat_result:
        """Of what a name stands for. target: the real path that it leads to, '' for no link. Raises: OSError."""
        if not self._beneath:
            return item.stat(follow_symlinks=True)
        if not target:
            return item.stat(follow_symlinks=False)
        fd = open_beneath(self._beneath, target, os.O_PATH)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _is_in_cache(self, path: str, around: fence.Fence) -> bool:
        """Whether a real path is the mount's own cache, or lies in it."""
        while around.cache and len(path) > 1:
            if around.is_cache(os.stat(path)):
                return True
            path = os.path.dirname(path)
        return False

    def _leads_around(self, target: str, path: str) -> bool:
        """Whether a link leads to a directory that holds one on the way down to it: a tree without end."""
        parts = path.split("/") if path else []
        way_down = (os.path.join(self._root, *parts[:depth]) for depth in range(len(parts) + 1))
        return any(_is_inside(os.path.realpath(above), target) for above in way_down)


def _inside_target(link: str, target: str, status: os.stat_result, real_root: str) -> str | None:
    """The relative target of a link that stays below the root, else None: then the thing is served, not the link.

    The target is rewritten against the link's real place, so that no step of it can lead outside.
    """
    place = os.path.realpath(os.path.dirname(link))
    if not _is_inside(target, real_root) or not _is_inside(place, real_root):
        return None  # a place outside means that a directory above was itself linked from outside
    relative = os.path.relpath(target, place)
    is_served = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    if not is_served or any(name_fault(part) for part in relative.split("/") if part not in ("..", ".")):
        raise FileNotFoundError(target)  # would dangle in the tree
    return relative


def open_beneath(directory: str, path: str, flags: int) -> int:
    """Open a real path in a directory, itself a real path. No step between them follows a link.

    Raises: OSError: EXDEV for what lies elsewhere, as openat2(2) has it; ELOOP or ENOTDIR where a step became a link.
    """
    if not _is_inside(path, directory):
        raise OSError(errno.EXDEV, f"leads out of {directory}")
    *above, last = os.path.relpath(path, directory).split("/")
    fd = os.open(directory, _STEP)
    try:
        for name in above:
            inner = os.open(name, _STEP, dir_fd=fd)
            os.close(fd)
            fd = inner
        return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    finally:
        os.close(fd)


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def file_version(status: os.stat_result) -> str:
    """What `ObjectId.version` says of a local file."""
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"


def _check_version(fd: int, obj: ObjectId) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or file_version(status) != obj.version:
        raise ChangedError(f"{obj.source}/{obj.path}: opened as {obj.version}, is {file_version(status)} now")


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
        case number if number in PASSING:
            return Transient(f"{path}: {error.strerror}")
        case _:
            return StoreError(f"{path}: {error.strerror}")


def open_url(url: str, options: SourceOptions) -> FolderSource:
    """The folder a file URL or absolute path names. Raises: UsageError."""
    return FolderSource(
        folder_path(url),
        mountpoint=options.mountpoint,
        cache_directory=options.cache_directory,
        beneath=options.beneath,
    )


def folder_path(url: str) -> str:
    """The absolute path a file URL or a plain path names. Raises: UsageError."""
    if url.startswith("/"):
        return url
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise UsageError(f"{url!r}: expected file:///absolute/path")
    return unquote(parts.path)
