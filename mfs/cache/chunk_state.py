"""What the conductor knows: of a chunk that has a slot, an order to fill it, an object in use, of what happened so far.

Only `chunk_cache` changes these, on the trio thread; others may look.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import trio

from mfs.cache.chunks import full_mask
from mfs.errors import MfsError
from mfs.types import ObjectId
from mfs.workers.frames import object_to_wire
from mfs.workers.pool import Job
from mfs.workers.shares import group_of_file


@dataclass
class CacheCounters:
    """What happened since the start; only ever grows."""

    ram_hit_bytes: int = 0
    ssd_hit_bytes: int = 0
    origin_bytes: int = 0
    origin_requests: int = 0
    origin_errors: int = 0
    saved_bytes: int = 0
    lost_bytes: int = 0
    """Given up unsaved, because readers needed the slot before the disk had taken it."""


class Fill:
    """One order to bring blocks into a chunk; `done` is set when they are there or `error` says why not."""

    __slots__ = ("attempts", "done", "error", "file_lost", "job", "mask")

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self.done = trio.Event()
        self.error: MfsError | None = None
        self.job: Job | None = None
        self.attempts = 0
        self.file_lost = False
        """Another fill found the chunk's SSD file bad and dropped it: what this one reads from there is not kept."""


class Chunk:
    """A chunk that has a slot."""

    __slots__ = (
        "changed_at", "coming", "delivered", "file_lost", "fills", "index", "keep", "leases", "length", "saved",
        "saving", "slot", "state", "sums", "unread", "valid",
    )  # fmt: skip

    def __init__(self, state: ObjectState, index: int, slot: int) -> None:
        self.state = state
        self.index = index
        self.slot = slot
        self.length = len(state.object.chunk_range(index))
        self.valid = 0
        """Blocks whose bytes may be handed out."""
        self.saved = 0
        """Blocks the SSD tier is known to hold."""
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
        self.saving: trio.Event | None = None
        self.changed_at = 0.0

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

    __slots__ = ("chunks", "group", "object", "source", "ssd_known", "ssd_masks", "users", "wire")

    def __init__(self, obj: ObjectId, source: int) -> None:
        self.object = obj
        self.source = source
        self.group = group_of_file(source, obj.path)
        """Whose share of the common bounds it uses."""
        self.chunks: dict[int, Chunk] = {}
        self.users = 0
        """Open handles and others that hold it."""
        self.wire = object_to_wire(obj)
        self.ssd_masks: array[int] = array("I")
        """By chunk: blocks the SSD tier very likely holds; empty if nothing is known. A hint: files decide."""
        self.ssd_known = trio.Event()
        """Set once that was asked."""

    def on_ssd(self, index: int) -> int:
        """Blocks of a chunk that SSD very likely has."""
        return self.ssd_masks[index] if self.ssd_masks else 0
