"""Ten thousand models of thirty shards: what listing them costs the daemon in memory."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import Mounted

MODELS_COUNT, SHARDS_COUNT = 10_000, 30
RSS_BYTES_MAX = 150 << 20
_MAKE = """
import os, sys
root, models, shards = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
for model in range(models):
    folder = os.path.join(root, f"org-{model % 100}--model-{model:05d}")
    os.mkdir(folder)
    fd = os.open(folder, os.O_RDONLY)
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
"""


def own_bytes(pid: int) -> int:
    """Resident memory of a process beyond shared mappings, which are the slots."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))


@pytest.fixture
def many() -> Iterator[Path]:
    # In memory where it can be: on a disk, making and removing them takes longer than everything else.
    root = Path(tempfile.mkdtemp(prefix="mfs-many-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        subprocess.run(["python3", "-c", _MAKE, root, str(MODELS_COUNT), str(SHARDS_COUNT)], check=True, timeout=120)
        yield root
    finally:
        subprocess.run(["rm", "-rf", root], check=True, timeout=120)


def test_a_folder_of_ten_thousand_models(many: Path, mounted: Mounted) -> None:
    mount = mounted(str(many))
    before = own_bytes(mount.pid)
    out = mount.run("sh", "-c", f"find {mount.path} -type f | wc -l", timeout_s=150)
    assert int(out) == MODELS_COUNT * SHARDS_COUNT
    after = own_bytes(mount.pid)
    assert len(mount.client.ls("")) == MODELS_COUNT
    print(f"daemon beyond its slots: {before / 1e6:.0f} MB at start, {after / 1e6:.0f} MB with 300,000 files listed")
    assert after < RSS_BYTES_MAX
