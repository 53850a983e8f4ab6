"""Copies between bytes in several runs: whatever the cuts, the piece arrives whole, in order, and from nowhere else."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gpuload.moving.moves import Move, plan_moves, plan_parts
from gpuload.moving.plan import Piece


def laid_out(total: int, cuts: list[int], first: int) -> list[tuple[int, int]]:
    """Runs of `total` bytes in all, cut at `cuts`, at addresses from `first` on that leave a hole after each."""
    edges = sorted({0, total, *(c % total for c in cuts)})
    runs, address = [], first
    for start, stop in pairwise(edges):
        runs.append((address, stop - start))
        address += stop - start + 7
    return runs


@given(
    row_bytes=st.integers(1, 40),
    rows_count=st.integers(1, 12),
    gap=st.integers(0, 9),
    offset=st.integers(0, 30),
    source_cuts=st.lists(st.integers(1, 600), max_size=6),
    run_cuts=st.lists(st.integers(1, 600), max_size=6),
)
def test_any_cuts(
    row_bytes: int, rows_count: int, gap: int, offset: int, source_cuts: list[int], run_cuts: list[int]
) -> None:
    pitch = row_bytes + gap
    piece = Piece(0, 0, 100 + offset, row_bytes, rows_count, pitch)
    span = offset + (rows_count - 1) * pitch + row_bytes
    sources, runs = laid_out(span + 5, source_cuts, 1000), laid_out(piece.nbytes, run_cuts, 50_000)
    place_of = {address + i: at for at, (address, i) in enumerate((a, i) for a, n in sources for i in range(n))}
    target_of = {address + i: at for at, (address, i) in enumerate((a, i) for a, n in runs for i in range(n))}
    got: dict[int, int] = {}
    for move in plan_moves(piece, offset, sources, runs):
        for row in range(move.rows_count):
            for i in range(move.row_bytes):
                to = target_of[move.dst + row * move.row_bytes + i]
                assert to not in got, "copied twice"
                got[to] = place_of[move.src + row * move.pitch_bytes + i]
    want = [offset + row * pitch + i for row in range(rows_count) for i in range(row_bytes)]
    assert [got[i] for i in range(piece.nbytes)] == want
    assert [place_of[a + i] for a, n in plan_parts(piece, offset, sources) for i in range(n)] == want


def test_whole_rows_are_one_strided_copy() -> None:
    piece = Piece(0, 0, 0, 10, 5, 16)
    assert list(plan_moves(piece, 3, [(1000, 100)], [(9000, 50)])) == [Move(9000, 1003, 10, 5, 16)]
    cut = list(plan_moves(piece, 0, [(1000, 40), (2000, 60)], [(9000, 50)]))  # the third row goes over the edge
    assert cut == [
        Move(9000, 1000, 10, 2, 16), Move(9020, 1032, 8, 1, 8), Move(9028, 2000, 2, 1, 2), Move(9030, 2008, 10, 2, 16),
    ]  # fmt: skip


def test_a_piece_nobody_wants_there_is_not_copied() -> None:
    assert not list(plan_moves(Piece(0, 0, 0, 10, 1, 10), 0, [(1000, 10)], []))
