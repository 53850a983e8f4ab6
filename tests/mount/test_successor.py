"""What a successor meets that would have kept a mount from beginning, or that keeps it from serving at all."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from mfs.types import CHUNK_BYTES
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.swift import SwiftServer

SIZE = (9 << 20) + 17
RAM_BYTES = 3 << 30

MountedBy = Callable[..., TestMount]
"""(program of the holder, origin, settings) -> a started mount."""


@pytest.fixture
def mounted_by(tmp_path: Path) -> Iterator[MountedBy]:
    with ExitStack() as stack:

        def make(program: str, origin: origins.Origin, **settings: Any) -> TestMount:
            mount = origins.mount(origin, tmp_path / "m", **settings)
            stack.callback(mount.clean_up)
            return mount.start(program=program)

        yield make


def holder_of(daemon: str, *, only_successors: bool = False, settings: str = "") -> str:
    """A holder that starts this Python in place of `mfs.daemon`."""
    return (
        "from mfs import children, holder\npython = children.python\n"
        "def start(_, name, *rest):\n"
        f"    if '--successor' not in rest and {only_successors}:\n"
        "        return python('-m', name, *rest)\n"
        f"    return python('-c', {daemon!r}, *rest)\n"
        f"children.python = start\n{settings}\nholder.main()"
    )


def held_while(mount: TestMount, happens: Callable[[], object]) -> None:
    """A descriptor and a mapping outlive a daemon that ends while, and because, something happens."""
    path = str(mount.path / "w.bin")
    reader = mount.outside()
    reader.call(touching.hold, "fd", path)
    reader.call(touching.hold_map, "map", path)
    before = mount.pid
    happens()
    mount.wait_successor(before)
    assert reader.call(touching.held_read, "fd", 5_000_000, 1000) == ramp(1000, 5_000_000)
    assert reader.call(touching.held_map, "map", 8_000_000, 1000) == ramp(1000, 8_000_000)
    assert reader.call(touching.read, path) == ramp(SIZE)


class TestNothingIsRefused:
    """Under a mount that serves."""

    def test_too_little_memory(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder, ram_bytes=RAM_BYTES)

        def run_short() -> None:
            resource.prlimit(mount.holder_pid, resource.RLIMIT_AS, (RAM_BYTES, RAM_BYTES))
            mount.crash()

        held_while(mount, run_short)
        status = mount.client.status()
        assert 16 <= status["ram"]["slots_count"] < RAM_BYTES // CHUNK_BYTES
        [warning] = status["warnings"]
        assert "does not fit" in warning
        assert "going on with" in warning

    def test_a_cache_directory_that_others_can_write_to(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("w.bin", ramp(SIZE))
        mount = mounted(folder)
        cache = mount.folder / "cache"

        def open_up() -> None:
            cache.chmod(0o777)
            mount.crash()

        held_while(mount, open_up)
        assert any("without the SSD tier" in text for text in mount.client.status()["warnings"])
        cache.chmod(0o700)
        assert mount.wait_for(lambda: mount.client.status()["warnings"] == [])

    def test_a_source_that_cannot_be_opened(
        self, swift: SwiftServer, s3_bucket: str, mounted: Mounted, tmp_path: Path
    ) -> None:
        """What is on SSD is served, the rest as soon as it can be opened."""
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all({"w.bin": ramp(SIZE), "v.bin": ramp(SIZE, 3)})
        profile = tmp_path / "aws-config"
        keys = {name.lower(): value for name, value in origin.env.items() if name.startswith("AWS_")}
        profile.write_text("[profile team]\n" + "".join(f"{name} = {value}\n" for name, value in keys.items()))
        origin.env["AWS_CONFIG_FILE"] = str(profile)
        origin.source["profile"] = "team"
        mount = mounted(origin)
        assert mount.call(touching.read, str(mount.path / "w.bin")) == ramp(SIZE)
        mount.wait_saved("w.bin")

        def lose_profile() -> None:
            profile.rename(tmp_path / "away")
            mount.crash()

        held_while(mount, lose_profile)
        assert mount.wait_for(lambda: any("team" in text for text in mount.client.status()["warnings"]))
        (tmp_path / "away").rename(profile)
        assert mount.call(touching.read, str(mount.path / "v.bin")) == ramp(SIZE, 3)


def daemon_with_a_defect(flag: Path) -> str:
    """A daemon that fails once `flag` is there, which it takes away."""
    return (
        "import trio, mfs.daemon, mfs.mount\nfrom pathlib import Path\n"
        "maintain = mfs.mount.Mount._maintain\n"
        "async def maintain_and_fail(self):\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        nursery.start_soon(maintain, self)\n"
        f"        while not Path({str(flag)!r}).exists():\n"
        "            await trio.sleep(0.02)\n"
        f"        Path({str(flag)!r}).unlink()\n"
        "        raise RuntimeError('a defect')\n"
        "mfs.mount.Mount._maintain = maintain_and_fail\nmfs.daemon.main()"
    )


class TestDefects:
    def test_a_daemon_that_fails_is_followed(
        self, folder: origins.FolderOrigin, mounted_by: MountedBy, tmp_path: Path
    ) -> None:
        """What was open goes on; nothing that says whose mount it is goes, until it is unmounted."""
        folder.put("w.bin", ramp(SIZE))
        mount = mounted_by(holder_of(daemon_with_a_defect(tmp_path / "fail")), folder)
        mount.alarms_expected += ["the daemon failed", "Traceback"]
        [lock] = (mount.folder / "run").glob("*.lock")
        for _ in range(2):
            held_while(mount, (tmp_path / "fail").touch)
            assert lock.exists()
        mount.stop()
        assert not lock.exists()


class TestHangs:
    def test_successors_that_never_serve_are_not_tried_for_ever(
        self, folder: origins.FolderOrigin, mounted_by: MountedBy
    ) -> None:
        """However long each of them is waited for."""
        folder.put("w.bin", ramp(SIZE))
        impatient = "from mfs import one_child; holder._SERVES_WITHIN_S, one_child.WITHIN_S = 0.2, 0.1"
        program = holder_of("import time; time.sleep(600)", only_successors=True, settings=impatient)
        mount = mounted_by(program, folder)
        reader = mount.outside()
        reader.call(touching.hold, "fd", str(mount.path / "w.bin"))
        mount.crash()
        assert mount.wait_for(lambda: "is given up" in mount.log)
        assert reader.call(touching.held_outcome, "fd", 0, 10) == "ENOTCONN"

    def test_a_record_that_cannot_be_read_is_not_waited_for(
        self, folder: origins.FolderOrigin, mounted_by: MountedBy
    ) -> None:
        """The journal knows what is open, and the sources the rest."""
        folder.put("w.bin", ramp(SIZE))
        hanging = (
            "import time, mfs.daemon, mfs.mount\n"
            "from mfs.tree.record import TreeRecord\n"
            "TreeRecord.load = lambda *what: time.sleep(600)\n"
            "mfs.mount._RECALL_S = 0.5\nmfs.daemon.main()"
        )
        mount = mounted_by(holder_of(hanging, only_successors=True), folder)
        held_while(mount, mount.crash)
        mount.stop()
