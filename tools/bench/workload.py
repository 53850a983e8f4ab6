"""What is read (a bf16 safetensors model of four shards; folders of empty files), and how it is read and checked.

A tree, wherever it stands, holds `model/` and `storm/`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.bench.processes import BenchError, run
from tools.bench.reader import STORM, Figure, digest, tensor_bytes

MODEL = "model"
SHARDS_COUNT = 4
SHARD_NAMES = tuple(f"model-{n:05d}-of-{SHARDS_COUNT:05d}.safetensors" for n in range(1, SHARDS_COUNT + 1))
_STORM_FOLDERS, _STORM_FILES = 10, 100
_ROWS, _COLUMNS = 1024, 5120  # 10 MiB a tensor, as attention weights of a small model are
_PRETOUCH_COLD = 1.5  # of the data: page cache and the clone in hand
_PRETOUCH_WARM_BYTES = 128 << 20  # the clone in hand


class Reading(NamedTuple):
    """One pass of a pattern by one fresh process, its bytes found right."""

    bytes: int
    """0 where a pattern reads none."""
    reader_cpu_s: float
    figures: tuple[Figure, ...]

    @property
    def gb_s(self) -> float:
        """Of a pattern with one rate."""
        return self.figures[0][1]


@dataclass(frozen=True)
class Model:
    """A model on the local disk, and the hash of its tensors."""

    folder: Path
    size_bytes: int
    digest: str

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in SHARD_NAMES]


def make_model(folder: Path, size_bytes: int, *, seed: int) -> Model:
    """Write about `size_bytes` of random bf16 tensors; some rows are shorter, so that offsets are odd ones."""
    import numpy
    import torch
    from safetensors.torch import save_file

    random, shards = numpy.random.default_rng(seed), [{} for _ in SHARD_NAMES]  # type: ignore[var-annotated]
    count = max(SHARDS_COUNT, round(size_bytes / (_ROWS * _COLUMNS * 2)))
    for number in range(count):
        bits = random.integers(0, 1 << 16, (_ROWS, _COLUMNS - 8 * (number % 3)), dtype=numpy.uint16)
        tensor = torch.from_numpy(bits.view(numpy.int16)).view(torch.bfloat16)
        shards[number * SHARDS_COUNT // count][f"layers.{number:03d}.weight"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in zip(SHARD_NAMES, shards, strict=True):
        save_file(tensors, str(folder / name))
    files = [folder / name for name in SHARD_NAMES]
    fds = [os.open(path, os.O_RDONLY) for path in files]
    try:
        return Model(folder, sum(path.stat().st_size for path in files), digest(tensor_bytes(fds)))
    finally:
        for fd in fds:
            os.close(fd)


def make_storm(folder: Path) -> None:
    """Ten folders of a hundred empty files: nothing of them is read."""
    for number in range(_STORM_FOLDERS):
        (folder / f"part-{number:02d}").mkdir(parents=True)
        for file in range(_STORM_FILES):
            (folder / f"part-{number:02d}" / f"{file:03d}.bin").touch()


def read(pattern: str, folder: Path, model: Model, *, seed: int = 7, check: bool = True, warm: bool = False) -> Reading:
    """Have a fresh process read `folder`, a copy of the model's (for 'storm': of the one beside it).

    warm: its pages are cached already, so less memory is needed.
    Raises: BenchError if its bytes differ: correct before fast.
    """
    pretouch_bytes = _PRETOUCH_WARM_BYTES if warm else int(model.size_bytes * _PRETOUCH_COLD)
    argv: list[object] = [sys.executable, "-m", "tools.bench.reader", pattern, folder, "--seed", seed]
    argv += ["--pretouch", pretouch_bytes, "--truth", model.folder.parent / place_of(pattern)]
    result = json.loads(run(argv, timeout_s=300))
    if check and result["digest"] not in (None, model.digest):
        raise BenchError(f"{folder} does not hold the bytes of {model.folder}: wrong tensors, so no figures")
    return Reading(result["bytes"], result["cpu_s"], tuple(map(tuple, result["figures"])))


def place_of(pattern: str) -> str:
    """The folder of a tree that a pattern reads."""
    return STORM if pattern == STORM else MODEL
