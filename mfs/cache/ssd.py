"""The SSD tier: one file per chunk, self-describing, verified block by block whenever it is read.

This docstring is the format's only reference. Below the cache directory:

    mfs-cache.json                      {"format": 1}; a directory that holds anything else is refused
    v1/chunks/<aa>/<cache_id>.<index>   one chunk; cache_id is ObjectId.cache_id, aa its first two digits,
                                        index eight hex digits
    v1/chunks/<aa>/*.tmp                a chunk being written; swept when an hour old
    v1/index/                           `residency`'s tables: hints about what stands here, rebuilt when lost
    v1/pins/                            which objects are pinned, likewise `residency`'s

A chunk file is a 4096-byte header page followed by the chunk's bytes at their own offsets (holes where blocks are
missing), cut at the chunk's length. The header, little-endian:

     0  8s    magic b"MFSCHUNK"
     8  u32   format version, 1
    12  u32   blocks present, bit i for block i
    16  u64   chunk index
    24  u64   size of the whole object
    32  u32   length of the chunk in bytes
    36  u32   length of the identity, at most 3072
    40  40s   cache_id, ASCII
    80  32 x u64   xxh3_64 of each present block, 0 for absent ones
   336  identity: UTF-8 JSON [source, path, size, version, digest], cut off where it does not fit (people read it,
   nothing
        is decided by it)
  4088  u64   xxh3_64 of bytes 0 to 4088

Files are written beside their place and renamed into it, so a kill at any instant leaves the old state or the new one.
Without fsync a power cut may leave garbage under a good name: the checksums turn that into a miss. Reads and writes
are O_DIRECT where the file system can: the bytes stand in a slot already and must not stand in the page cache too.

Runs in worker processes; thread-safe; several processes may share a directory.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from mfs.cache.chunks import full_mask, mask_runs, run_bytes
from mfs.errors import ConfigError
from mfs.types import BLOCKS_PER_CHUNK, CHUNK_BYTES, ObjectId

logger = logging.getLogger(__name__)

FORMAT = 1
HEADER_BYTES = 4096
_HEADER = struct.Struct(f"<8sIIQQII40s{BLOCKS_PER_CHUNK}Q")
_MAGIC = b"MFSCHUNK"
_IDENTITY_BYTES_MAX = 3072
_ALIGN_BYTES = 4096
_TEMPORARY_AGE_S = 3600
_PROCESS = secrets.token_hex(6)
"""Names this process in temporary files. Not its pid: containers that share a directory have the same ones."""
_serial = itertools.count()


@dataclass(frozen=True)
class SsdConfig:
    """Where the SSD tier stands."""

    directory: Path
    fsync: bool = False
    """fdatasync before each rename. Off by default: checksums make a torn file a miss, and the origin has the bytes."""


@dataclass(frozen=True)
class ChunkHeader:
    """A chunk file's verified header."""

    cache_id: str
    index: int
    object_bytes: int
    length: int
    mask: int
    sums: tuple[int, ...]
    identity: str


def open_directory(directory: Path) -> None:
    """Create the cache directory or check that it is ours.

    Raises: ConfigError naming the directory, what stands there and what to do.
    """
    marker = directory / "mfs-cache.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # One look at the names: another worker may be making this very directory at the same instant.
        names = os.listdir(directory)
        if marker.name in names:
            found = json.loads(marker.read_text()).get("format")
            if found != FORMAT:
                raise ConfigError(
                    f"cache directory {directory} has format {found!r}, expected {FORMAT}: it was written by another "
                    f"version of mfs; name another --cache-dir or delete this one"
                )
        elif any(name != "lost+found" and not name.endswith(".tmp") for name in names):
            raise ConfigError(
                f"cache directory {directory} is neither empty nor an mfs cache; name an empty one with --cache-dir"
            )
        else:
            temporary = marker.with_suffix(f".{_PROCESS}.tmp")
            with open(temporary, "w") as file:
                file.write(json.dumps({"format": FORMAT}))
                file.flush()
                os.fsync(file.fileno())  # the one file of a cache that may not be lost: without it nothing starts
            temporary.rename(marker)
        (directory / "v1" / "chunks").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"cache directory {directory} cannot be used ({error}); name a writable one with --cache-dir"
        ) from error


class SsdTier:
    """Chunk files below one cache directory."""

    def __init__(self, config: SsdConfig) -> None:
        self._config = config
        self._root = config.directory / "v1" / "chunks"
        self._direct = os.O_DIRECT
        self._local = threading.local()

    # -- reading

    def read_into(self, obj: ObjectId, index: int, mask: int, slot: memoryview) -> tuple[int, dict[int, int]]:
        """Bring those blocks of `mask` that stand here and verify into `slot` at their own offsets.

        slot: a whole slot, page-aligned. Returns (blocks brought, {block: checksum}); bytes of other blocks are
        undefined. A file that fails any check is deleted and logged; this never raises for cache trouble.
        """
        path = self._path(obj.cache_id, index)
        length = len(obj.chunk_range(index))
        try:
            with self._open(path, os.O_RDONLY) as fd:
                return self._read_verified(fd, path, obj, index, mask, length, slot)
        except FileNotFoundError:
            return 0, {}
        except OSError as error:
            logger.warning("cache: %s cannot be read (%s); fetching from the origin", path, error)
            return 0, {}

    def _read_verified(
        self, fd: int, path: Path, obj: ObjectId, index: int, mask: int, length: int, slot: memoryview
    ) -> tuple[int, dict[int, int]]:
        page = self._header_page()
        # One read brings header and body when all is wanted: half the I/O operations of the common case.
        whole = mask == full_mask(length)
        got = os.preadv(fd, [page, slot[: _aligned(length)]] if whole else [page], 0)
        header = parse_header(page) if got >= HEADER_BYTES else None
        if header is None or (header.cache_id, header.index, header.object_bytes) != (obj.cache_id, index, obj.size):
            self._drop(path, "its header is damaged or another chunk's", fd)
            return 0, {}
        wanted = mask & header.mask
        good, sums = 0, {}
        for first, end in mask_runs(wanted):
            start, stop = run_bytes(first, end, length)
            if not whole:
                os.preadv(fd, [slot[start : _aligned(stop)]], HEADER_BYTES + start)
            for block in range(first, end):
                low, high = run_bytes(block, block + 1, length)
                if xxh3_64_intdigest(slot[low:high]) == header.sums[block]:
                    good |= 1 << block
                    sums[block] = header.sums[block]
        if good != wanted:
            self._drop(path, f"blocks {wanted & ~good:#x} fail their checksums", fd)
        return good, sums

    def header(self, cache_id: str, index: int) -> ChunkHeader | None:
        """The header of one chunk file, None if there is none that verifies."""
        try:
            return self._read_header(self._path(cache_id, index))
        except OSError:
            return None

    def _read_header(self, path: Path) -> ChunkHeader | None:
        page = self._header_page()
        with self._open(path, os.O_RDONLY) as fd:  # not buffered: read-ahead would bring 128 KiB of the body along
            got = os.preadv(fd, [page], 0)
        return parse_header(page) if got >= HEADER_BYTES else None

    def names(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(cache_id, index) of the chunk files whose cache_id starts with two digits; old temporaries are deleted."""
        try:
            names = os.listdir(self._root / prefix)
        except OSError:  # nothing stands there
            return
        for name in names:
            cache_id, _, index = name.partition(".")
            if name.endswith(".tmp"):
                _sweep_temporary(self._root / prefix / name)
            elif _is_hex(cache_id, 40) and _is_hex(index, 8):
                yield cache_id, int(index, 16)

    def walk(self) -> Iterator[ChunkHeader]:
        """The verified headers of all chunk files, in no order; others and old temporaries are deleted on the way."""
        for folder in self._root.iterdir():
            for path in folder.iterdir():
                if path.suffix == ".tmp":
                    _sweep_temporary(path)
                    continue
                try:
                    header = self._read_header(path)
                except OSError:
                    continue
                if header is not None and path.name == _name(header.cache_id, header.index):
                    yield header
                else:
                    self._drop(path, "it is no chunk of this format")

    # -- writing

    def write(self, obj: ObjectId, index: int, sums: dict[int, int], slot: memoryview) -> int:
        """Write the blocks named in `sums` (block -> checksum) from `slot`, keeping what the file already has.

        Returns the mask of blocks the file holds afterwards. Raises OSError (ENOSPC, EIO ...); nothing visible changed
        then.
        """
        path = self._path(obj.cache_id, index)
        length = len(obj.chunk_range(index))
        mask = sum(1 << block for block in sums)
        all_sums = dict(sums)
        old = None if mask == full_mask(length) else self.header(obj.cache_id, index)
        if old is not None and old.length == length:
            all_sums |= {b: s for b, s in enumerate(old.sums) if old.mask >> b & 1 and not mask >> b & 1}
        page = self._header_page()
        merged = _encode_header(page, obj, index, length, all_sums)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{_PROCESS}-{next(_serial)}.tmp")
        try:
            with self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
                self._write_blocks(fd, page, mask, length, slot)
                if merged != mask:
                    self._copy_blocks(path, fd, merged & ~mask, length)
                os.ftruncate(fd, HEADER_BYTES + length)
                if self._config.fsync or not self._direct:
                    os.fdatasync(fd)
                if not self._direct:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            temporary.rename(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(error, FileNotFoundError) and merged != mask:
                return self.write(
                    obj, index, sums, slot
                )  # the old file was evicted meanwhile: there is nothing to keep
            raise
        return merged

    def _write_blocks(self, fd: int, page: mmap.mmap, mask: int, length: int, slot: memoryview) -> None:
        position, buffers = 0, [memoryview(page)]
        for first, end in mask_runs(mask):
            start, stop = run_bytes(first, end, length)
            if HEADER_BYTES + start != position + sum(map(len, buffers)):
                _pwrite_all(fd, buffers, position)
                position, buffers = HEADER_BYTES + start, []
            buffers.append(slot[start : _aligned(stop)])
        _pwrite_all(fd, buffers, position)

    def _copy_blocks(self, source: Path, target_fd: int, mask: int, length: int) -> None:
        """Copy blocks from the old chunk file into the new one; their checksums travel in the header."""
        with self._open(source, os.O_RDONLY) as fd:
            for first, end in mask_runs(mask):
                start, stop = run_bytes(first, end, length)
                with mmap.mmap(-1, _aligned(stop - start)) as buffer:
                    os.preadv(fd, [buffer], HEADER_BYTES + start)
                    _pwrite_all(target_fd, [memoryview(buffer)], HEADER_BYTES + start)

    def remove(self, cache_id: str, index: int) -> bool:
        """Delete one chunk file; False if there was none."""
        try:
            self._path(cache_id, index).unlink()
        except OSError:
            return False
        return True

    # -- helpers

    def _path(self, cache_id: str, index: int) -> Path:
        return self._root / cache_id[:2] / _name(cache_id, index)

    @contextlib.contextmanager
    def _open(self, path: Path, flags: int) -> Iterator[int]:
        """Open with O_DIRECT; a file system without it (tmpfs of old kernels) is remembered and read buffered."""
        try:
            fd = os.open(path, flags | os.O_CLOEXEC | self._direct, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            logger.warning("cache: %s has no O_DIRECT; its pages will be dropped with fadvise instead", path.parent)
            self._direct = 0
            with contextlib.suppress(OSError):
                if flags & os.O_CREAT:
                    path.unlink()
            fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            yield fd
        finally:
            if not self._direct:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def _header_page(self) -> mmap.mmap:
        """This thread's page-aligned scratch page, as O_DIRECT needs."""
        page: mmap.mmap | None = getattr(self._local, "page", None)
        if page is None:
            page = self._local.page = mmap.mmap(-1, HEADER_BYTES)
        return page

    def _drop(self, path: Path, why: str, fd: int | None = None) -> None:
        """Delete a bad file. fd: it, open; whatever was renamed over it meanwhile stays."""
        logger.warning("cache: %s dropped: %s", path, why)
        with contextlib.suppress(OSError):
            if fd is None or os.path.samestat(os.fstat(fd), path.stat()):
                path.unlink()


def parse_header(page: bytes | mmap.mmap) -> ChunkHeader | None:
    """The header in a page, None if it does not verify."""
    raw = bytes(page[:HEADER_BYTES])
    if len(raw) < HEADER_BYTES or raw[:8] != _MAGIC:
        return None
    if struct.unpack_from("<Q", raw, HEADER_BYTES - 8)[0] != xxh3_64_intdigest(raw[:-8]):
        return None
    _, version, mask, index, object_bytes, length, identity_bytes, cache_id, *sums = _HEADER.unpack_from(raw)
    start = index * CHUNK_BYTES
    sound = (
        version == FORMAT
        and start < object_bytes
        and length == min(CHUNK_BYTES, object_bytes - start)
        and not mask & ~full_mask(length)
        and _is_hex(cache_id.decode("latin-1"), 40)
    )
    if not sound:  # its checksum holds, so a program wrote it, but none that knows this format
        return None
    identity = raw[_HEADER.size : _HEADER.size + identity_bytes].decode("utf-8", "replace")
    return ChunkHeader(cache_id.decode("ascii"), index, object_bytes, length, mask, tuple(sums), identity)


def _encode_header(page: mmap.mmap, obj: ObjectId, index: int, length: int, sums: dict[int, int]) -> int:
    """Fill `page`; returns the mask of the blocks in `sums`."""
    identity = json.dumps([obj.source, obj.path, obj.size, obj.version, obj.digest]).encode()[:_IDENTITY_BYTES_MAX]
    mask = sum(1 << block for block in sums)
    fields = [sums.get(block, 0) for block in range(BLOCKS_PER_CHUNK)]
    raw = bytearray(HEADER_BYTES)
    _HEADER.pack_into(
        raw, 0, _MAGIC, FORMAT, mask, index, obj.size, length, len(identity), obj.cache_id.encode(), *fields
    )
    raw[_HEADER.size : _HEADER.size + len(identity)] = identity
    struct.pack_into("<Q", raw, HEADER_BYTES - 8, xxh3_64_intdigest(bytes(raw[:-8])))
    page[:] = bytes(raw)
    return mask


def _pwrite_all(fd: int, buffers: Sequence[memoryview], position: int) -> None:
    wanted = sum(map(len, buffers))
    written = os.pwritev(fd, buffers, position)
    if written != wanted:  # a regular file writes short only when the disk is full
        raise OSError(errno.ENOSPC, f"only {written} of {wanted} bytes could be written")


def _sweep_temporary(path: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _TEMPORARY_AGE_S:
            path.unlink()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _is_hex(text: str, digits_count: int) -> bool:
    return len(text) == digits_count and not text.strip("0123456789abcdef")


def _name(cache_id: str, index: int) -> str:
    return f"{cache_id}.{index:08x}"
