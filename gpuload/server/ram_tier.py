"""The page-locked RAM tier: blocks that left an arena, by content, where a device copies from at link speed.

Memory is page-locked once, in slabs, after the server began to serve, and kept until it ends: the tier is what has been
locked so far. A block takes slots anywhere in it. Everything here is a cache: a block that finds no room is dropped,
one that is not there is read from its files. Fit counts nothing of it: what stands here may go at any time, first what
an arena has as well, then what was used longest ago.

On the loop, but for `lock_more` and what is said otherwise.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import trio

from gpuload.device.base import Device, Run, Staging, total_granules
from gpuload.device.nodes import on_node
from gpuload.errors import DeviceError, DeviceLostError
from gpuload.server.digest_files import Digest
from gpuload.server.granules import RunSet
from gpuload.server.piece_index import PieceIndex

log = logging.getLogger("gpuload.server")

SLAB_BYTES = 64 << 20
"""Page-locked in one call: some 6 ms by NVIDIA/cudf#23457, and as much again to touch it."""

SLOT_BYTES = 1 << 20
"""What a block's last bytes may waste."""


@dataclass(eq=False)
class Kept:
    """One block in RAM."""

    digest: Digest
    nbytes: int
    pieces: Sequence[tuple[int, int, Digest]]
    """(offset, nbytes, digest), in order."""
    slots: list[Run]
    is_complete: bool = False
    holds: int = 0
    """Loads that copy from it: it stays meanwhile."""


@dataclass
class Totals:
    """In bytes, since the server began."""

    saved: int = 0
    dropped: int = 0
    """Left an arena and found no room here, or could not be copied."""
    returned: int = 0


class RamTier:
    """Blocks in page-locked memory of at most `nbytes`."""

    def __init__(self, nbytes: int, device: Device) -> None:
        """device: one of those that reach it, which makes the memory, on its own node."""
        self.slab_bytes = min(SLAB_BYTES, nbytes)
        self.slot_bytes = min(SLOT_BYTES, self.slab_bytes)
        self._per_slab = self.slab_bytes // self.slot_bytes
        self.slabs_count = nbytes // self.slab_bytes
        self._device = device
        self.is_resident: Callable[[Digest], bool] = lambda digest: False
        """Whether some arena has that block."""
        self._slabs: list[Staging] = []
        self._free = RunSet(self.slabs_count * self._per_slab)
        self._kept: OrderedDict[Digest, Kept] = OrderedDict()
        """By last use, oldest first."""
        self._pieces: PieceIndex[Kept] = PieceIndex()
        self.totals = Totals()

    @property
    def nbytes(self) -> int:
        """What it may have."""
        return self.slabs_count * self.slab_bytes

    @property
    def locked_bytes(self) -> int:
        return len(self._slabs) * self.slab_bytes

    @property
    def used_bytes(self) -> int:
        return self.locked_bytes - self._free.members_count * self.slot_bytes

    @property
    def blocks_count(self) -> int:
        return len(self._kept)

    async def lock_all(self) -> None:
        """Page-lock slab by slab; what is refused is done without."""
        while len(self._slabs) < self.slabs_count:
            try:
                slab = await trio.to_thread.run_sync(self._lock_one)
            except DeviceLostError:
                raise
            except (DeviceError, OSError) as error:
                log.warning("the RAM tier has %d of %d bytes: %s", self.locked_bytes, self.nbytes, error)
                return
            self._free.put([(len(self._slabs) * self._per_slab, self._per_slab)])
            self._slabs.append(slab)

    def _lock_one(self) -> Staging:
        with on_node(self._device.node):  # this thread touches it
            return self._device.alloc_staging(self.slab_bytes)

    def find(self, digest: Digest) -> Kept | None:
        """The block, complete."""
        kept = self._kept.get(digest)
        return kept if kept is not None and kept.is_complete else None

    def find_piece(self, digest: Digest) -> tuple[Kept, int] | None:
        """Some complete block that has these bytes, and at which offset."""
        return self._pieces.find(digest)

    def hold(self, kept: Kept) -> None:
        """It stays until `let_go`, and is the last used."""
        kept.holds += 1
        self._kept.move_to_end(kept.digest)

    def let_go(self, kept: Kept) -> None:
        kept.holds -= 1

    def admit(self, digest: Digest, nbytes: int, pieces: Sequence[tuple[int, int, Digest]]) -> Kept | None:
        """A place for a block that is about to be copied here (`complete` or `drop` ends that); None if it is here
        already, or there is no room for it.
        """
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return None
        wanted = -(-nbytes // self.slot_bytes)
        going, room = [], self._free.members_count
        leaving = self._leaving()
        while room < wanted and (kept := next(leaving, None)) is not None:
            going.append(kept)
            room += total_granules(kept.slots)
        if room < wanted:
            self.totals.dropped += nbytes
            return None
        for kept in going:
            self.drop(kept)
        made = self._kept[digest] = Kept(digest, nbytes, pieces, self._free.take(wanted))
        return made

    def _leaving(self) -> Iterator[Kept]:
        """What may go: first what an arena has too, then the rest; oldest first. As far as somebody asks."""
        for is_elsewhere in (True, False):
            for kept in self._kept.values():
                if kept.is_complete and not kept.holds and self.is_resident(kept.digest) is is_elsewhere:
                    yield kept

    def complete(self, kept: Kept) -> None:
        """Its bytes are here: let loads find them."""
        kept.is_complete = True
        self._pieces.add(kept, kept.pieces)
        self.totals.saved += kept.nbytes

    def drop(self, kept: Kept) -> None:
        """Nobody copies from or to it."""
        if not kept.is_complete:
            self.totals.dropped += kept.nbytes
        self._pieces.remove(kept, kept.pieces)
        del self._kept[kept.digest]
        self._free.put(kept.slots)

    def runs(self, kept: Kept, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Where bytes [offset, offset + nbytes) of a block stand: (address, nbytes), in order; none crosses two slabs,
        which are page-locked each by itself. From any thread, while it is held or being filled.
        """
        found = []
        for first, count in kept.slots:
            size = count * self.slot_bytes
            if offset >= size:
                offset -= size
                continue
            while nbytes and offset < size:
                slot, into = divmod(first * self.slot_bytes + offset, self.slab_bytes)
                n = min(nbytes, size - offset, self.slab_bytes - into)
                found.append((self._slabs[slot].address + into, n))
                offset, nbytes = offset + n, nbytes - n
            offset = 0
        return found

    def described(self) -> dict[str, int | None]:
        """For `status`."""
        return {
            "node": self._device.node, "bytes": self.nbytes,
            "locked_bytes": self.locked_bytes, "used_bytes": self.used_bytes,
            "blocks": self.blocks_count, "saved_bytes": self.totals.saved, "returned_bytes": self.totals.returned,
            "dropped_bytes": self.totals.dropped,
        }  # fmt: skip

    def gauges(self) -> dict[str, int]:
        """What must be zero when nothing was kept, and what must be when no load is at work."""
        return {"blocks": len(self._kept), "pieces": len(self._pieces), "used_bytes": self.used_bytes,
                "holds": sum(kept.holds for kept in self._kept.values())}  # fmt: skip

    def close(self) -> None:
        """Give all memory back; no device copies any more."""
        while self._slabs:
            self._slabs.pop().close()
