"""The kernel's messages as bytes: what a request says, what an answer looks like. Pure.

A request is a header of 40 bytes and a body that depends on its operation; an answer is a header of 16 bytes and a
body. All numbers are in the machine's byte order, which is little-endian wherever this runs.

Source: include/uapi/linux/fuse.h (fuse_in_header, fuse_out_header and the structures named below), protocol 7.31 and
newer; fs/fuse/dev.c for what is asked without wanting an answer.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from enum import IntEnum

IN_HEADER_BYTES, OUT_HEADER_BYTES = 40, 16
IN_HEADER = struct.Struct("<4xIQQ16x")
"""fuse_in_header: opcode, unique, nodeid. Left out: length, which read(2) says, and uid, gid, pid: the kernel checks
permissions itself (default_permissions)."""
OUT_HEADER = struct.Struct("<IiQ")
"""fuse_out_header: length with this header, errno negated (or the kind of a notification), unique."""
FORGET_IN = struct.Struct("<Q")
"""fuse_forget_in: nlookup"""
BATCH_FORGET_IN = struct.Struct("<I4x")
"""fuse_batch_forget_in: count"""
FORGET_ONE = struct.Struct("<QQ")
"""fuse_forget_one: nodeid, nlookup"""
OPEN_IN = struct.Struct("<I4x")
"""fuse_open_in: flags, those of open(2)"""
READ_IN = struct.Struct("<QQI20x")
"""fuse_read_in, also of directories: fh, offset, size"""
RELEASE_IN = struct.Struct("<Q16x")
"""fuse_release_in: fh"""
GETXATTR_IN = struct.Struct("<I4x")
"""fuse_getxattr_in: size, 0 asks how large the answer is; the name follows"""

_ATTR = struct.Struct("<QQQqqqIIIIIIIIII")
"""fuse_attr: ino, size, blocks, atime, mtime, ctime (seconds), their nanoseconds, mode, nlink, uid, gid, rdev,
blksize, flags"""
_ENTRY_OUT = struct.Struct("<QQQQII")
"""fuse_entry_out: nodeid, generation, entry_valid, attr_valid (seconds), their nanoseconds; fuse_attr follows"""
_ATTR_OUT = struct.Struct("<QI4x")
"""fuse_attr_out: attr_valid (seconds), its nanoseconds; fuse_attr follows"""
_OPEN_OUT = struct.Struct("<QIi")
"""fuse_open_out: fh, open_flags, backing_id"""
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")
"""fuse_kstatfs: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize"""
_GETXATTR_OUT = struct.Struct("<I4x")
"""fuse_getxattr_out: size"""
_DIRENT = struct.Struct("<QQII")
"""fuse_dirent: ino, off, namelen, type; the name follows, padded to 8 bytes"""

KEEP_CACHE, NO_FLUSH, PASSTHROUGH = 1 << 1, 1 << 5, 1 << 7
"""Of an answer to OPEN: the page cache of the inode stays; close(2) is not told (older kernels tell all the same); the
kernel reads the backing file, and keeps nothing of its own."""

_BLOCK_BYTES = 4096


class Opcode(IntEnum):
    """What the kernel may ask of a read-only tree; enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    FLUSH = 25
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Wants no answer. INTERRUPT could have one, of its request; but EINTR of a page is SIGBUS or EIO for whoever reads it,
with a signal that was never meant to kill."""


ANSWERED_FIRST = frozenset({Opcode.RELEASE, Opcode.RELEASEDIR})
"""Is answered before it is done: should we be killed in between, the kernel does not say it a second time. A handle too
many that is thought to be open costs little; one too few, EIO (`handles`)."""


def answer_head(nbytes: int, unique: int) -> bytes:
    """What stands before an answer of so many bytes. unique: of its request."""
    return OUT_HEADER.pack(OUT_HEADER_BYTES + nbytes, 0, unique)


def attributes(
    inode: int, mode: int, links: int, size: int, time_ns: int, uid: int, gid: int
) -> bytes:  # fmt: skip
    """A fuse_attr. time_ns: all three times, since the epoch; negative before it."""
    seconds, ns = divmod(time_ns, 1_000_000_000)
    return _ATTR.pack(
        inode, size, -(-size // 512), seconds, seconds, seconds, ns, ns, ns, mode, links, uid, gid, 0, _BLOCK_BYTES, 0
    )


def entry_answer(node: int, name_valid_s: int, attributes_valid_s: int, attr: bytes) -> bytes:
    """A fuse_entry_out: a name stands for `node`; how long name and attributes may be believed without asking."""
    return _ENTRY_OUT.pack(node, 0, name_valid_s, attributes_valid_s, 0, 0) + attr


def attributes_answer(valid_s: int, attr: bytes) -> bytes:
    """A fuse_attr_out."""
    return _ATTR_OUT.pack(valid_s, 0) + attr


def open_answer(handle: int, flags: int, backing: int = 0) -> bytes:
    """A fuse_open_out. flags: of KEEP_CACHE and its like. backing: with PASSTHROUGH, the id of the file to read."""
    return _OPEN_OUT.pack(handle, flags, backing)


def statfs_answer(blocks: int, files: int, name_bytes_max: int) -> bytes:
    """A fuse_kstatfs of a file system that is full. blocks: of 4 KiB."""
    return _STATFS_OUT.pack(blocks, 0, 0, files, 0, _BLOCK_BYTES, name_bytes_max, _BLOCK_BYTES, 0)


def xattr_size_answer(size: int) -> bytes:
    """A fuse_getxattr_out: how long the value, or the list of names, is."""
    return _GETXATTR_OUT.pack(size)


def directory_entry(inode: int, offset: int, mode: int, name: bytes) -> bytes:
    """A fuse_dirent. offset: what READDIR says to go on behind this one."""
    return _DIRENT.pack(inode, offset, len(name), stat.S_IFMT(mode) >> 12) + name + bytes(-len(name) % 8)


def forgotten(body: memoryview) -> Iterator[tuple[int, int]]:
    """(node, count) of each reference that a BATCH_FORGET drops."""
    (count,) = BATCH_FORGET_IN.unpack_from(body)
    start = BATCH_FORGET_IN.size
    return FORGET_ONE.iter_unpack(body[start : start + count * FORGET_ONE.size])
