"""What a refresh has published is seen by who asked for it, at once: Triton looks once per load and not again."""

from __future__ import annotations

from pathlib import Path

from mfs.testing import ramp
from tests.mount import origins, touching
from tests.mount.conftest import Mounted


def test_a_directorys_time_has_moved_when_the_refresh_returns(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    """For names that the kernel knew and for those it did not; it believes a directory for a second otherwise."""
    base = {"m/config.pbtxt": b"", "m/1/w": ramp(10)}
    folder.put_all(base)
    mount = mounted(folder)
    path = mount.path / "m"
    mount.call(touching.tree, str(mount.path))
    for number in range(20):
        more = {f"m/{number + 2}/w": ramp(20)}
        for files in ({**base, **more}, base):
            before = mount.call(touching.stat, str(path))["st_mtime_ns"]
            folder.put_all(files)
            folder.remove_empty_folders()
            mount.client.refresh()
            assert mount.call(touching.stat, str(path))["st_mtime_ns"] > before
            names = sorted({Path(name).parts[1] for name in files})
            assert mount.call(touching.list_names, str(path)) == names
