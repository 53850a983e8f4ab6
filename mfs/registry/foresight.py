"""What reads from a registry will cost before they are made, from manifests and the tables of some chunks. No I/O here.

It follows `frames`: a range of a file takes frames of chunks, a frame on the edge of two ranges is fetched for both,
the table comes with a chunk's first frames, or by itself to every process that begins elsewhere in the chunk. Frames of
a compressed chunk count as equally long. What stands on the node already, or comes for another file, is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mfs.registry.chunk import FRAME_BYTES, table_bytes
from mfs.registry.frames import frames_of, guessed_bytes
from mfs.registry.manifest import Chunk
from mfs.registry.revisions import FileOfRevision, Revision
from mfs.types import ByteRange


@dataclass
class Foreseen:
    """A sum."""

    origin_bytes: float = 0.0
    """That the registry will send."""
    shared_bytes: int = 0
    """Of the files, that will be copied on the node."""
    twice_bytes: int = 0
    """That the registry sends beside, if files that share chunks come at the same time."""
    requests: float = 0.0
    """Expected."""
    requests_most: int = 0


class Foresight:
    """Sums reads up."""

    def __init__(
        self, processes: int, has_chunk: Callable[[Chunk], bool], below: Callable[[Chunk], Sequence[Chunk]], *,
        keeps: bool,
    ) -> None:  # fmt: skip
        """processes: that read, each with tables of its own. has_chunk: whether the node has all of a chunk.
        below: the chunks that one stands on as a difference, uppermost first, as `has_chunk` wants them.
        keeps: whether what comes for one file is there for the next (an SSD tier).
        """
        self._processes = processes
        self._has_chunk = has_chunk
        self._below = below
        self._keeps = keeps
        self._owners: dict[str, str] = {}
        """Chunk -> content of the file that it comes for first."""
        self._here: dict[str, bool] = {}
        self.sum = Foreseen()

    def add(self, revision: Revision, file: FileOfRevision, span: ByteRange) -> None:
        """One range of one file, as the cache asks for it."""
        for part in revision.parts(file, span):
            chunk = part.chunk
            comes_twice = self._keeps and self._owners.setdefault(chunk.id, file.content) != file.content
            if self._is_here(chunk) or comes_twice:
                self.sum.shared_bytes += len(part.span)
                if not self._is_here(chunk):
                    self.sum.twice_bytes += len(part.span) * chunk.stored_bytes // chunk.plain_bytes
                continue
            wanted = frames_of(part)
            self._count(chunk, wanted)
            for other in self._below(chunk):
                if self._is_here(other):
                    break
                self._count(other, wanted)

    def _is_here(self, chunk: Chunk) -> bool:
        found = self._here.get(chunk.id)
        if found is None:
            found = self._here[chunk.id] = self._has_chunk(chunk)
        return found

    def _count(self, chunk: Chunk, wanted: range) -> None:
        head, size = table_bytes(chunk.plain_bytes), chunk.stored_bytes
        self.sum.requests += 1
        self.sum.requests_most += 2
        if not wanted.start:
            self.sum.origin_bytes += guessed_bytes(chunk, wanted, size)
            return
        plain = min(wanted.stop * FRAME_BYTES, chunk.plain_bytes) - wanted.start * FRAME_BYTES
        self.sum.origin_bytes += plain * (size - head) / chunk.plain_bytes
        elsewhere = (self._processes - 1) / self._processes  # that another process has begun the chunk
        self.sum.requests += elsewhere
        self.sum.origin_bytes += elsewhere * head
