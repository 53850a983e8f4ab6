"""The soak, short: each thing that may happen to a mount once, and readers who compare what they get."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from tests.mount import origins, soak


def test_readers_get_right_bytes_whatever_happens(tmp_path: Path) -> None:
    folder = origins.FolderOrigin(tmp_path / "origin")
    mount = soak.mount_of(folder, tmp_path / "m")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(soak.small_disk(mount.folder / "cache", tmp_path / "disk"))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk of our own can be had here: {error}")
        stack.callback(mount.clean_up)
        seen = soak.run(mount, folder, operations=1, readers=2, seed=1, between=200)
        mount.stop()
    print(seen)
    assert seen.wrong == []
    assert set(seen.operations) == {"open", "read", "mapped", "direct", "list", "stat"}
