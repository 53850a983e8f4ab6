"""What files are by content: digests of whole files and tensors, and the ids of the chunks they are cut into."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from blake3 import blake3

from mfs.registry.chunk import chunk_id, digests_of
from mfs.registry.cutting import Span, cut_plain, cut_safetensors
from mfs.registry.manifest import CHUNK_BYTES_MAX, Tensor
from mfs.safetensors import Header, TensorInfo
from mfs.sources import Source
from mfs.types import ByteRange, ObjectId

READ_S = 120.0
"""Until one piece of a file was read, or the push gives up: it may lie on a disk of the network."""


@dataclass(frozen=True)
class Hashed:
    """One file, read once."""

    obj: ObjectId
    sha256: str
    spans: tuple[Span, ...]
    chunk_ids: tuple[str, ...]
    """One for each span."""
    tensors: tuple[Tensor, ...]
    header: Header | None
    """Of a safetensors file."""


def read_span(source: Source, obj: ObjectId, start: int, stop: int, out: memoryview) -> memoryview:
    """Bytes [start, stop) of a file, in `out`. Raises: ChangedError if it is another file now, and as `Source` says."""
    piece = out[: stop - start]
    source.get_range(obj, ByteRange(start, stop), out=piece, deadline_s=time.monotonic() + READ_S)
    return piece


def hash_file(
    source: Source, obj: ObjectId, header: Header | None, beside: Executor, advance: Callable[[int], object]
) -> Hashed:
    """Read a file once, from its first byte to its last.

    header: where it is a safetensors file. beside: where one of the digests is computed beside the others.
    advance: told the bytes of each piece. Memory: one chunk.
    Raises: ChangedError if the file changes meanwhile; as `Source.get_range` otherwise.
    """
    spans = cut_plain(obj.size) if header is None else cut_safetensors(header)
    whole, ids = hashlib.sha256(), []
    of_tensors = _TensorDigests(header.tensors if header else ())
    buffer = memoryview(bytearray(min(obj.size, CHUNK_BYTES_MAX)))
    for span in spans:
        piece = read_span(source, obj, span.start, span.stop, buffer)
        other = beside.submit(whole.update, piece)  # the slowest of the three, so it has a thread of its own
        try:
            ids.append(chunk_id(span.nbytes, digests_of(piece)))
            of_tensors.update(span.start, piece)
        finally:
            other.result()
        advance(span.nbytes)
    return Hashed(obj, whole.hexdigest(), tuple(spans), tuple(ids), of_tensors.finish(), header)


class _TensorDigests:
    """The digest of each tensor of a file, from pieces of the file in order."""

    def __init__(self, tensors: tuple[TensorInfo, ...]) -> None:
        self._left = list(reversed(tensors))
        self._digest = blake3()
        self._done: list[Tensor] = []

    def update(self, start: int, piece: memoryview) -> None:
        """piece: the file's bytes from `start` on, where the last piece ended."""
        stop = start + len(piece)
        while self._left and self._left[-1].start < stop:
            tensor = self._left[-1]
            self._digest.update(piece[max(tensor.start, start) - start : min(tensor.stop, stop) - start])
            if tensor.stop > stop:
                return
            self._finish_one()

    def finish(self) -> tuple[Tensor, ...]:
        while self._left:  # those without bytes, at the end of the file
            self._finish_one()
        return tuple(self._done)

    def _finish_one(self) -> None:
        t = self._left.pop()
        self._done.append(Tensor(t.name, t.dtype, t.shape, t.start, t.stop, self._digest.hexdigest()))
        self._digest = blake3()
