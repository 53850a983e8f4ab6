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
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class BlockPlan:
    """One block, before it has memory. Columns rather than an object for each tensor, of which there are thousands."""

    transfers: list[int] = field(default_factory=list)
    """The tensors in it."""
    offsets: list[int] = field(default_factory=list)
    """Where each begins, in bytes from the beginning of the block; multiples of ALIGN_BYTES."""
    pieces: list[tuple[int, Piece]] = field(default_factory=list)
    """Each with where in the block it begins."""
    nbytes: int = 0

    @property
    def placed_bytes(self) -> int:
        """Of the tensors, without what is between them."""
        return sum(piece.nbytes for _, piece in self.pieces)

    def granules_count(self, granule_bytes: int) -> int:
        return -(-self.nbytes // granule_bytes)

    def put(self, transfers: Sequence[int], starts: Sequence[int], pieces: Sequence[Piece]) -> None:
        """Some more tensors, behind those that are there; see `cut_all`."""
        begin = -(-self.nbytes // ALIGN_BYTES) * ALIGN_BYTES
        self.transfers += transfers
        self.offsets += [begin + start for start in starts]
        self.pieces += [(begin + piece.offset, piece) for piece in pieces]
        self.nbytes = begin + sum(piece.nbytes for piece in pieces)


def plan_blocks(transfers: Sequence[Transfer], granule_bytes: int, device: str | None = None) -> list[BlockPlan]:
    """Pack all transfers (to `device`, if given) that have bytes; depends on the tensors' sizes and order only, so
    equal files pack equally.
    """
    large_bytes = BLOCK_GRANULES * granule_bytes
    blocks: list[BlockPlan] = []
    small = BlockPlan()
    shard = -1
    for cut in cut_all(transfers, device, small_bytes=min(SMALL_BYTES, large_bytes - 1)):
        t = transfers[cut[0][0]]
        if t.shard != shard or small.nbytes >= large_bytes:
            blocks += [small] if small.transfers else []
            small, shard = BlockPlan(), t.shard
        if t.nbytes >= large_bytes:
            blocks.append(BlockPlan())
            blocks[-1].put(*cut)
        else:
            small.put(*cut)
    return blocks + ([small] if small.transfers else [])


def cut_all(
    transfers: Sequence[Transfer], device: str | None = None, *, small_bytes: int = SMALL_BYTES
) -> Iterator[tuple[Sequence[int], Sequence[int], Sequence[Piece]]]:
    """All transfers (to `device`, if given) that have bytes, in pieces. Those that share theirs come together, others
    alone: their indices, where each begins behind the first one, and the pieces."""
    counts = Counter([t.shard for t in transfers if device in (None, t.device)])
    run: list[int] = []  # of those side by side, in the file and in the block
    starts: list[int] = []
    shard = first = reached = -1  # where it is, begins and ends
    for index, t in enumerate(transfers):
        start, nbytes = t.start, t.row_bytes * t.rows_count
        if not nbytes or device not in (None, t.device):
            continue
        joins = nbytes <= small_bytes and t.rows_count == 1 and counts[t.shard] >= MANY_COUNT
        is_next = joins and start == reached and t.shard == shard
        if not is_next or (start - first) % ALIGN_BYTES or start + nbytes - first > PIECE_BYTES:
            if run:
                yield run, starts, _shared(run, first, reached)
                run, starts = [], []
            if not joins:
                reached = -1
                yield (index,), (0,), cut_transfer(index, t, PIECE_BYTES)
                continue
            shard, first = t.shard, start
        run.append(index)
        starts.append(start - first)
        reached = start + nbytes
    if run:
        yield run, starts, _shared(run, first, reached)


def _shared(run: Sequence[int], first: int, reached: int) -> tuple[Piece]:
    nbytes = reached - first
    return (Piece(run[0], 0, first, nbytes, 1, nbytes),)
