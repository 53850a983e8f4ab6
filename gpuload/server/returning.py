"""What of a load stands in the RAM tier, and its way back to the device: through the pipeline, as from any source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuload.moving.plan import Batch, Piece, pack_pieces
from gpuload.moving.source import copy_out
from gpuload.server.catalog import Block
from gpuload.server.digest_files import Digest
from gpuload.server.ram_tier import Kept, RamTier


class Returning:
    """Of one device's part: found on the loop, and held until `let_go`."""

    def __init__(self, tier: RamTier | None) -> None:
        """tier: None where there is none, so nothing is found."""
        self._tier = tier
        self.copies: list[tuple[Block, int, int, int, int]] = []
        """(to, offset in it, number in `blocks`, offset in that, nbytes)."""
        self.blocks: list[Kept] = []
        self._numbers: dict[Kept, int] = {}
        self.nbytes = 0
        """Of tensors."""

    def hold_block(self, digest: Digest | None) -> bool:
        """Have it stay if it is there, before others come that would drive it out."""
        kept = self._tier.find(digest) if self._tier is not None and digest is not None else None
        if kept is not None:
            self._number(kept)
        return kept is not None

    def hold_piece(self, digest: Digest) -> None:
        """The same for whatever has that piece."""
        there = self._tier.find_piece(digest) if self._tier is not None else None
        if there is not None:
            self._number(there[0])

    def find_block(self, digest: Digest | None, block: Block) -> bool:
        """Whether all of it is there; then it is on its way."""
        kept = self._tier.find(digest) if self._tier is not None and digest is not None else None
        if kept is None:
            return False
        self.copies.append((block, 0, self._number(kept), 0, kept.nbytes))
        self.nbytes += sum(nbytes for _, nbytes, _ in kept.pieces)
        return True

    def find_piece(self, digest: Digest, nbytes: int, block: Block, offset: int) -> bool:
        """The same for a piece that belongs at `offset`."""
        there = self._tier.find_piece(digest) if self._tier is not None else None
        if there is None:
            return False
        self.copies.append((block, offset, self._number(there[0]), there[1], nbytes))
        self.nbytes += nbytes
        return True

    def _number(self, kept: Kept) -> int:
        if kept not in self._numbers:
            assert self._tier is not None
            self._tier.hold(kept)
            self._numbers[kept] = len(self.blocks)
            self.blocks.append(kept)
        return self._numbers[kept]

    def batches(self, buffer_bytes: int) -> list[Batch]:
        """Of `TierSource`; a piece's `transfer` is the number of its copy."""
        pieces = (
            (shard, Piece(number, done, begin + done, n, 1, n))
            for number, (_, _, shard, begin, nbytes) in enumerate(self.copies)
            for done in range(0, nbytes, buffer_bytes)
            if (n := min(buffer_bytes, nbytes - done))
        )
        return pack_pieces(pieces, buffer_bytes=buffer_bytes)

    def let_go(self) -> None:
        for kept in self.blocks:
            assert self._tier is not None
            self._tier.let_go(kept)
        self.blocks = []
        self._numbers = {}


@dataclass(frozen=True)
class TierSource:
    """Held blocks as the files of a `Source`: shard i is block i, lent where it stands."""

    tier: RamTier
    blocks: Sequence[Kept]

    def borrow(self, shard: int, start: int, stop: int) -> _Lent:
        """See `Source.borrow`."""
        return _Lent(self.tier.runs(self.blocks[shard], start, stop - start))

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        """See `Source.read_into`."""
        copy_out(self.tier.runs(self.blocks[shard], start, sum(map(len, views))), views)

    def interrupt(self) -> None:
        """See `Source.interrupt`: nobody waits here."""

    def close(self) -> None:
        """See `Source.close`."""


@dataclass(frozen=True, eq=False)
class _Lent:
    """See `source.Loan`. The load's own hold keeps it."""

    runs: Sequence[tuple[int, int]]

    def release(self) -> None:
        """Nothing to do."""
