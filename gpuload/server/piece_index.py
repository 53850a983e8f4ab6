"""Which complete blocks have a piece of this content, and where in them. Pure bookkeeping, on the loop."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from gpuload.server.digest_files import Digest

Owner = TypeVar("Owner", bound=Hashable)


class PieceIndex(Generic[Owner]):
    """Digest of a piece -> its owners, each with one offset."""

    def __init__(self) -> None:
        self._owners: dict[Digest, dict[Owner, int]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def find(self, digest: Digest) -> tuple[Owner, int] | None:
        """Some owner of these bytes, and at which offset."""
        return next(iter(self._owners.get(digest, {}).items()), None)

    def add(self, owner: Owner, pieces: Iterable[tuple[int, int, Digest]]) -> None:
        """pieces: (offset, nbytes, digest)."""
        for offset, _, digest in pieces:
            self._owners.setdefault(digest, {}).setdefault(owner, offset)

    def remove(self, owner: Owner, pieces: Iterable[tuple[int, int, Digest]]) -> None:
        """Those that were added, or some that were not."""
        for _, _, digest in pieces:
            owners = self._owners.get(digest)
            if owners is not None and owners.pop(owner, None) is not None and not owners:
                del self._owners[digest]
