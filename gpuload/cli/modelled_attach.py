"""One attach, repeated, to a model on the modelled device; what rows of `gpuload bench --modelled` run in a process."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass

from gpuload.client.arrays import attach_arrays, close_left
from gpuload.device import open_device


@dataclass(frozen=True)
class Attaches:
    """Seconds of the first attach, for which the server exports, of the best later one, and of the best detach."""

    first_s: float
    best_s: float
    detach_s: float


def measure(model: str, socket_path: str, rounds: int) -> Attaches:
    """Attach `rounds` times and once before. As in an engine, the card is in use already."""
    context = open_device("cuda:0")
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        began = time.monotonic()
        held = attach_arrays(model, socket_path=socket_path)
        there = time.monotonic()
        del held
        gc.collect(0)
        close_left()
        times.append((there - began, time.monotonic() - there))
    context.close()
    return Attaches(times[0][0], min(t for t, _ in times[1:]), min(t for _, t in times))


if __name__ == "__main__":
    if "STANDIN_PRICES" not in os.environ:
        sys.exit("modelled_attach: error: run it by `gpuload bench --modelled`, on tools/gpu/simulate")
    print(json.dumps(asdict(measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
