"""A node with a driver, and models to publish."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.testing import ramp
from tests.csi.driver import Driver

FILES = {"llama/w.bin": ramp((5 << 20) + 17), "llama/config.json": b"{}"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if "tests/csi/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="a CSI driver is root"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of the node with a model in it."""
    for name, content in FILES.items():
        file = tmp_path / "models" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "models"


@pytest.fixture
def place() -> Iterator[Path]:
    """A node's directory, whose mounts propagate as /var/lib/kubelet's do; short, for sockets."""
    with tempfile.TemporaryDirectory(prefix="mfs-n-") as name:
        subprocess.run(["mount", "--bind", name, name], check=True)
        try:
            subprocess.run(["mount", "--make-rshared", name], check=True)
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


@pytest.fixture
def driver(place: Path, models: Path) -> Iterator[Driver]:
    """A driver that runs, and may publish `models`."""
    with Driver(place, folders=(models,)) as driver:
        yield driver.start()
