"""Registries of ours as a user fills them: `mfs push` by itself, what it said, what it took, what is there then."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench.processes import run

TAG = "v1"
_PUSH_S = 900.0
_WORK = "work"


class Push(NamedTuple):
    """One `mfs push`."""

    seconds: float
    """With the start of Python, some 0.3 s."""
    cpu_s: float
    """Of the command and all it started."""
    said: dict[str, Any]
    """Its JSON."""


def push(
    directory: Path, root: str, model: str, *options: str, tag: str = TAG, env: Mapping[str, str] | None = None
) -> Push:
    """Push a directory to `root`/`model`:`tag`. root: an mfs+…:// URL."""
    argv = [sys.executable, "-P", "-m", "mfs", "push", directory, f"{root}/{model}:{tag}", "--json", *options]
    before, start = _children_s(), time.perf_counter()
    said = json.loads(run(argv, timeout_s=_PUSH_S, env=env))
    return Push(time.perf_counter() - start, _children_s() - before, said)


def stored_bytes(root: Path) -> int:
    """Of a registry in a folder: chunks, manifests, tags, all but who is at work."""
    return sum(
        path.stat().st_size for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != _WORK
    )


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
