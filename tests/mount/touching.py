"""What tests have done to a mount in a process outside (`TestMount.call`): module-level functions, plain results."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

from mfs import mapping

_held: dict[str, Any] = {}
"""Descriptors and mappings kept open between calls, by name."""


def read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def digest(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pread(path: str, length: int, offset: int, flags: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def pread_direct(path: str, length: int, offset: int) -> bytes:
    """Through O_DIRECT, into page-aligned memory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, -(-length // 4096) * 4096)
        count = os.preadv(fd, [memoryview(buffer)[:length]], offset)
        return buffer[:count]
    finally:
        os.close(fd)


def map_file(path: str, kind: str) -> bytes:
    """All bytes through a mapping: 'shared', 'private' or 'writable' (private, and written to afterwards)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        flags = mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if kind == "writable" else 0)
        with mmap.mmap(fd, 0, flags, prot) as mapped:
            content = bytes(mapped)
            if kind == "writable":
                mapped[0:4] = b"mine"
                assert mapped[0:4] == b"mine"
            return content
    finally:
        os.close(fd)


def stat(path: str) -> dict[str, int]:
    found = os.lstat(path)
    return {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}


def list_names(path: str) -> list[str]:
    return sorted(os.listdir(path))


def scan(path: str) -> dict[str, tuple[int, bool, bool, bool]]:
    """Name -> (inode, is directory, is file, is link), all from readdir itself."""
    with os.scandir(path) as entries:
        return {
            entry.name: (
                entry.inode(), entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False),
                entry.is_symlink(),
            )
            for entry in entries
        }  # fmt: skip


def tree(path: str) -> dict[str, int]:
    """Every file below: relative path -> size."""
    found = {}
    for folder, _, names in os.walk(path, onerror=_raise):
        for name in names:
            full = os.path.join(folder, name)
            found[os.path.relpath(full, path)] = os.lstat(full).st_size
    return found


def _raise(error: OSError) -> None:
    raise error


def attributes(path: str) -> dict[str, str]:
    return {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}


def statvfs(path: str) -> tuple[int, ...]:
    found = os.statvfs(path)
    return (found.f_bsize, found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_namemax, found.f_flag)


def readlink(path: str) -> str:
    return os.readlink(path)


def failure(call: str, *args: Any) -> str:
    """The errno name with which an `os` function fails; '' if it does not."""
    try:
        getattr(os, call)(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def read_failure(path: str, offset: int = 0, length: int = 4096) -> str:
    """The errno name with which a read at an offset fails; '' if it does not."""
    try:
        pread(path, length, offset)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def setxattr_failure(path: str) -> str:
    return failure("setxattr", path, "user.x", b"1")


def hold(name: str, path: str) -> int:
    """Open a file and keep it open; its inode."""
    _held[name] = os.open(path, os.O_RDONLY)
    return os.fstat(_held[name]).st_ino


def hold_map(name: str, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    _held[name] = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(fd)


def held_map(name: str, offset: int, length: int) -> bytes:
    return bytes(_held[name][offset : offset + length])


def hold_map_alone(name: str, path: str) -> None:
    """A mapping whose file is closed: `mmap.mmap` keeps a descriptor."""
    fd = os.open(path, os.O_RDONLY)
    _held[name] = mapping.map_file(fd, os.fstat(fd).st_size, huge=False)
    os.close(fd)


def held_map_outcome(name: str, offset: int, length: int) -> bytes | str:
    """What a mapping has, or the errno name of what would be SIGBUS for who touches it himself."""
    scratch, found = os.memfd_create("looked-at"), 0
    try:
        while found < length:
            with memoryview(_held[name]) as view, view[offset + found : offset + length] as part:
                found += os.pwrite(scratch, part, found)
        return os.pread(scratch, length, 0)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(scratch)


def held_read(name: str, offset: int, length: int) -> bytes:
    return os.pread(_held[name], length, offset)


def held_outcome(name: str, offset: int, length: int) -> bytes | str:
    """The bytes, or the errno name."""
    try:
        return read_on(_held[name], length, offset)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def held_again(name: str) -> str:
    """The errno name with which the file behind a descriptor is opened anew; '' if it is."""
    return failure("open", f"/proc/self/fd/{_held[name]}", os.O_RDONLY)


def held_size(name: str) -> int:
    return os.fstat(_held[name]).st_size


def release(name: str) -> None:
    found = _held.pop(name)
    if isinstance(found, mmap.mmap):
        found.close()
    elif isinstance(found, memoryview):
        found.release()
    else:
        os.close(found)


def drop_pages(path: str) -> None:
    """Have the kernel forget a file's pages, so that the next read reaches the daemon."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def held_drop_pages(name: str) -> None:
    os.posix_fadvise(_held[name], 0, 0, os.POSIX_FADV_DONTNEED)


def held_resident_pages(name: str) -> int:
    return resident_pages(_held[name])


def resident_pages(file: str | int) -> int:
    """How many of a file's pages the kernel's page cache holds (mincore(2)); of a path, or a descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mapped_privately(file) as (address, size):
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0, os.strerror(
            ctypes.get_errno()
        )
        return sum(page & 1 for page in pages)


@contextlib.contextmanager
def mapped_privately(file: str | int) -> Iterator[tuple[int, int]]:
    """(address, size) of a whole file, mapped for as long as the context is open; no byte of it is touched."""
    fd = os.open(file, os.O_RDONLY) if isinstance(file, str) else os.dup(file)
    try:
        size = os.fstat(fd).st_size
        mapped = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        yield ctypes.addressof(ctypes.c_char.from_buffer(mapped)), size
        with contextlib.suppress(BufferError):  # the address' own reference may outlive this by a moment
            mapped.close()
    finally:
        os.close(fd)


def safetensors_header(path: str) -> dict[str, Any]:
    """The header as a careful reader takes it: eight bytes, then as many as they say."""
    with open(path, "rb", buffering=0) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        return header


def safe_open_keys(path: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return sorted(file.keys())


def safe_open_slice(path: str, name: str, start: int, stop: int) -> bytes:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        part: bytes = file.get_slice(name)[start:stop].tobytes()
        return part


def read_failures_together(paths: list[str]) -> list[str]:
    """`read_failure` of each path, all at once, from threads."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(read_failure, paths))


def read_outcome(path: str, offset: int, length: int) -> bytes | str:
    """The bytes, or the errno name."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            return read_on(fd, length, offset)
        finally:
            os.close(fd)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def read_on(fd: int, length: int, offset: int) -> bytes:
    """As pread, on where that ends before a page that cannot be had: the error comes with the next call."""
    found = b""
    while len(found) < length and (piece := os.pread(fd, length - len(found), offset + len(found))):
        found += piece
    return found


def drop_pages_if_there(path: str) -> None:
    try:
        drop_pages(path)
    except FileNotFoundError:
        pass


def all_times(path: str) -> dict[str, tuple[int, int, int]]:
    """(inode, mtime, ctime) in ns of everything below a directory by relative path, and of itself under ''."""
    found = {}
    for folder, directories, files in os.walk(path, onerror=_raise):
        for name in [".", *directories, *files]:
            status = os.stat(os.path.join(folder, name))
            relative = os.path.relpath(os.path.join(folder, name), path)
            found["" if relative == "." else relative] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return found


def drop_dentries() -> None:
    """Have the kernel forget the names that nobody uses."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2\n")
