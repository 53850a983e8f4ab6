"""CudaDevice against a stand-in driver on host memory. NO GPU is involved: see standin/libcuda.c for what it shows.

The same suite runs on a real GPU in tests/gpuload/device/test_cuda.py, where there is one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpuload.client.attached
from gpuload.client.asking import load_resident
from gpuload.client.attached import attach, let_go
from gpuload.device import driver as cu
from gpuload.device.base import Device
from gpuload.device.cuda import CudaDevice
from gpuload.errors import DeviceError
from gpuload.server.daemon import ServerConfig
from gpuload.testing import DeviceSuite, assert_same, random_tensors, running_server, write
from mfs.control.borrowing import LentFile

SOURCE = Path(__file__).parent / "standin" / "libcuda.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> cu.Driver:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here: the stand-in driver cannot be built")
    out = tmp_path_factory.mktemp("standin") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", out, SOURCE], check=True)
    return cu.Driver(str(out))


class TestCudaDeviceOnStandin(DeviceSuite):
    @pytest.fixture
    def device(self, library: cu.Driver) -> Device:
        return CudaDevice(0, granule_bytes=65536, driver=library)


class TestCudaDeviceThatKnowsNoReadOnlyMemory(TestCudaDeviceOnStandin):
    """Attribute 113 is 0, as on a B300."""

    @pytest.fixture(autouse=True)
    def _driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STANDIN_NO_READ_ONLY", "1")

    def test_memory_of_others_is_copied_from_in_place(self, device: Device) -> None:
        with pytest.raises(DeviceError, match="cuMemHostRegister_v2 failed"):
            super().test_memory_of_others_is_copied_from_in_place(device)


def test_structs_have_the_sizes_of_cuda_h() -> None:
    assert ctypes.sizeof(cu.MemAllocationProp) == 32
    assert ctypes.sizeof(cu.MemAccessDesc) == 12
    assert ctypes.sizeof(cu.Memcpy2D) == 128


def test_granules_are_rounded_up_to_the_hardware(library: cu.Driver) -> None:
    assert CudaDevice(0, granule_bytes=70_000, driver=library).granule_bytes == 131072


def test_what_the_driver_refuses_is_named(library: cu.Driver) -> None:
    with pytest.raises(DeviceError, match=r"this machine has 1 CUDA devices"):
        CudaDevice(3, driver=library)
    device = CudaDevice(0, granule_bytes=65536, driver=library)
    with pytest.raises(DeviceError, match=r"cuMemMap failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        device.call("cuMemMap", 0, 65536, 0, 5, 0)
    assert device.model_name() == "stand-in"


def test_a_client_maps_read_only(library: cu.Driver) -> None:
    device = CudaDevice(0, granule_bytes=65536, driver=library)
    arena = device.reserve_arena(3 * 65536)
    arena.commit([(0, 1), (1, 2)])
    fds = arena.export([(1, 2)])
    mapping = device.attach(fds, [(1, 2)])
    rights = {
        line.split()[1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.startswith(f"{mapping.address:x}-")
    }
    assert rights == {"r--s"}
    with pytest.raises(DeviceError, match="1 pieces came, expected 2"):
        device.attach(fds, [(1, 1), (2, 1)])
    for fd in fds:
        os.close(fd)
    mapping.close()
    arena.close()


def test_memory_that_cannot_be_page_locked_is_refused_and_not_reached(
    library: cu.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that knows no read-only registration, and what it says of memory that this process may not write."""
    device = CudaDevice(0, granule_bytes=65536, driver=library)
    fd = os.memfd_create("gpuload-test")
    os.ftruncate(fd, 8192)
    lent = LentFile(fd, 8192)
    os.close(fd)
    address = lent.address
    monkeypatch.setenv("STANDIN_NO_READ_ONLY", "1")
    with pytest.raises(DeviceError, match="cuMemHostRegister_v2 failed: CUDA_ERROR_INVALID_VALUE"):
        device.register(address, 8192)
    assert not device.reaches(address, 1)
    monkeypatch.delenv("STANDIN_NO_READ_ONLY")
    device.register(address, 8192)
    assert CudaDevice(0, granule_bytes=65536, driver=library).reaches(address, 8192), "page-locked for every context"
    device.unregister(address)
    assert not device.reaches(address, 1)
    lent.close()


def test_the_callers_own_context_is_current_again_after_every_call(library: cu.Driver) -> None:
    """torch may be working with another device in that thread."""
    current = library._functions["cuCtxPopCurrent_v2"]
    device = CudaDevice(0, granule_bytes=65536, driver=library)
    stream, staging = device.open_stream(), device.alloc_staging(4096)
    stream.record().wait(30)
    with pytest.raises(DeviceError):
        device.call("cuMemMap", 0, 65536, 0, 5, 0)
    assert current(ctypes.byref(ctypes.c_void_p())) == 201, "a context was left current"
    stream.close()
    staging.close()


def test_nothing_is_left_open(library: cu.Driver) -> None:
    device = CudaDevice(0, granule_bytes=65536, driver=library)
    before = len(os.listdir("/proc/self/fd"))
    arena = device.create_arena(5 * 65536)
    fds = arena.export([(0, 5)])
    device.attach(fds, [(0, 5)]).close()
    for fd in fds:
        os.close(fd)
    arena.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_server_on_it(
    library: cu.Driver, config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the server's CUDA path but torch: granules as descriptors, tensors read at the mapped addresses."""

    def open_one(name: str) -> Device:
        return CudaDevice(0, granule_bytes=65536, driver=library)

    monkeypatch.setattr(gpuload.client.attached, "open_device", open_one)
    over, empty = gpuload.client.attached.tensors.over_memory, torch.empty
    monkeypatch.setattr(
        gpuload.client.attached.tensors, "over_memory", lambda owner, at, n, _: over(owner, at, n, "cpu")
    )
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **{**kwargs, "device": "cpu"}))
    old = random_tensors(1, {f"w.{i}": (300, 1000) for i in range(6)} | {"n": (5,), "none": (0,)})
    new = {**old, "w.3": random_tensors(2, {"x": (300, 1000)})["x"]}
    with running_server(replace(config, arena_bytes={"cuda:0": 16 << 20}), open_one) as server:
        where = {"socket_path": server.socket_path}
        load_resident(write(tmp_path / "a.safetensors", old), "m", "cuda:0", **where)
        held = attach("m", **where)
        assert_same(held, old)
        report = load_resident(write(tmp_path / "b.safetensors", new), "m", "cuda:0", is_swap=True, **where)["report"]
        assert report["bytes_copied"] == 600_000
        now = attach("m", **where)
        assert_same(now, new)
        assert_same(held, old)
        del held, now
        gc.collect()
        let_go()
        assert server.gauges("cuda:0")["leases"] == 0


def test_without_a_driver(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no CUDA driver on this machine"):
        cu.Driver(str(tmp_path / "libcuda.so.1"))


def test_a_model_of_more_granules_than_a_process_may_have_files(
    library: cu.Driver, config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual limit is 1024 descriptors; a 16 GB model comes as 2000."""
    monkeypatch.setattr(
        gpuload.client.attached, "open_device", lambda _: CudaDevice(0, granule_bytes=65536, driver=library)
    )
    over = gpuload.client.attached.tensors.over_memory
    monkeypatch.setattr(
        gpuload.client.attached.tensors, "over_memory", lambda owner, at, n, _: over(owner, at, n, "cpu")
    )
    made = random_tensors(1, {"w": (400 * 65536,)}, "U8")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    arena = replace(config, arena_bytes={"cuda:0": 420 * 65536})
    with running_server(arena, lambda _: CudaDevice(0, granule_bytes=65536, driver=library)) as server:
        load_resident(write(tmp_path / "a.safetensors", made), "m", "cuda:0", socket_path=server.socket_path)
        used = len(os.listdir("/proc/self/fd"))
        exchange = gpuload.client.attached.exchange

        def exchange_scarcely(*args: Any, admit: Callable[[int], object]) -> Any:
            def admit_scarcely(count: int) -> None:  # only now: the server, of this process too, has opened its own
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + 100, limits[1]))
                admit(count)

            return exchange(*args, admit=admit_scarcely)

        monkeypatch.setattr(gpuload.client.attached, "exchange", exchange_scarcely)
        try:
            held = attach("m", socket_path=server.socket_path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert_same(held, made)
        del held
        gc.collect()
        let_go()
