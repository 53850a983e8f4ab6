"""Swaps by the hundred, beside programs that refresh, that lag behind, and that leave: no room is lost to anybody."""

from __future__ import annotations

import ctypes
import gc
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import Attached, attach, let_go
from gpuload.device import driver as cu
from gpuload.device.cuda import CudaDevice
from gpuload.device.host import HostDevice
from gpuload.errors import FitError
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, bits, random_tensors, running_server, write
from tests.gpuload.device.conftest import Processes, be_client, calls, capture, compiled, process

__all__ = ["be_client", "compiled", "process"]  # fixtures

CONTENTS, BLOCKS = 8, 4
LAGGARDS_MAX = 4
SWAPS = 300
"""A thousand, by hand, went as well; each takes some 20 ms."""


class Life:
    """One server, a name whose content is swapped all the time, and some programs that hold it."""

    def __init__(self, server: ServerThread, device: str, folder: Path, granule_bytes: int, seed: int) -> None:
        self.server, self.device, self.chance = server, device, random.Random(seed)
        # eight granules and more are a block; the contents share some of theirs
        rows = {f"w{i}": (9 * granule_bytes // 2,) for i in range(BLOCKS)}
        made = [
            {
                name: random_tensors(10 * i + self.chance.randrange(5), {name: shape})[name]
                for i, (name, shape) in enumerate(rows.items())
            }
            for _ in range(CONTENTS)
        ]
        self.files = [write(folder / f"{i}.safetensors", tensors) for i, tensors in enumerate(made)]
        self.wanted = [{name: bits(tensor) for name, tensor in tensors.items()} for tensors in made]
        self.now = 0
        self.programs: list[tuple[Attached, dict[str, tuple[int, int]]]] = []
        self.shown: list[int] = []
        self.seen = dict.fromkeys(("swap", "refused", "refresh", "attach", "leave", "prepared"), 0)
        self.swap(0)

    def swap(self, to: int) -> None:
        load_resident(self.files[to], "m", self.device, is_swap=True, socket_path=self.server.socket_path)
        self.now = to
        self.seen["swap"] += 1

    def refresh(self, which: int) -> None:
        held, captured = self.programs[which]
        held.refresh()
        self.shown[which] = self.now
        assert {n: ctypes.string_at(at, size) for n, (at, size) in captured.items()} == self.wanted[self.now]
        self.seen["refresh"] += 1

    def step(self) -> None:
        to = self.chance.randrange(CONTENTS)
        try:
            self.swap(to)
        except FitError as error:
            if "old generations still hold" not in str(error):
                raise
            self.seen["refused"] += 1
            for which in range(len(self.programs)):
                self.refresh(which)
            self.server.settle()
            self.swap(to)  # there is room, always, once nobody lags behind
        which = self.chance.randrange(LAGGARDS_MAX)
        if which >= len(self.programs):
            held = attach("m", socket_path=self.server.socket_path)
            self.programs.append((held, {n: (t.data_ptr(), t.nbytes) for n, t in held.items()}))
            self.shown.append(self.now)
            self.seen["attach"] += 1
            return
        match self.chance.choice(["refresh", "refresh", "lag", "lag", "leave", "prepared"]):
            case "refresh":
                self.refresh(which)
            case "prepared":
                self.programs[which][0].prepare().close()
                self.seen["prepared"] += 1
            case "leave" if self.chance.random() < 0.3:
                del self.programs[which], self.shown[which]
                let_go()
                self.seen["leave"] += 1
        for (_, captured), content in zip(self.programs, self.shown, strict=True):
            name, (at, size) = self.chance.choice(list(captured.items()))
            assert ctypes.string_at(at, size) == self.wanted[content][name], "a laggard keeps what it had"

    def end(self) -> None:
        assert min(self.seen.values()) > 0, f"something was never seen: {self.seen}"
        self.programs.clear()
        gc.collect()
        let_go()
        ask({"op": "unload", "model": "m"}, socket_path=self.server.socket_path)
        assert set(self.server.gauges(self.device).values()) == {0}


def test_swaps_beside_laggards(config: ServerConfig, small_granules: None, tmp_path: Path) -> None:
    config = replace(config, arena_bytes={"cpu": 75 * 4096})
    with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
        life = Life(server, "cpu", tmp_path, 4096, 7)
        while life.seen["swap"] < SWAPS:
            life.step()
        life.end()


def test_swaps_on_a_card_that_the_program_numbers_otherwise(
    config: ServerConfig,
    tmp_path: Path,
    process: Processes,
    be_client: Callable[[cu.Driver], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With somebody's capture of a graph between two steps, now and then: what is dropped then does not break it."""
    unit = 65536
    monkeypatch.setattr(CudaDevice.__init__, "__kwdefaults__", {"granule_bytes": unit, "driver": None})
    driver = process(STANDIN_DEVICES=2, CUDA_VISIBLE_DEVICES="1,0")
    be_client(driver)
    own = process(STANDIN_DEVICES=2)
    config = replace(config, arena_bytes={"cuda:0": 75 * unit})
    with running_server(config, lambda _: CudaDevice(0, driver=own)) as server:
        life = Life(server, "cuda:0", tmp_path, unit, 8)
        while life.seen["swap"] < SWAPS // 4:
            life.step()
            if life.programs and life.chance.random() < 0.1:
                ready = life.programs[0][0].prepare()
                capture(driver, 1)
                del ready
                gc.collect(0)
                assert capture(driver, 0) == 1, "the capture was broken"
        life.end()
    assert calls(driver, "cuMemImportFromShareableHandle") == calls(driver, "cuMemRelease")
