"""Other content under the same addresses of a card: pieces that differ are mapped anew, all of them or none.

On stand-in drivers. No GPU is involved.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuload.client.asking import load_resident
from gpuload.client.attached import Attached, attach, let_go
from gpuload.device import driver as cu
from gpuload.device.cuda import CudaDevice
from gpuload.errors import DeviceError
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, assert_same, bits, random_tensors, running_server, write
from tests.gpuload.device.conftest import Processes, calls, capture
from tests.gpuload.device.test_cuda_forbidden import rights_at

UNIT = 65536
SHAPES = {f"w{i}": (300, 1000) for i in range(4)} | {"n": (7,)}
"""600,000 bytes each: a block of ten granules, in one piece; and one granule for what is small."""


def content(*seeds: int) -> dict[str, torch.Tensor]:
    """Of each tensor by its own seed."""
    return {n: random_tensors(seed, {n: SHAPES[n]})[n] for n, seed in zip(SHAPES, seeds, strict=True)}


OLD, NEW, OTHER = content(1, 1, 1, 1, 1), content(1, 2, 1, 1, 1), content(3, 3, 3, 3, 3)


@pytest.fixture
def driver(process: Processes, be_client: Callable[[cu.Driver], None]) -> cu.Driver:
    """The client's, which numbers the cards otherwise than the server."""
    made = process(STANDIN_DEVICES=2, CUDA_VISIBLE_DEVICES="1,0")
    be_client(made)
    return made


@pytest.fixture
def server(
    process: Processes,
    config: ServerConfig,
    tmp_path: Path,
    driver: cu.Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[ServerThread]:
    """With OLD as "m" on its cuda:0, which is the client's cuda:1."""
    monkeypatch.setattr(CudaDevice.__init__, "__kwdefaults__", {"granule_bytes": UNIT, "driver": None})
    own = process(STANDIN_DEVICES=2)
    config = replace(config, arena_bytes={"cuda:0": 200 * UNIT})
    with running_server(config, lambda _: CudaDevice(0, driver=own)) as running:
        serve(running, tmp_path, OLD)
        yield running
        gc.collect()
        let_go()
        assert running.gauges("cuda:0")["leases"] == 0


def handles(driver: cu.Driver) -> int:
    """Pieces that the client holds."""
    return calls(driver, "cuMemImportFromShareableHandle") - calls(driver, "cuMemRelease")


def serve(server: ServerThread, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    number = len(list(folder.glob("*.safetensors")))
    file = write(folder / f"{number}.safetensors", tensors)
    load_resident(file, "m", "cuda:0", is_swap=True, socket_path=server.socket_path)


def graph(attached: Attached) -> Callable[[], dict[str, bytes]]:
    """As a captured graph: it reads at the addresses that were there when it was made."""
    captured = {name: (tensor.data_ptr(), tensor.nbytes) for name, tensor in attached.items()}
    return lambda: {name: ctypes.string_at(at, nbytes) for name, (at, nbytes) in captured.items()}


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def test_a_captured_graph_reads_the_new_bytes(server: ServerThread, driver: cu.Driver, tmp_path: Path) -> None:
    held = attach("m", socket_path=server.socket_path)
    assert held.device == "cuda:1"
    replay, tensors, held_before = graph(held), dict(held), handles(driver)
    serve(server, tmp_path, NEW)
    assert replay() == bytes_of(OLD)
    before = {name: calls(driver, name) for name in ("cuMemMap", "cuMemUnmap", "cuCtxSynchronize", "cuMemSetAccess")}
    assert held.refresh()
    assert replay() == bytes_of(NEW)
    assert_same(tensors, NEW)
    made = {name: calls(driver, name) - count for name, count in before.items()}
    assert made == {"cuMemMap": 1, "cuMemUnmap": 1, "cuCtxSynchronize": 1, "cuMemSetAccess": 1}, "one tensor differs"
    assert (server.gauges("cuda:0")["retired"], server.gauges("cuda:0")["leases"]) == (0, 1)
    assert handles(driver) == held_before, "what is not shown any more is held no more"
    serve(server, tmp_path, OTHER)
    assert held.refresh()
    assert replay() == bytes_of(OTHER)


class Broken:
    """The client's driver, in which a call fails: the n-th of that name from now on, or each of them from then on."""

    def __init__(
        self, driver: cu.Driver, patch: pytest.MonkeyPatch, name: str, number: int, *, for_ever: bool = False
    ) -> None:
        self.count, real = 0, driver.call

        def call(called: str, *args: Any) -> None:
            if called == name:
                self.count += 1
                if self.count == number or (for_ever and self.count > number):
                    raise DeviceError(f"{name} failed, as asked")
            real(called, *args)

        patch.setattr(driver, "call", call)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("cuMemImportFromShareableHandle", 3),
        ("cuCtxSynchronize", 1),
        *(("cuMemUnmap", n) for n in (1, 3, 5)),
        *(("cuMemMap", n) for n in (1, 3, 5)),
        ("cuMemSetAccess", 1),
    ],
)
def test_an_error_in_the_middle_leaves_the_old_content_whole(
    server: ServerThread, driver: cu.Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    held = attach("m", socket_path=server.socket_path)
    replay, generation, held_before = graph(held), held.generation, handles(driver)
    serve(server, tmp_path, OTHER)
    with monkeypatch.context() as patch:
        Broken(driver, patch, name, number)
        with pytest.raises(DeviceError, match="as asked"):
            held.refresh()
    assert replay() == bytes_of(OLD)
    assert (held.generation, server.gauges("cuda:0")["leases"]) == (generation, 1)
    assert handles(driver) == held_before
    assert held.refresh()
    assert replay() == bytes_of(OTHER)


def test_where_there_is_no_way_back_nothing_is_mapped(
    server: ServerThread, driver: cu.Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = attach("m", socket_path=server.socket_path)
    at = held["w0"].data_ptr()
    serve(server, tmp_path, OTHER)
    with monkeypatch.context() as patch:
        Broken(driver, patch, "cuMemMap", 3, for_ever=True)
        with pytest.raises(DeviceError, match=r"lost to this process: a refresh failed .*cuMemMap failed, as asked"):
            held.refresh()
    assert rights_at(at) == "---p"
    with pytest.raises(DeviceError, match="let go of all tensors and attach anew"):
        held.refresh()
    del held


def test_what_is_prepared_and_dropped_waits_for_a_capture_to_end(
    server: ServerThread, driver: cu.Driver, tmp_path: Path
) -> None:
    held = attach("m", socket_path=server.socket_path)
    serve(server, tmp_path, NEW)
    ready = held.prepare()
    capture(driver, 1)
    before = calls(driver, "cuMemRelease")
    del ready
    gc.collect()
    assert capture(driver, 0) == 1, "the capture was broken"
    assert calls(driver, "cuMemRelease") == before
    assert server.gauges("cuda:0")["leases"] == 2
    let_go()
    assert server.gauges("cuda:0")["leases"] == 1
    assert held.refresh()


def test_another_server_of_that_card_is_followed(
    process: Processes, config: ServerConfig, driver: cu.Driver, server: ServerThread, tmp_path: Path
) -> None:
    """Its pieces have the same numbers, and are others."""
    held = attach("m", socket_path=server.socket_path)
    replay = graph(held)
    serve(server, tmp_path, NEW)
    held._held.sock.close()  # as if that server had ended: its lease is over
    held._held.sock = attach("m", socket_path=server.socket_path)._held.sock.dup()
    held._held.shown["parts"][0]["arena"] = "of before"
    before = calls(driver, "cuMemMap")
    assert held.refresh()
    assert calls(driver, "cuMemMap") - before == 5, "all of them"
    assert replay() == bytes_of(NEW)
