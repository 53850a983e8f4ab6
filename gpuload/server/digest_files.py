"""Digests on disk: one small file per version of a weights file, so that they outlive processes, mounts and reboots.

This docstring is the format's only reference. All numbers are little-endian:

    8 bytes   'gpldig1' and a line feed
    8 bytes   length of the key, number of rows: two unsigned 32-bit numbers
    key       as `versions.Version.key`
    rows      64 bytes each: start, row_bytes, rows_count, pitch_bytes of a piece in its file, 64 bits each; its BLAKE3
    32 bytes  BLAKE3 of all that stands before

The file's name is made of the BLAKE3 of its key. It is written beside its place and renamed, so any number of
processes may use the folder, and a kill or a power cut leaves an old file, a new one, or one that its checksum
refuses. A file that cannot be used is a miss. mtimes order the files by last use; the least recently used go when
the folder is over budget.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import struct
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

log = logging.getLogger("gpuload.server")

Digest = bytes
Geometry = tuple[int, int, int, int]
"""(start, row_bytes, rows_count, pitch_bytes) of a piece in its file."""

BYTES_MAX = 256 << 20
"""All files of a folder together; at 64 bytes for a piece of 4 MiB that is 16 TB of weights."""

FILE_BYTES_MAX = 64 << 20
"""Longest file that is read: a million pieces."""

USED_S = 3600.0
"""A use is noted once in so long: finer than the day that matters for what to drop, and no write for each read."""

_MAGIC = b"gpldig1\n"
_COUNTS = struct.Struct("<II")
_ROW = struct.Struct("<QQQQ32s")
_CHECKSUM_BYTES = 32
_UINT64_MAX = (1 << 64) - 1


class DigestFiles:
    """A folder of them. Never raises for what happens to the folder: what cannot be read or written is lost, and
    logged."""

    def __init__(self, folder: str | os.PathLike[str], *, bytes_max: int = BYTES_MAX) -> None:
        self._folder = Path(folder)
        self._bytes_max = bytes_max
        self._is_usable = self._prepare()

    def read(self, key: bytes) -> dict[Geometry, Digest]:
        """What is known under `key`; empty if nothing is, or nothing that can be believed."""
        if not self._is_usable:
            return {}
        path = self._path(key)
        try:
            status = path.stat()
            if status.st_size > FILE_BYTES_MAX:
                return {}
            raw = path.read_bytes()
            if time.time() - status.st_mtime > USED_S:
                os.utime(path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("digests in %s cannot be read: %s", path, error.strerror)
            return {}
        found = decode(raw, key)
        if found is None:
            log.warning("digests in %s are damaged: not used", path)
            self.remove(key)
        return found or {}

    def which(self, key: bytes) -> object:
        """Which file stands there now: another one each time it is replaced; None if there is none."""
        try:
            found = os.stat(self._path(key))
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size) if self._is_usable else None

    def write(self, key: bytes, known: Mapping[Geometry, Digest]) -> None:
        """Replace what is known under `key`."""
        if not self._is_usable:
            return
        raw = encode(key, known)
        if len(raw) > min(self._bytes_max, FILE_BYTES_MAX):
            return
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".new-")  # mode 0600
            with open(handle, "wb") as file:
                file.write(raw)
            os.replace(temporary, self._path(key))
            self._trim()
        except OSError as error:
            log.warning("digests are not kept in %s: %s", self._folder, error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def remove(self, key: bytes) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path(key))

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{blake3(key).hexdigest()[:40]}.digests"

    def _prepare(self) -> bool:
        """Make the folder, or see that only we can write there."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            log.warning("digests are not kept: %s: %s", self._folder, error.strerror)
            return False
        trouble = trouble_with(self._folder)
        if trouble is not None:
            log.warning("digests are not kept: %s", trouble)
        return trouble is None

    def _trim(self) -> None:
        """Least recently used first, until the folder is within its budget; what a killed writer left counts too."""
        found = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):  # another process trims as well
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        over = sum(size for _, size, _ in found) - self._bytes_max
        for _, size, path in sorted(found):
            if over <= 0:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            over -= size


def trouble_with(folder: Path) -> str | None:
    """Why nothing in a folder that exists is believed: whoever else could write there would choose what we serve."""
    try:
        found = folder.stat()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        return f"{folder} can be written by others than user {os.geteuid()}"
    return None


def encode(key: bytes, known: Mapping[Geometry, Digest]) -> bytes:
    rows = b"".join(_ROW.pack(*where, digest) for where, digest in known.items() if max(where) <= _UINT64_MAX)
    body = _MAGIC + _COUNTS.pack(len(key), len(rows) // _ROW.size) + key + rows
    return body + blake3(body).digest()


def decode(raw: bytes, key: bytes) -> dict[Geometry, Digest] | None:
    """The rows of a file that was written under `key`; None if it is anything else."""
    head = len(_MAGIC) + _COUNTS.size
    if len(raw) < head + _CHECKSUM_BYTES or not raw.startswith(_MAGIC):
        return None
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    key_length, count = _COUNTS.unpack_from(raw, len(_MAGIC))
    rows = body[head + key_length :]
    if blake3(body).digest() != checksum or body[head : head + key_length] != key or len(rows) != count * _ROW.size:
        return None
    return {(a, b, c, d): digest for a, b, c, d, digest in _ROW.iter_unpack(rows)}
