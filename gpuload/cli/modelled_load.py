"""One load, repeated, on whatever device cuda:0 is; what a row of `gpuload bench --modelled` runs in its own process.

The destination is addresses as `into_tensors` would make them, not memory: the model moves no bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import trio

from gpuload.client import rings
from gpuload.client.into_tensors import batches_of
from gpuload.device import open_device
from gpuload.moving.pipeline import Limits, move_batches
from gpuload.moving.plan import Piece, Placement, plan_transfers
from gpuload.moving.shards import close_shards, open_shards
from gpuload.moving.slabs import SLAB_BYTES, plan_slabs
from gpuload.moving.source import FileSource

BASE = 1 << 40
HASH_GB_S = 4.3
"""As in the table of prices."""


@dataclass(frozen=True)
class Rounds:
    """Seconds of the first load in this process, of the best later one, and that one's CPU."""

    first_s: float
    best_s: float
    cpu_s: float


def measure(path: str, rounds: int, *, is_hashed: bool) -> Rounds:
    """Load a file `rounds` times and once before."""
    shards = open_shards([path])
    transfers = plan_transfers([shard.header for shard in shards], Placement(device="cuda:0"))
    readers = 20 if is_hashed else 8  # of a host, whatever this machine has
    limits = Limits(readers_count=readers, buffers_count=readers + 4)
    places, sizes = plan_slabs(transfers)
    bases = [BASE + i * SLAB_BYTES for i in range(len(sizes))]
    addresses, at = [], BASE + len(sizes) * SLAB_BYTES
    for t, place in zip(transfers, places, strict=True):
        addresses.append(bases[place.slab] + place.offset if place else at)
        at += 0 if place else -(-t.nbytes // 512) * 512 + 512

    def runs_of(piece: Piece) -> list[tuple[int, int]]:
        return [(addresses[piece.transfer] + piece.offset, piece.nbytes)]

    def check(piece: Piece, views: Sequence[memoryview]) -> None:
        time.sleep(1e-9 * piece.nbytes / HASH_GB_S)

    def load() -> None:
        batches = batches_of(transfers, limits)["cuda:0"]
        with rings.lent("cuda:0", limits) as kept, closing(open_device("cuda:0")) as device:
            check_all = check if is_hashed else None

            async def move() -> None:
                await move_batches(
                    batches,
                    source=FileSource(shards),
                    device=device,
                    runs_of=runs_of,
                    limits=limits,
                    check=check_all,
                    checks_later=True,
                    lent=kept.ring,
                )

            trio.run(move)

    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        began, before = time.monotonic(), time.process_time()
        load()
        times.append((time.monotonic() - began, time.process_time() - before))
    close_shards(shards)
    best, cpu = min(times[1:])
    return Rounds(times[0][0], best, cpu)


if __name__ == "__main__":
    if "STANDIN_PRICES" not in os.environ:
        sys.exit("modelled_load: error: run it by `gpuload bench --modelled`, on tools/gpu/simulate")
    print(json.dumps(asdict(measure(sys.argv[1], int(sys.argv[2]), is_hashed=sys.argv[3] == "hashed"))))
