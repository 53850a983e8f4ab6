"""What tools/gpu/run runs: tests, the rows of `gpuload bench`, other loaders on the same file; writes one JSON file."""

from __future__ import annotations

import argparse
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
TESTS_TIMEOUT_S = 420


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", type=parse_size, default="16G")
    parser.add_argument("--dir", default="/dev/shm" if os.path.isdir("/dev/shm") else "/tmp")
    parser.add_argument("--out", default="")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()

    from gpuload.cli.bench import run_bench

    results: dict[str, Any] = {"when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": describe()}
    steps: dict[str, Callable[[], Any]] = {
        "tests": lambda: "skipped" if args.skip_tests else run_tests(),
        "bench": lambda: run_bench(args.device, args.size, args.dir),
        "others": lambda: others(args.device, min(args.size, 16 << 30), args.dir),
    }
    for name, step in steps.items():  # a step that fails must not cost the others: the machine may be lent only once
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results[name] = step()
        except Exception as error:
            results[name] = {"failed": "".join(traceback.format_exception(error))[-3000:]}
    out = Path(args.out or f"tools/bench/results/gpuload-{platform.node()}-{args.device.replace(':', '')}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    print(f"written to {out}", file=sys.stderr)
    failed = any("failed" in results[name] for name in steps)
    failed = failed or (isinstance(results["tests"], dict) and results["tests"].get("status") != 0)
    sys.exit(1 if failed else 0)


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


def run_tests() -> dict[str, Any]:
    # Only the fixtures below tests/gpuload: those of tests/ want servers that such a machine does not have. Another
    # machine's libraries may warn of what is none of our business.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpuload"]
    command += ["-o", "filterwarnings=", *(test for test in TESTS if os.path.exists(test))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TESTS_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        tail = (error.stdout or b"").decode(errors="replace").splitlines()[-5:]
        return {"status": -1, "end": [f"not done after {TESTS_TIMEOUT_S} s", *tail]}
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
