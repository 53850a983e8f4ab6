"""A cache directory that vanishes under a serving mount costs the cache, not the readers."""

from __future__ import annotations

import shutil
from pathlib import Path

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from mfs.types import CHUNK_BYTES

_BYTES = 3 * CHUNK_BYTES + 5


def test_reads_go_on_without_the_cache_directory(tmp_path: Path) -> None:
    source = tmp_path / "registry" / "model"
    source.mkdir(parents=True)
    (source / "weights.bin").write_bytes(ramp(_BYTES))
    with TestMount(tmp_path / "m", str(source.parent)) as mount:
        shutil.rmtree(tmp_path / "m" / "cache")
        mount.run("cmp", mount.path / "model" / "weights.bin", source / "weights.bin")
        assert mount.client.status()["reads"]["errors_count"] == 0
        assert "without writing to the cache" in mount.log


def test_a_prefetch_to_a_disk_that_takes_nothing_says_so(tmp_path: Path) -> None:
    source = tmp_path / "registry" / "model"
    source.mkdir(parents=True)
    (source / "weights.bin").write_bytes(ramp(_BYTES))
    with TestMount(tmp_path / "m", str(source.parent)) as mount:
        chunks = tmp_path / "m" / "cache" / "v1" / "chunks"
        shutil.rmtree(chunks)
        chunks.touch()
        [failed] = list(mount.client.prefetch(["model"], "ssd", wait=True))[-1]["failed"]
        assert failed["path"] == "model/weights.bin"
        assert "could not be written" in failed["error"]
        mount.run("cmp", mount.path / "model" / "weights.bin", source / "weights.bin")
