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

from gpuload.client.into_tensors import batches_of
from gpuload.device import open_device
from gpuload.moving.pipeline import Limits, move_batches
from gpuload.moving.plan import Piece, Placement, plan_transfers
from gpuload.moving.shards import close_shards, open_shards
from gpuload.moving.source import FileSource

LIMITS = {"buffers_count": 6, "readers_count": 8}
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
    limits = Limits(**LIMITS)
    addresses = [0] * len(transfers)
    at = 1 << 40
    for index, t in enumerate(transfers):
        addresses[index], at = at, at + -(-t.nbytes // 512) * 512 + 512

    def runs_of(piece: Piece) -> list[tuple[int, int]]:
        return [(addresses[piece.transfer] + piece.offset, piece.nbytes)]

    def check(piece: Piece, views: Sequence[memoryview]) -> None:
        time.sleep(1e-9 * piece.nbytes / HASH_GB_S)

    def load() -> None:
        batches = batches_of(transfers, limits)["cuda:0"]
        with closing(open_device("cuda:0")) as device:
            trio.run(
                lambda: move_batches(
                    batches, source=FileSource(shards), device=device, runs_of=runs_of, limits=limits,
                    check=check if is_hashed else None,
                )  # fmt: skip
            )

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
