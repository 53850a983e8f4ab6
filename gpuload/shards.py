"""Which files a model is made of: one file, a folder, or an index. Opens them and reads their tables, nothing more.

File names in an index come from strangers: they must name files beside the index.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mfs.errors import AccessError, IntegrityError, MfsError, NotFoundError, StoreError, UsageError
from mfs.safetensors import LENGTH_BYTES, Header, header_bytes_needed, parse_header

INDEX_BYTES_MAX = 100_000_000
"""Longest index that is read; the largest known (90,000 tensors) has 9 MB."""

SHARDS_MAX = 4096
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One open file of a model. Whoever opened it closes `fd`."""

    path: str
    fd: int
    header: Header


def find_shards(where: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a model, in a fixed order.

    where: a .safetensors file, an index (.json), or a folder; a folder's index decides, else its single file, else all
        its *.safetensors files by name.
    Raises: NotFoundError, UsageError, IntegrityError for an index that cannot be followed.
    """
    path = Path(where)
    if path.is_dir():
        indexes = (
            [path / INDEX_NAME] if (path / INDEX_NAME).is_file() else sorted(path.glob("*.safetensors.index.json"))
        )
        if len(indexes) > 1:
            raise UsageError(f"{path} has {len(indexes)} indexes: name the one to load")
        if indexes:
            return _from_index(indexes[0])
        whole = path / "model.safetensors"
        found = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
        if not found:
            raise NotFoundError(f"{path} holds no .safetensors file")
        return found
    if not path.exists():
        raise NotFoundError(f"no such file or folder: {path}")
    return _from_index(path) if path.suffix == ".json" else [path]


def _from_index(path: Path) -> list[Path]:
    with _translated(str(path)):
        size = path.stat().st_size
        if size > INDEX_BYTES_MAX:
            raise IntegrityError(f"{path}: an index of {size} bytes, more than {INDEX_BYTES_MAX}")
        raw = path.read_bytes()
    try:
        names = list(dict.fromkeys(json.loads(raw)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise IntegrityError(f"{path}: not an index of shards (a JSON object with 'weight_map')") from None
    if len(names) > SHARDS_MAX:
        raise IntegrityError(f"{path}: names {len(names)} shards, more than {SHARDS_MAX}")
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise IntegrityError(f"{path}: names the shard {name!r}, expected a file beside the index")
    if not names:
        raise IntegrityError(f"{path}: names no shards")
    return [path.parent / name for name in sorted(names)]


def open_shards(paths: Sequence[str | os.PathLike[str]]) -> list[Shard]:
    """Open every file and read its table; all or none.

    Raises: NotFoundError, AccessError, StoreError, IntegrityError, each naming the file.
    """
    shards: list[Shard] = []
    try:
        shards.extend(_open_shard(os.fspath(path)) for path in paths)
    except BaseException:
        close_shards(shards)
        raise
    return shards


def close_shards(shards: Sequence[Shard]) -> None:
    """Never raises: a file of a dead mount is closed by an error, and there is nothing to lose in one only read."""
    for shard in shards:
        with contextlib.suppress(OSError):
            os.close(shard.fd)


def _open_shard(path: str) -> Shard:
    with _translated(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Shard(path, fd, read_header(fd, path))
    except BaseException:
        os.close(fd)
        raise


def read_header(fd: int, path: str) -> Header:
    """The table of an open file in two small reads. Raises: IntegrityError, StoreError naming `path`."""
    with _translated(path):
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


class _translated:
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
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(text)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessError(text)
    return StoreError(text)
