"""Which copies bring a piece from where its bytes stand to where they belong, when both are in several runs. Pure.

    sources   |aaaaaaaa|bbbbbbbb|      where the batch was put: one buffer, or pieces locked each by itself
    piece       rr..rr.. rr..          rows of it
    runs      |rrrr|rr|                granules on the device

Rows that stand whole in one source and go whole into one run are one strided copy; what an edge cuts through is copied
in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpuload.moving.plan import Piece

Runs = Sequence[tuple[int, int]]
"""(address, nbytes), in order."""


class Move(NamedTuple):
    """One copy: rows `pitch_bytes` apart at the source, packed at the destination."""

    dst: int
    src: int
    row_bytes: int
    rows_count: int
    pitch_bytes: int


def plan_moves(piece: Piece, offset: int, sources: Runs, runs: Runs) -> Iterator[Move]:
    """The copies of one piece, in order.

    offset: of the piece's first byte in `sources`. runs: exactly the piece's bytes in all; empty: no copies.
    """
    if not runs:
        return
    origin, target = _Cursor(sources), _Cursor(runs)
    row = 0
    while row < piece.rows_count:
        src, room = origin.at(offset + row * piece.pitch_bytes)
        dst, place = target.at(row * piece.row_bytes)
        whole = min(
            piece.rows_count - row,
            place // piece.row_bytes,
            (room - piece.row_bytes) // piece.pitch_bytes + 1 if room >= piece.row_bytes else 0,
        )
        if whole:
            yield Move(dst, src, piece.row_bytes, whole, piece.pitch_bytes)
            row += whole
            continue
        done = 0
        while done < piece.row_bytes:
            src, room = origin.at(offset + row * piece.pitch_bytes + done)
            dst, place = target.at(row * piece.row_bytes + done)
            n = min(room, place, piece.row_bytes - done)
            yield Move(dst, src, n, 1, n)
            done += n
        row += 1


def plan_parts(piece: Piece, offset: int, sources: Runs) -> Iterator[tuple[int, int]]:
    """Where the piece's bytes stand in `sources`, in order: (address, nbytes)."""
    cursor = _Cursor(sources)
    for row in range(piece.rows_count):
        done = 0
        while done < piece.row_bytes:
            address, room = cursor.at(offset + row * piece.pitch_bytes + done)
            n = min(room, piece.row_bytes - done)
            yield address, n
            done += n


class _Cursor:
    """Where an offset into runs stands. Offsets asked for never fall."""

    def __init__(self, runs: Runs) -> None:
        self._runs = iter(runs)
        self._address, self._nbytes = next(self._runs)
        self._first = 0

    def at(self, offset: int) -> tuple[int, int]:
        """(address, bytes from there to the end of its run)."""
        while offset >= self._first + self._nbytes:
            self._first += self._nbytes
            self._address, self._nbytes = next(self._runs)
        into = offset - self._first
        return self._address + into, self._nbytes - into
