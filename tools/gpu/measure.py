"""What tools/gpu/run runs: the rows of `gpuload bench`, other loaders on the same file, tests. A machine may be lent
only once, and taken back at any time: each row is in the file as soon as it is measured, and all ends in time.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mfs.units import parse_size

TESTS = [
    "tests/gpuload/device", "tests/gpuload/server/test_server.py", "tests/gpuload/server/test_leases.py",
    "tests/gpuload/client/test_load.py", "tests/gpuload/moving/test_pipeline.py", "tests/gpuload/moving/test_moves.py",
]  # fmt: skip
"""What needs neither a mount nor a network; tests/gpuload/device holds everything that is for a GPU alone."""
BUDGET_S = 500.0
"""Of all of it. What is left over is the tests', and what has no time left is said not to have been run."""

ROW_S_MIN = 20.0
"""Left in any case to a step that begins; with less it does not."""


class Results:
    """One JSON file, whole at any instant."""

    def __init__(self, path: Path, until_s: float) -> None:
        """until_s: on the monotonic clock."""
        self._path, self._until_s = path, until_s
        self.found: dict[str, Any] = {"is_complete": False}
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        return self._until_s - time.monotonic()

    def put(self, name: str, value: object) -> None:
        """Say it, and keep it."""
        self.found[name] = value
        beside = self._path.with_name(f".{self._path.name}.new")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        beside.replace(self._path)

    def add(self, name: str, row: object) -> None:
        """One more row of a step."""
        print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)
        self.put(name, {"rows": [*self.found.get(name, {}).get("rows", []), row]})

    def step(self, name: str, work: Callable[[], Any]) -> bool:
        """Whether it was done. A step that fails, or has no time left, costs no other, and keeps its rows."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            if self.left_s < ROW_S_MIN:
                raise TimeoutError(f"not run: {max(self.left_s, 0):.0f} s are left")
            self.put(name, work())
        except (Exception, KeyboardInterrupt) as error:
            text = "".join(traceback.format_exception(error))[-3000:]
            self.put(name, {**self.found.get(name, {}), "failed": text})
            return False
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", type=parse_size, default="16G")
    parser.add_argument("--dir", default="/dev/shm" if os.path.isdir("/dev/shm") else "/tmp")
    parser.add_argument("--out", default="")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="all of it (default 500)")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()
    out = Path(args.out or f"tools/bench/results/gpuload-{platform.node()}-{args.device.replace(':', '')}.json")
    results = Results(out, time.monotonic() + args.budget)
    # What hangs in a driver hears no signal and no exception: the process ends, and the rows are there.
    faulthandler.dump_traceback_later(args.budget, exit=True)
    results.put("when", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    results.put("machine", describe())
    is_good = results.step("bench", lambda: bench(args.device, args.size, args.dir, results))
    is_good = is_good and not any("failed" in row for row in results.found["bench"]["rows"])
    results.step("others", lambda: others(args.device, min(args.size, 16 << 30), args.dir))
    if args.skip_tests:
        results.put("tests", "skipped")
    else:
        is_good = results.step("tests", lambda: run_tests(results.left_s - ROW_S_MIN / 2)) and is_good
        is_good = is_good and results.found["tests"]["status"] == 0
    results.put("is_complete", True)
    print(out.read_text())
    print(f"written to {out}", file=sys.stderr)
    sys.exit(0 if is_good else 1)


def bench(device: str, nbytes: int, folder: str, results: Results) -> dict[str, Any]:
    from gpuload.cli.bench import run_bench  # torch takes seconds; what is known of the machine is written by then

    return run_bench(device, nbytes, folder, lambda row: results.add("bench", row))


def describe() -> dict[str, Any]:
    """The machine, as far as it can be asked without a network."""
    import torch

    said: dict[str, Any] = {
        "node": platform.node(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    with open("/proc/meminfo") as file:
        said["memory"] = file.readline().split(":")[1].strip()
    with open("/proc/cpuinfo") as file:
        said["cpu"] = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max"]
    try:
        found = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
        said["gpus"] = found.stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        said["gpus"] = f"none: {error}"
    return said


def run_tests(timeout_s: float) -> dict[str, Any]:
    # Only the fixtures below tests/gpuload: those of tests/ want servers that such a machine does not have. Another
    # machine's libraries may warn of what is none of our business.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpuload"]
    command += ["-o", "filterwarnings=", *(test for test in TESTS if os.path.exists(test))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        tail = (error.stdout or b"").decode(errors="replace").splitlines()[-5:]
        return {"status": -1, "end": [f"not done after {timeout_s:.0f} s", *tail]}
    return {"status": done.returncode, "end": done.stdout.strip().splitlines()[-40:]}


def others(device: str, nbytes: int, folder: str) -> dict[str, Any]:
    """Seconds of each other loader for the same file, best of three, or why it was not measured."""
    import torch
    from safetensors.torch import save_file

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = f"{scratch}/model.safetensors"
        count = max(1, nbytes >> 24)
        save_file({f"w{i}": torch.full((1 << 23,), i, dtype=torch.bfloat16) for i in range(count)}, path)
        ways: dict[str, Callable[[], object]] = {
            "fastsafetensors": lambda: _fastsafetensors(path, device),
            "instanttensor": lambda: _instanttensor(path, device),
            "runai_model_streamer": lambda: _runai(path, device),
        }
        for name, way in ways.items():
            try:
                importlib.import_module(name)
                taken = sorted(_timed(way, device) for _ in range(3))
                rows[name] = {"seconds": taken[0], "all_seconds": taken, "gb_s": (count << 24) / taken[0] / 1e9}
            except Exception as error:  # a foreign loader may fail in any way: say how, and go on
                rows[name] = f"not measured: {type(error).__name__}: {error}"
    return rows


def _timed(way: Callable[[], object], device: str) -> float:
    """Seconds until every byte is where it should be: a loader may return before its copies have ended."""
    import torch

    began = time.monotonic()
    kept = way()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    taken = time.monotonic() - began
    del kept
    return taken


def _fastsafetensors(path: str, device: str) -> object:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=[path], device=device, nogds=True) as f:
        return {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118


def _instanttensor(path: str, device: str) -> object:
    import instanttensor

    with instanttensor.safe_open([path], framework="pt", device=device) as f:
        return dict(f.tensors())


def _runai(path: str, device: str) -> object:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        return {name: tensor.to(device, copy=True) for name, tensor in streamer.get_tensors()}


if __name__ == "__main__":
    main()
