"""The two files of each object in the SSD tier: opened, made, locked, removed and swept. `sidecar` has the format.

Only files of ours are opened: regular, no links, of our user or root's (`directory`). Data is read and written O_DIRECT
where the file system can: the bytes stand in a slot already and must not stand in the page cache too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mfs.cache import sidecar
from mfs.cache.directory import open_own, root_of
from mfs.cache.sidecar import HEADER_BYTES, RECORD_BYTES, Header, Record, record_offset
from mfs.mapping import punch_hole
from mfs.types import ObjectId

logger = logging.getLogger(__name__)

FOREIGN = (errno.EISDIR, errno.ELOOP, errno.EPERM)
"""What opening says of what is no file of ours: not regular, a link, another user's."""
ALIGN_BYTES = 4096
_SUMS = ".sums"
_RECORDS_AT_ONCE = 2048
_FLOCK = struct.Struct("hhqqi4x")  # fcntl(2): type, whence, start, length, pid


class GoneError(Exception):
    """The object was removed between finding its files and locking them."""


class DamagedError(Exception):
    """The two files are not what the format says; the message tells why."""


@dataclass
class OpenObject:
    """The files of one object, open. Good inside the context that gave it."""

    path: str
    data: int
    sums: int
    header: Header
    is_locked: bool
    """Whether nobody else can be writing the records we look at."""

    def record(self, index: int) -> Record | None:
        """A chunk's record as it stands now; None if it does not verify, looked at twice since it may be being
        written."""
        length = self.header.chunk_bytes(index)
        found = sidecar.parse_record(os.pread(self.sums, RECORD_BYTES, record_offset(index)), index, length)
        if found is None and not self.is_locked:
            lock(self.sums, fcntl.F_RDLCK, record_offset(index))
            found = sidecar.parse_record(os.pread(self.sums, RECORD_BYTES, record_offset(index)), index, length)
            lock(self.sums, fcntl.F_UNLCK, record_offset(index))
        return found

    def records(self) -> Iterator[Record | None]:
        """The records of all chunks, in order, as `record` gives them."""
        for first in range(0, self.header.chunks_count, _RECORDS_AT_ONCE):
            count = min(_RECORDS_AT_ONCE, self.header.chunks_count - first)
            raw = os.pread(self.sums, count * RECORD_BYTES, record_offset(first))
            for index in range(first, first + count):
                part = raw[(index - first) * RECORD_BYTES :][:RECORD_BYTES]
                yield sidecar.parse_record(part, index, self.header.chunk_bytes(index)) or self.record(index)

    def put_record(self, index: int, raw: bytes) -> None:
        """Write a chunk's record; who calls holds its lock. Raises: OSError."""
        if os.pwrite(self.sums, raw, record_offset(index)) != len(raw):
            raise OSError(errno.ENOSPC, "no room for a record")

    def check(self, cache_id: str, object_bytes: int | None) -> None:
        """Raises: DamagedError."""
        header = self.header
        if header.cache_id != cache_id or object_bytes not in (None, header.object_bytes):
            raise DamagedError("its sidecar is another object's")
        for fd, what, expected in (
            (self.data, "data", header.object_bytes), (self.sums, "sidecar", header.sidecar_bytes)
        ):  # fmt: skip
            found = os.fstat(fd).st_size
            if found != expected:
                raise DamagedError(f"its {what} has {found} bytes, expected {expected}")


class ObjectFiles:
    """The files below objects/ of one cache directory. Thread-safe; several processes may share it."""

    def __init__(self, cache_directory: Path, *, shared: bool) -> None:
        self._root = str(root_of(cache_directory) / "objects")
        self._names_lock = root_of(cache_directory) / "names.lock"
        self._shared = shared
        self._said_buffered = False
        self.direct = os.O_DIRECT

    def path(self, cache_id: str) -> Path:
        """Where an object's data stands."""
        return Path(self._place(cache_id))

    def _place(self, cache_id: str) -> str:
        """The same for who opens it with each order: a Path takes longer to make than the kernel to open."""
        return f"{self._root}/{cache_id[:2]}/{cache_id}"

    # -- opening

    @contextlib.contextmanager
    def reading(self, cache_id: str, object_bytes: int | None = None, *, direct: bool = True) -> Iterator[OpenObject]:
        """The files of an object, to be read. direct: past the page cache.

        Raises: FileNotFoundError if there is none, DamagedError, OSError.
        """
        path = self._place(cache_id)
        with self._open(path + _SUMS, os.O_RDONLY) as sums:
            header = sidecar.parse_header(os.pread(sums, HEADER_BYTES, 0))
            if header is None:  # it may be being sealed
                lock(sums, fcntl.F_RDLCK, 0)
                header = sidecar.parse_header(os.pread(sums, HEADER_BYTES, 0))
                lock(sums, fcntl.F_UNLCK, 0)
            if header is None:
                raise DamagedError("its sidecar's header does not verify")
            with self._open_data(path, os.O_RDONLY, direct=direct) as data:
                found = OpenObject(path, data, sums, header, is_locked=False)
                found.check(cache_id, object_bytes)
                yield found

    @contextlib.contextmanager
    def changing(self, cache_id: str, index: int | None) -> Iterator[OpenObject]:
        """The files of an object, locked to change one chunk, or, with index None, the whole.

        Waits for others who do. Raises: FileNotFoundError, GoneError, DamagedError, OSError.
        """
        path = self._place(cache_id)
        with self._open(path + _SUMS, os.O_RDWR) as sums:
            lock(sums, fcntl.F_WRLCK if index is None else fcntl.F_RDLCK, 0)
            if index is not None:
                lock(sums, fcntl.F_WRLCK, record_offset(index))
            if not os.fstat(sums).st_nlink:
                raise GoneError
            header = sidecar.parse_header(os.pread(sums, HEADER_BYTES, 0))
            if header is None:
                raise DamagedError("its sidecar's header does not verify")
            with self._open_data(path, os.O_RDWR, direct=True) as data:
                found = OpenObject(path, data, sums, header, is_locked=True)
                found.check(cache_id, None)
                yield found

    @contextlib.contextmanager
    def _open(self, path: str | Path, flags: int) -> Iterator[int]:
        fd = self._open_own(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _open_data(self, path: str, flags: int, *, direct: bool) -> Iterator[int]:
        """Open with O_DIRECT if asked, or buffered where this file has none; asked each time, since another may."""
        try:
            fd = self._open_own(path, flags | (self.direct if direct else 0))
        except OSError as error:
            if error.errno != errno.EINVAL or not direct or not self.direct:
                raise
            fd = self._open_own(path, flags)
            if not self._said_buffered:
                self._said_buffered = True
                logger.warning("cache: %s has no O_DIRECT; its pages are dropped with fadvise instead", path)
        try:
            yield fd
        finally:
            if direct and not is_direct(fd):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def _open_own(self, path: str | Path, flags: int) -> int:
        # O_NONBLOCK: a FIFO in a file's place must not hold us up.
        fd = open_own(path, flags | os.O_NONBLOCK, shared=self._shared)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise IsADirectoryError(errno.EISDIR, "it is no regular file")
        return fd

    # -- names

    def create(self, obj: ObjectId) -> None:
        """Make the files of an object with nothing in them, unless they stand. Raises: OSError."""
        path, header = self.path(obj.cache_id), sidecar.header_of(obj)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        new = path.with_suffix(".new")
        with self._names(obj.cache_id[:2]):
            if os.path.lexists(_sums(path)) and os.path.lexists(path):
                return
            for stale in (_sums(path), path, new):
                _unlink(stale)
            try:
                for place, nbytes, page in ((path, header.object_bytes, b""),
                                            (new, header.sidecar_bytes, sidecar.encode_header(header))):  # fmt: skip
                    with self._open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
                        os.ftruncate(fd, nbytes)
                        if os.pwrite(fd, page, 0) != len(page):
                            raise OSError(errno.ENOSPC, "no room for a sidecar")
                new.rename(_sums(path))
            except BaseException:
                for half in (new, path):
                    with contextlib.suppress(OSError):
                        half.unlink()
                raise

    def remove(self, cache_id: str, *, only_empty: bool = False) -> bool:
        """Remove an object, whatever stands in its files' places, waiting for who changes it; False if none stood.

        only_empty: unless a record promises something. Who reads it goes on reading: what he has open stays until he
        closes it, and takes its space until then.
        """
        path = self.path(cache_id)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            with contextlib.suppress(OSError):  # whatever cannot be opened has no lock to wait for
                sums = stack.enter_context(self._open(_sums(path), os.O_RDWR))
                lock(sums, fcntl.F_WRLCK, 0)
                status = os.fstat(sums)
                if not status.st_nlink or (only_empty and any(os.pread(sums, status.st_size, HEADER_BYTES))):
                    return False
            with self._names(cache_id[:2]):
                stood = os.path.lexists(_sums(path))
                for place in (_sums(path), path):  # the sidecar first: without it the data is nothing
                    _unlink(place)
                return stood
        return False

    def ids(self, prefix: str) -> list[str]:
        """The objects of one folder that have both files; anything else there is nobody's and goes."""
        folder = Path(self._root, prefix)
        if not folder.is_dir():
            return []
        with self._names(prefix):
            names = set(os.listdir(folder))
            found = {name for name in names if sidecar.is_cache_id(name) and name + _SUMS in names}
            for name in names - found - {name + _SUMS for name in found}:
                logger.warning("cache: %s dropped: it is no object of this format", folder / name)
                with contextlib.suppress(OSError):
                    _unlink(folder / name)
        return sorted(found)

    @contextlib.contextmanager
    def _names(self, prefix: str) -> Iterator[None]:
        """One process at a time makes and removes files of a folder."""
        fd = open_own(self._names_lock, os.O_RDWR | os.O_CREAT, shared=self._shared)
        try:
            lock(fd, fcntl.F_WRLCK, int(prefix, 16))
            yield
        finally:
            os.close(fd)


def lock(fd: int, kind: int, start: int) -> None:
    """Lock one byte of a file for this open of it, waiting for others; closing it unlocks. Raises: OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0))


def punch(fd: int, start: int, length: int) -> None:
    """Give the space of a range back; it reads as zeros. Raises: OSError, EOPNOTSUPP where no file can do it."""
    punch_hole(fd, start, -(-length // ALIGN_BYTES) * ALIGN_BYTES)


def is_direct(fd: int) -> bool:
    """Whether a descriptor goes past the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _sums(path: Path) -> Path:
    return path.with_name(path.name + _SUMS)


def _unlink(path: Path) -> None:
    """Remove whatever stands there, if anything. Raises: OSError."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # nothing of ours: it would be in the way for ever
        if not path.is_dir() or path.is_symlink():
            raise
        shutil.rmtree(path)
