"""The benchmark behind `gpuload bench` and tools/gpu/run: the same rows on any device, beside the bare copy's speed.

Everything is measured in this run, on this machine, on one made-up model of 16 MiB tensors that lies in the page cache:
disks are not what it is about. Each row is the best of its rounds. 'of_ceiling' is a row's rate over the bare copy's.
A row that fails says why ('failed') and costs no other: the machine may be lent for this once.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file

from gpuload.cli.bench_first import IN_PLACE, first_loads, in_place_rows
from gpuload.client.asking import load_resident
from gpuload.client.attached import attach
from gpuload.client.load import load_file, stream
from gpuload.device import canonical_name, open_device
from gpuload.errors import DeviceError
from mfs import children
from mfs.errors import UsageError

TENSOR_BYTES = 16 << 20
ROUNDS = 3
IN_PLACE_BYTES_MAX = 4 << 30
"""Memory of another's that is page-locked for the row that says what it costs."""

DIFFERENT_PARTS = 10
"""One tensor of so many differs between the two fine-tunes."""


def run_bench(
    device: str, nbytes: int, folder: str, tell: Callable[[dict[str, Any]], object] = lambda row: None
) -> dict[str, Any]:
    """Measure all rows. Writes two models into `folder`, removes them.

    tell: called with each row as it is there; first come those that need no model.
    Raises: UsageError, DeviceError.
    """
    device = canonical_name(device)
    count = nbytes // TENSOR_BYTES
    if count < DIFFERENT_PARTS:
        raise UsageError(f"--size: at least {DIFFERENT_PARTS * TENSOR_BYTES} bytes, to have something to measure")
    nbytes = count * TENSOR_BYTES
    open_device(device).close()
    rows = _Rows(tell)
    ceiling = nbytes / _ceiling(device, nbytes)

    def add_all(found: Iterable[dict[str, Any]]) -> None:
        for row in found:
            rows.append(row | {"of_ceiling": row["gb_s"] * 1e9 / ceiling} if "gb_s" in row else row)

    def add(what: str, measured: Callable[[], float]) -> None:
        rows.attempt(what, lambda: add_all([{**_plain(what, seconds := measured()), "gb_s": nbytes / seconds / 1e9}]))

    add("bare copy from page-locked memory" if device != "cpu" else "bare memcpy, all cores", lambda: nbytes / ceiling)
    rows.attempt(IN_PLACE, lambda: add_all(in_place_rows(device, min(nbytes, IN_PLACE_BYTES_MAX))))
    with tempfile.TemporaryDirectory(dir=os.path.abspath(folder), prefix="gpuload-bench-") as scratch:
        one, two = _make_models(Path(scratch), count)
        add(
            "safetensors load_file, every byte touched", lambda: _best(lambda: _touch(reference_load_file(one, device)))
        )
        add("gpuload load_file", lambda: _best(lambda: load_file(one, device)))
        rows.attempt_plain("gpuload stream, first tensor", lambda: _best(lambda: next(iter(stream(one, device)))))
        add_all(first_loads(one, device, rounds=ROUNDS))
        rows.attempt("server", lambda: _server_rows(device, nbytes, one, two, Path(scratch), add, rows))
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, {_card(device)}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device,
        "bytes": nbytes,
        "ceiling_gb_s": ceiling / 1e9,
        "rows": list(rows),
    }


class _Rows(list[dict[str, Any]]):
    def __init__(self, tell: Callable[[dict[str, Any]], object]) -> None:
        super().__init__()
        self._tell = tell

    def append(self, row: dict[str, Any]) -> None:
        super().append(row)
        self._tell(row)

    def attempt(self, what: str, work: Callable[[], object]) -> None:
        """`work` adds rows; if it fails, in whatever way, a row says so."""
        try:
            work()
        except Exception as error:  # torch, safetensors and a driver may fail in any
            self.append({"what": what, "failed": f"{type(error).__name__}: {error}"})

    def attempt_plain(self, what: str, measured: Callable[[], float]) -> None:
        """A row of seconds alone."""
        self.attempt(what, lambda: self.append(_plain(what, measured())))


def _server_rows(
    device: str, nbytes: int, one: Path, two: Path, scratch: Path, add: Callable[..., None], rows: _Rows
) -> None:
    path = str(scratch / "s.sock")
    command = children.python("-m", "gpuload", "serve", "--socket", path, "--digests", str(scratch / "digests"))
    command += ["--arena", f"{device}={int(nbytes * 1.5) + (256 << 20)}"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=children.CWD, env=children.environment()
    ) as server:
        try:
            assert server.stderr is not None
            said = server.stderr.readline()
            if "serving" not in said:
                raise DeviceError(f"the benchmark's server did not start: {said.strip()}")
            reports: list[dict[str, Any]] = []

            def swapped(model: Path) -> float:
                reports.append(_report(model, device, path, is_swap=True))
                return float(reports[-1]["seconds"])

            add("server: first load", lambda: _report(one, device, path)["seconds"])
            rows.attempt_plain(
                "server: attach, in this process", lambda: _best(lambda: attach("bench", socket_path=path))
            )
            rows.attempt_plain("server: attach, in a fresh process", lambda: _fresh_attach(path))
            differs = f"server: swap, 1 of {DIFFERENT_PARTS} differs, digests"
            add(f"{differs} unknown", lambda: swapped(two))
            add(f"{differs} known", lambda: min([swapped(model) for model in (one, two, one, two)]))
            if reports:
                rows.append(_plain("server: bytes a swap copied", 0.0) | {"bytes": reports[0]["bytes_copied"]})
        finally:
            server.terminate()


def _report(model: Path, device: str, socket_path: str, *, is_swap: bool = False) -> dict[str, Any]:
    reply = load_resident(model, "bench", device, is_swap=is_swap, socket_path=socket_path)
    report: dict[str, Any] = reply["report"]
    return report


def _fresh_attach(socket_path: str) -> float:
    """From the first line after the imports: importing torch takes seconds, with or without us."""
    code = (
        "import sys, time, torch, gpuload.client.attached as c; began = time.monotonic();"
        "held = c.attach('bench', socket_path=sys.argv[1]); print(time.monotonic() - began)"
    )
    done = subprocess.run(
        children.python("-c", code, socket_path), capture_output=True, text=True, timeout=300,
        cwd=children.CWD, env=children.environment(),
    )  # fmt: skip
    if done.returncode:
        raise DeviceError(f"attaching in a fresh process failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout)


def _make_models(folder: Path, count: int) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(1)
    made = {f"layers.{i}.weight": torch.empty(TENSOR_BYTES // 8192, 4096, dtype=torch.bfloat16) for i in range(count)}
    for tensor in made.values():
        tensor.view(torch.int64).random_(generator=generator)
    save_file(made, folder / "one.safetensors")
    for i in range(0, count, DIFFERENT_PARTS):
        made[f"layers.{i}.weight"].view(torch.int64).add_(1)
    save_file(made, folder / "two.safetensors")
    for name in ("one", "two"):  # settled long enough for the digests to be remembered, and in the page cache
        with open(folder / f"{name}.safetensors", "rb") as file:
            os.fsync(file.fileno())
            while file.read(16 << 20):
                pass
    time.sleep(2.1)
    return folder / "one.safetensors", folder / "two.safetensors"


def _ceiling(device: str, nbytes: int) -> float:
    """Seconds for the bare copy of `nbytes`, nothing but the copy."""
    if device == "cpu":
        return _best(lambda: None, _memcpy_of(nbytes))
    opened = open_device(device)
    arena, staging, copies = opened.create_arena(256 << 20), opened.alloc_staging(256 << 20), opened.open_stream()

    def copy() -> None:
        for _ in range(max(1, nbytes // (256 << 20))):
            copies.copy_in(arena.address, staging.address, 256 << 20)
        copies.record().wait(120)

    seconds = _best(copy) * nbytes / (max(1, nbytes // (256 << 20)) * (256 << 20))
    copies.close()
    staging.close()
    arena.close()
    opened.close()
    return seconds


def _memcpy_of(nbytes: int) -> Callable[[], None]:
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    threads = os.cpu_count() or 1
    part = nbytes // threads

    def copy() -> None:
        workers = [
            threading.Thread(
                target=ctypes.memmove, args=(target.data_ptr() + i * part, source.data_ptr() + i * part, part)
            )
            for i in range(threads)
        ]
        for w in workers:
            w.start()
        for w in workers:
            w.join()

    return copy


def _best(work: Callable[[], Any], *more: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.monotonic()
        result = (more[0] if more else work)()
        best = min(best, time.monotonic() - began)
        del result
    return best


def _touch(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors on the CPU gives views of a mapped file: copy them, as whoever computes with them must read them."""
    return {n: t.clone() if t.device.type == "cpu" else t for n, t in tensors.items()}


def _plain(what: str, seconds: float) -> dict[str, Any]:
    return {"what": what, "seconds": seconds, "gb_s": 0.0, "of_ceiling": 0.0}


def _card(device: str) -> str:
    opened = open_device(device)
    name = getattr(opened, "model_name", lambda: platform.processor() or "CPU")()
    opened.close()
    return str(name)


if __name__ == "__main__":
    print(json.dumps(run_bench(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
