"""How far away an origin is, measured as a mount would ask it: latency by small ranges, bandwidth by chunks.

Bounded in bytes and time; what arrives is thrown away.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mfs.sources.base import Source
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange, Entry, EntryKind, ObjectId

SMALL_READS = 5
"""Of one byte each; their median is the latency, so that one lost packet or one new connection says nothing."""
BYTES_MAX = 64 << 20
"""Fetched to measure bandwidth; whole chunks of the largest file."""
SECONDS_MAX = 3.0
"""What is under way then is finished, and counted."""
PIECE_S = 0.25
"""That one range should take, so that a slow link is measured in the time of a fast one."""
DIRECTORIES_MAX = 50
"""Looked into for a file to read."""


@dataclass(frozen=True)
class Link:
    """Between this machine and an origin."""

    latency_s: float
    """From asking for a byte to having it, over a connection that stands."""
    bytes_s: float
    """Of all connections together."""
    sample_bytes: int
    """That the bandwidth was measured with."""


def files(
    source: Source, *, deadline_s: float, directories_max: int = DIRECTORIES_MAX, below: Sequence[str] = ()
) -> Iterator[tuple[str, Entry]]:
    """(directory, entry) of the files of a source, as they are found; directories beyond the bound are left out.

    below: paths; only directories on the way to them, and below them, are looked into. None: all.
    Raises: MfsError.
    """
    left, seen = [""], {""}
    listed_count = 0
    while left and listed_count < directories_max:
        wanted = left.pop(0)
        listed_count += 1
        pages: dict[str, list[Entry]] = {}
        for folder, entries in source.list(wanted, deadline_s=deadline_s):
            pages.setdefault(folder, []).extend(entries)
        for folder, entries in pages.items():
            seen.add(folder)
            if folder in left:
                left.remove(folder)
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.kind is EntryKind.FILE:
                    yield folder, entry
                elif (
                    entry.kind is EntryKind.DIRECTORY and path not in seen and path not in pages and _leads(path, below)
                ):
                    seen.add(path)
                    left.append(path)


def _leads(path: str, below: Sequence[str]) -> bool:
    """Whether a directory lies on the way to one of the paths, or below it."""
    return not below or any(f"{one}/".startswith(f"{path}/") or f"{path}/".startswith(f"{one}/") for one in below)


def largest(source: Source, *, deadline_s: float) -> ObjectId | None:
    """The largest file among the first that are found; None if there is none with a byte in it. Raises: MfsError."""
    best: ObjectId | None = None
    for folder, entry in files(source, deadline_s=deadline_s):
        if entry.size > (best.size if best else 0):
            best = entry.object_at(source.identity, folder)
            if best.size >= BYTES_MAX:
                break
    return best


def measure(source: Source, obj: ObjectId, *, connections: int, deadline_s: float) -> Link:
    """Read parts of an object. Raises: MfsError."""
    latency_s = latency(source, obj, deadline_s=deadline_s)
    bytes_s, sample_bytes = _bandwidth(source, obj, connections, deadline_s)
    return Link(latency_s, bytes_s, sample_bytes)


def latency(source: Source, obj: ObjectId, *, deadline_s: float) -> float:
    """Small ranges, one after the other; the first, which opens connections and looks things up, does not count."""
    took = []
    out = memoryview(bytearray(1))
    for number in range(SMALL_READS + 1):
        at = number * BLOCK_BYTES % obj.size
        began = time.monotonic()
        source.get_range(obj, ByteRange(at, at + 1), out=out, deadline_s=deadline_s)
        took.append(time.monotonic() - began)
    return statistics.median(took[1:])


def _bandwidth(source: Source, obj: ObjectId, connections: int, deadline_s: float) -> tuple[float, int]:
    nbytes = min(obj.size, BYTES_MAX)
    piece_bytes = _piece_bytes(source, obj, deadline_s)
    spans = [ByteRange(at, min(at + piece_bytes, nbytes)) for at in range(0, nbytes, piece_bytes)]
    until, left = time.monotonic() + SECONDS_MAX, iter(spans)
    lanes = min(connections, len(spans))

    def lane(_: int) -> int:
        moved = 0
        with mmap.mmap(-1, CHUNK_BYTES) as memory, memoryview(memory) as view:
            for span in left:
                with view[: len(span)] as out:
                    cost = source.get_range(obj, span, out=out, deadline_s=deadline_s)
                moved += len(span) if cost is None else cost.origin_bytes
                if time.monotonic() > until:
                    break
        return moved

    began = time.monotonic()
    with ThreadPoolExecutor(lanes, thread_name_prefix="probe") as pool:
        moved = sum(pool.map(lane, range(lanes)))
    return moved / max(time.monotonic() - began, 1e-9), moved


def _piece_bytes(source: Source, obj: ObjectId, deadline_s: float) -> int:
    """How long a range may be to come within PIECE_S over one connection: whole blocks, a chunk at most."""
    first = ByteRange(0, min(obj.size, 4 * BLOCK_BYTES))
    began = time.monotonic()
    source.get_range(obj, first, out=memoryview(bytearray(len(first))), deadline_s=deadline_s)
    wanted = len(first) / max(time.monotonic() - began, 1e-9) * PIECE_S
    return max(BLOCK_BYTES, min(CHUNK_BYTES, int(wanted) // BLOCK_BYTES * BLOCK_BYTES))
