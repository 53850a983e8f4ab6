"""What a node keeps of models beside its cards: pieces on SSD and in RAM, the longest unused forgotten first. Pure.

A piece is what one service has alone, or what a family shares: fetched once a node, as by mfs from our registry.
"""

from __future__ import annotations

from collections import OrderedDict

Piece = tuple[str, int]
"""('own', service) or ('common', family)."""


class Tier:
    """Pieces within a bound, in the order of their last use."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._pieces: OrderedDict[Piece, int] = OrderedDict()
        self.bytes_held = 0

    def __contains__(self, piece: Piece) -> bool:
        return piece in self._pieces

    def use(self, piece: Piece, size_bytes: int) -> None:
        """Keep it, as the one used last. What is larger than the tier is not kept."""
        if size_bytes > self._bytes_max:
            return
        self.bytes_held += size_bytes - self._pieces.pop(piece, 0)
        self._pieces[piece] = size_bytes
        while self.bytes_held > self._bytes_max:
            self.bytes_held -= self._pieces.popitem(last=False)[1]
