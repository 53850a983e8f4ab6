"""DLPack: the same bytes in numpy and torch, no copy, no torch, a lease that lives as long as its consumers."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gpuload.client.arrays
import gpuload.client.attached
from gpuload import attach_arrays
from gpuload.client.asking import load_resident
from gpuload.client.attached import attach
from gpuload.device import driver as cu
from gpuload.device.cuda import CudaDevice
from gpuload.device.host import HostDevice, view_of
from gpuload.errors import ServerError
from gpuload.server.config import ServerConfig
from gpuload.testing import ServerThread, bits, random_tensors, running_server, write
from mfs.errors import ChangedError, NotFoundError
from tests.gpuload.conftest import GRANULE
from tests.gpuload.device.conftest import Processes, compiled, process

__all__ = ["compiled", "process"]  # fixtures

one_way = pytest.mark.parametrize("server", [True], indirect=True, ids=["direct"])


@pytest.fixture(autouse=True)
def own_granules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpuload.client.arrays, "open_device", lambda name: HostDevice(granule_bytes=GRANULE))


MADE = {
    **random_tensors(1, {"f32": (3, 5), "none": (0, 4), "one": ()}, "F32"),
    **random_tensors(2, {"i64": (7,)}, "I64"),
    **random_tensors(3, {"bf16": (4, 6)}, "BF16"),
    **random_tensors(4, {"f8": (9, 2)}, "F8_E4M3"),
    "bool": torch.tensor([True, False, True]),
}


@one_way
def test_granules_of_another_size_are_refused(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server of another version: its runs would lead to other bytes."""
    load_resident(write(tmp_path / "a.safetensors", MADE), "m", "cpu", socket_path=server.socket_path)
    for module, door in ((gpuload.client.arrays, attach_arrays), (gpuload.client.attached, attach)):
        monkeypatch.setattr(module, "open_device", lambda name: HostDevice(granule_bytes=2 * GRANULE))
        with pytest.raises(ServerError, match=rf"granules of {GRANULE} bytes on cpu, .* expects {2 * GRANULE}"):
            door("m", socket_path=server.socket_path)
    assert server.gauges()["leases"] == 0


@one_way
def test_numpy_and_torch_see_the_bytes(server: ServerThread, tmp_path: Path) -> None:
    load_resident(write(tmp_path / "a.safetensors", MADE), "m", "cpu", socket_path=server.socket_path)
    arrays = attach_arrays("m", socket_path=server.socket_path)
    assert set(arrays) == set(MADE)
    for name in ("f32", "one", "i64", "bool", "none"):
        seen = np.from_dlpack(arrays[name])
        assert seen.shape == tuple(MADE[name].shape)
        assert seen.tobytes() == bits(MADE[name]), name
        if seen.size:
            assert not seen.flags.writeable
            assert seen.ctypes.data == arrays[name].address, "no copy"
    for name in ("f32", "i64", "bf16", "bool", "one"):
        tensor = torch.from_dlpack(arrays[name])
        assert (tensor.dtype, tensor.shape) == (MADE[name].dtype, MADE[name].shape)
        assert bits(tensor) == bits(MADE[name]), name
    assert arrays["f8"].nbytes == 18
    assert bytes(view_of(arrays["f8"].address, 18)) == bits(MADE["f8"])


@one_way
def test_the_lease_lives_as_long_as_a_consumer(server: ServerThread, tmp_path: Path) -> None:
    load_resident(write(tmp_path / "a.safetensors", MADE), "m", "cpu", socket_path=server.socket_path)
    arrays = attach_arrays("m", socket_path=server.socket_path)
    seen, old = np.from_dlpack(arrays["f32"]), arrays["f32"].__dlpack__()  # one consumed, one that nobody takes
    part = seen[1:]
    del arrays, seen
    gc.collect()
    assert server.gauges()["leases"] == 1
    assert part.tobytes() == bits(MADE["f32"][1:])
    del part
    gc.collect()
    assert server.gauges()["leases"] == 1
    del old
    gc.collect()
    assert server.gauges()["leases"] == 0
    assert not gpuload.client.arrays._live


@one_way
def test_what_dlpack_cannot_say_is_refused(server: ServerThread, tmp_path: Path) -> None:
    load_resident(write(tmp_path / "a.safetensors", MADE), "m", "cpu", socket_path=server.socket_path)
    where = {"socket_path": server.socket_path}
    arrays = attach_arrays("m", "cpu", **where)
    with pytest.raises(BufferError, match="without a copy"):
        arrays["f32"].__dlpack__(copy=True)
    with pytest.raises(BufferError, match="where they stand"):
        arrays["f32"].__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match=r"F8_E4M3, read-only, needs DLPack 1\.1"):
        arrays["f8"].__dlpack__(max_version=(1, 0))
    with pytest.raises(NotFoundError):
        attach_arrays("x", **where)
    with pytest.raises(ChangedError):
        attach_arrays("m", digest="0" * 64, **where)
    del arrays
    gc.collect()
    assert server.gauges()["leases"] == 0


@one_way
def test_no_torch_is_imported(server: ServerThread, tmp_path: Path) -> None:
    load_resident(write(tmp_path / "a.safetensors", MADE), "m", "cpu", socket_path=server.socket_path)
    code = """
import sys, numpy, gpuload
import gpuload.client.arrays as arrays
from gpuload.device.host import HostDevice
arrays.open_device = lambda name: HostDevice(granule_bytes=4096)
seen = numpy.from_dlpack(gpuload.attach_arrays("m", socket_path=sys.argv[1])["f32"])
print(seen.tobytes().hex(), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, server.socket_path], capture_output=True, text=True)
    assert done.stdout.split() == [bits(MADE["f32"]).hex(), "False"], done.stderr


def test_on_a_card(process: Processes, config: ServerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a consumer that knows no read-only gets nothing, and memory goes back when it is asked for."""
    from dataclasses import replace

    driver: cu.Driver = process()
    open_one = lambda name: CudaDevice(0, granule_bytes=65536, driver=driver)  # noqa: E731
    monkeypatch.setattr(gpuload.client.arrays, "open_device", open_one)
    with running_server(replace(config, arena_bytes={"cuda:0": 4 << 20}), open_one) as server:
        load_resident(write(tmp_path / "a.safetensors", MADE), "m", "cuda:0", socket_path=server.socket_path)
        arrays = attach_arrays("m", socket_path=server.socket_path)
        array = arrays["bf16"]
        assert array.__dlpack_device__() == (2, 0)
        assert bytes(view_of(array.address, array.nbytes)) == bits(MADE["bf16"])
        with pytest.raises(BufferError, match="read-only, needs DLPack"):
            array.__dlpack__()
        capsule = array.__dlpack__(max_version=(1, 0), stream=1)
        del arrays, array, capsule
        gc.collect()
        assert server.gauges("cuda:0")["leases"] == 1
        gpuload.client.arrays.close_left()
        assert server.gauges("cuda:0")["leases"] == 0
