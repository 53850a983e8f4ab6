"""What of a directory is pushed: every regular file, and what of the rest is left out or refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from mfs.errors import NotFoundError, UsageError
from mfs.registry.manifest import path_fault
from mfs.sources.bounds import FILE_BYTES_MAX
from mfs.sources.fence import CACHE_MARKER
from mfs.sources.folder import FolderSource, file_version
from mfs.types import ObjectId


@dataclass(frozen=True)
class Scan:
    """The files of a directory at one moment."""

    root: str
    """Real path."""
    files: tuple[ObjectId, ...]
    """In the order of their paths; to be read through `source`, which refuses them once they change."""
    left_out: tuple[str, ...]
    """Paths of what begins with a dot: not pushed, and said."""

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    def source(self) -> FolderSource:
        return FolderSource(self.root)


def scan(directory: str) -> Scan:
    """Look at everything below `directory`.

    A link to a file counts as that file (the Hub's cache is made of such). Names that begin with a dot are left out:
    they are tools' own (.git, .cache, .DS_Store).
    Raises: UsageError naming the first thing that cannot be part of a revision; NotFoundError, OSError.
    """
    root = os.path.realpath(directory)
    if not os.path.isdir(root):
        raise (UsageError if os.path.exists(root) else NotFoundError)(f"{directory}: not a directory of files to push")
    left_out: list[str] = []
    files = sorted(_below(root, "", left_out), key=lambda file: file.path)
    if not files:
        raise UsageError(f"{directory}: holds no file to push{_but(left_out)}")
    return Scan(root, tuple(files), tuple(sorted(left_out)))


def _below(root: str, folder: str, left_out: list[str]) -> Iterator[ObjectId]:
    with os.scandir(os.path.join(root, folder) if folder else root) as found:
        items = list(found)
    if any(item.name == CACHE_MARKER for item in items):
        raise UsageError(f"{os.path.join(root, folder)}: the cache of a mount, not a model; name another directory")
    for item in items:
        path = f"{folder}/{item.name}" if folder else item.name
        if item.name.startswith("."):
            left_out.append(path)
            continue
        if fault := path_fault(path):
            raise UsageError(f"{path!r} in {root}: the name {fault}; rename it")
        if item.is_dir(follow_symlinks=False):
            yield from _below(root, path, left_out)
        else:
            yield _file(root, path, item)


def _file(root: str, path: str, item: os.DirEntry[str]) -> ObjectId:
    try:
        status = item.stat()
    except OSError as error:
        what = f"a link that leads nowhere ({error.strerror})" if item.is_symlink() else error.strerror
        raise UsageError(f"{item.path}: {what}; remove it, or put the file in its place") from None
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{item.path}: a link to a directory; put the files themselves in its place")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{item.path}: neither a file nor a directory (a pipe, socket or device); remove it")
    if status.st_size > FILE_BYTES_MAX:
        raise UsageError(f"{item.path}: {status.st_size} bytes, more than {FILE_BYTES_MAX}")
    return ObjectId(f"file://{root}", path, status.st_size, file_version(status))


def _but(left_out: list[str]) -> str:
    return f" but those whose names begin with a dot: {', '.join(sorted(left_out)[:3])}" if left_out else ""
