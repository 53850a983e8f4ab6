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
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = ["tests/gpuload/device", "tests/gpuload/server", "tests/gpuload/test_load.py", "tests/gpuload/test_pipeline.py"]
TESTS_TIMEOUT_S = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", default="16GiB")
    parser.add_argument("--dir", default="/dev/shm" if os.path.isdir("/dev/shm") else "/tmp")
    parser.add_argument("--out", default="")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args()

    from gpuload.bench import run_bench
    from gpuload.cli import parse_bytes

    results: dict[str, Any] = {"when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": describe()}
    results["tests"] = "skipped" if args.skip_tests else run_tests()
    results["bench"] = run_bench(args.device, parse_bytes(args.size), args.dir)
    results["others"] = others(args.device, min(parse_bytes(args.size), 16 << 30), args.dir)
    out = Path(args.out or f"tools/bench/results/gpuload-{platform.node()}-{args.device.replace(':', '')}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    print(f"written to {out}", file=sys.stderr)
    failed = isinstance(results["tests"], dict) and results["tests"]["status"] != 0
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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TESTS_TIMEOUT_S)
    return {"status": done.returncode, "end": done.stdout.strip().splitlines()[-15:]}


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
                seconds = min(_timed(way) for _ in range(3))
                rows[name] = {"seconds": seconds, "gb_s": (count << 24) / seconds / 1e9}
            except Exception as error:  # a foreign loader may fail in any way: say how, and go on
                rows[name] = f"not measured: {type(error).__name__}: {error}"
    return rows


def _timed(way: Callable[[], object]) -> float:
    began = time.monotonic()
    kept = way()
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
