"""Paths are found in the kernel's table of mounts, without touching any mount."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mfs.control import mountinfo
from mfs.control.mountinfo import Mount
from mfs.errors import UsageError

TABLE = rb"""21 28 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw
28 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
60 28 0:52 / /mnt/models ro,nosuid,nodev,relatime shared:30 master:2 - fuse.mfs mfs:prod ro,user_id=1000,group_id=100
61 28 0:53 / /mnt/with\040space\011tab\134back\012line\043x ro - fuse.mfs mfs:s rw,user_id=0,group_id=0,allow_other
62 60 0:54 / /mnt/models/scratch rw - tmpfs tmpfs rw
63 28 0:52 /llama /srv/llama ro - fuse.mfs mfs:prod ro,user_id=1000,group_id=100
this line means nothing
64 28 0:55 / /mnt/\377\376 ro - fuse.mfs mfs:bytes ro,user_id=0,group_id=0
"""
MOUNTS = mountinfo.parse(TABLE)


def test_all_readable_lines_are_parsed() -> None:
    assert [mount.mountpoint for mount in MOUNTS if mount.is_mfs] == [
        "/mnt/models", "/mnt/with space\ttab\\back\nline#x", "/srv/llama", "/mnt/\udcff\udcfe",
    ]  # fmt: skip
    models = MOUNTS[2]
    assert (models.device, models.root, models.source, models.user_id) == ("0:52", "/", "mfs:prod", 1000)
    assert MOUNTS[0].user_id is None


def test_the_running_kernel_is_understood() -> None:
    assert any(mount.fstype == "proc" for mount in mountinfo.read())
    lines = Path("/proc/self/mountinfo").read_bytes().count(b"\n")
    assert len(mountinfo.read()) == lines


@pytest.mark.parametrize(
    ("path", "mountpoint", "below"),
    [
        ("/mnt/models", "/mnt/models", ""),
        ("/mnt/models/", "/mnt/models", ""),
        ("/mnt/models/llama/../minilm/./x", "/mnt/models", "minilm/x"),
        ("/mnt//models/a b", "/mnt/models", "a b"),
        ("/srv/llama/x", "/srv/llama", "llama/x"),
        ("/mnt/models/../../srv/llama", "/srv/llama", "llama"),
        ("/mnt/with space\ttab\\back\nline#x/y", "/mnt/with space\ttab\\back\nline#x", "y"),
        ("/mnt/\udcff\udcfe/z", "/mnt/\udcff\udcfe", "z"),
    ],
)
def test_a_path_is_taken_apart(path: str, mountpoint: str, below: str) -> None:
    place = mountinfo.locate(path, MOUNTS)
    assert place is not None
    assert (place.mount.mountpoint, place.path) == (mountpoint, below)


@pytest.mark.parametrize("path", ["/", "/mnt", "/mnt/modelsx", "/mnt/models/..", "/mnt/models/scratch/x", "/sys"])
def test_paths_outside_are_outside(path: str) -> None:
    assert mountinfo.locate(path, MOUNTS) is None


def test_the_topmost_of_stacked_mounts_counts() -> None:
    over = Mount("0:99", "/", "/mnt/models", "tmpfs", "tmpfs", "rw")
    assert mountinfo.locate("/mnt/models/x", [*MOUNTS, over]) is None
    assert mountinfo.mount_at("/mnt/models", [*MOUNTS, over]) == over
    assert mountinfo.mount_at("/nowhere", MOUNTS) is None


def test_links_lead_into_a_mount_and_are_not_read_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 'mount' is a plain directory whose links would lead elsewhere if anyone looked inside."""
    inside = tmp_path / "mount"
    inside.mkdir()
    (inside / "link").symlink_to("/etc")
    (tmp_path / "into").symlink_to("mount/sub")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "up").symlink_to("../into")
    mounts = [Mount("0:9", "/", os.path.realpath(inside), mountinfo.FSTYPE, "mfs:x", "rw")]

    def below(path: str) -> str | None:
        place = mountinfo.locate(path, mounts)
        return place.path if place else None

    assert below(f"{tmp_path}/into/file") == "sub/file"
    assert below(f"{tmp_path}/deep/up") == "sub"
    assert below(f"{tmp_path}/mount/link/passwd") == "link/passwd"
    assert below(f"{tmp_path}/deep/up/../../mount/a") == "a"
    monkeypatch.chdir(tmp_path)
    assert below("mount/a") == "a"
    assert below("./deep/../into") == "sub"
    assert mountinfo.real_mountpoint("into", mounts) == f"{os.path.realpath(inside)}/sub"


def test_a_circle_of_links_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UsageError, match="symbolic links"):
        mountinfo.locate(str(tmp_path / "a" / "x"), [])
