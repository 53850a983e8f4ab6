"""What a reader of a registry asks of the node it runs on: bytes of chunks that stand here already, in any file.

Who has an SSD tier gives an implementation (`workers.resident`); what it says is verified before it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mfs.cache.chunk_places import Content
from mfs.types import ByteRange


class Resident(Protocol):
    """Chunks on this node. Methods may block for a disk; thread-safe; trouble is a miss, never an error."""

    def may_have(self, chunk_id: str) -> bool:
        """Whether it is worth asking: no disk is looked at."""
        ...

    def read(self, chunk_id: str, span: ByteRange, out: memoryview) -> bool:
        """Fill `out` with plain bytes of a chunk as some file has them here; False if none has all of them.

        Nobody has compared them with the chunk's id.
        """
        ...

    def note(self, contents: Sequence[Content]) -> None:
        """Say what files are made of, so that their chunks are found as far as they stand here."""
        ...


class NothingResident:
    """Of a reader without an SSD tier."""

    def may_have(self, chunk_id: str) -> bool:
        """Nothing is here."""
        return False

    def read(self, chunk_id: str, span: ByteRange, out: memoryview) -> bool:
        """Nothing is here."""
        return False

    def note(self, contents: Sequence[Content]) -> None:
        """Nobody wants to know."""
