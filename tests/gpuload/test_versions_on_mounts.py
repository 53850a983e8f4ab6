"""What digests are remembered under on real mounts: stable over remounts, shared by equal files, and only where bytes
are bound to what the source says of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gpuload.server.versions import look
from mfs.control import mountinfo
from mfs.testing.mounting import TestMount
from tests.mount.origins import FolderOrigin, HubOrigin, Origin, RegistryOrigin, S3Origin, WebOrigin
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

CONTENT = os.urandom(100_000)


def keys(folder: Path, origin: Origin, *names: str) -> list[bytes | None]:
    """Mount it, and look at these files."""
    found = []
    with TestMount(folder, origin.url, source=origin.source, env=origin.env) as mount:
        for name in names:
            fd = os.open(mount.path / name, os.O_RDONLY)
            found.append(look(fd).key)
            os.close(fd)
    return found


def test_on_a_hub_equal_files_are_one_in_any_repository_under_any_name(hub: HubServer, tmp_path: Path) -> None:
    one, two = HubOrigin(hub), HubOrigin(hub)
    one.put_all({"a.safetensors": CONTENT, "b.safetensors": CONTENT[::-1]})
    two.put_all({"x/c.safetensors": CONTENT})
    a, b = keys(tmp_path / "m", one, "a.safetensors", "b.safetensors")
    assert None not in (a, b)
    assert a != b
    assert keys(tmp_path / "m", one, "a.safetensors") == [a], "the same after a remount"
    assert keys(tmp_path / "n", two, "x/c.safetensors") == [a]


def test_in_s3_an_object_is_its_place_and_etag(swift: SwiftServer, s3_bucket: str, tmp_path: Path) -> None:
    origin = S3Origin(swift, s3_bucket)
    origin.put_all({"a": CONTENT, "b": CONTENT})
    a, b = keys(tmp_path / "m", origin, "a", "b")
    assert None not in (a, b)
    assert a != b
    assert keys(tmp_path / "m", origin, "a") == [a], "the same after a remount"
    origin.put_all({"a": CONTENT[::-1], "b": CONTENT})
    changed, same = keys(tmp_path / "m", origin, "a", "b")
    assert changed not in (a, None)
    assert same == b


def test_in_a_registry_equal_files_are_one_whatever_model_tag_or_registry_they_stand_in(tmp_path: Path) -> None:
    one, two = RegistryOrigin(tmp_path / "one"), RegistryOrigin(tmp_path / "two", "other", "v1")
    one.put_all({"a.safetensors": CONTENT, "b.safetensors": CONTENT[::-1]})
    two.put_all({"x/c.safetensors": CONTENT})
    a, b = keys(tmp_path / "m", one, "a.safetensors", "b.safetensors")
    assert None not in (a, b)
    assert a != b
    assert keys(tmp_path / "m", one, "a.safetensors") == [a], "the same after a remount"
    assert keys(tmp_path / "n", two, "x/c.safetensors") == [a]


def test_times_and_sizes_of_others_are_not_trusted(nginx: NginxServer, tmp_path: Path) -> None:
    for i, origin in enumerate((WebOrigin(nginx), FolderOrigin(tmp_path / "f"))):
        origin.put_all({"a": CONTENT})
        assert keys(tmp_path / f"m{i}", origin, "a") == [None]


def test_a_mount_of_another_user_is_not_believed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = HubOrigin(hub)
    origin.put_all({"a.safetensors": CONTENT})
    real = mountinfo.read
    theirs = "rw,user_id=12345,group_id=0"
    with TestMount(tmp_path / "m", origin.url, env=origin.env) as mount:
        fd = os.open(mount.path / "a.safetensors", os.O_RDONLY)
        assert look(fd).key is not None
        monkeypatch.setattr(mountinfo, "read", lambda: [replace(m, options=theirs) if m.is_mfs else m for m in real()])
        assert look(fd).key is None
        monkeypatch.undo()
        os.close(fd)
