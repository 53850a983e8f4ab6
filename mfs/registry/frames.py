"""Bytes of chunks by range: only the frames that a range touches are fetched, and each is verified before it counts.

    the node has the chunk in some file     from there; verified by the digests of its table, or by the chunk's own id
    its table is not known                  with the first frames, in one request; where they are not wanted by itself
    it is a difference                      the same frames of the chunk below it, and so on down
    it was stored anew in between           once more from the table on

Requests for a whole chunk: one. For a part of it: one where it begins with the first frame or the table is known.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mfs.errors import ChangedError, IntegrityError, NotFoundError, TransientStoreError
from mfs.registry import layout
from mfs.registry.chunk import (
    FRAME_BYTES,
    Table,
    chunk_id,
    digests_of,
    frames_count,
    parse_table,
    table_bytes,
    walk,
)
from mfs.registry.codecs import DIFFERENCE
from mfs.registry.manifest import Chunk
from mfs.registry.resident import NothingResident, Resident
from mfs.registry.revisions import Part
from mfs.registry.store import Store
from mfs.sources.base import Moved
from mfs.types import ByteRange

TABLES_FRAMES_MAX = 1 << 17
"""Rows of tables kept in one process, some 25 MB: of 16 GiB of chunks."""

_GUESS_BYTES = 32 << 10  # beyond the share that frames of equal length would have
_SCRATCH_COUNT, _SCRATCH_BYTES = 8, 16 << 20  # kept, of each; what goes beyond is made when it is wanted


@dataclass(frozen=True, slots=True)
class _Level:
    """Frames of one chunk as they are stored."""

    table: Table
    stored: memoryview
    start: int
    """Where `stored` begins in the object."""

    def frame(self, index: int) -> memoryview:
        span = self.table.stored_range(index, index + 1)
        return self.stored[span.start - self.start : span.stop - self.start]


class FrameReader:
    """Reads chunks of one registry for one process. Thread-safe."""

    def __init__(self, store: Callable[[float], Store]) -> None:
        """store: gives the store, by a deadline."""
        self._store = store
        self._tables = _Tables()
        self._scratch = _Scratch()
        self.resident: Resident = NothingResident()

    def read(self, part: Part, out: memoryview, *, deadline_s: float) -> Moved:
        """Fill `out` with plain bytes of a chunk, verified.

        Raises: IntegrityError for a chunk that is missing or damaged; AccessError, StoreError.
        """
        moved = Moved()
        with self._scratch.holding() as scratch:
            if self._read_resident(part, out, scratch, moved):
                return moved
            for is_last in (False, True):
                asked: list[str] = []
                try:
                    self._read_stored(part, out, scratch, asked, deadline_s, moved)
                    return moved
                except NotFoundError as error:
                    raise _missing(part.chunk.id) from error
                except ChangedError as error:
                    if is_last:
                        raise TransientStoreError(f"stored anew while it is read: {error}") from error
                except IntegrityError:
                    if is_last:
                        raise
                # Somebody may have stored a chunk anew, otherwise: then what is known of it is another object's. Or a
                # cache between has others than its own bytes.
                for wanted_id in asked:
                    self._tables.forget(wanted_id)
                    self._store(deadline_s).doubt(layout.chunk_key(wanted_id))
        raise AssertionError

    def table(self, chunk: Chunk, *, deadline_s: float) -> Table:
        """How a chunk is stored, by its table alone. Raises: as `read`."""
        known = self._tables.get(chunk.id)
        if known is not None:
            return known
        moved, head = Moved(), table_bytes(chunk.plain_bytes)
        with self._scratch.holding() as scratch:
            try:
                size = self._size(chunk, deadline_s, moved)
                got = self._get(chunk, ByteRange(0, min(head, size)), size, scratch, deadline_s, moved)
            except NotFoundError as error:
                raise _missing(chunk.id) from error
            return parse_table(got, chunk.id, chunk.plain_bytes)

    # -- what the node has

    def _read_resident(self, part: Part, out: memoryview, scratch: _Buffers, moved: Moved) -> bool:
        wanted = frames_of(part)
        plain = self._resident(part.chunk, wanted, scratch)
        if plain is None:
            return False
        start = part.span.start - wanted.start * FRAME_BYTES
        out[:] = plain[start : start + len(out)]
        moved.shared_bytes += len(out)
        return True

    def _resident(self, chunk: Chunk, wanted: range, scratch: _Buffers) -> memoryview | None:
        """The plain bytes of frames of a chunk as some file here has them, verified; None if none has."""
        if not self.resident.may_have(chunk.id):
            return None
        digests = self._tables.digests(chunk.id)
        if digests is None:
            # All of it proves itself by its id, and saves asking for the table.
            whole = scratch.take(chunk.plain_bytes)
            if not self.resident.read(chunk.id, ByteRange(0, chunk.plain_bytes), whole):
                return None
            found = digests_of(whole)
            if chunk_id(chunk.plain_bytes, found) != chunk.id:
                return None
            self._tables.note_digests(chunk.id, found)
            return whole[wanted.start * FRAME_BYTES : wanted.stop * FRAME_BYTES]
        span = ByteRange(wanted.start * FRAME_BYTES, min(wanted.stop * FRAME_BYTES, chunk.plain_bytes))
        plain = scratch.take(len(span))
        is_there = self.resident.read(chunk.id, span, plain)
        return plain if is_there and digests_of(plain) == list(digests[wanted.start : wanted.stop]) else None

    # -- what the registry has

    def _read_stored(
        self, part: Part, out: memoryview, scratch: _Buffers, asked: list[str], deadline_s: float, moved: Moved
    ) -> None:
        """asked: gets the chunks that the registry was asked for."""
        chunk, wanted = part.chunk, frames_of(part)
        below: memoryview | None = None

        def look(of_id: str) -> tuple[_Level | None, str | None]:
            """Frames of a chunk as they are stored, None for those that the node has."""
            nonlocal below
            of = chunk if of_id == chunk.id else Chunk(of_id, chunk.plain_bytes, 0)
            if of is not chunk and (below := self._resident(of, wanted, scratch)) is not None:
                moved.shared_bytes += len(below)
                return None, None
            asked.append(of_id)
            level = self._fetch(of, wanted, scratch, deadline_s, moved)
            rows = level.table.frames[wanted.start : wanted.stop]
            return level, level.table.base if any(row.codec == DIFFERENCE for row in rows) else None

        levels = [level for level in walk(chunk.id, look) if level is not None]
        since_s = time.monotonic()
        self._decode(part, wanted, levels, below, out, scratch)
        moved.decode_s += time.monotonic() - since_s

    @staticmethod
    def _decode(
        part: Part, wanted: range, levels: list[_Level], below: memoryview | None, out: memoryview, scratch: _Buffers
    ) -> None:
        """Bring frames of the uppermost level into `out`, each through all levels from the lowest up."""
        spare = [scratch.take(FRAME_BYTES) for _ in levels]
        for index in wanted:
            plain = levels[0].table.plain_range(index)
            base: memoryview | None = None
            if below is not None:
                start = plain.start - wanted.start * FRAME_BYTES
                base = below[start : start + len(plain)]
            for number in range(len(levels) - 1, 0, -1):
                target = spare[number][: len(plain)]
                levels[number].table.decode(index, levels[number].frame(index), target, base)
                base = target
            start, stop = max(plain.start, part.span.start), min(plain.stop, part.span.stop)
            place = out[start - part.span.start : stop - part.span.start]
            target = place if len(place) == len(plain) else spare[0][: len(plain)]
            levels[0].table.decode(index, levels[0].frame(index), target, base)
            if target is not place:
                place[:] = target[start - plain.start : stop - plain.start]

    def _fetch(self, chunk: Chunk, wanted: range, scratch: _Buffers, deadline_s: float, moved: Moved) -> _Level:
        """Frames of a chunk as they are stored."""
        table = self._tables.get(chunk.id)
        if table is not None:
            span = table.stored_range(wanted.start, wanted.stop)
            return _Level(table, self._get(chunk, span, table.stored_bytes, scratch, deadline_s, moved), span.start)
        size = self._size(chunk, deadline_s, moved)
        head = table_bytes(chunk.plain_bytes)
        if not head < size <= head + chunk.plain_bytes:
            raise IntegrityError(f"chunk {chunk.id[:12]}: {size} bytes for {chunk.plain_bytes}, expected more than its "
                                 f"table's {head} and no more than that beside it")  # fmt: skip
        stop = guessed_bytes(chunk, wanted, size) if not wanted.start else head
        got = self._get(chunk, ByteRange(0, stop), size, scratch, deadline_s, moved)
        table = parse_table(got, chunk.id, chunk.plain_bytes)
        if table.stored_bytes != size:
            raise IntegrityError(f"chunk {chunk.id[:12]}: of {size} bytes, its table says {table.stored_bytes}")
        self._tables.note(table)
        span = table.stored_range(wanted.start, wanted.stop)
        if span.stop <= stop:
            return _Level(table, got, 0)
        if wanted.start:
            return _Level(table, self._get(chunk, span, size, scratch, deadline_s, moved), span.start)
        whole = scratch.take(span.stop)  # the guess fell short: what came need not come twice
        whole[:stop] = got
        self._read(chunk, ByteRange(stop, span.stop), size, whole[stop:], deadline_s, moved)
        return _Level(table, whole, 0)

    def _size(self, chunk: Chunk, deadline_s: float, moved: Moved) -> int:
        """How long the object is: what the manifest said when it was made, unless that proved wrong."""
        if chunk.stored_bytes and not self._tables.is_doubted(chunk.id):
            return chunk.stored_bytes
        moved.requests += 1
        size = self._store(deadline_s).size(layout.chunk_key(chunk.id), deadline_s=deadline_s)
        if size is None:
            raise _missing(chunk.id)
        return size

    def _get(
        self, chunk: Chunk, span: ByteRange, size: int, scratch: _Buffers, deadline_s: float, moved: Moved
    ) -> memoryview:
        out = scratch.take(len(span))
        self._read(chunk, span, size, out, deadline_s, moved)
        return out

    def _read(self, chunk: Chunk, span: ByteRange, size: int, out: memoryview, deadline_s: float, moved: Moved) -> None:
        moved.requests += 1
        key = layout.chunk_key(chunk.id)
        self._store(deadline_s).read_range(key, span, size=size, out=out, deadline_s=deadline_s)
        moved.origin_bytes += len(span)


def guessed_bytes(chunk: Chunk, wanted: range, size: int) -> int:
    """How far to read so that the table and the first frames, from 0 on, come in one request.

    size: of the chunk's object. By plain bytes, not by frames: the last may be short, and a guess that falls short by
    its share costs all of the range once more.
    """
    head = table_bytes(chunk.plain_bytes)
    if wanted.stop == frames_count(chunk.plain_bytes):
        return size
    if size == head + chunk.plain_bytes:  # then nothing in it is compressed
        return head + wanted.stop * FRAME_BYTES
    return min(size, head + (size - head) * wanted.stop * FRAME_BYTES // chunk.plain_bytes + _GUESS_BYTES)


def frames_of(part: Part) -> range:
    """The frames that hold a part's bytes."""
    return range(part.span.start // FRAME_BYTES, -(-part.span.stop // FRAME_BYTES))


def _missing(wanted_id: str) -> IntegrityError:
    return IntegrityError(f"chunk {wanted_id[:12]} is not in the registry; 'mfs fsck' says what needs it")


class _Tables:
    """Tables and digests of the chunks read last, and which of them turned out otherwise than thought."""

    def __init__(self) -> None:
        self._tables: OrderedDict[str, Table | tuple[bytes, ...]] = OrderedDict()
        self._doubted: OrderedDict[str, None] = OrderedDict()
        self._rows = 0
        self._lock = threading.Lock()

    def get(self, wanted_id: str) -> Table | None:
        found = self._tables.get(wanted_id)
        return found if isinstance(found, Table) else None

    def digests(self, wanted_id: str) -> tuple[bytes, ...] | None:
        """Of each frame, proven by the chunk's id."""
        found = self._tables.get(wanted_id)
        return tuple(frame.digest for frame in found.frames) if isinstance(found, Table) else found

    def note(self, table: Table) -> None:
        self._put(table.id, table, len(table.frames))

    def note_digests(self, wanted_id: str, digests: list[bytes]) -> None:
        self._put(wanted_id, tuple(digests), len(digests))

    def _put(self, wanted_id: str, what: Table | tuple[bytes, ...], rows: int) -> None:
        with self._lock:
            self._drop(wanted_id)
            self._tables[wanted_id] = what
            self._rows += rows
            while self._rows > TABLES_FRAMES_MAX:
                self._drop(next(iter(self._tables)))

    def forget(self, wanted_id: str) -> None:
        """Nothing that is known of a chunk's object need hold."""
        with self._lock:
            self._drop(wanted_id)
            self._doubted[wanted_id] = None
            while len(self._doubted) > 4096:
                self._doubted.popitem(last=False)

    def is_doubted(self, wanted_id: str) -> bool:
        return wanted_id in self._doubted

    def _drop(self, wanted_id: str) -> None:
        found = self._tables.pop(wanted_id, None)
        self._rows -= 0 if found is None else len(found.frames) if isinstance(found, Table) else len(found)


class _Buffers:
    """Memory for one read, given out piece by piece."""

    def __init__(self) -> None:
        self.views: list[memoryview] = []
        self._used = 0

    def take(self, nbytes: int) -> memoryview:
        """Bytes that nobody else writes to until the read is over. They hold anything."""
        if self._used < len(self.views) and len(self.views[self._used]) < nbytes:
            self.views[self._used] = memoryview(mmap.mmap(-1, nbytes))
        if self._used == len(self.views):
            self.views.append(memoryview(mmap.mmap(-1, nbytes)))
        self._used += 1
        return self.views[self._used - 1][:nbytes]

    def rewind(self) -> None:
        """All of it may be used anew; what was needed for once is let go."""
        self._used = 0
        while sum(map(len, self.views)) > _SCRATCH_BYTES:
            self.views.pop()


class _Scratch:
    """Buffers that are used again: fresh memory costs more CPU than the copy out of it."""

    def __init__(self) -> None:
        self._free: list[_Buffers] = []

    @contextmanager
    def holding(self) -> Iterator[_Buffers]:
        try:
            buffers = self._free.pop()
        except IndexError:
            buffers = _Buffers()
        try:
            yield buffers
        finally:
            buffers.rewind()
            if len(self._free) < _SCRATCH_COUNT:
                self._free.append(buffers)
