"""What is read: a bf16 safetensors model of a given size, and how a reading of it is made and checked."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.bench.processes import BenchError, run
from tools.bench.reader import digest

FILE_NAME = "model.safetensors"
_ROWS, _COLUMNS = 1024, 5120  # 10 MiB a tensor, as attention weights of a small model are
_PRETOUCH_COLD = 1.5  # of the data: page cache and the clone in hand
_PRETOUCH_WARM_BYTES = 128 << 20  # the clone in hand


class Reading(NamedTuple):
    """One pass over the model by one fresh process, its bytes found right."""

    bytes: int
    seconds: float
    header_s: float
    """From the open to the list of tensors."""
    reader_cpu_s: float

    @property
    def gb_s(self) -> float:
        return self.bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Model:
    """A model file on the local disk, and the hash of its tensors."""

    path: Path
    size_bytes: int
    digest: str


def make_model(path: Path, size_bytes: int, *, seed: int) -> Model:
    """Write about `size_bytes` of random bf16 tensors; some rows are shorter, so that offsets are odd ones."""
    import numpy
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    random, tensors = numpy.random.default_rng(seed), {}
    for number in range(max(1, round(size_bytes / (_ROWS * _COLUMNS * 2)))):
        bits = random.integers(0, 1 << 16, (_ROWS, _COLUMNS - 8 * (number % 3)), dtype=numpy.uint16)
        tensors[f"layers.{number:03d}.weight"] = torch.from_numpy(bits.view(numpy.int16)).view(torch.bfloat16)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path))
    with safe_open(str(path), framework="pt") as file:
        return Model(path, path.stat().st_size, digest(file))


def read(path: Path, model: Model, *, seed: int, check: bool = True, warm: bool = False) -> Reading:
    """Read the model at `path` in a fresh process. warm: its pages are cached already, so less memory is needed.

    Raises: BenchError if its bytes differ: correct before fast.
    """
    pretouch_bytes = _PRETOUCH_WARM_BYTES if warm else int(model.size_bytes * _PRETOUCH_COLD)
    argv: list[object] = [sys.executable, "-m", "tools.bench.reader", path, "--seed", seed]
    argv += ["--pretouch", pretouch_bytes, *([] if check else ["--no-digest"])]
    result = json.loads(run(argv, timeout_s=300))
    if check and result.pop("digest") != model.digest:
        raise BenchError(f"{path} does not hold the bytes of {model.path}: wrong tensors, so no figures")
    return Reading(**result)
