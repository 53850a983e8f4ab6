"""How two revisions differ: by digests tensor by tensor, and how far those that differ do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from mfs.registry.chunk import FRAME_BYTES
from mfs.registry.chunk_io import read_chunk, read_frame
from mfs.registry.cutting import element_bytes
from mfs.registry.manifest import CHUNK_BYTES_MAX, File, Manifest, Tensor
from mfs.registry.parallel import for_each
from mfs.registry.store import Store

SAMPLED_BYTES = 128 << 10
"""Of a tensor that differs, from its middle, where not all of it is read."""
AT_ONCE = 8

SAME, DIFFERS, OTHER_SHAPE = "same", "differs", "other shape"
ONLY_FIRST, ONLY_SECOND = "only in first", "only in second"


@dataclass(frozen=True)
class Row:
    """One tensor, or one file that holds none."""

    name: str
    kind: str
    """'tensor' or 'file'."""
    state: str
    """SAME, DIFFERS, OTHER_SHAPE, ONLY_FIRST or ONLY_SECOND."""
    first: str
    """'BF16 [30522, 384]'; '' where there is none, and for files."""
    second: str
    nbytes: int
    """In the second revision, or else in the first."""
    differing_share: float | None = None
    """Of its elements; None where that was not looked at."""
    is_sampled: bool = False


@dataclass(frozen=True)
class Diff:
    """Two revisions compared."""

    rows: tuple[Row, ...]
    first_bytes: int
    second_bytes: int
    shared_chunks_bytes: int
    """Plain bytes of the second whose chunks the first has too."""

    @property
    def same_bytes(self) -> int:
        """Bytes of tensors and files that are the same in both."""
        return sum(row.nbytes for row in self.rows if row.state == SAME)

    def as_json(self) -> dict[str, object]:
        """Exact numbers, for programs."""
        return {
            "first_bytes": self.first_bytes,
            "second_bytes": self.second_bytes,
            "same_bytes": self.same_bytes,
            "shared_chunks_bytes": self.shared_chunks_bytes,
            "rows": [asdict(row) for row in self.rows],
        }


class Side(NamedTuple):
    """One of the two."""

    store: Store
    manifest: Manifest


class _Item(NamedTuple):
    """A tensor or a file of one side, and where its bytes are."""

    file: File
    tensor: Tensor | None

    @property
    def digest(self) -> str:
        return self.tensor.blake3 if self.tensor else self.file.sha256

    @property
    def start(self) -> int:
        return self.tensor.start if self.tensor else 0

    @property
    def nbytes(self) -> int:
        return self.tensor.stop - self.tensor.start if self.tensor else self.file.size

    @property
    def shown(self) -> str:
        return f"{self.tensor.dtype} [{', '.join(map(str, self.tensor.shape))}]" if self.tensor else ""

    @property
    def width(self) -> int:
        return element_bytes(self.tensor.dtype) if self.tensor else 1


def compare(first: Side, second: Side, *, full: bool = False, told: Callable[[int], object] = lambda n: None) -> Diff:
    """Compare two revisions, of whichever registries.

    Tensors are found by name, in whichever file. full: read all of the tensors that differ, not a sample of each.
    told: the bytes that were compared, from several threads.
    Raises: NotFoundError, IntegrityError, AccessError, StoreError.
    """
    ours, theirs = dict(_items(first.manifest)), dict(_items(second.manifest))
    rows: dict[tuple[str, str], Row] = {}
    differing: list[tuple[str, str]] = []
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        state = _state(a, b)
        one = b or a
        assert one is not None
        rows[key] = Row(key[1], key[0], state, a.shown if a else "", b.shown if b else "", one.nbytes)
        if state == DIFFERS and a and b and a.nbytes == b.nbytes:
            differing.append(key)
    left, right, lock = _Bytes(first), _Bytes(second), threading.Lock()

    def look(key: tuple[str, str]) -> None:
        a, b = ours[key], theirs[key]
        spans = list(_spans(b, full=full))
        count = total = 0
        for start, stop in spans:
            x = np.frombuffer(left.read(a.file, a.start + start, a.start + stop), f"u{b.width}")
            y = np.frombuffer(right.read(b.file, b.start + start, b.start + stop), f"u{b.width}")
            count, total = count + int(np.count_nonzero(x != y)), total + len(x)
            told(stop - start)
        row = rows[key]
        is_sampled = sum(stop - start for start, stop in spans) < b.nbytes
        with lock:
            rows[key] = Row(*_head(row), count / total if total else None, is_sampled)

    for_each(differing, look, at_once=AT_ONCE)
    has = {chunk.id for chunk in first.manifest.chunks}
    chunks = second.manifest.chunks
    shared = sum(chunks[i].plain_bytes for file in second.manifest.files for i in file.chunks if chunks[i].id in has)
    return Diff(tuple(rows.values()), first.manifest.nbytes, second.manifest.nbytes, shared)


def _head(row: Row) -> tuple[str, str, str, str, str, int]:
    return row.name, row.kind, row.state, row.first, row.second, row.nbytes


def _items(manifest: Manifest) -> Iterator[tuple[tuple[str, str], _Item]]:
    names = Counter(tensor.name for file in manifest.files for tensor in file.tensors)
    for file in manifest.files:
        if not file.tensors:
            yield ("file", file.path), _Item(file, None)
        for tensor in file.tensors:  # a name that several files have says nothing without its file
            name = tensor.name if names[tensor.name] == 1 else f"{file.path}: {tensor.name}"
            yield ("tensor", name), _Item(file, tensor)


def _state(a: _Item | None, b: _Item | None) -> str:
    if a is None or b is None:
        return ONLY_SECOND if a is None else ONLY_FIRST
    if a.shown != b.shown:
        return OTHER_SHAPE
    return SAME if (a.digest, a.nbytes) == (b.digest, b.nbytes) else DIFFERS


def _spans(item: _Item, *, full: bool) -> Iterator[tuple[int, int]]:
    """What of an item is read, from its first byte, in whole elements."""
    stop = item.nbytes - item.nbytes % item.width
    if not full and stop > SAMPLED_BYTES:
        middle = (stop - SAMPLED_BYTES) // 2 // 8 * 8
        yield middle, middle + SAMPLED_BYTES
        return
    for start in range(0, stop, CHUNK_BYTES_MAX):
        yield start, min(start + CHUNK_BYTES_MAX, stop)


class _Bytes:
    """Bytes of one revision by range."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def read(self, file: File, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of a file: frames where little is wanted, whole chunks else."""
        manifest, out = self._side.manifest, bytearray()
        at = 0
        for index in file.chunks:
            chunk = manifest.chunks[index]
            low, high = max(start, at) - at, min(stop, at + chunk.plain_bytes) - at
            if low < high:
                out += self._of_chunk(chunk.id, chunk.plain_bytes, low, high)
            at += chunk.plain_bytes
        return out

    def _of_chunk(self, chunk_id: str, plain_bytes: int, low: int, high: int) -> bytes:
        first, last = low // FRAME_BYTES, (high - 1) // FRAME_BYTES
        if last - first > 3:
            return bytes(read_chunk(self._side.store, chunk_id, plain_bytes).data[low:high])
        found = b"".join(read_frame(self._side.store, chunk_id, plain_bytes, i) for i in range(first, last + 1))
        return found[low - first * FRAME_BYTES : high - first * FRAME_BYTES]
