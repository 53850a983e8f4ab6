"""A registry in a folder, local or shared over a network: `mfs+file:///srv/reg`.

An object is written as `work/tmp-<token>`, forced to the disk, and then gets its name: by link(2), which one of two at
once wins, or by rename(2), which replaces. So nothing is ever half there under its name, and what a killed writer
leaves stands among the work records, where `gc` sweeps. Where a file system knows neither link(2) nor a rename that
replaces nothing (CIFS, some FUSE file systems) nobody decides between two, as on some S3 servers.
Modes come from the root: a directory gets the root's own bits (setgid among them), a file its read bits. Who makes the
root 2775 shares it with its group, 0700 with nobody.
No step below the root follows a link. Directories come with their first object and go with their last.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from mfs.errors import AccessError, ChangedError, IntegrityError, MfsError, NotFoundError, StoreError
from mfs.errors import TransientStoreError as Transient
from mfs.registry.layout import is_key
from mfs.registry.store import SMALL_BYTES_MAX, Stored
from mfs.sources.folder import PASSING, folder_path, open_beneath
from mfs.sources.options import SourceOptions
from mfs.types import ByteRange

PIECE_BYTES = 4 << 20
"""One system call at most, so that the deadline is looked at in between."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_TRIES_MAX = 20
"""Times that a directory is made again, which others remove because it is empty."""
_RENAME_NOREPLACE = 1
"""Source: renameat2(2)."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NOT_KNOWN = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_REFUSED = (errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""Of modes, and of directories that are forced to the disk, where a file system has no such thing."""

log = logging.getLogger(__name__)


class FolderStore:
    """One folder; see `registry.store.Store`. Thread-safe: each call opens what it needs."""

    can_write = True

    def __init__(self, root: str, *, beneath: str = "") -> None:
        """root: absolute path; looked at only when used. It may be a link, what is below it not.

        beneath: see `SourceOptions`.
        """
        self._root, self._beneath = os.path.normpath(root), beneath
        self.identity = f"mfs+file://{self._root}"
        self._decides: bool | None = None
        """Whether one of two that create at once wins; None before the first."""
        self._is_refusal_said = False

    def read(self, key: str, *, bytes_max: int = SMALL_BYTES_MAX, deadline_s: float) -> bytes:
        """A small object, whole; see `Store.read`."""
        with self._opened(key) as fd:
            size = _size_of(fd, self._shown(key))
            if size > bytes_max:
                raise StoreError(f"{self._shown(key)}: has {size} bytes, more than the {bytes_max} of its kind")
            out = bytearray(size)
            self._fill(fd, key, ByteRange(0, size), memoryview(out), deadline_s)
            return bytes(out)

    def read_range(self, key: str, span: ByteRange, *, size: int, out: memoryview, deadline_s: float) -> None:
        """Fill `out` with a range of an object; see `Store.read_range`."""
        if len(out) != len(span):
            raise ValueError(f"out has {len(out)} bytes for a range of {len(span)}")
        with self._opened(key) as fd:
            if (found := _size_of(fd, self._shown(key))) != size:
                raise ChangedError(f"{self._shown(key)}: expected {size} bytes, it now has {found}")
            self._fill(fd, key, span, out, deadline_s)

    def doubt(self, key: str) -> None:
        """Nothing stands between; see `Store.doubt`."""

    def size(self, key: str, *, deadline_s: float) -> int | None:
        """Bytes of an object, None if there is none; see `Store.size`."""
        try:
            with self._opened(key) as fd:
                return _size_of(fd, self._shown(key))
        except NotFoundError:
            return None

    def list(self, prefix: str, *, deadline_s: float) -> Iterator[Stored]:
        """Every object below `prefix`; see `Store.list`. One directory at a time is held in memory."""
        for name, found in self._entries(prefix, deadline_s):
            if found is None:
                yield from self.list(f"{prefix}{name}/", deadline_s=deadline_s)
            else:
                yield Stored(prefix + name, found.st_size, found.st_mtime_ns)

    def names(self, prefix: str, *, deadline_s: float) -> Iterator[str]:
        """The first components below `prefix`; see `Store.names`. A directory without objects has no name."""
        for name, found in self._entries(prefix, deadline_s):
            if found is not None or next(self.list(f"{prefix}{name}/", deadline_s=deadline_s), None):
                yield name

    def create(self, key: str, body: bytes, *, deadline_s: float) -> bool:
        """Write an object unless there is one; see `Store.create`."""
        with self._written(key, body, deadline_s) as (work, temp, fd):

            def link(folder: int, name: str) -> bool:
                if self._decides is False:
                    return _rename_unless_seen(work, temp, folder, name)
                try:
                    os.link(temp, name, src_dir_fd=work, dst_dir_fd=folder, follow_symlinks=False)
                except FileExistsError:
                    # Over a network the answer may have been lost, and the same link asked for again.
                    return os.fstat(fd).st_nlink > 1
                except OSError as e:
                    if e.errno not in _NO_LINKS:
                        raise
                    try:
                        return _rename_noreplace(work, temp, folder, name)
                    except OSError as refused:
                        if refused.errno not in _NOT_KNOWN:
                            raise
                        self._decides = False
                        return _rename_unless_seen(work, temp, folder, name)
                return True

            is_ours = self._place(key, link)
            self._decides = self._decides is not False
            return is_ours

    def write(self, key: str, body: bytes | memoryview, *, deadline_s: float) -> None:
        """Write an object, replacing what is there; see `Store.write`."""
        with self._written(key, body, deadline_s) as (work, temp, _):

            def rename(folder: int, name: str) -> bool:
                os.rename(temp, name, src_dir_fd=work, dst_dir_fd=folder)
                return True

            self._place(key, rename)

    def delete(self, keys: Iterable[str], *, deadline_s: float) -> None:
        """Remove objects; see `Store.delete`."""
        for key in keys:
            if time.monotonic() >= deadline_s:
                raise Transient(f"{self._root}: deleting not done before the deadline")
            self._remove(key)

    def is_conditional(self, *, deadline_s: float) -> bool:
        """Whether the file system decides: tried once, by a name of nobody's. See `Store.is_conditional`."""
        if self._decides is None:
            key = f"work/probe-{secrets.token_hex(16)}"
            self.create(key, b"", deadline_s=deadline_s)
            self.delete([key], deadline_s=deadline_s)
        return self._decides is not False

    def close(self) -> None:
        """Nothing is held open."""

    def _shown(self, key: str) -> str:
        return os.path.join(self._root, key)

    @contextlib.contextmanager
    def _folder(self, parts: Sequence[str], *, is_made: bool = False) -> Iterator[int]:
        """A descriptor of a directory below the root, reached without following a link; made, if wanted."""
        if is_made:
            os.makedirs(self._root, exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if self._beneath:
            fd = open_beneath(self._beneath, os.path.realpath(self._root), flags)
        else:
            fd = os.open(self._root, flags)
        try:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            for part in parts:
                try:
                    inner = _open_folder(part, fd)
                except FileNotFoundError:
                    if not is_made:
                        raise
                    self._make_folder(part, fd, mode)
                    inner = _open_folder(part, fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """A descriptor of an object, for reading."""
        *parts, name = self._parts(key)
        with self._translated(key), self._folder(parts) as folder:
            fd = os.open(name, _FILE, dir_fd=folder)
            try:
                yield fd
            finally:
                os.close(fd)

    def _fill(self, fd: int, key: str, span: ByteRange, out: memoryview, deadline_s: float) -> None:
        filled = 0
        while filled < len(out):
            if time.monotonic() >= deadline_s:
                raise Transient(f"{self._shown(key)}: reading not done before the deadline")
            count = os.preadv(fd, [out[filled : filled + PIECE_BYTES]], span.start + filled)
            if not count:
                raise IntegrityError(f"{self._shown(key)}: expected {len(span)} bytes at {span.start}, got {filled}, "
                                     "though its size says otherwise")  # fmt: skip
            filled += count

    def _entries(self, prefix: str, deadline_s: float) -> Sequence[tuple[str, os.stat_result | None]]:
        """Files, with what is known of them, and directories, with None, of one directory, in the order of keys."""
        found: builtins.list[tuple[str, os.stat_result | None]] = []
        parts = self._parts(prefix[:-1]) if prefix else []
        try:
            with self._translated(prefix), self._folder(parts) as folder, os.scandir(folder) as items:
                for item in items:
                    if time.monotonic() >= deadline_s:
                        raise Transient(f"{self._shown(prefix)}: listing not done before the deadline")
                    if not is_key(item.name):
                        continue
                    if item.is_dir(follow_symlinks=False):
                        found.append((item.name, None))
                    elif item.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):  # gone since scandir saw it
                            found.append((item.name, item.stat(follow_symlinks=False)))
        except NotFoundError:
            return []
        return sorted(found, key=lambda entry: entry[0] if entry[1] else f"{entry[0]}/")

    @contextlib.contextmanager
    def _written(self, key: str, body: bytes | memoryview, deadline_s: float) -> Iterator[tuple[int, str, int]]:
        """(descriptor of work/, name in it, descriptor) of a file that holds `body` for good; it goes with the end."""
        self._parts(key)
        temp = f"tmp-{secrets.token_hex(16)}"
        with self._translated(key), self._folder(["work"], is_made=True) as work:
            mode = stat.S_IMODE(os.stat("..", dir_fd=work).st_mode) & 0o444
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=work)
            try:
                view = memoryview(body)
                while view:
                    if time.monotonic() >= deadline_s:
                        raise Transient(f"{self._shown(key)}: writing not done before the deadline")
                    view = view[os.write(fd, view[:PIECE_BYTES]) :]
                with self._unless_refused("modes"):
                    os.fchmod(fd, mode | stat.S_IRUSR)
                os.fsync(fd)
                yield work, temp, fd
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temp, dir_fd=work)
                os.close(fd)

    def _place(self, key: str, act: Callable[[int, str], bool]) -> bool:
        """Give a written file its name by `act(folder, name)`, in a directory that is there; what `act` said."""
        *parts, name = self._parts(key)
        for tries_left in reversed(range(_TRIES_MAX)):
            try:
                with self._folder(parts, is_made=True) as folder:
                    done = act(folder, name)
                    self._force(folder)
                    return done
            except FileNotFoundError:  # somebody removed the directory, which was empty
                if not tries_left:
                    raise
        raise AssertionError

    def _remove(self, key: str) -> None:
        *parts, name = self._parts(key)
        try:
            with self._translated(key), self._folder(parts) as folder:
                os.unlink(name, dir_fd=folder)
        except NotFoundError:
            return
        with contextlib.suppress(OSError):  # it is not empty, or gone
            while len(parts) > 1:
                *parts, name = parts
                with self._folder(parts) as folder:
                    os.rmdir(name, dir_fd=folder)

    def _make_folder(self, name: str, above: int, mode: int) -> None:
        try:
            os.mkdir(name, dir_fd=above)
        except FileExistsError:
            return
        with contextlib.suppress(FileNotFoundError), self._unless_refused("modes"):
            os.chmod(name, mode, dir_fd=above)  # what umask took away
        self._force(above)

    def _force(self, folder: int) -> None:
        with self._unless_refused("to force directories to the disk"):
            os.fsync(folder)

    @contextlib.contextmanager
    def _unless_refused(self, what: str) -> Iterator[None]:
        """What a file system may lack, and a registry can do without; said once."""
        try:
            yield
        except OSError as e:
            if e.errno not in _REFUSED:
                raise
            if not self._is_refusal_said:
                self._is_refusal_said = True
                log.warning("%s: its file system refuses %s (%s), and is used without", self.identity, what, e.strerror)

    def _parts(self, key: str) -> Sequence[str]:
        if not is_key(key):
            raise NotFoundError(f"{self._root}: {key!r:.200} is no key of a registry")
        return key.split("/")

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise _translate(e, self._shown(key)) from e


def _open_folder(name: str, above: int) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=above)
    except NotADirectoryError:
        if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, "a link") from None
        raise


def _size_of(fd: int, shown: str) -> int:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise NotFoundError(f"{shown}: no file")
    return found.st_size


def _rename_noreplace(from_folder: int, old: str, folder: int, name: str) -> bool:
    """Rename unless there is one, where the file system knows no hard links; whether it was done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(from_folder, os.fsencode(old), folder, os.fsencode(name), _RENAME_NOREPLACE) == 0:
        return True
    if (code := ctypes.get_errno()) == errno.EEXIST:
        return False
    raise OSError(code, f"neither link nor renameat2 can name a file there that must be the only one "
                        f"({os.strerror(code)})")  # fmt: skip


def _rename_unless_seen(from_folder: int, old: str, folder: int, name: str) -> bool:
    """Rename unless there is one at this moment; whether it was done."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(old, name, src_dir_fd=from_folder, dst_dir_fd=folder)
        return True
    return False


def _translate(error: OSError, shown: str) -> MfsError:
    said = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NotFoundError(f"{shown}: no such file or directory")
        case errno.EXDEV:
            return NotFoundError(f"{shown}: {said}")
        case errno.ELOOP:
            return StoreError(f"{shown}: it, or a directory on the way, is a link, and a registry follows none")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return AccessError(f"{shown}: {said}, for uid {os.geteuid()}; check the modes of the registry's folder")
        case errno.ENOSPC | errno.EDQUOT:
            return StoreError(f"{shown}: {said}: make room, or collect with 'mfs gc'")
        case number if number in PASSING:
            return Transient(f"{shown}: {said}")
        case _:
            return StoreError(f"{shown}: {said}")


def open_place(place: str, options: SourceOptions) -> FolderStore:
    """The store at file:///folder. Raises: UsageError."""
    return FolderStore(folder_path(place), beneath=options.beneath)
