"""Beside Triton, mfs runs in Triton's own Python, whose numpy is older than the one it is developed with."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.servers import triton

BLOCKS = 5
DEADLINE_S = 60


def test_a_mount_counts_what_its_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are numpy arrays: with numpy 1.26 every question about them failed, and the SSD tier seemed empty."""
    if not triton.PYTHON.exists():
        pytest.skip("Triton's Python is not here: run tools/setup test")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def python(*arguments: str | Path) -> str:
        return subprocess.run(
            [triton.PYTHON, *map(str, arguments)], check=True, capture_output=True, text=True, env=environment,
            timeout=DEADLINE_S,
        ).stdout  # fmt: skip

    models, mnt, cache = (tmp_path / name for name in ("models", "mnt", "cache"))
    for folder in (models / "llama", mnt):
        folder.mkdir(parents=True)
    (models / "llama" / "w.bin").write_bytes(bytes(BLOCKS << 17))
    assert python("-c", "import numpy; print(numpy.__version__)").startswith("1."), "the reason for this test"
    python("-m", "mfs", "mount", models, mnt, "--ram-size", "64M", "--cache-dir", cache)
    try:
        assert (mnt / "llama" / "w.bin").read_bytes() == bytes(BLOCKS << 17)
        python("-m", "mfs", "prefetch", mnt / "llama")
        status = json.loads(python("-m", "mfs", "status", "--json", mnt))
        assert status["ssd"]["objects_count"] == 1
        assert status["ssd"]["used_bytes"] > BLOCKS << 17
    finally:
        python("-m", "mfs", "umount", mnt)
    (found,) = json.loads(python("-m", "mfs", "status", "--json", "--cache-dir", cache))
    assert found["ssd_bytes"] == BLOCKS << 17
