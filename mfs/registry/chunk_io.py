"""Whole chunks, out of a store: what a push and a comparison need. Readers of a mount take frames, see `source`."""

from __future__ import annotations

import time
from typing import NamedTuple

from mfs.errors import ChangedError, IntegrityError, NotFoundError
from mfs.registry import layout
from mfs.registry.chunk import HEAD_BYTES, Table, parse_table, stated_bytes, table_bytes, walk
from mfs.registry.store import Store
from mfs.types import ByteRange

IO_S = 120.0
"""Until a request about one chunk gives up: 8 MiB at half a megabit a second."""


class Plain(NamedTuple):
    """A chunk and what it holds."""

    table: Table
    data: memoryview
    bases: tuple[str, ...]
    """Ids of all chunks that it is a difference to, over all steps: first the one that its table names."""


def read_table(
    store: Store, chunk_id: str, plain_bytes: int | None = None, stored_bytes: int | None = None
) -> Table | None:
    """The table of a chunk, None where there is no such chunk.

    plain_bytes: None if nobody told: then as the object says, which its id proves. stored_bytes: what `store.size` said
    of it, None if nobody asked.
    Raises: IntegrityError if what stands there is not this chunk, or not as long as its table says.
    """
    size = _size(store, chunk_id) if stored_bytes is None else stored_bytes
    if size is None:
        return None
    if plain_bytes is None:
        plain_bytes = stated_bytes(_read(store, chunk_id, ByteRange(0, min(size, HEAD_BYTES)), size), chunk_id)
    head = ByteRange(0, min(size, table_bytes(plain_bytes)))
    table = parse_table(_read(store, chunk_id, head, size), chunk_id, plain_bytes)
    _check_size(table, size)
    return table


def read_chunk(store: Store, chunk_id: str, plain_bytes: int) -> Plain:
    """A chunk's plain bytes, verified.

    Raises: NotFoundError, IntegrityError, AccessError, StoreError; also for a chunk that it is a difference to.
    """

    def look(wanted_id: str) -> tuple[tuple[Table, memoryview], str | None]:
        size = _size(store, wanted_id)
        if size is None:
            raise _missing(wanted_id)
        if size > table_bytes(plain_bytes) + plain_bytes:
            raise IntegrityError(f"chunk {wanted_id[:12]}: {size} bytes for {plain_bytes}, longer than any is stored")
        body = _read(store, wanted_id, ByteRange(0, size), size)
        table = parse_table(body, wanted_id, plain_bytes)
        _check_size(table, size)
        return (table, body), table.base

    levels = list(walk(chunk_id, look))
    data: memoryview | None = None
    for table, body in reversed(levels):
        data = decode_chunk(table, body, data)
    assert data is not None
    return Plain(levels[0][0], data, tuple(table.id for table, _ in levels[1:]))


def read_frame(store: Store, chunk_id: str, plain_bytes: int, index: int) -> memoryview:
    """One frame's plain bytes, verified; two requests for each difference on the way. Raises: as `read_chunk`."""

    def look(wanted_id: str) -> tuple[Table, str | None]:
        table = read_table(store, wanted_id, plain_bytes)
        if table is None:
            raise _missing(wanted_id)
        return table, table.base

    data: memoryview | None = None
    for table in reversed(list(walk(chunk_id, look))):
        out = memoryview(bytearray(len(table.plain_range(index))))
        stored = _read(store, table.id, table.stored_range(index, index + 1), table.stored_bytes)
        table.decode(index, stored, out, data)
        data = out.toreadonly()
    assert data is not None
    return data


def decode_chunk(table: Table, body: memoryview, base: memoryview | None) -> memoryview:
    """The plain bytes of a stored object. base: of the one that it is a difference to. Raises: IntegrityError."""
    out = memoryview(bytearray(table.plain_bytes))
    for index in range(len(table.frames)):
        stored, span = table.stored_range(index, index + 1), table.plain_range(index)
        of_base = None if base is None else base[span.start : span.stop]
        table.decode(index, body[stored.start : stored.stop], out[span.start : span.stop], of_base)
    return out.toreadonly()


def _missing(chunk_id: str) -> NotFoundError:
    return NotFoundError(f"chunk {chunk_id[:12]} is not in the registry; 'mfs fsck' says what needs it")


def _size(store: Store, chunk_id: str) -> int | None:
    return store.size(layout.chunk_key(chunk_id), deadline_s=time.monotonic() + IO_S)


def _read(store: Store, chunk_id: str, span: ByteRange, size: int) -> memoryview:
    """A range of a chunk's object of `size` bytes."""
    out = memoryview(bytearray(len(span)))
    try:
        store.read_range(layout.chunk_key(chunk_id), span, size=size, out=out, deadline_s=time.monotonic() + IO_S)
    except ChangedError:  # stored anew in between, by one who mended it: so it is no longer what was asked for
        raise IntegrityError(
            f"chunk {chunk_id[:12]}: no longer of {size} bytes: it is written anew; try again"
        ) from None
    return out


def _check_size(table: Table, size: int) -> None:
    if table.stored_bytes != size:
        raise IntegrityError(f"chunk {table.id[:12]}: of {size} bytes, its table says {table.stored_bytes}")
