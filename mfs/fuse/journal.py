"""What the next daemon of a mount cannot know by itself, in a file in memory that outlives us: the journal.

One row for each inode: of an open file what it takes to read it on, of a directory that the kernel knows where it is.
The file belongs to whoever holds its descriptor (`mfs.holder`), and only one daemon writes it at a time. It is

    start       uint64: where the first record stands
    records     uint32 length, uint32 CRC-32, then MessagePack: [inode, row], or [inode, nil] for a row that went

A later record of an inode takes an earlier one's place. A row is written before the kernel hears of what it is about;
the end of a record that a kill has cut off does not count, for the kernel has heard nothing. Where most records are
out of date, those that are not are written behind them, `start` moves there, and what stood before it goes back to
the system.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from zlib import crc32

import msgpack

from mfs.mapping import punch_hole

Row = list[Any]

FORMAT = 1
"""Of the rows, and of how inodes are made; a journal of another one is of no use."""
AGREEMENT = 0
"""In the place of an inode: [FORMAT, what was said at INIT: request, reply, then the identities of the sources, how
many daemons the mount has had, and how many of them failed]."""
_START = struct.Struct("<Q")
_RECORD = struct.Struct("<II")
_TEXT = "surrogatepass"
_GARBAGE_BYTES_MIN = 64 << 10
_READ_BYTES = 1 << 20


class Journal:
    """The rows of one mount."""

    def __init__(self, fd: int) -> None:
        """fd: of a journal, or of an empty file in memory."""
        self.fd = fd
        self._records: dict[int, bytes] = {}
        """Of each inode that has a row. As they are written: ten thousand rows as lists would take 5 MB."""
        self._live_bytes = 0
        self._start = self._end = _START.size
        self._held: bytearray | None = None
        """What was noted since `hold`."""
        self._load()

    @classmethod
    def create(cls) -> Journal:
        """An empty one."""
        return cls(os.memfd_create("mfs-journal", os.MFD_CLOEXEC))

    def close(self) -> None:
        """Nobody else has it."""
        os.close(self.fd)

    def hold(self) -> None:
        """Write nothing from now on: another daemon reads the file, and writes to it next. What is noted is kept."""
        self._held = bytearray()

    def go_on(self) -> None:
        """The file is ours again: what was noted since `hold` is written."""
        held, self._held = self._held, None
        self._write(bytes(held or b""))

    def note(self, inode: int, row: Row) -> None:
        """Write a row down, in place of an earlier one. It is there when this returns, whatever happens to us, but for
        `hold`.
        """
        self._append(inode, row)

    def forget(self, inode: int) -> None:
        """Take a row out."""
        if inode in self._records:
            self._append(inode, None)

    def row(self, inode: int) -> Row | None:
        """The row of an inode."""
        record = self._records.get(inode)
        return None if record is None else _unpacked(record[_RECORD.size :])[1]

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(inode, row) of all inodes."""
        for inode, record in list(self._records.items()):
            if inode != AGREEMENT:
                yield inode, _unpacked(record[_RECORD.size :])[1] or []

    def _append(self, inode: int, row: Row | None) -> None:
        record = _packed(inode, row)
        self._take(inode, None if row is None else record)
        if self._held is not None:
            self._held += record
        else:
            self._write(record)

    def _write(self, records: bytes) -> None:
        os.pwrite(self.fd, records, self._end)
        self._end += len(records)
        if self._end - self._start > 2 * self._live_bytes + _GARBAGE_BYTES_MIN:
            self._compact()

    def _take(self, inode: int, record: bytes | None) -> None:
        self._live_bytes -= len(self._records.pop(inode, b""))
        if record is not None:
            self._records[inode] = record
            self._live_bytes += len(record)

    def _compact(self) -> None:
        records = b"".join(self._records.values())
        os.pwrite(self.fd, records, self._end)
        os.pwrite(self.fd, _START.pack(self._end), 0)
        self._start, self._end = self._end, self._end + len(records)
        with suppress(OSError):
            punch_hole(self.fd, _START.size, self._start - _START.size)

    def _load(self) -> None:
        size = os.fstat(self.fd).st_size
        if size < _START.size:
            os.pwrite(self.fd, _START.pack(self._start), 0)
            return
        (self._start,) = _START.unpack(os.pread(self.fd, _START.size, 0))
        content = b"".join(
            os.pread(self.fd, _READ_BYTES, at) for at in range(self._start, max(size, self._start), _READ_BYTES)
        )
        at = 0
        while len(content) - at >= _RECORD.size:
            length, checksum = _RECORD.unpack_from(content, at)
            payload = content[at + _RECORD.size : at + _RECORD.size + length]
            if not length or len(payload) < length or crc32(payload) != checksum:
                break
            inode, row = _unpacked(payload)
            record = content[at : at + _RECORD.size + length]
            at += len(record)
            self._take(inode, None if row is None else record)
        self._end = self._start + at
        if self._end < size:  # else what stands behind a damaged record could count again, behind one of ours
            os.ftruncate(self.fd, self._end)


def _packed(inode: int, row: Row | None) -> bytes:
    payload: bytes = msgpack.packb([inode, row], unicode_errors=_TEXT)
    return _RECORD.pack(len(payload), crc32(payload)) + payload


def _unpacked(payload: bytes) -> tuple[int, Row | None]:
    inode, row = msgpack.unpackb(payload, unicode_errors=_TEXT)
    return inode, row
