"""HostDevice passes the suite, and keeps what it promises about sharing."""

from __future__ import annotations

import mmap
import os

import pytest

from gpuload.device import canonical_name, open_device
from gpuload.device.base import Device
from gpuload.device.host import HostDevice, view_of
from gpuload.errors import BusyError, DeviceError
from gpuload.testing import DeviceSuite, FaultyDevice, Gate
from gpuload.wire import close_all
from mfs.errors import UsageError


class TestHostDevice(DeviceSuite):
    @pytest.fixture(params=[4096, 2 << 20])
    def device(self, request: pytest.FixtureRequest) -> Device:
        return HostDevice(granule_bytes=request.param)


def test_what_is_handed_out_cannot_be_written_resized_or_opened_for_more_by_another_user() -> None:
    device = HostDevice(granule_bytes=4096)
    arena = device.create_arena(8192)
    fds = arena.export([(0, 2)])
    with pytest.raises(PermissionError):
        mmap.mmap(fds[0], 8192)
    for write in (lambda: os.pwrite(fds[0], b"x", 0), lambda: os.ftruncate(fds[0], 0)):
        with pytest.raises(OSError):
            write()
    assert os.fstat(fds[0]).st_mode & 0o777 == 0o400
    if os.geteuid() == 0:  # root may be anybody
        child = os.fork()
        if not child:
            os.setuid(65534)
            refused = []
            for flags in (os.O_RDWR, os.O_WRONLY):
                try:
                    os.open(f"/proc/self/fd/{fds[0]}", flags)
                except PermissionError:
                    refused.append(flags)
            try:
                os.fchmod(fds[0], 0o666)
            except PermissionError:
                refused.append(-1)
            os._exit(len(refused))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    own = os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR)  # our own user can: it can swap what is served as well
    for nbytes in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(own, nbytes)
    close_all([*fds, own])
    arena.close()


def test_memory_that_goes_back_is_the_machines_again() -> None:
    device = HostDevice(granule_bytes=4096)
    arena = device.reserve_arena(64 * 4096)
    fds = arena.export([(0, 1)])

    def has_bytes() -> int:
        return os.fstat(fds[0]).st_blocks * 512

    assert has_bytes() == 0, "nothing is taken before it is needed"
    arena.commit([(3, 10), (40, 2)])
    assert has_bytes() == 12 * 4096
    view_of(arena.address + 3 * 4096, 4096)[:] = b"a" * 4096
    arena.release([(4, 9), (41, 1)])
    assert has_bytes() == 2 * 4096
    assert device.read_back(arena.address + 3 * 4096, 4096) == b"a" * 4096
    arena.release([(3, 1), (40, 1)])
    arena.commit([(3, 1)])
    assert device.read_back(arena.address + 3 * 4096, 4096) == bytes(4096), "nobody sees who was there"
    close_all(fds)
    arena.close()


def test_a_client_that_writes_changes_only_its_own_pages() -> None:
    device = HostDevice(granule_bytes=4096)
    arena = device.create_arena(8192)
    owner = view_of(arena.address, 8192)
    owner[:] = b"a" * 8192
    fds = arena.export([(0, 2)])
    one, two = device.attach(fds, [(0, 2)]), device.attach(fds, [(0, 2)])
    view_of(one.address, 8192)[5] = ord("z")
    assert owner[5] == ord("a") == view_of(two.address, 8192)[5]
    owner[4096] = ord("b")
    assert view_of(one.address, 8192)[4096] == ord("b"), "pages that were not written are shared"
    close_all(fds)
    one.close()
    two.close()
    owner.release()
    arena.close()


def test_a_failed_copy_fails_every_later_event() -> None:
    device = FaultyDevice(HostDevice(), Gate(1))
    stream, staging = device.open_stream(), device.alloc_staging(64)
    stream.copy_in(staging.address, staging.address + 32, 8)
    good = stream.record()
    stream.copy_in(staging.address, staging.address + 32, 8)
    good.wait(30)
    for _ in range(2):
        with pytest.raises(DeviceError, match="as asked"):
            stream.record().wait(30)
    stream.close()
    staging.close()


def test_a_copy_that_hangs_ends_in_busy() -> None:
    gate = Gate(0, blocks=True)
    device = FaultyDevice(HostDevice(), gate)
    stream, staging = device.open_stream(), device.alloc_staging(64)
    stream.copy_in(staging.address, staging.address + 32, 8)
    with pytest.raises(BusyError, match="was not done"):
        stream.record().wait(0.01)
    gate.opened.set()
    stream.close()
    staging.close()


@pytest.mark.parametrize(
    ("given", "name"),
    [("cpu", "cpu"), ("cpu:0", "cpu"), ("cpu:03", "cpu:3"), ("cuda", "cuda:0"), (1, "cuda:1"), ("cuda:07", "cuda:7")],
)
def test_names(given: str | int, name: str) -> None:
    assert canonical_name(given) == name


@pytest.mark.parametrize("given", ["", "mps", "cuda:", "cuda:x", "cuda:-1", "cpu:", True])
def test_names_that_mean_nothing(given: str) -> None:
    with pytest.raises(UsageError):
        open_device(given)
