"""One device of the server: its arena, what the arena holds, its page-locked ring, and whose turn it is."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from gpuload.device.base import Arena, Device
from gpuload.moving.staging import Ring
from gpuload.server.catalog import Block, Catalog

InsideCopy = tuple[Block, int, Block, int, int]
"""(to, offset in it, from, offset in it, nbytes), both blocks in one arena."""


@dataclass(eq=False)
class Site:
    """Everything that is there once per device."""

    name: str
    """As requests name it: 'cpu', 'cuda:0'."""
    device: Device
    arena: Arena
    catalog: Catalog
    ring: Ring
    """Page-locked once, for all loads: one at a time uses it."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells clients whether granules of two answers are of one arena: then equal numbers are equal memory."""
    turn: trio.Lock = field(default_factory=trio.Lock)
    """Held by the load that may change what stands here."""

    @property
    def waiting_count(self) -> int:
        """Loads at work or waiting."""
        statistics = self.turn.statistics()
        return int(statistics.locked) + statistics.tasks_waiting

    def runs(self, block: Block, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Where bytes [offset, offset + nbytes) of a block stand: (address, nbytes), in order."""
        unit, found = self.arena.granule_bytes, []
        for first, count in block.runs:
            size = count * unit
            if offset < size and nbytes:
                n = min(nbytes, size - offset)
                found.append((self.arena.address + first * unit + offset, n))
                offset, nbytes = 0, nbytes - n
            else:
                offset -= size
        return found

    def copy_inside(self, copies: Sequence[InsideCopy], timeout_s: float) -> None:
        """Copy from block to block, and wait for it. Blocks; holds on all blocks are the caller's.

        Raises: DeviceError, BusyError.
        """
        stream = self.device.open_stream()
        try:
            for to, to_offset, source, source_offset, nbytes in copies:
                done = 0
                for dst, room in self.runs(to, to_offset, nbytes):
                    for src, n in self.runs(source, source_offset + done, room):
                        stream.copy_within(dst, src, n)
                        dst += n
                    done += room
            stream.record().wait(timeout_s)
        finally:
            stream.close()
