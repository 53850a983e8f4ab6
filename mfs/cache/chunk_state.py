"""What the conductor knows: of a chunk that has a slot, an order to fill it, an object in use, of what happened so far.

Only `chunk_cache` changes these, on the trio thread; others may look.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

import trio

from mfs.cache.chunks import full_mask
from mfs.cache.pieces import Piece
from mfs.cache.ram import Place, RamFile
from mfs.errors import MfsError
from mfs.types import CHUNK_BYTES, ObjectId
from mfs.waits import Cause
from mfs.workers.frames import object_to_wire
from mfs.workers.job import Job
from mfs.workers.shares import group_of_file

_FULL_MASK = full_mask(CHUNK_BYTES)


@dataclass
class CacheCounters:
    """What happened since the start; only ever grows."""

    ram_hit_bytes: int = 0
    ram_hits: int = 0
    """Reads that RAM answered, and of those that cross chunks each part."""
    ram_misses: int = 0
    """Likewise those that had to wait for a chunk."""
    ram_evictions: int = 0
    """Chunks with bytes that lost their slot."""
    ram_evicted_bytes: int = 0
    ssd_hit_bytes: int = 0
    ssd_hits: int = 0
    """Fills of which SSD had something."""
    ssd_misses: int = 0
    """Fills of which SSD lacked something."""
    ssd_evictions: int = 0
    """Chunks that its budget dropped."""
    ssd_evicted_bytes: int = 0
    brought_bytes: int = 0
    """That fills brought which SSD did not have, as readers get them: `origin_bytes` and `shared_bytes` are what it
    took."""
    ahead_bytes: int = 0
    """Brought to RAM ahead of need."""
    wasted_bytes: int = 0
    """Of these, dropped before anybody had come for them."""
    origin_bytes: int = 0
    """That came over the network: of a registry that compresses, fewer than they stand for."""
    shared_bytes: int = 0
    """Copied from other files that the SSD tier has."""
    origin_requests: int = 0
    origin_errors: int = 0
    saved_bytes: int = 0
    lost_bytes: int = 0
    """Given up unsaved, because readers needed the slot before the disk had taken it."""


class Reply(NamedTuple):
    """What a reader is answered once the bytes are there."""

    head: bytes
    """Goes before them."""
    start: int
    """In the chunk."""
    stop: int


class Fill:
    """One order to bring blocks into a chunk; `done` is set when they are there or `error` says why not."""

    __slots__ = ("attempts", "came", "cause", "decode_s", "done", "error", "file_lost", "job", "mask", "replies")

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self.done = trio.Event()
        self.error: MfsError | None = None
        self.job: Job | None = None
        self.attempts = 0
        self.came = False
        """Some blocks have come before the rest; they are not in `mask` any more."""
        self.cause = Cause.ORIGIN
        """What those wait for who wait for it."""
        self.decode_s = 0.0
        """Of the time that it took, what went into unpacking and verifying."""
        self.file_lost = False
        """Another fill found the chunk's SSD file bad and dropped it: what this one reads from there is not kept."""
        self.replies: dict[bytes, tuple[int, int]] = {}
        """Readers whom the worker answers by itself: the parts of the chunk, by the reply's head."""

    def wake(self) -> None:
        """Some blocks count already while the rest is on its way: who waits looks whether they are his."""
        done, self.done = self.done, trio.Event()
        done.set()


class Chunk:
    """A chunk that has a slot."""

    __slots__ = (
        "changed_at", "coming", "delivered", "file_lost", "fills", "index", "is_clean", "keep", "leases", "left",
        "length", "looks", "place", "saved", "saving", "state", "sums", "unread", "valid", "written",
    )  # fmt: skip

    def __init__(self, state: ObjectState, index: int, place: Place) -> None:
        self.state = state
        self.index = index
        self.place = place
        """Where its slot is."""
        self.is_clean = True
        """No worker that was given up may still write there."""
        self.left: list[tuple[Place, bool]] = []
        """Where it stood before, while a worker reads there; and whether that is clean."""
        self.length = len(state.object.chunk_range(index))
        self.valid = 0
        """Blocks whose bytes may be handed out."""
        self.saved = 0
        """Blocks the SSD tier is known to hold."""
        self.written = 0
        """Blocks it was given since somebody began to wait for that: an eviction may be as quick as the write."""
        self.delivered = 0
        """Blocks handed to a reader; then the kernel's page cache has them."""
        self.unread = False
        """Brought ahead of need, and nobody came yet."""
        self.keep = False
        """Asked into RAM by a person: not the first to go once delivered."""
        self.file_lost = False
        """Its SSD file turned out bad and was dropped since the last save began."""
        self.sums: dict[int, int] = {}
        self.fills: list[Fill] = []
        self.coming = False
        """Something of it is asked of the origin: it counts against its model's share of the slots."""
        self.leases = 0
        self.looks = 0
        """Workers that read it now, beside the one that saves it."""
        self.saving: trio.Event | None = None
        self.changed_at = 0.0

    @property
    def start(self) -> int:
        """Where it begins in its object."""
        return self.index * CHUNK_BYTES

    @property
    def is_own(self) -> bool:
        """Whether it stands in its object's own file."""
        return self.place.file is self.state.ram

    @property
    def piece(self) -> Piece:
        """What a worker needs to read or fill it."""
        return Piece(self.place.file.fd, self.place.start, self.length, self.place.file.stays)

    def view(self, start: int, stop: int) -> memoryview:
        """Its bytes [start, stop); only its valid blocks mean anything."""
        return self.place.file.view(self.place.start + start, self.place.start + stop)

    @property
    def complete(self) -> bool:
        return self.valid == full_mask(self.length)

    @property
    def on_ssd(self) -> int:
        """Blocks that SSD very likely has."""
        return self.state.on_ssd(self.index)

    def note_ssd(self, mask: int) -> None:
        """SSD very likely has these blocks and no others."""
        if self.state.ssd_masks:
            self.state.ssd_masks[self.index] = mask

    @property
    def idle(self) -> bool:
        return not self.leases and not self.fills and self.saving is None


class ObjectState:
    """An object version somebody uses: its chunks in RAM and its place among the sources."""

    __slots__ = (
        "chunks", "group", "object", "ram", "source", "ssd_known", "ssd_masks", "taken", "users", "whole", "wire",
    )  # fmt: skip

    def __init__(self, obj: ObjectId, source: int) -> None:
        self.object = obj
        self.source = source
        self.group = group_of_file(source, obj.path)
        """Whose share of the common bounds it uses."""
        self.chunks: dict[int, Chunk] = {}
        self.taken: set[int] = set()
        """Chunks that lost their slot after all of them was handed out: the kernel has them, for all we know."""
        self.ram: RamFile | None = None
        """Its own file, while a chunk has a slot there or somebody holds it; `slots` opens and closes it."""
        self.users = 0
        """Open handles and others that hold it."""
        self.wire = object_to_wire(obj)
        self.ssd_masks: array[int] = array("I")
        """By chunk: blocks the SSD tier very likely holds; empty if nothing is known. A hint: files decide."""
        self.ssd_known = trio.Event()
        """Set once that was asked."""
        self.whole = False
        """The SSD tier very likely has all of it, verified, in a file that is the object. A hint as well."""

    @property
    def complete_in_ram(self) -> bool:
        """Whether the object's own file in RAM has all blocks."""
        is_there = self.ram is not None and self.ram.slots_count == self.object.chunks_count
        return is_there and all(chunk.complete for chunk in self.chunks.values())

    @property
    def given_whole(self) -> list[int]:
        """Chunks that readers have got all of through us: the kernel has them, for all we know."""
        return sorted(self.taken.union(c.index for c in self.chunks.values() if c.delivered == full_mask(c.length)))

    def on_ssd(self, index: int) -> int:
        """Blocks of a chunk that SSD very likely has."""
        return self.ssd_masks[index] if self.ssd_masks else 0

    @property
    def complete_on_ssd(self) -> bool:
        """Whether the SSD tier very likely has all blocks."""
        obj, masks = self.object, self.ssd_masks
        if not masks:
            return False
        last = obj.chunks_count - 1
        return masks[last] == full_mask(len(obj.chunk_range(last))) and masks.count(_FULL_MASK) >= last
