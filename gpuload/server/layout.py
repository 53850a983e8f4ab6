"""Where each tensor of a model stands in memory: tensors in blocks, blocks in whole granules. Pure.

A block is the unit that two models share in place; it is named by its content. A tensor of BLOCK_GRANULES granules or
more is a block of its own, so equal large tensors are shared wherever they stand in their files. Smaller ones of a
shard are packed in file order until a block is full: the waste stays below one granule per block.

Tensors are cut in pieces of PIECE_BYTES from their own beginning; a piece is the unit that is hashed, and copied
inside the device rather than over the bus when some resident block has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuload.moving.plan import Piece, Transfer, cut_transfer

PIECE_BYTES = 4 << 20
"""Small enough that a fine-tune which changes rows of an embedding moves little else; large enough that its digest
(32 bytes and some hundred of bookkeeping) is nothing beside it."""

ALIGN_BYTES = 256
"""Where tensors begin inside a block: what cudaMalloc promises and vectorised kernels expect."""

BLOCK_GRANULES = 8
"""Smallest block worth its own granules: at most one of nine is partly empty."""


@dataclass(frozen=True)
class Placed:
    """One tensor inside its block."""

    transfer: int
    offset: int
    """Bytes from the beginning of the block; a multiple of ALIGN_BYTES."""
    pieces: tuple[Piece, ...]


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

    shard = -1
    for index, t in enumerate(transfers):
        if device not in (None, t.device):
            continue
        if t.shard != shard:
            close_small()
            shard = t.shard
        if not t.nbytes:
            continue
        pieces = tuple(cut_transfer(index, t, PIECE_BYTES))
        if t.nbytes >= large_bytes:
            blocks.append(BlockPlan((Placed(index, 0, pieces),), t.nbytes))
            continue
        offset = -(-reached // ALIGN_BYTES) * ALIGN_BYTES
        small.append(Placed(index, offset, pieces))
        reached = offset + t.nbytes
        if reached >= large_bytes:
            close_small()
    close_small()
    return blocks


def placed_bytes(plan: BlockPlan) -> int:
    """Bytes of tensors in a block."""
    return sum(piece.nbytes for placed in plan.placed for piece in placed.pieces)
