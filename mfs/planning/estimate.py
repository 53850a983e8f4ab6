"""What a cold start will cost here: bytes and requests at the origin, time and egress, before anything is fetched.

The origin is listed as a mount lists it, and its requests are counted. What is read then follows from how the cache
asks: runs of missing blocks of one chunk are one range. Of a registry `registry.foresight` says what ranges cost, of
an OCI layer that is packed the whole layer comes. Demand reads before a file is streamed make more ranges of the same
bytes: `requests_most` has room for them.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mfs.cache.chunks import block_mask, full_mask, mask_bytes, mask_runs, run_bytes
from mfs.errors import IntegrityError, NotFoundError
from mfs.fetch.transport import counting
from mfs.oci.artifact import parse_locator
from mfs.oci.media import Packing
from mfs.oci.source import OciSource
from mfs.oci.unpacked import PIECE_BYTES
from mfs.planning import probe
from mfs.planning.cached import Cached
from mfs.planning.prices import Price
from mfs.prefetch.pattern import WEIGHTS_BYTES_MAX
from mfs.registry.foresight import Foresight
from mfs.registry.manifest import Chunk
from mfs.registry.source import RegistrySource
from mfs.safetensors import LENGTH_BYTES, header_bytes_needed
from mfs.sources.base import Source
from mfs.tree.small_files import is_small, is_weights
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ByteRange, ObjectId
from mfs.units import format_size

Read = Literal["all", "headers", "first"]

DIRECTORIES_MAX = 10_000
FILES_MAX = 1_000_000
HEADERS_MAX = 512
"""Files whose header is looked for: eight bytes each. Those beyond are taken for one block."""
TABLES_MAX = 4096
"""Chunks whose tables are read where a revision has differences."""
AT_ONCE = 16
DEMAND_READ_BYTES = 1 << 20
"""What the kernel asks for at a time (FUSE's max_pages); until a file is streamed each may be a range of its own."""


@dataclass(frozen=True)
class Question:
    """What is to be estimated."""

    read: Read
    paths: Sequence[str] = ()
    """Files, or directories with all below them; none for the whole source."""
    processes: int = 2
    """Fetcher processes of the mount."""
    connections: int = 16
    keeps: bool = True
    """Whether there is to be an SSD tier."""
    link_bytes_s: float | None = None
    """Given, not measured."""
    latency_s: float | None = None
    price: Price | None = None


@dataclass
class Estimate:
    """See above. All in bytes and seconds."""

    source: str
    read: Read
    files_count: int = 0
    total_bytes: int = 0
    """Of what is to be read, as files show it; equal files count each."""
    cached_bytes: int = 0
    """Of that, on SSD already."""
    shared_bytes: int = 0
    """Of that, copied on this node from another file: equal files, and chunks that models share."""
    origin_bytes: int = 0
    """That cross the network."""
    requests: int = 0
    """Ranges, as expected; listings beside."""
    requests_most: int = 0
    """With everything that may come in smaller pieces, or to each process anew."""
    listing_requests: int = 0
    listing_s: float = 0.0
    latency_s: float = 0.0
    link_bytes_s: float = 0.0
    is_measured: bool = False
    """Whether the link was measured now, at least in part."""
    seconds: float = 0.0
    """Until the last byte is here, from the first look; the machine itself not counted."""
    egress_dollars: float | None = None
    price: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Wanted:
    obj: ObjectId
    mask_of: dict[int, int]
    """Chunk -> blocks."""

    @property
    def nbytes(self) -> int:
        return sum(mask_bytes(mask, len(self.obj.chunk_range(i))) for i, mask in self.mask_of.items())


def estimate(source: Source, question: Question, cached: Cached, *, deadline_s: float) -> Estimate:
    """Ask the origin what there is, and count. Raises: MfsError, NotFoundError for a path that is not there."""
    found = Estimate(source.identity, question.read)
    began = time.monotonic()
    with counting() as tally:
        objects = _objects(source, question.paths, deadline_s)
    found.listing_requests, found.listing_s = tally.requests_count, time.monotonic() - began
    wanted = list(_wanted(source, objects, question.read, deadline_s))
    found.files_count = len(wanted)
    found.total_bytes = sum(item.nbytes for item in wanted)
    missing = _missing(wanted, cached, found)
    if isinstance(source, RegistrySource):
        _registry(source, missing, question, cached, found, deadline_s)
    elif isinstance(source, OciSource):
        _plain(_oci(missing, question, found), question, found)
    else:
        _plain(missing, question, found)
    _time(source, objects, question, found, deadline_s)
    if question.price is not None:
        found.egress_dollars = question.price.of(found.origin_bytes)
        found.price = asdict(question.price)
    return found


def _objects(source: Source, paths: Sequence[str], deadline_s: float) -> list[ObjectId]:
    """All files at and below the paths, in the order of their names."""
    wanted = [path.strip("/") for path in paths]
    found: list[ObjectId] = []
    for folder, entry in probe.files(source, deadline_s=deadline_s, directories_max=DIRECTORIES_MAX, below=wanted):
        path = posixpath.join(folder, entry.name)
        if not wanted or any(path == one or path.startswith(f"{one}/") for one in wanted):
            found.append(entry.object_at(source.identity, folder))
        if len(found) > FILES_MAX:
            raise IntegrityError(f"{source.identity}: more than {FILES_MAX:,} files: name paths in it")
    for one in wanted:
        if not any(obj.path == one or obj.path.startswith(f"{one}/") for obj in found):
            raise NotFoundError(f"{source.identity}: no file at or below {one!r}")
    return sorted(found, key=lambda obj: obj.path)


def _wanted(source: Source, objects: Sequence[ObjectId], read: Read, deadline_s: float) -> Iterator[_Wanted]:
    whole = [obj for obj in objects if obj.size and (read == "all" or is_small(_name(obj), obj.size))]
    if read == "first":
        whole += [obj for obj in objects if obj.size and is_weights(_name(obj))][:1]
    taken = {obj.path for obj in whole}
    headed = [] if read == "all" else [o for o in objects if o.path.endswith(".safetensors") and o.path not in taken]
    for obj in whole:
        yield _Wanted(obj, {i: full_mask(len(obj.chunk_range(i))) for i in range(obj.chunks_count)})
    for obj, nbytes in zip(headed, _headers(source, headed, deadline_s), strict=True):
        yield _Wanted(obj, {0: block_mask(0, min(nbytes, obj.size, CHUNK_BYTES))})


def _headers(source: Source, objects: Sequence[ObjectId], deadline_s: float) -> list[int]:
    """How long each file's header is, as far as a mount brings it at open."""

    def ask(obj: ObjectId) -> int:
        out = memoryview(bytearray(LENGTH_BYTES))
        if obj.size <= LENGTH_BYTES:
            return obj.size
        source.get_range(obj, ByteRange(0, LENGTH_BYTES), out=out, deadline_s=deadline_s)
        try:
            needed = header_bytes_needed(out)
        except IntegrityError:  # a foreign file with this ending: its first block comes all the same
            return BLOCK_BYTES
        return needed if BLOCK_BYTES < needed <= CHUNK_BYTES else BLOCK_BYTES

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="headers") as pool:
        asked = list(pool.map(ask, objects[:HEADERS_MAX]))
    return asked + [BLOCK_BYTES] * (len(objects) - len(asked))


def _missing(wanted: Sequence[_Wanted], cached: Cached, found: Estimate) -> list[_Wanted]:
    """What neither the cache has nor an equal file brings."""
    missing: list[_Wanted] = []
    coming: dict[str, dict[int, int]] = {}
    for item in wanted:
        masks, before = cached.masks(item.obj), coming.setdefault(item.obj.cache_id, {})
        left: dict[int, int] = {}
        for index, mask in item.mask_of.items():
            length = len(item.obj.chunk_range(index))
            here, twice = mask & masks[index], mask & ~masks[index] & before.get(index, 0)
            found.cached_bytes += mask_bytes(here, length)
            found.shared_bytes += mask_bytes(twice, length)
            if rest := mask & ~here & ~twice:
                left[index] = rest
                before[index] = before.get(index, 0) | rest
        if left:
            missing.append(_Wanted(item.obj, left))
    return missing


def _spans(item: _Wanted) -> Iterator[ByteRange]:
    """The ranges that the cache asks for."""
    for index, mask in item.mask_of.items():
        length, base = len(item.obj.chunk_range(index)), index * CHUNK_BYTES
        for first, end in mask_runs(mask):
            start, stop = run_bytes(first, end, length)
            yield ByteRange(base + start, base + stop)


def _plain(missing: Sequence[_Wanted], question: Question, found: Estimate) -> None:
    """One request for each range, of just its bytes."""
    for item in missing:
        spans = list(_spans(item))
        found.origin_bytes += sum(map(len, spans))
        found.requests += len(spans)
        found.requests_most += len(spans) + _demand(item)


def _demand(item: _Wanted) -> int:
    """Ranges more that a reader may cause before the file is streamed: its header, then what the kernel asks for."""
    nbytes = item.nbytes
    header = 2 if item.obj.path.endswith(".safetensors") else 0
    return header if nbytes <= BLOCK_BYTES else header + min(nbytes, WEIGHTS_BYTES_MAX) // DEMAND_READ_BYTES + 1


def _registry(
    source: RegistrySource, missing: Sequence[_Wanted], question: Question, cached: Cached, found: Estimate,
    deadline_s: float,
) -> None:  # fmt: skip
    below = _Below(source, found, deadline_s)
    foresight = Foresight(
        question.processes, lambda chunk: cached.has_chunk(chunk.id, chunk.plain_bytes), below.of, keeps=question.keeps
    )
    for item in missing:
        revision, file, _ = source.find(item.obj, deadline_s=deadline_s)
        spans = list(_spans(item))
        if revision.has_differences:
            below.learn([part.chunk for span in spans for part in revision.parts(file, span)])
        for span in spans:
            foresight.add(revision, file, span)
        foresight.sum.requests_most += 2 * _demand(item)
    found.origin_bytes += round(foresight.sum.origin_bytes)
    found.shared_bytes += foresight.sum.shared_bytes
    if foresight.sum.twice_bytes:
        found.notes.append(
            f"files share {format_size(foresight.sum.twice_bytes)}: counted once, and sent once more where they are "
            f"read at the same time"
        )
    # Every process but the one that listed looks for the registry and reads its manifests.
    again = (question.processes - 1) * max(3, found.listing_requests)
    found.requests += round(foresight.sum.requests)
    found.requests_most += foresight.sum.requests_most + again
    if foresight.sum.origin_bytes and below.is_partial:
        found.notes.append(
            f"of {TABLES_MAX} chunks it was looked at what they stand on; the others may need more bytes"
        )


class _Below:
    """Which chunks others stand on, as far as their tables were read."""

    def __init__(self, source: RegistrySource, found: Estimate, deadline_s: float) -> None:
        self._source, self._found, self._deadline_s = source, found, deadline_s
        self._known: dict[str, Sequence[Chunk]] = {}
        self.is_partial = False

    def learn(self, chunks: Sequence[Chunk]) -> None:
        """Read the tables of chunks. Raises: MfsError."""
        new = list({chunk.id: chunk for chunk in chunks if chunk.id not in self._known}.values())
        room = TABLES_MAX - len(self._known)
        self.is_partial = self.is_partial or len(new) > room
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="tables") as pool:
            found = pool.map(lambda chunk: self._source.stands_on(chunk, deadline_s=self._deadline_s), new[:room])
            self._known |= {chunk.id: below for chunk, below in zip(new[:room], found, strict=True)}

    def of(self, chunk: Chunk) -> Sequence[Chunk]:
        return self._known.get(chunk.id, ())


def _oci(missing: Sequence[_Wanted], question: Question, found: Estimate) -> list[_Wanted]:
    """Take what stands in packed layers out: they come whole, once. What is left is read by range."""
    plain: list[_Wanted] = []
    layers: dict[str, int] = {}
    blobs: set[str] = set()
    for item in missing:
        place = parse_locator(item.obj.locator)
        if place.packing in (Packing.GZIP, Packing.ZSTD):
            layers[place.layer] = place.layer_bytes
        else:
            plain.append(item)
            blobs.add(place.layer)
    if layers:
        found.notes.append(
            "layers that are packed were fetched whole to list what is in them, and are kept in the cache: they cost "
            "nothing any more"
            if question.keeps
            else "layers that are packed are fetched whole to list what is in them"
        )
        if not question.keeps:
            found.origin_bytes += sum(layers.values())
            requests = sum(-(-nbytes // PIECE_BYTES) for nbytes in layers.values())
            found.requests += requests
            found.requests_most += question.processes * requests
    found.requests_most += 2 * question.processes * len(blobs)  # redirects, and being let in
    return plain


def _time(source: Source, objects: Sequence[ObjectId], question: Question, found: Estimate, deadline_s: float) -> None:
    """Latency hides behind other requests as far as there are connections; bandwidth is shared by all."""
    largest = max(objects, key=lambda obj: obj.size, default=None)
    latency_s, link = question.latency_s, question.link_bytes_s
    if (latency_s is None or link is None) and largest is not None and largest.size:
        found.is_measured = True
        if link is None:
            measured = probe.measure(source, largest, connections=question.connections, deadline_s=deadline_s)
            latency_s = measured.latency_s if latency_s is None else latency_s
            link = measured.bytes_s
        else:
            latency_s = probe.latency(source, largest, deadline_s=deadline_s)
    found.latency_s, found.link_bytes_s = latency_s or 0.0, link or 0.0
    moving_s = found.origin_bytes / found.link_bytes_s if found.link_bytes_s else 0.0
    lanes = max(1, min(question.connections, found.requests))
    waiting_s = found.latency_s * -(-found.requests // lanes)
    first_s = found.latency_s if found.requests else 0.0
    found.seconds = found.listing_s + max(moving_s + first_s, waiting_s)


def _name(obj: ObjectId) -> bytes:
    return posixpath.basename(obj.path).encode("utf-8", "surrogatepass")
