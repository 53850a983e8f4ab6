"""One load, repeated, on whatever cuda:0 (and the cards after it) is; what a row of `gpuload bench --modelled` runs in
its own process.

    client    as `load_file` does it: planned while it is moved, a ring that grows at first, nothing hashed
    server    as the server does it: its pieces, its ring, made before; every piece hashed while its copy is under way

The destination is addresses as `into_tensors` or `layout` would make them, not memory: the model moves no bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass

import trio

from gpuload.client import rings
from gpuload.client.into_tensors import batches_of
from gpuload.device import open_device
from gpuload.moving.pipeline import Limits, move_batches
from gpuload.moving.plan import Batch, Packing, Piece, Placement, Transfer, pack_pieces, plan_transfers
from gpuload.moving.shards import close_shards, open_shards
from gpuload.moving.slabs import SLAB_BYTES, plan_slabs
from gpuload.moving.source import FileSource
from gpuload.moving.staging import Ring
from gpuload.server.layout import plan_blocks

BASE = 1 << 40
GRANULE_BYTES = 8 << 20
HASH_GB_S = 4.3
"""As in the table of prices."""
READERS = {"client": 8, "server": 20}
"""Of a host, whatever this machine has."""


@dataclass(frozen=True)
class Rounds:
    """Seconds of the first load in this process, of the best later one, and that one's CPU; of all later ones."""

    first_s: float
    best_s: float
    cpu_s: float
    later_s: float


class Load:
    """Of one file to one card."""

    def __init__(self, path: str, card: str, way: str) -> None:
        self._card, self._way = card, way
        self._shards = open_shards([path])
        self._transfers = plan_transfers([shard.header for shard in self._shards], Placement(device=card))
        self._limits = Limits(readers_count=READERS[way], buffers_count=READERS[way] + 4)
        self._pieces: list[Piece] = []
        self._addresses: Sequence[int] = ()
        self._ring: Ring | None = None
        if way == "client":
            self._addresses = _in_slabs(self._transfers)
            return
        self._addresses, self._pieces = _in_blocks(self._transfers)
        self._ring = Ring(
            open_device(card), buffer_bytes=self._limits.buffer_bytes, count=self._limits.buffers_count
        )  # fmt: skip
        self._ring.grow()

    def batches(self) -> Sequence[Batch] | Packing:
        if self._way == "client":
            return batches_of(self._transfers, self._limits)[self._card]
        return pack_pieces(((0, piece) for piece in self._pieces), buffer_bytes=self._limits.buffer_bytes)

    def _runs_of(self, piece: Piece) -> list[tuple[int, int]]:
        return [(self._addresses[piece.transfer] + piece.offset, piece.nbytes)]

    def _check(self, piece: Piece, views: Sequence[memoryview]) -> None:
        time.sleep(1e-9 * piece.nbytes / HASH_GB_S)

    @contextmanager
    def _lent(self) -> Iterator[Ring]:
        if self._ring is not None:
            yield self._ring
            return
        with rings.lent(self._card, self._limits) as kept:
            yield kept.ring

    async def run(self) -> None:
        batches = self.batches()
        with self._lent() as ring, closing(open_device(self._card)) as device:
            await move_batches(
                batches,
                source=FileSource(self._shards),
                device=device,
                runs_of=self._runs_of,
                limits=self._limits,
                check=self._check if self._way == "server" else None,
                checks_later=True,
                lent=ring,
            )

    def close(self) -> None:
        close_shards(self._shards)


def _in_slabs(transfers: Sequence[Transfer]) -> list[int]:
    """Addresses as a client's tensors have them."""
    places, sizes = plan_slabs(transfers)
    addresses, at = [], BASE + len(sizes) * SLAB_BYTES
    for t, place in zip(transfers, places, strict=True):
        addresses.append(BASE + place.slab * SLAB_BYTES + place.offset if place else at)
        at += 0 if place else -(-t.nbytes // 512) * 512 + 512
    return addresses


def _in_blocks(transfers: Sequence[Transfer]) -> tuple[list[int], list[Piece]]:
    """Addresses as a server's blocks have them, and its pieces."""
    addresses, at = [BASE] * len(transfers), BASE
    pieces: list[Piece] = []
    for block in plan_blocks(transfers, GRANULE_BYTES):
        for index, offset in zip(block.transfers, block.offsets, strict=True):
            addresses[index] = at + offset
        pieces += [piece for _, piece in block.pieces]
        at += block.granules_count(GRANULE_BYTES) * GRANULE_BYTES
    return addresses, pieces


def measure(path: str, rounds: int, way: str, cards_count: int) -> Rounds:
    """Load a file to each card, all at once, `rounds` times and once before.

    Says that it is ready and waits for a line, so that several processes begin together.
    """
    with ExitStack() as held:
        loads = [held.enter_context(closing(Load(path, f"cuda:{i}", way))) for i in range(cards_count)]

        async def load_all() -> None:
            async with trio.open_nursery() as nursery:
                for load in loads:
                    nursery.start_soon(load.run)

        print("ready", flush=True)
        sys.stdin.readline()
        times: list[tuple[float, float]] = []
        for _ in range(rounds + 1):
            began, before = time.monotonic(), time.process_time()
            trio.run(load_all)
            times.append((time.monotonic() - began, time.process_time() - before))
    best, cpu = min(times[1:])
    return Rounds(times[0][0], best, cpu, sum(seconds for seconds, _ in times[1:]) / rounds)


if __name__ == "__main__":
    if "STANDIN_PRICES" not in os.environ:
        sys.exit("modelled_load: error: run it by `gpuload bench --modelled`, on tools/gpu/simulate")
    print(json.dumps(asdict(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))))
