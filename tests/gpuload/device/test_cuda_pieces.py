"""A card's memory comes in pieces, one for each block of a model: what is free in other shapes is made anew.

On stand-in drivers, where memory that went back is not mapped any more: whoever writes there too late, or reads too
early, ends the test. No GPU is involved.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import attach, let_go
from gpuload.device import driver as cu
from gpuload.device.cuda import CudaDevice
from gpuload.errors import DeviceError, FitError
from gpuload.moving.source import FileSource
from gpuload.server import leaving, ram_tier, site, turns
from gpuload.server.daemon import ServerConfig
from gpuload.server.granules import PIECE_COUNT
from gpuload.testing import ServerThread, assert_same, random_tensors, running_server, write
from tests.gpuload.device.conftest import Processes, calls

UNIT = 65536
EXPORT, CREATE, IMPORT = "cuMemExportToShareableHandle", "cuMemCreate", "cuMemImportFromShareableHandle"

Tensors = dict[str, torch.Tensor]


def content(seed: int, *granules: int) -> Tensors:
    """Tensors that are blocks of so many granules, each its own."""
    return random_tensors(seed, {f"w{i}": (count * UNIT - 100,) for i, count in enumerate(granules)}, "U8")


@pytest.fixture
def driver(process: Processes) -> cu.Driver:
    """The server's."""
    return process()


@pytest.fixture
def client(process: Processes, be_client: Callable[[cu.Driver], None], monkeypatch: pytest.MonkeyPatch) -> cu.Driver:
    monkeypatch.setattr(CudaDevice.__init__, "__kwdefaults__", {"granule_bytes": UNIT, "driver": None})
    made = process()
    be_client(made)
    return made


class Life:
    """A server with one card."""

    def __init__(self, server: ServerThread, folder: Path) -> None:
        self.server, self.folder = server, folder

    def load(self, name: str, tensors: Tensors, **options: Any) -> dict[str, Any]:
        file = self.folder / f"{len(list(self.folder.glob('*.safetensors')))}.safetensors"
        reply = load_resident(write(file, tensors), name, "cuda:0", socket_path=self.server.socket_path, **options)
        report: dict[str, Any] = reply["report"]
        return report

    def again(self, number: int, name: str) -> dict[str, Any]:
        file = self.folder / f"{number}.safetensors"
        report: dict[str, Any] = load_resident(file, name, "cuda:0", socket_path=self.server.socket_path)["report"]
        return report

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        return ask({"op": op, **request}, socket_path=self.server.socket_path)

    def check(self, name: str, tensors: Tensors) -> None:
        assert_same(attach(name, socket_path=self.server.socket_path), tensors)
        gc.collect()
        let_go()

    def runs(self, name: str) -> list[int]:
        """Granules of each of its pieces."""
        (part,) = self.server.sites["cuda:0"].catalog.models[name].parts
        return [count for block in part.blocks for _, count in block.runs]

    def sizes(self) -> tuple[int, int]:
        """Committed and used, in granules."""
        (one,) = self.ask("status")["devices"]
        return one["arena_committed_bytes"] // UNIT, one["arena_used_bytes"] // UNIT


@pytest.fixture
def open_card(driver: cu.Driver, client: cu.Driver) -> Callable[[str], CudaDevice]:
    return lambda _: CudaDevice(0, granule_bytes=UNIT, driver=driver)


def of(config: ServerConfig, granules: int, floor: int = 0, **options: Any) -> ServerConfig:
    return replace(
        config,
        arena_bytes={"cuda:0": granules * UNIT},
        floor_bytes={"cuda:0": floor * UNIT} if floor else {},
        **options,
    )


def test_a_block_is_made_handed_out_and_mapped_by_one_call_each(
    config: ServerConfig, tmp_path: Path, driver: cu.Driver, client: cu.Driver, open_card: Callable[[str], CudaDevice]
) -> None:
    with running_server(of(config, 60), open_card) as server:
        life = Life(server, tmp_path)
        made = content(1, 11, 20, 9)
        life.load("m", made)
        assert (sorted(life.runs("m")), calls(driver, CREATE)) == ([9, 11, 20], 3)
        for _ in range(3):
            life.check("m", made)
        assert calls(client, IMPORT) == 9
        assert calls(driver, EXPORT) == 3, "descriptors are kept: who attaches gets copies"


@pytest.mark.parametrize("floor", [0, 60])
def test_memory_that_is_free_in_other_shapes_is_made_anew(
    config: ServerConfig, tmp_path: Path, open_card: Callable[[str], CudaDevice], floor: int
) -> None:
    with running_server(of(config, 60, floor), open_card) as server:
        life = Life(server, tmp_path)
        for seed, shape in enumerate([(8, 9, 10, 11), (30, 29), (9, 9, 9, 9, 9, 9), (59,), (10, 11, 8)]):
            made = content(seed, *shape)
            life.load("m", made, is_swap=True, options={"allow_gap": True})
            assert sorted(life.runs("m")) == sorted(shape)
            life.check("m", made)
            committed, used = life.sizes()
            assert used == sum(shape)
            assert max(used, floor) <= committed <= 60
        life.ask("unload", model="m")
        committed, used = life.sizes()
        assert (used, floor <= committed < floor + PIECE_COUNT) == (0, True)
        life.ask("resize", bytes=21 * UNIT, floor_bytes=min(floor, 21) * UNIT)
        assert life.sizes() == (min(floor, 21), 0)


def test_memory_that_others_take_at_that_moment_fails_the_load_and_nothing_else(
    config: ServerConfig,
    tmp_path: Path,
    open_card: Callable[[str], CudaDevice],
    driver: cu.Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site, "AGAIN_S", 0.3)
    with running_server(of(config, 60), open_card) as server:
        life = Life(server, tmp_path)
        kept = content(1, 12)
        life.load("kept", kept)
        life.ask("pin", model="kept")
        life.load("victim", content(2, 40))
        real, refused = driver.number, list[int]()

        def number(name: str, *args: Any) -> int:
            if name == CREATE and len(refused) < 100:
                refused.append(1)
                raise DeviceError("cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY (2)", code=cu.ERROR_OUT_OF_MEMORY)
            return real(name, *args)

        new = content(3, 15, 20)
        with monkeypatch.context() as patch:
            patch.setattr(driver, "number", number)
            with pytest.raises(FitError, match="OUT_OF_MEMORY"):
                life.load("new", new)
        assert len(refused) > 1, "it is tried again for a while"
        life.check("kept", kept)
        assert life.sizes()[1] == 12
        life.load("victim", content(2, 40))
        refused[:] = [1] * 99  # one more, and it is there
        with monkeypatch.context() as patch:
            patch.setattr(driver, "number", number)
            life.load("new", new)
        life.check("new", new)
        for name in ("kept", "new"):
            life.ask("unload", model=name)
        assert life.sizes() == (0, 0)
        assert set(server.gauges("cuda:0").values()) == {0}


@pytest.fixture
def small_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram_tier, "SLAB_BYTES", 1 << 18)
    monkeypatch.setattr(ram_tier, "SLOT_BYTES", 1 << 16)
    monkeypatch.setattr(leaving, "COPY_BYTES", 1 << 17)


def test_what_is_evicted_leaves_before_its_memory_takes_another_shape(
    config: ServerConfig, tmp_path: Path, open_card: Callable[[str], CudaDevice], small_tier: None
) -> None:
    shapes = [(9, 21, 12), (40,), (8, 9, 10, 11)]
    with running_server(of(config, 43, 43, ram_tier_bytes=16 << 20), open_card) as server:
        life = Life(server, tmp_path)
        tier = server.sites["cuda:0"].tier
        assert tier is not None
        while tier.locked_bytes < tier.nbytes:
            server.settle()
        made = [content(seed, *shape) for seed, shape in enumerate(shapes)]
        for number, tensors in enumerate(made):
            life.load(f"m{number}", tensors)
        for number in (0, 1, 2, 1, 0):
            report = life.again(number, f"m{number}")
            assert report["bytes_from_ram"] == report["bytes_total"]
            life.check(f"m{number}", made[number])


def test_two_loads_reshape_one_card_at_once(
    config: ServerConfig,
    tmp_path: Path,
    open_card: Callable[[str], CudaDevice],
    driver: cu.Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One stands aside while its memory is made anew, and another needs the same memory in other shapes: each gets its
    own, and neither is written over the other."""
    monkeypatch.setattr(turns, "STALL_S", 0.05)
    made = {"first": content(3, 13, 17), "second": content(4, 9, 12, 8)}
    reads, gives, makes, goes = threading.Event(), threading.Event(), threading.Event(), threading.Event()
    read_into, number = FileSource.read_into, driver.number

    def read(self: FileSource, shard: int, start: int, views: Any) -> None:
        if "3.safetensors" in self._shards[shard].path:
            reads.set()
            assert gives.wait(60)
        read_into(self, shard, start, views)

    def slowly(name: str, *args: Any) -> Any:
        if name == CREATE and not makes.is_set():
            makes.set()
            assert goes.wait(60)
        return number(name, *args)

    monkeypatch.setattr(FileSource, "read_into", read)
    with running_server(of(config, 60, 60), open_card) as server, ThreadPoolExecutor(2) as threads:
        life, site = Life(server, tmp_path), server.sites["cuda:0"]
        files = [write(tmp_path / f"{i}.safetensors", made[name]) for i, name in ((3, "first"), (4, "second"))]

        def load(file: Path, name: str) -> dict[str, Any]:
            reply: dict[str, Any] = load_resident(file, name, "cuda:0", socket_path=server.socket_path)
            return reply

        monkeypatch.setattr(driver, "number", slowly)
        try:
            first = threads.submit(load, files[0], "first")
            assert reads.wait(60)
            assert makes.wait(60)
            second = threads.submit(load, files[1], "second")
            until = time.monotonic() + 60
            while not site.aside_count and time.monotonic() < until:
                time.sleep(0.01)
            assert site.aside_count == 1
        finally:
            goes.set()
        assert second.result(60)["report"]["bytes_copied"] > 0
        assert not first.done()
        gives.set()
        assert first.result(60)["model"] == "first"
        for name, tensors in made.items():
            assert sorted(life.runs(name)) == sorted(len(t) // UNIT + 1 for t in tensors.values())
            life.check(name, tensors)
            life.ask("unload", model=name)
        life.ask("resize", bytes=60 * UNIT, floor_bytes=0)
        assert life.sizes() == (0, 0)
        assert set(server.gauges("cuda:0").values()) == {0}


def test_loads_that_reshape_one_card_at_once_at_random(
    config: ServerConfig,
    tmp_path: Path,
    open_card: Callable[[str], CudaDevice],
    driver: cu.Driver,
    small_tier: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three at a time, of files that give late: what is served is what was loaded, and no memory is lost."""
    monkeypatch.setattr(turns, "STALL_S", 0.01)
    chance, read_into, asides = random.Random(11), FileSource.read_into, list[int]()

    def late(self: FileSource, shard: int, start: int, views: Any) -> None:
        time.sleep(chance.choice([0, 0, 0.05, 0.1]))
        read_into(self, shard, start, views)

    step_aside = turns.Turns._step_aside

    async def counted(self: turns.Turns) -> None:
        asides.append(1)
        await step_aside(self)

    monkeypatch.setattr(FileSource, "read_into", late)
    monkeypatch.setattr(turns.Turns, "_step_aside", counted)
    made = [content(seed, *(chance.randrange(8, 20) for _ in range(chance.randrange(1, 4)))) for seed in range(9)]
    files = [write(tmp_path / f"{number}.safetensors", tensors) for number, tensors in enumerate(made)]
    plans = {name: [chance.randrange(len(made)) for _ in range(12)] for name in "abc"}
    with running_server(of(config, 100, ram_tier_bytes=8 << 20), open_card) as server:

        def swap(name: str) -> dict[str, int]:
            """Which digests it saw under the name, and of which file each is."""
            seen = {}
            for number in plans[name]:
                with suppress(FitError):
                    found = load_resident(files[number], name, "cuda:0", is_swap=True, socket_path=server.socket_path)
                    seen[found["digest"]] = number
            return seen

        with ThreadPoolExecutor(3) as threads:
            digests = dict(pair for seen in threads.map(swap, plans) for pair in seen.items())
        assert asides, "nobody stood aside"
        assert len(digests) > 5
        life = Life(server, tmp_path)
        for model in life.ask("status")["devices"][0]["models"]:
            life.check(model["model"], made[digests[model["digest"]]])
            life.ask("unload", model=model["model"])
        assert life.sizes() == (0, 0)
        assert set(server.gauges("cuda:0").values()) == {0}
        granules = server.sites["cuda:0"].catalog.granules
        assert granules.absent_runs() == [(0, granules.count)], "no address is lost"
    assert calls(driver, CREATE) == calls(driver, "cuMemRelease")


STEPS = 150
"""10,000, by hand, went as well (decisions/0009)."""


def test_random_swaps_of_random_shapes(
    config: ServerConfig,
    tmp_path: Path,
    open_card: Callable[[str], CudaDevice],
    driver: cu.Driver,
    client: cu.Driver,
    small_tier: None,
) -> None:
    chance = random.Random(5)
    made = [content(seed, *(chance.randrange(8, 20) for _ in range(chance.randrange(1, 4)))) for seed in range(9)]
    seen = dict.fromkeys(("swapped", "refused", "resized", "attached"), 0)
    with running_server(of(config, 100, ram_tier_bytes=8 << 20), open_card) as server:
        life, served = Life(server, tmp_path), dict[str, int]()
        held: list[tuple[Any, int]] = []
        for number, tensors in enumerate(made):
            write(tmp_path / f"{number}.safetensors", tensors)
        for _ in range(STEPS):
            name, number = chance.choice("abc"), chance.randrange(len(made))
            try:
                file = tmp_path / f"{number}.safetensors"
                where = {"socket_path": server.socket_path}
                report = load_resident(file, name, "cuda:0", is_swap=True, **where)["report"]
            except FitError:
                seen["refused"] += 1
            else:
                seen["swapped"] += 1
                served = {n: m for n, m in served.items() if n not in report["evicted"]} | {name: number}
            if chance.random() < 0.3 and served:
                name = chance.choice(sorted(served))
                held.append((attach(name, socket_path=server.socket_path), served[name]))
                seen["attached"] += 1
            del held[: chance.choice([0, 0, 1, 3])]
            if chance.random() < 0.1:
                gc.collect(0)
                let_go()
            if chance.random() < 0.2:
                most = chance.choice([60, 80, 100])
                try:
                    life.ask("resize", bytes=most * UNIT, floor_bytes=chance.choice([0, 15, most]) * UNIT, evict=True)
                    seen["resized"] += 1
                except FitError:
                    seen["refused"] += 1
                else:
                    served = {m["model"]: served[m["model"]] for m in life.ask("status")["devices"][0]["models"]
                              if m["model"]}  # fmt: skip
                    committed, used = life.sizes()
                    assert used <= committed <= most
            if held:
                assert_same(held[-1][0], made[held[-1][1]])
        assert min(seen.values()) > 0, f"something was never seen: {seen}"
        held.clear()
        gc.collect()
        let_go()
        life.ask("resize", bytes=100 * UNIT, floor_bytes=0)
        for name, number in served.items():
            life.check(name, made[number])
            life.ask("unload", model=name)
        assert life.sizes() == (0, 0)
        assert set(server.gauges("cuda:0").values()) == {0}
        granules = server.sites["cuda:0"].catalog.granules
        assert granules.absent_runs() == [(0, granules.count)], "no address is lost"
    assert calls(client, IMPORT) == calls(client, "cuMemRelease")
    assert calls(driver, CREATE) == calls(driver, "cuMemRelease")
