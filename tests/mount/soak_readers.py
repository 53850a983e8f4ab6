"""What the readers of `soak` do, each in a process of its own, and the board by which they hear what they are to do.

A file's size tells its version, and version and number every byte: what a read must give is known before it is made.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FILES_COUNT = 8
_FILE_BYTES = (9 << 20) + 17
_PERIOD = 65_521  # a prime beyond half of a block: bytes of another place, version or file are others
_STEP = 7_919
_PIECE_BYTES, _LONG_BYTES = 5000, 1 << 20
_BLOCK_BYTES, _CHUNK_BYTES = 128 << 10, 4 << 20
_READS_MAX = 20
"""Of one burst."""
_HELD_MAX = 1
"""Open over whatever happens, by each reader; with more each file always would be, and nothing of it given up."""
_WRONG_MAX = 20
_GONE = (errno.ESTALE, errno.EFAULT)
"""How a read ends, and a look at a mapping, where the version is gone."""


def size_of(version: int) -> int:
    """How long each version of a file is."""
    return _FILE_BYTES + version


def version_of(size: int) -> int:
    """Which version is so long."""
    return size - _FILE_BYTES


class Contents:
    """What stands in the files."""

    def __init__(self) -> None:
        self._bases = [random.Random(number).randbytes(_PERIOD) * (2 + _LONG_BYTES // _PERIOD)
                       for number in range(FILES_COUNT)]  # fmt: skip

    def part(self, number: int, version: int, start: int, length: int) -> bytes:
        """As many bytes of a version, from `start` on, as there are; at most `_LONG_BYTES`."""
        at = (start + version * _STEP) % _PERIOD
        return self._bases[number][at : at + max(0, min(length, size_of(version) - start))]

    def whole(self, number: int, version: int) -> bytes:
        """All of a version."""
        return b"".join(
            self.part(number, version, start, _LONG_BYTES) for start in range(0, size_of(version), _LONG_BYTES)
        )

    def describe(self, got: bytes, expected: bytes, number: int, version: int, start: int) -> str:
        """In which way these are not the bytes of a version, and whose they are."""
        differing = [at for at, (one, other) in enumerate(zip(got, expected, strict=False)) if one != other]
        if not differing:
            return f"{len(got)} bytes where there are {len(expected)}"
        first, last = start + differing[0], start + differing[-1]
        bad = got[differing[0] : differing[-1] + 1]
        whose = "of nobody" if any(bad) else "zeros"
        for other in range(FILES_COUNT):
            for its_version in range(max(0, version - 20), version + 20):
                for moved in (0, -_BLOCK_BYTES, _BLOCK_BYTES, -_CHUNK_BYTES, _CHUNK_BYTES):
                    if first + moved >= 0 and bad == self.part(other, its_version, first + moved, len(bad)):
                        whose = f"of file {other}, version {its_version}, moved by {moved}"
        return (
            f"{len(differing)} of {len(got)} bytes are others, from {first} ({first % 4096} in its page, "
            f"{first % _BLOCK_BYTES} in its block) to {last}, {whose}: {bad[:16].hex()}"
        )


@dataclass
class Found:
    """By one reader."""

    operations: Counter[str] = field(default_factory=Counter)
    """By kind."""
    met: Counter[str] = field(default_factory=Counter)
    """On the way: versions that were gone, reads that ended early."""
    wrong: list[str] = field(default_factory=list)


class Board:
    """Words in a file that all map: how far the readers are, and which versions stand at the origin."""

    def __init__(self, path: str, readers_count: int, *, create: bool = False) -> None:
        if create:
            Path(path).write_bytes(bytes(8 * (2 + 3 * readers_count + 2 * FILES_COUNT)))
        with open(path, "r+b") as file:
            words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self._orders = words[:2]
        self._operations, self._wrong, self._paused = (
            words[2 + part * readers_count : 2 + (part + 1) * readers_count] for part in range(3)
        )
        self._oldest = words[-2 * FILES_COUNT : -FILES_COUNT]
        self._newest = words[-FILES_COUNT:]

    @property
    def is_over(self) -> bool:
        """The readers are to end."""
        return bool(self._orders[0])

    def end(self) -> None:
        self._orders[0] = 1

    @property
    def is_paused(self) -> bool:
        """The readers are to have nothing open."""
        return bool(self._orders[1])

    def pause(self, paused: bool) -> None:
        self._orders[1] = paused

    @property
    def all_paused(self) -> bool:
        """They have nothing open."""
        return all(self._paused)

    @property
    def operations(self) -> int:
        """Of all readers."""
        return sum(self._operations)

    @property
    def wrong(self) -> int:
        """What they have found wrong."""
        return sum(self._wrong)

    def note(self, reader: int, found: Found, *, paused: bool) -> None:
        """How far a reader is."""
        self._operations[reader], self._wrong[reader] = found.operations.total(), len(found.wrong)
        self._paused[reader] = paused

    def note_newest(self, number: int, version: int) -> None:
        """The origin may have this version of a file from now on."""
        self._newest[number] = version

    def note_oldest(self, number: int, version: int) -> None:
        """The versions before are gone, and whoever opens it gets this one."""
        self._oldest[number] = version

    def may_be_gone(self, number: int, version: int) -> bool:
        """Whether the origin may have another version by now."""
        return version != self._newest[number] or version != self._oldest[number]


@dataclass
class _Opened:
    """A version of a file, open and mapped."""

    fd: int
    number: int
    version: int
    view: mmap.mmap

    @classmethod
    def open(cls, folder: str, number: int) -> _Opened:
        fd = os.open(f"{folder}/{number}.bin", os.O_RDONLY)
        size = os.fstat(fd).st_size
        return cls(fd, number, version_of(size), mmap.mmap(fd, size, prot=mmap.PROT_READ))

    def close(self) -> None:
        self.view.close()
        os.close(self.fd)


class _Reader:
    def __init__(self, folder: str, chance: random.Random, board: Board) -> None:
        self._folder = folder
        self._chance = chance
        self._board = board
        self._contents = Contents()
        self._held: list[_Opened] = []
        self._scratch = os.memfd_create("soak")
        self._direct = mmap.mmap(-1, _BLOCK_BYTES)
        self.found = Found()

    def burst(self) -> None:
        """A few reads of a file that is opened, or has been open for long."""
        if self._held and self._chance.random() < 0.5:
            opened = self._chance.choice(self._held)
            is_kept = self._chance.random() < 0.95
        else:
            opened = _Opened.open(self._folder, self._chance.randrange(FILES_COUNT))
            self._held.append(opened)
            self.found.operations["open"] += 1
            is_kept = len(self._held) <= _HELD_MAX and self._chance.random() < 0.3
        if self._chance.random() < 0.2:
            os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        is_there = self._read(
            opened, self._chance.choice((self._pread, self._look, self._either, self._run, self._end))
        )
        self._look_around()
        if not is_kept or not is_there:
            self._held.remove(opened)
            opened.close()

    def let_go(self) -> None:
        """Have nothing open."""
        while self._held:
            self._held.pop().close()

    def _read(self, opened: _Opened, kind: Callable[[_Opened], None]) -> bool:
        """Whether all that was to be read is there still."""
        try:
            kind(opened)
        except OSError as error:
            if error.errno not in _GONE or not self._board.may_be_gone(opened.number, opened.version):
                self._say(opened, f"{kind.__name__}: {error}")
            self.found.met["gone"] += 1
            return False
        return True

    def _pread(self, opened: _Opened) -> None:
        for _ in range(self._chance.randrange(1, _READS_MAX)):
            self._take(opened, self._anywhere(opened), _PIECE_BYTES)

    def _look(self, opened: _Opened) -> None:
        for _ in range(self._chance.randrange(1, _READS_MAX)):
            self._take_mapped(opened, self._anywhere(opened), _PIECE_BYTES)

    def _either(self, opened: _Opened) -> None:
        """The same bytes in all ways, or some."""
        for _ in range(self._chance.randrange(1, _READS_MAX)):
            start = self._anywhere(opened)
            for take in self._chance.sample((self._take, self._take_mapped, self._take_direct), 2):
                take(opened, start, _PIECE_BYTES)

    def _run(self, opened: _Opened) -> None:
        """In order."""
        take = self._chance.choice((self._take, self._take_mapped))
        length = self._chance.choice((64 << 10, 300_000, _LONG_BYTES))
        start = self._anywhere(opened)
        for at in range(start, min(start + 4 * length, size_of(opened.version)), length):
            take(opened, at, length)

    def _end(self, opened: _Opened) -> None:
        """Across the end of the file."""
        self._take(opened, size_of(opened.version) - self._chance.randrange(_PIECE_BYTES), _PIECE_BYTES)

    def _anywhere(self, opened: _Opened) -> int:
        return self._chance.randrange(size_of(opened.version) - _PIECE_BYTES)

    # -- one read each

    def _take(self, opened: _Opened, start: int, length: int) -> None:
        expected = self._contents.part(opened.number, opened.version, start, length)
        got = os.pread(opened.fd, length, start)
        while len(got) < len(expected):  # it may end before a page that cannot be had: the next call says why
            self.found.met["short"] += 1
            more = os.pread(opened.fd, length - len(got), start + len(got))
            if not more:
                break
            self.found.met["short, and then more"] += 1
            got += more
        self._compare("read", opened, start, got, expected)

    def _take_mapped(self, opened: _Opened, start: int, length: int) -> None:
        """By the kernel's faults on the mapping, which are an error there and no signal."""
        expected = self._contents.part(opened.number, opened.version, start, length)
        at, end = start, start + len(expected)
        while at < end:
            with memoryview(opened.view) as view, view[at:end] as part:
                at += os.pwrite(self._scratch, part, at - start)
        self._compare("mapped", opened, start, os.pread(self._scratch, len(expected), 0), expected)

    def _take_direct(self, opened: _Opened, start: int, length: int) -> None:
        """Past the page cache, where the block is that `start` is in."""
        start = start // _BLOCK_BYTES * _BLOCK_BYTES
        expected = self._contents.part(opened.number, opened.version, start, _BLOCK_BYTES)
        flags = fcntl.fcntl(opened.fd, fcntl.F_GETFL)  # opened anew it could be ESTALE, had it been found damaged
        fcntl.fcntl(opened.fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            count = os.preadv(opened.fd, [self._direct], start)
        finally:
            fcntl.fcntl(opened.fd, fcntl.F_SETFL, flags)
        self._compare("direct", opened, start, self._direct[:count], expected)

    def _compare(self, how: str, opened: _Opened, start: int, got: bytes, expected: bytes) -> None:
        self.found.operations[how] += 1
        if got != expected:
            described = self._contents.describe(got, expected, opened.number, opened.version, start)
            again = os.pread(opened.fd, len(expected), start) == expected
            self._say(opened, f"{how} at {start}: {described}; read again {'right' if again else 'wrong'}")

    def _look_around(self) -> None:
        names = os.listdir(self._folder)
        self.found.operations["list"] += 1
        number = self._chance.randrange(FILES_COUNT)
        version = version_of(os.stat(f"{self._folder}/{number}.bin").st_size)
        self.found.operations["stat"] += 1
        if len(names) != FILES_COUNT or version < 0:
            self.found.wrong.append(f"{names}, version {version} of {number}")

    def _say(self, opened: _Opened, what: str) -> None:
        if len(self.found.wrong) < _WRONG_MAX:
            self.found.wrong.append(f"{time.time():.3f} {opened.number}.bin, version {opened.version}: {what}")


def read_on(folder: str, reader: int, seed: int, board_path: str, readers_count: int) -> Found:
    """Read until the board says that it is over; nothing is open while it says so."""
    board = Board(board_path, readers_count)
    reading = _Reader(folder, random.Random(seed), board)
    while not board.is_over:
        if board.is_paused:
            reading.let_go()
            board.note(reader, reading.found, paused=True)
            time.sleep(0.01)
            continue
        try:
            reading.burst()
        except OSError as error:
            if len(reading.found.wrong) < _WRONG_MAX:
                reading.found.wrong.append(f"{time.time():.3f} {error}")
        board.note(reader, reading.found, paused=False)
    reading.let_go()
    return reading.found
