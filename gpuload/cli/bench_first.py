"""What a process pays once: its first load, and page-locking what a mount lends. Rows for `bench` and tools/bench.

A first load is measured in a fresh process, from after the imports (and, on CUDA, after the context is made: both cost
the same with any loader) until every byte is where it should be. All ways take turns within a round.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpuload.device import open_device
from gpuload.errors import DeviceError
from gpuload.moving.kept import PIECE_BYTES
from mfs import children
from mfs.control.borrowing import LentFile

ROUNDS = 5
TIMEOUT_S = 300.0

IN_PLACE = "page-lock memory mapped read-only, in pieces"

WAYS: Mapping[str, str] = {
    "gpuload load_file": "load = gpuload.load_file",
    "gpuload load_file, as a plain file": (
        "import gpuload.client.into_tensors, gpuload.moving.source\n"
        "gpuload.client.into_tensors.open_source = gpuload.moving.source.FileSource\n"
        "load = gpuload.load_file"
    ),
    "safetensors load_file, every byte touched": (
        "def load(path, device):\n"
        "    made = safetensors.torch.load_file(path, device=device)\n"
        "    return {n: t.clone() for n, t in made.items()} if device == 'cpu' else made"
    ),
}
_CHILD = """
import json, os, resource, sys, time, torch, safetensors.torch, gpuload, gpuload.client.load
path, device, drops = sys.argv[1:]
{way}
if device != "cpu":
    torch.empty(1, device=device)
if drops == "drop":
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
made = load(path, device)
if device != "cpu":
    torch.cuda.synchronize(device)
seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({{"seconds": seconds, "cpu_seconds": cpu, "bytes": sum(t.nbytes for t in made.values())}}))
"""


def first_loads(
    path: Path, device: str, *, drop_page_cache: bool = False, ways: Mapping[str, str] = WAYS, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """One row per way: what, seconds of each round in ascending order, the median, CPU seconds, GB/s; or why it failed.

    drop_page_cache: the kernel forgets the file before each load; on a mount its daemon does not.
    """
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            if name in failed:
                continue
            command = children.python("-c", _CHILD.format(way=way), os.path.abspath(path), device)
            command.append("drop" if drop_page_cache else "keep")
            try:
                taken[name].append(json.loads(_output_of(command)))
            except DeviceError as error:
                failed[name] = str(error)
    rows: list[dict[str, Any]] = []
    for name, runs in taken.items():
        if name in failed:
            rows.append({"what": f"fresh process: {name}", "failed": failed[name]})
            continue
        seconds = sorted(run["seconds"] for run in runs)
        median = seconds[len(seconds) // 2]
        cpu = sorted(run["cpu_seconds"] for run in runs)[len(runs) // 2]
        rows.append({
            "what": f"fresh process: {name}", "seconds": median, "all_seconds": seconds, "cpu_seconds": cpu,
            "gb_s": runs[0]["bytes"] / median / 1e9,
        })  # fmt: skip
    return rows


def _output_of(command: list[str]) -> str:
    """The last line that a fresh process says. Raises: DeviceError with the last line of its trouble."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=children.CWD, env=children.environment()
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"not done after {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise DeviceError(" ".join(done.stderr.strip().splitlines()[-1:]) or f"status {done.returncode}")
    return done.stdout.splitlines()[-1]


def in_place_rows(device: str, nbytes: int) -> list[dict[str, Any]]:
    """Page-locking memory of another's, mapped without the right to write, and copying out of it where it stands."""
    opened, fd = open_device(device), os.memfd_create("gpuload-bench")
    nbytes = max(PIECE_BYTES, nbytes // PIECE_BYTES * PIECE_BYTES)
    rows: list[dict[str, Any]] = []
    try:
        block = bytes(PIECE_BYTES)
        for _ in range(nbytes // PIECE_BYTES):
            os.write(fd, block)
        lent = LentFile(fd, nbytes)
        arena, copies = opened.create_arena(max(PIECE_BYTES, opened.granule_bytes)), opened.open_stream()
        pieces = [lent.address + at for at in range(0, nbytes, PIECE_BYTES)]
        try:
            began = time.monotonic()
            for piece in pieces:
                opened.register(piece, PIECE_BYTES)
            rows.append(_row(IN_PLACE, nbytes, time.monotonic() - began))
            best = float("inf")
            for _ in range(3):
                began = time.monotonic()
                for piece in pieces:
                    copies.copy_in(arena.address, piece, PIECE_BYTES)
                copies.record().wait(TIMEOUT_S)
                best = min(best, time.monotonic() - began)
            rows.append(_row("copy out of it in place", nbytes, best))
        finally:
            copies.close()
            for piece in pieces:
                if opened.reaches(piece, 1):
                    opened.unregister(piece)
            arena.close()
            lent.close()
    except DeviceError as error:
        rows.append({"what": IN_PLACE, "failed": f"refused: {error}"})
    finally:
        os.close(fd)
        opened.close()
    return rows


def _row(what: str, nbytes: int, seconds: float) -> dict[str, Any]:
    return {"what": what, "seconds": seconds, "gb_s": nbytes / max(seconds, 1e-9) / 1e9, "bytes": nbytes}
