"""The files of a model: opens them and reads their tables, nothing more. Which ones they are is `model_files`' to say.

However many there are, few are open at once: `Shard.opened` opens a file anew where it could not stay open, and refuses
it if it is another one by then. Nobody's limit is raised for that: children would inherit it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mfs.errors import AccessError, ChangedError, IntegrityError, MfsError, NotFoundError, StoreError, UsageError
from mfs.safetensors import LENGTH_BYTES, Header, header_bytes_needed, parse_header

DESCRIPTORS_SHARE = 4
"""A load keeps open files up to this part of the descriptors that the process may still have; others for each read."""

Stamp = tuple[int, int, int, int]
"""Device, inode, size in bytes, time of the last change of the bytes in ns."""


@dataclass(frozen=True)
class Shard:
    """One file of a model. Whoever opened it closes `fd`."""

    path: str
    fd: int
    """-1: it could not stay open; see `opened`."""
    header: Header
    """Of the tensors that are taken from this file."""
    stamp: Stamp | None = None
    """What it was when its table was read; None where `fd` stays open."""

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor for as long as the block lasts: `fd`, or one of its own.

        Raises: ChangedError if the name leads to another file by now, or to another state of it; as `open_file`.
        """
        if self.fd >= 0:
            yield self.fd
            return
        fd = open_file(self.path)
        try:
            if self.stamp is not None and stamp_of(fd) != self.stamp:
                raise ChangedError(f"{self.path} changed while it was loaded; load it again")
            yield fd
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino if self.stamp is None else self.stamp[1]


def open_shards(paths: Sequence[str | os.PathLike[str]]) -> list[Shard]:
    """Read the table of every file, and keep open as many of them as the process can spare descriptors; all or none.

    Raises: NotFoundError, AccessError, StoreError, IntegrityError, each naming the file.
    """
    shards: list[Shard] = []
    kept_count = spare_descriptors() // DESCRIPTORS_SHARE
    try:
        for position, path in enumerate(paths):
            shards.append(_open_shard(os.fspath(path), is_kept=position < kept_count))
    except BaseException:
        close_shards(shards)
        raise
    return shards


def read_shards(paths: Sequence[str | os.PathLike[str]]) -> list[Shard]:
    """As `open_shards`, for who wants the tables only: no file stays open."""
    return [_open_shard(os.fspath(path), is_kept=False) for path in paths]


def close_shards(shards: Sequence[Shard]) -> None:
    """Never raises: a file of a dead mount is closed by an error, and there is nothing to lose in one only read."""
    for shard in shards:
        if shard.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(shard.fd)


def spare_descriptors() -> int:
    """How many files this process may open beside those it has open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, soft - len(os.listdir("/proc/self/fd")))


def open_file(path: str) -> int:
    """A descriptor to read `path` by; the caller closes it.

    Raises: NotFoundError, AccessError, StoreError; UsageError for what is no file.
    """
    with translated(path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a pipe: nobody may ever write into it
        except ValueError:  # a zero byte, or half of a surrogate pair
            raise NotFoundError(f"no such file: {path!r}") from None
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise UsageError(f"{path} is not a file; expected a .safetensors file")


def stamp_of(fd: int) -> Stamp:
    """What an open file is now."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open_shard(path: str, *, is_kept: bool) -> Shard:
    fd = open_file(path)
    try:
        with translated(path):
            stamp = stamp_of(fd)
        header = read_header(fd, path)
    except BaseException:
        os.close(fd)
        raise
    if is_kept:
        return Shard(path, fd, header)
    with contextlib.suppress(OSError):
        os.close(fd)
    return Shard(path, -1, header, stamp)


def read_header(fd: int, path: str) -> Header:
    """The table of an open file in two small reads. Raises: IntegrityError, StoreError naming `path`."""
    with translated(path):
        file_bytes = os.fstat(fd).st_size
        needed = header_bytes_needed(os.pread(fd, LENGTH_BYTES, 0))
        raw = bytearray()
        while len(raw) < min(needed, file_bytes):
            more = os.pread(fd, min(needed, file_bytes) - len(raw), len(raw))
            if not more:
                break
            raw += more
        if len(raw) < min(needed, file_bytes):
            raise IntegrityError(f"header ends at byte {len(raw)}, expected {needed}")
        return parse_header(raw, file_bytes)


class translated:
    """Errors of the operating system, and nameless ones of the parser, as ours with the file's name in front."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, MfsError) and not str(error).startswith(self._path):
            raise type(error)(f"{self._path}: {error}") from None
        if isinstance(error, OSError):
            raise from_os_error(error, self._path) from None


def from_os_error(error: OSError, path: str) -> MfsError:
    """The project's error for one of the operating system's."""
    text = f"{path}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno == errno.EMFILE:
        text += f" in this process, which may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} (ulimit -n)"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(text)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessError(text)
    return StoreError(text)
