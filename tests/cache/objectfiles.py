"""Objects, slots and files on SSD as the tests of the cache want them, and the page cache as the kernel sees it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import xxhash

from mfs.cache.directory import open_directory
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.testing import ramp
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ObjectId


def make_object(name: str = "model.bin", size: int = CHUNK_BYTES + 5 * BLOCK_BYTES + 777) -> ObjectId:
    return ObjectId("test://origin", name, size, "v1")


def make_slot() -> memoryview:
    """A slot as the daemon has them: page-aligned, with something in it that is nobody's content."""
    slot = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    slot[:] = b"\xa5" * CHUNK_BYTES
    return slot


def content(obj: ObjectId, index: int) -> bytes:
    """The bytes of a chunk: the ramp, begun elsewhere in each object so that no two are alike."""
    span = obj.chunk_range(index)
    return ramp(len(span), start=span.start + sum(obj.path.encode()))


def block_sums(data: bytes, mask: int) -> dict[int, int]:
    return {
        block: xxhash.xxh3_64_intdigest(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
        for block in range(32)
        if mask >> block & 1
    }


def make_tier(directory: Path) -> SsdTier:
    open_directory(directory)
    return SsdTier(SsdConfig(directory))


def write_chunk(tier: SsdTier, obj: ObjectId, index: int, mask: int, data: bytes | None = None) -> int:
    """Write blocks of the right content, others in the slot being rubbish."""
    data = content(obj, index) if data is None else data
    slot = make_slot()
    for block in range(32):
        if mask >> block & 1:
            slot[block * BLOCK_BYTES : min((block + 1) * BLOCK_BYTES, len(data))] = data[
                block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES
            ]
    return tier.write(obj, index, block_sums(data, mask), slot)


def assert_blocks(slot: memoryview, data: bytes, mask: int) -> None:
    """The blocks of `mask` in a slot are the right ones."""
    for block in range(32):
        if mask >> block & 1:
            start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, len(data))
            assert slot[start:stop] == data[start:stop], f"block {block}"


def data_path(directory: Path, obj: ObjectId) -> Path:
    return directory / "v2" / "objects" / obj.cache_id[:2] / obj.cache_id


def sums_path(directory: Path, obj: ObjectId) -> Path:
    return data_path(directory, obj).with_suffix(".sums")


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def cached_pages(path: Path) -> int:
    """How many pages of a file stand in the page cache, asked with mincore(2)."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    fd = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    vector = ctypes.create_string_buffer(pages)
    assert libc.mincore(address, size, vector) == 0
    libc.munmap(address, size)
    return sum(byte & 1 for byte in vector.raw[:pages])
