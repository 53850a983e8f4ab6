"""Where each tensor of a model stands in memory: tensors in blocks, blocks in whole granules. Pure.

A block is the unit that two models share in place; it is named by its content. A tensor of BLOCK_GRANULES granules or
more is a block of its own, so equal large tensors are shared wherever they stand in their files. Smaller ones of a
shard are packed in file order until a block is full: the waste stays below one granule per block.

Tensors are cut in pieces of PIECE_BYTES from their own beginning; a piece is the unit that is hashed, and copied
inside the device rather than over the bus when some resident block has it. Where a file has thousands of small tensors,
those that lie side by side share a piece:

    file, block   |aaaa|bb|ccccc|dddddd...      piece |aaaabbccccc|, of a; none of b and c; d is large: its own
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpuload.moving.plan import Piece, Transfer, cut_transfer

PIECE_BYTES = 4 << 20
"""Small enough that a fine-tune which changes rows of an embedding moves little else; large enough that its digest
(32 bytes and some hundred of bookkeeping) is nothing beside it."""

ALIGN_BYTES = 256
"""Where tensors begin inside a block: what cudaMalloc promises and vectorised kernels expect."""

BLOCK_GRANULES = 8
"""Smallest block worth its own granules: at most one of nine is partly empty."""


SMALL_BYTES = 1 << 20
"""Largest tensor that shares a piece."""

MANY_COUNT = 1000
"""Tensors of one file from which on small ones share pieces: each piece costs the server some 40 us. Where there are
fewer, a fine-tune that changes a norm moves that norm alone."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor inside its block."""

    transfer: int
    offset: int
    """Bytes from the beginning of the block; a multiple of ALIGN_BYTES."""
    pieces: tuple[Piece, ...]
    """Those that begin in it: none where the piece of a tensor before it goes on."""


@dataclass(frozen=True)
class BlockPlan:
    """One block, before it has memory."""

    placed: tuple[Placed, ...]
    nbytes: int

    def granules_count(self, granule_bytes: int) -> int:
        return -(-self.nbytes // granule_bytes)


def plan_blocks(transfers: Sequence[Transfer], granule_bytes: int, device: str | None = None) -> list[BlockPlan]:
    """Pack all transfers (to `device`, if given) that have bytes; depends on the tensors' sizes and order only, so
    equal files pack equally.
    """
    large_bytes = BLOCK_GRANULES * granule_bytes
    blocks: list[BlockPlan] = []
    small: list[Placed] = []
    reached = 0

    def close_small() -> None:
        nonlocal small, reached
        if small:
            blocks.append(BlockPlan(tuple(small), reached))
        small, reached = [], 0

    own = [(index, t) for index, t in enumerate(transfers) if device in (None, t.device)]
    shard = -1
    for index, pieces in cut_all(own, small_bytes=min(SMALL_BYTES, large_bytes - 1)):
        t = transfers[index]
        if t.shard != shard or (reached >= large_bytes and pieces):
            close_small()
            shard = t.shard
        if t.nbytes >= large_bytes:
            blocks.append(BlockPlan((Placed(index, 0, pieces),), t.nbytes))
            continue
        offset = -(-reached // ALIGN_BYTES) * ALIGN_BYTES
        small.append(Placed(index, offset, pieces))
        reached = offset + t.nbytes
    close_small()
    return blocks


def cut_all(
    transfers: Sequence[tuple[int, Transfer]], *, small_bytes: int = SMALL_BYTES
) -> Iterator[tuple[int, tuple[Piece, ...]]]:
    """Of every (index, transfer) that has bytes, to one device: its index and the pieces that begin in it."""
    counts = Counter(t.shard for _, t in transfers)
    run: list[tuple[int, Transfer]] = []
    for index, t in transfers:
        if not t.nbytes:
            continue
        joins = counts[t.shard] >= MANY_COUNT and t.rows_count == 1 and t.nbytes <= small_bytes
        if run and not (joins and _goes_on(run, t)):
            yield from _shared(run)
            run = []
        if joins:
            run.append((index, t))
        else:
            yield index, tuple(cut_transfer(index, t, PIECE_BYTES))
    yield from _shared(run)


def _goes_on(run: Sequence[tuple[int, Transfer]], t: Transfer) -> bool:
    """Whether a transfer stands where the run ends, in the file and in the block, and leaves it within a piece."""
    first, last = run[0][1], run[-1][1]
    is_next = t.shard == last.shard and t.start == last.stop and not last.nbytes % ALIGN_BYTES
    return is_next and t.stop - first.start <= PIECE_BYTES


def _shared(run: Sequence[tuple[int, Transfer]]) -> Iterator[tuple[int, tuple[Piece, ...]]]:
    if run:
        first, nbytes = run[0], run[-1][1].stop - run[0][1].start
        yield first[0], (Piece(first[0], 0, first[1].start, nbytes, 1, nbytes),)
        for index, _ in run[1:]:
            yield index, ()


def placed_bytes(plan: BlockPlan) -> int:
    """Bytes of tensors in a block."""
    return sum(piece.nbytes for placed in plan.placed for piece in placed.pieces)
