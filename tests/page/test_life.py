"""The page over the lives of daemons: who goes on with a mount goes on with its page, token and all."""

from __future__ import annotations

import json
import socket

import pytest

from mfs.errors import NotFoundError
from mfs.page import where
from mfs.testing.mounting import TestMount
from tests.mount import origins
from tests.mount.conftest import Mounted
from tests.page.test_site import Door, known


def door_of(mount: TestMount) -> Door:
    [file] = (mount.folder / "run").glob("*.page")
    return known(file.with_suffix(".sock"))


def serving_pid(door: Door) -> int | None:
    """The daemon that answers there, None while there is none."""
    try:
        status, _, body = door.ask("/v1/status")
    except (ConnectionRefusedError, IndexError):  # between two daemons; or closed before it said anything
        return None
    pid: int = json.loads(body)["pid"]
    assert status == 200
    return pid


@pytest.fixture
def mount(folder: origins.FolderOrigin, mounted: Mounted) -> TestMount:
    folder.put_all({"m/a.bin": b"1"})
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    return mounted(folder, page_addr=f"127.0.0.1:{address[1]}")


def test_a_handover_keeps_address_and_token(mount: TestMount) -> None:
    door, old = door_of(mount), mount.pid
    assert serving_pid(door) == old
    mount.hand_over()
    assert mount.wait_for(lambda: serving_pid(door) == mount.pid)
    assert mount.pid != old
    assert mount.wait_for(lambda: mount.client.status()["warnings"] == [])
    assert door_of(mount).token == door.token


def test_so_does_a_crash(mount: TestMount) -> None:
    door, old = door_of(mount), mount.crash()
    assert mount.wait_for(lambda: serving_pid(door) not in (None, old))
    assert door_of(mount).token == door.token


def test_a_mount_that_ends_leaves_no_token(mount: TestMount) -> None:
    socket_path = door_of(mount).socket_path
    mount.stop()
    with pytest.raises(NotFoundError):
        where.page_url(socket_path)


def test_a_taken_address_is_a_warning_and_no_failure(folder: origins.FolderOrigin, mounted: Mounted) -> None:
    folder.put_all({"m/a.bin": b"1"})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        mount = mounted(folder, page_addr=f"127.0.0.1:{taken.getsockname()[1]}")
        [warning] = [said for said in mount.ready["warnings"] if "page" in said]
        assert "in use" in warning
    assert mount.wait_for(lambda: not [said for said in mount.client.status()["warnings"] if "page" in said])
    assert serving_pid(door_of(mount)) == mount.pid
