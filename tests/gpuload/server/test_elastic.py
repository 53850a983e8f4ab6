"""Arenas that take memory when models need it, give it back, and are made smaller and larger while they serve."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import Attached, attach
from gpuload.device.base import Arena, Holder, Memory, Run
from gpuload.device.host import HostArena, HostDevice
from gpuload.errors import BusyError, FitError
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, assert_same, random_tensors, running_server, write
from mfs.errors import UsageError

UNIT = 4096
MODEL = {"w": (32, 2048)}  # 128 KiB in BF16: 32 granules
GRANULES = 100


class Shared(HostDevice):
    """A device whose memory somebody else takes a part of, in granules."""

    def __init__(self, name: str = "cpu", total: int = 256) -> None:
        super().__init__(name=name, granule_bytes=UNIT)
        self.total, self.others, self.arena_bytes = total, 0, 0
        self.has_started, self.asked = False, threading.Event()

    def memory(self) -> Memory:
        if not self.has_started:  # the server's buffers are in host memory too
            return Memory(1 << 30, 1 << 30)
        self.asked.set()
        return Memory(self.total * UNIT, max(0, (self.total - self.others) * UNIT - self.arena_bytes))

    def reserve_arena(self, nbytes: int, shared: int | None = None) -> HostArena:
        self.has_started = True
        return _Counted(nbytes, self)

    def holders(self) -> Sequence[Holder]:
        return [Holder(os.getppid(), self.others * UNIT)] if self.others else []


class _Counted(HostArena):
    def __init__(self, nbytes: int, device: Shared) -> None:
        super().__init__(nbytes, UNIT)
        self._device = device

    def commit(self, runs: Sequence[Run]) -> None:
        if sum(n for _, n in runs) * UNIT > self._device.memory().free_bytes:
            raise FitError("somebody was quicker", shortfall_bytes=1, waits=True)
        super().commit(runs)
        self._device.arena_bytes += sum(n for _, n in runs) * UNIT

    def release(self, runs: Sequence[Run]) -> None:
        super().release(runs)
        self._device.arena_bytes -= sum(n for _, n in runs) * UNIT


@pytest.fixture
def device() -> Shared:
    return Shared()


@pytest.fixture
def server(config: ServerConfig, small_granules: None, device: Shared) -> Iterator[ServerThread]:
    with running_server(replace(config, arena_bytes={"cpu": GRANULES * UNIT}), lambda _: device) as running:
        yield running


def made(folder: Path, seed: int) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = random_tensors(seed, MODEL)
    return write(folder / f"{seed}.safetensors", tensors), tensors


def load(server: ServerThread, path: Path, model: str, **options: Any) -> dict[str, Any]:
    reply: dict[str, Any] = load_resident(path, model, "cpu", socket_path=server.socket_path, options=options)
    return reply


def resize(server: ServerThread, granules: int, **options: Any) -> dict[str, Any]:
    return ask({"op": "resize", "device": "cpu", "bytes": granules * UNIT, **options}, socket_path=server.socket_path)


def sizes(server: ServerThread) -> tuple[int, int, int]:
    """Budget, committed and used, in granules."""
    server.settle()
    found = ask({"op": "status"}, socket_path=server.socket_path)["devices"][0]
    return tuple(found[f"arena_{n}bytes"] // UNIT for n in ("", "committed_", "used_"))  # type: ignore[return-value]


def test_memory_is_taken_for_models_and_goes_with_them(server: ServerThread, device: Shared, tmp_path: Path) -> None:
    (one, want), (two, _) = made(tmp_path, 1), made(tmp_path, 2)
    assert sizes(server) == (GRANULES, 0, 0)
    assert device.arena_bytes == 0, "an engine beside it may have all of the card"
    load(server, one, "one")
    load(server, two, "two")
    assert sizes(server) == (GRANULES, 64, 64)
    ask({"op": "unload", "model": "two"}, socket_path=server.socket_path)
    assert device.arena_bytes == 32 * UNIT, "before the answer, not some time after it"
    held = attach("one", socket_path=server.socket_path)
    ask({"op": "unload", "model": "one"}, socket_path=server.socket_path)
    assert sizes(server) == (GRANULES, 32, 32)
    assert_same(held, want)
    del held
    gc.collect()
    assert sizes(server) == (GRANULES, 0, 0)
    assert device.arena_bytes == 0


def test_a_floor_is_kept_from_the_start(config: ServerConfig, small_granules: None, tmp_path: Path) -> None:
    device = Shared()
    config = replace(config, arena_bytes={"cpu": GRANULES * UNIT}, floor_bytes={"cpu": 40 * UNIT})
    with running_server(config, lambda _: device) as server:
        assert sizes(server) == (GRANULES, 40, 0)
        load(server, made(tmp_path, 1)[0], "one")
        load(server, made(tmp_path, 2)[0], "two")
        assert sizes(server) == (GRANULES, 64, 64)
        for name in ("one", "two"):
            ask({"op": "unload", "model": name}, socket_path=server.socket_path)
        assert sizes(server) == (GRANULES, 40, 0)
        assert resize(server, 10)["arena_floor_bytes"] == 10 * UNIT, "a budget below the floor binds"
        assert sizes(server) == (10, 10, 0)
        resize(server, GRANULES)
        assert sizes(server) == (GRANULES, 40, 0)
        resize(server, GRANULES, floor_bytes=0)
        assert sizes(server) == (GRANULES, 0, 0)


def test_an_arena_is_made_smaller_by_evicting_only_if_that_is_said(
    server: ServerThread, device: Shared, tmp_path: Path
) -> None:
    for seed, name in enumerate("abc"):
        load(server, made(tmp_path, seed)[0], name)
    attach("a", socket_path=server.socket_path)  # used last
    gc.collect()
    before = sizes(server)
    with pytest.raises(FitError, match=r"256 K would do without b: say --evict"):
        resize(server, 64)
    held = attach("c", socket_path=server.socket_path)
    with pytest.raises(FitError, match=r"128 K would stay after evicting .*leased 128 K.*nothing was evicted"):
        resize(server, 31, evict=True)
    assert sizes(server) == before == (GRANULES, 96, 96)
    answer = resize(server, 70, evict=True)
    assert answer["evicted"] == ["b"]
    assert (answer["arena_bytes"], answer["arena_committed_bytes"]) == (70 * UNIT, 64 * UNIT)
    assert device.arena_bytes == 64 * UNIT
    del held
    gc.collect()
    server.settle()
    assert resize(server, 0, evict=True)["arena_committed_bytes"] == 0
    with pytest.raises(FitError, match=r"the arena has 0 B"):
        load(server, made(tmp_path, 1)[0], "b")
    with pytest.raises(UsageError, match=r"was started with 400 K, which is the most"):
        resize(server, GRANULES + 1)
    resize(server, GRANULES)
    load(server, made(tmp_path, 1)[0], "b")


def test_nobody_is_evicted_and_nothing_moves_for_memory_that_others_hold(
    server: ServerThread, device: Shared, tmp_path: Path
) -> None:
    load(server, made(tmp_path, 1)[0], "a")
    held = attach("a", socket_path=server.socket_path)
    device.others = device.total - 40  # 8 are left
    with pytest.raises(
        FitError,
        match=r"needs 128 K on cpu: the arena may have 400 K and has 128 K, but others hold the device's memory; "
        r"could be had 32\.0 K, .*short by 96\.0 K; nothing was evicted; cpu: others hold 864 K of 1\.0 M: "
        r"\S.* \(\d+\) 864 K",
    ) as caught:
        load(server, made(tmp_path, 2)[0], "b")
    assert caught.value.shortfall_bytes == 24 * UNIT
    assert sizes(server) == (GRANULES, 32, 32)
    del held
    gc.collect()
    server.settle()
    assert load(server, made(tmp_path, 2)[0], "b")["report"]["evicted"] == ["a"], "its memory will do"
    assert sizes(server) == (GRANULES, 32, 32)


def test_memory_is_waited_for(server: ServerThread, device: Shared, tmp_path: Path) -> None:
    device.others = device.total
    path, want = made(tmp_path, 1)
    waiting = threading.Thread(target=load, args=(server, path, "a"), kwargs={"wait_s": 60})
    waiting.start()
    device.asked.wait(60)
    device.others = 0
    waiting.join()
    assert_same(attach("a", socket_path=server.socket_path), want)
    device.others = device.total - 32
    held = attach("a", socket_path=server.socket_path)
    with pytest.raises(FitError, match=r"waited 1 s; cpu: others hold 896 K"):
        load(server, made(tmp_path, 2)[0], "b", wait_s=0.6)
    with pytest.raises(FitError, match=r"the floor of cpu lacks 272 K: .*; waited 1 s; others hold 896 K"):
        resize(server, GRANULES, floor_bytes=GRANULES * UNIT, wait_s=0.6)
    assert_same(held, want)


def test_a_commit_that_fails_changes_nothing(server: ServerThread, device: Shared, tmp_path: Path) -> None:
    """The device said that it had memory, and had not when it was asked for it."""
    load(server, made(tmp_path, 1)[0], "a")
    arena: Arena = server.sites["cpu"].arena
    commit, arena.commit = arena.commit, _refuse  # type: ignore[method-assign]
    with pytest.raises(FitError, match="somebody was quicker"):
        load(server, made(tmp_path, 2)[0], "b")
    assert sizes(server) == (GRANULES, 32, 32)
    arena.commit = commit  # type: ignore[method-assign]
    load(server, made(tmp_path, 2)[0], "b")


def _refuse(runs: Sequence[Run]) -> None:
    raise FitError("somebody was quicker", shortfall_bytes=1, waits=True)


@pytest.mark.parametrize(
    "wrong", [{"bytes": -1}, {"bytes": "1G"}, {"bytes": 1 << 70}, {"floor_bytes": GRANULES * UNIT + 1}, {"wait_s": 1e9}]
)
def test_what_resize_is_told_wrongly(server: ServerThread, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ask({"op": "resize", "device": "cpu", "bytes": GRANULES * UNIT, **wrong}, socket_path=server.socket_path)
    assert sizes(server) == (GRANULES, 0, 0)


def random_swaps(server: ServerThread, device: Shared, folder: Path, operations: int) -> dict[str, int]:
    """Swaps, attaches, resizes, others who take memory and give it back; what is committed is what models hold."""
    chance = random.Random(operations)
    models = [made(folder, seed) for seed in range(5)]
    leases: list[tuple[Attached, dict[str, torch.Tensor]]] = []
    seen = dict.fromkeys(("swapped", "refused", "resized", "not resized", "evicted"), 0)
    for _ in range(operations):
        name, (path, tensors) = chance.choice("ab"), chance.choice(models)
        device.others = chance.choice((0, 0, 0, 180, 200, 240))
        if chance.random() < 0.3:
            try:
                seen["evicted"] += len(resize(server, chance.randrange(GRANULES), evict=True)["evicted"])
                seen["resized"] += 1
            except FitError:
                seen["not resized"] += 1
            continue
        if chance.random() < 0.5:
            resize(server, GRANULES)
        try:
            load_resident(path, name, "cpu", is_swap=True, socket_path=server.socket_path)
        except FitError:
            seen["refused"] += 1
        else:
            seen["swapped"] += 1
            if chance.random() < 0.3:
                leases.append((attach(name, socket_path=server.socket_path), tensors))
                assert_same(*leases[-1])
        del leases[: chance.randrange(3)]
        gc.collect(0)
        budget, committed, used = sizes(server)
        assert used == committed <= budget
        assert device.arena_bytes == committed * UNIT
    leases.clear()
    gc.collect()
    return seen


def test_no_memory_is_left_by_random_swaps(server: ServerThread, device: Shared, tmp_path: Path) -> None:
    seen = random_swaps(server, device, tmp_path, 150)
    assert min(seen.values()) > 0, f"something was never seen: {seen}"
    assert resize(server, 0, evict=True)["arena_committed_bytes"] == 0
    assert set(server.gauges().values()) == {0}
    assert device.arena_bytes == 0
    fds = server.sites["cpu"].arena.export([(0, 1)])
    assert os.fstat(fds[0]).st_blocks == 0
    os.close(fds[0])


def test_memory_that_came_for_a_load_that_is_refused_elsewhere_goes_back(
    config: ServerConfig, small_granules: None, tmp_path: Path
) -> None:
    """Nothing was freed then, but neither is it anybody's."""
    devices = {name: Shared(name) for name in ("cpu", "cpu:1")}
    config = replace(config, arena_bytes=dict.fromkeys(devices, GRANULES * UNIT), linger_s=0.0)
    path = write(tmp_path / "both.safetensors", random_tensors(1, {"a.w": (32, 2048), "b.w": (32, 2048)}))
    with running_server(config, devices.__getitem__) as server:
        came = threading.Event()

        def refuse(runs: Sequence[Run]) -> None:
            if devices["cpu"].arena_bytes:
                came.set()
            raise FitError("somebody was quicker", shortfall_bytes=1, waits=True)

        server.sites["cpu:1"].arena.commit = refuse  # type: ignore[method-assign]
        with pytest.raises(FitError, match="somebody was quicker"):
            load_resident(
                path, "m", None, socket_path=server.socket_path, options={"device_map": {"a": "cpu", "b": "cpu:1"}}
            )
        assert came.is_set(), "memory for the first part was there"
        server.settle()
        assert devices["cpu"].arena_bytes == 0


def test_two_who_see_that_memory_lacks_take_it_once(server: ServerThread) -> None:
    """Both wait while memory comes or goes, and what the first had made is there when it is the second's turn."""
    changing, errors = server.sites["cpu"]._changing, list[BaseException]()

    def ask_for_a_floor() -> None:
        try:
            resize(server, GRANULES, floor_bytes=40 * UNIT)
        except BaseException as error:
            errors.append(error)

    server.on_loop(changing.acquire_nowait)
    threads = [threading.Thread(target=ask_for_a_floor) for _ in range(2)]
    for thread in threads:
        thread.start()
    while server.on_loop(changing.statistics).tasks_waiting < len(threads):
        assert not errors
        server.settle()
    server.on_loop(changing.release)
    for thread in threads:
        thread.join()
    assert not errors
    assert sizes(server) == (GRANULES, 40, 0)


def test_what_is_still_copied_out_is_not_given_back_and_ends_nobody(server: ServerThread, tmp_path: Path) -> None:
    site = server.sites["cpu"]
    load(server, made(tmp_path, 1)[0], "one")

    def refuse(runs: Sequence[Run]) -> None:
        raise BusyError("it did not leave")

    site._release = refuse  # type: ignore[method-assign]
    ask({"op": "unload", "model": "one"}, socket_path=server.socket_path)
    assert sizes(server) == (GRANULES, 32, 0)
    del site._release
    resize(server, GRANULES)
    assert sizes(server) == (GRANULES, 0, 0)
