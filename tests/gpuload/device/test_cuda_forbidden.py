"""What a real driver forbids, or does not forgive: on a stand-in that forbids it too. No GPU is involved."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpuload.client.asking import load_resident
from gpuload.client.attached import attach, let_go
from gpuload.device import cards
from gpuload.device import driver as cu
from gpuload.device.cuda import CudaDevice
from gpuload.errors import DeviceError, DeviceLostError
from gpuload.hooks import safetensors_patch
from gpuload.hooks.weights import weights_of
from gpuload.server import daemon
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, assert_same, ramp, random_tensors, running_server, write
from tests.gpuload.device.conftest import Processes, calls, capture, fail

WEIGHTS = random_tensors(1, {"w": (100, 100)})


def on_cuda(config: ServerConfig) -> ServerConfig:
    return replace(config, arena_bytes={"cuda:0": 16 << 20})


@pytest.fixture
def driver(process: Processes, be_client: Callable[[cu.Driver], None]) -> cu.Driver:
    """The client's."""
    made = process()
    be_client(made)
    return made


@pytest.fixture
def server(process: Processes, config: ServerConfig, tmp_path: Path, driver: cu.Driver) -> Iterator[ServerThread]:
    """With one model, "m"; on a driver of its own."""
    own = process()
    with running_server(on_cuda(config), lambda _: CudaDevice(0, driver=own)) as running:
        load_resident(write(tmp_path / "a.safetensors", WEIGHTS), "m", "cuda:0", socket_path=running.socket_path)
        yield running
        let_go()
        assert running.gauges("cuda:0")["leases"] == 0


def test_what_is_dropped_while_a_graph_is_captured_is_let_go_later(server: ServerThread, driver: cu.Driver) -> None:
    held = attach("m", socket_path=server.socket_path)
    capture(driver, 1)
    del held
    gc.collect()
    assert capture(driver, 0) == 1, "the capture was broken"
    assert calls(driver, "cuCtxSynchronize") == calls(driver, "cuMemUnmap") == 0
    assert server.gauges("cuda:0")["leases"] == 1, "the memory is still mapped"
    let_go()
    assert server.gauges("cuda:0")["leases"] == 0
    assert calls(driver, "cuCtxSynchronize") == 1


def test_the_next_attach_lets_go_of_what_was_dropped(server: ServerThread) -> None:
    for _ in range(3):
        assert_same(attach("m", socket_path=server.socket_path), WEIGHTS)
        gc.collect()
    assert server.gauges("cuda:0")["leases"] == 1


def test_nothing_is_let_go_by_a_thread_that_captures(
    server: ServerThread, driver: cu.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = attach("m", socket_path=server.socket_path)
    del held
    gc.collect()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        let_go()
    assert calls(driver, "cuCtxSynchronize") == 0


def test_a_load_beside_a_capture_leaves_it_alone(driver: cu.Driver) -> None:
    """Every call of a load that is refused in any thread while a graph is captured in the default mode."""
    device = CudaDevice(0, driver=driver)
    arena = device.create_arena(device.granule_bytes)
    capture(driver, 1)
    staging, stream = device.alloc_staging(4096), device.open_stream()
    staging.view[:] = ramp(4096)
    stream.copy_in(arena.address, staging.address, 4096)
    stream.record().wait(30)
    stream.close()
    staging.close()
    assert device.read_back(arena.address, 4096) == ramp(4096)
    assert capture(driver, 0) == 1, "the capture was broken"
    arena.close()


def test_the_idle_timer_of_the_hook_waits_for_no_device(
    server: ServerThread, driver: cu.Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPULOAD_SOCKET", server.socket_path)
    monkeypatch.setattr(safetensors_patch, "IDLE_S", 0.0)
    file = safetensors_patch._File(str(tmp_path / "a.safetensors"), "cuda:0")
    assert file.tensor("w") is not None
    capture(driver, 1)
    assert file.release_if_idle()
    gc.collect()
    assert capture(driver, 0) == 1, "the capture was broken"
    file.close()


def test_programs_that_write_in_place_get_copies(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that writes to memory which is mapped read-only ends its process's use of the card."""
    monkeypatch.setenv("GPULOAD_SOCKET", server.socket_path)
    file = safetensors_patch._File(str(tmp_path / "a.safetensors"), "cuda:0")
    whole, cut = file.tensor("w"), file.tensor("w", slice(10, 20))
    for tensor in (whole, cut):
        assert rights_at(tensor.data_ptr()).startswith("rw"), "the stand-in's kernels would end here"
        tensor.add_(1)
    assert_same({"w": file.tensor("w")}, WEIGHTS)
    assert torch.equal(file.tensor("w", slice(10, 20)).view(torch.uint8), WEIGHTS["w"][10:20].view(torch.uint8))
    monkeypatch.setenv("GPULOAD_ZERO_COPY", "1")
    assert rights_at(file.tensor("w").data_ptr()) == "r--s"
    file.close()


def test_engines_get_copies_and_hold_no_lease_afterwards(server: ServerThread, tmp_path: Path) -> None:
    files = [str(tmp_path / "a.safetensors")]
    got = dict(weights_of(files, device="cuda:0", socket_path=server.socket_path))
    got["w"].add_(1)
    gc.collect()
    assert server.gauges("cuda:0")["leases"] == 0
    assert_same(dict(weights_of(files, device="cuda:0", socket_path=server.socket_path)), WEIGHTS)


def test_a_forked_child_calls_nothing_of_the_drivers_and_keeps_no_lease(
    server: ServerThread, driver: cu.Driver
) -> None:
    """It lets go of what it inherited, and lives on."""
    held = [attach("m", socket_path=server.socket_path)]
    dropped = attach("m", socket_path=server.socket_path)
    del dropped
    gc.collect()
    device = CudaDevice(0, driver=driver)
    before = calls(driver, "cuCtxPushCurrent_v2")
    out_read, out_write = os.pipe()
    hold_read, hold_write = os.pipe()
    child = os.fork()
    if not child:
        try:
            held.clear()
            gc.collect()
            try:
                device.memory()
            except DeviceError as error:
                os.write(out_write, f"{calls(driver, 'cuCtxPushCurrent_v2') - before} calls; {error}".encode())
            os.close(hold_write)
            os.read(hold_read, 1)
        finally:
            os._exit(0)
    os.close(hold_read)
    os.close(out_write)
    assert os.read(out_read, 1000).startswith(b"0 calls; CUDA does not survive a fork")
    assert_same(held[0], WEIGHTS)
    held.clear()
    gc.collect()
    let_go()
    assert server.gauges("cuda:0")["leases"] == 0, "the child has the lease"
    os.close(hold_write)
    os.waitpid(child, 0)
    os.close(out_read)


def test_a_card_that_one_process_may_use_is_no_place_for_an_arena(
    process: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_COMPUTE_MODE", "3")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    device = CudaDevice(0, driver=process())
    with pytest.raises(DeviceError, match=rf"cuda:0 \({device.identity}\) is in exclusive-process mode.*-c DEFAULT"):
        device.create_arena(device.granule_bytes)
    (tmp_path / "control").touch()
    assert cards.mps_is_there()
    device.create_arena(device.granule_bytes).close()


def test_a_lost_card_ends_the_server_with_its_reason(process: Processes, config: ServerConfig, tmp_path: Path) -> None:
    own = process()
    file = write(tmp_path / "a.safetensors", WEIGHTS)

    def serving() -> None:
        with running_server(on_cuda(config), lambda _: CudaDevice(0, driver=own)) as server:
            fail(own, 700)
            with pytest.raises(DeviceLostError, match="can no longer use the card"):
                load_resident(file, "m", "cuda:0", socket_path=server.socket_path)

    with pytest.raises(DeviceLostError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        serving()


def test_a_card_that_is_lost_while_nobody_asks_ends_the_server(
    process: Processes, config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "HEALTH_S", 0.01)
    own = process()

    def serving() -> None:
        with running_server(on_cuda(config), lambda _: CudaDevice(0, driver=own)) as server:
            fail(own, 214)
            assert server.ended.wait(60)

    with pytest.raises(DeviceLostError, match=r"CUDA_ERROR_ECC_UNCORRECTABLE \(214\)"):
        serving()


def test_the_process_ends_so_that_the_card_is_free(compiled: Path, tmp_path: Path) -> None:
    """A copy fails in the middle of a load; the command says why, and exits."""
    socket_path = str(tmp_path / "s.sock")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(compiled.parent), "STANDIN_STICKY": "719@1"}
    command = [sys.executable, "-m", "gpuload", "serve", "--arena", "cuda:0=64M", "--socket", socket_path]
    command += ["--digests", str(tmp_path / "digests")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stderr is not None
            assert "serving at" in serving.stderr.readline()
            with pytest.raises(DeviceLostError, match="CUDA_ERROR_LAUNCH_FAILED"):
                load_resident(write(tmp_path / "a.safetensors", WEIGHTS), "m", "cuda:0", socket_path=socket_path)
            _, said = serving.communicate(timeout=60)
            assert serving.returncode == 1
            assert "CUDA_ERROR_LAUNCH_FAILED (719)" in said
            assert "Traceback" not in said
            assert not os.path.exists(socket_path)
        finally:
            serving.kill()


def rights_at(address: int) -> str:
    """'r--s', 'rw-p': what this process may do there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[1]
    return ""
