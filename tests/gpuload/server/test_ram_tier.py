"""What is evicted from a card waits in page-locked RAM, by content, and comes back without a look at its files."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import attach
from gpuload.client.committed import Identity, commit, committed, restore
from gpuload.device.host import HostDevice, HostStream
from gpuload.device.nodes import on_node
from gpuload.errors import DeviceError, FitError
from gpuload.server import loader, ram_tier
from gpuload.server.daemon import ServerConfig
from gpuload.server.ram_tier import RamTier
from gpuload.testing import FaultySource, Gate, ServerThread, assert_same, random_tensors, running_server, write
from mfs.errors import ConfigError, NotFoundError

UNIT = 4096
SHAPES = {f"l.{i}": (8, 2048) for i in range(6)} | {f"n.{i}": (100,) for i in range(5)}  # 49 granules
GRANULES = 60


class Card(HostDevice):
    """Host memory that the CPU does not reach, with a gate before each copy out of it."""

    def __init__(self) -> None:
        super().__init__(granule_bytes=UNIT, is_direct=False)
        self.out = Gate(1 << 30)

    def open_stream(self) -> HostStream:
        return _Stream(self.out)


class _Stream(HostStream):
    def __init__(self, out: Gate) -> None:
        super().__init__()
        self._out = out

    def copy_out(self, dst: int, src: int, nbytes: int) -> None:
        self._queue.put(lambda: self._out.pass_or(DeviceError("no copy out, as asked")))
        super().copy_out(dst, src, nbytes)


def test_a_place_is_looked_for_only_as_far_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some thousand blocks are there, and a hundred leave at a time: on the loop, where all others wait."""
    monkeypatch.setattr(ram_tier, "SLAB_BYTES", 8 * 4096)
    monkeypatch.setattr(ram_tier, "SLOT_BYTES", 4096)
    tier, asked = RamTier(8 * 4096, HostDevice(is_direct=False)), list[bytes]()
    trio.run(tier.lock_all)

    def is_resident(digest: bytes) -> bool:
        asked.append(digest)
        return digest == b"c"

    tier.is_resident = is_resident
    for digest in (b"a", b"b", b"c", b"d"):
        kept = tier.admit(digest, 2 * 4096, [])
        assert kept is not None
        tier.complete(kept)
    assert not asked, "there was room"
    assert tier.admit(b"e", 2 * 4096, []) is not None
    assert asked == [b"a", b"b", b"c"]
    assert tier.find(b"c") is None, "what an arena has too is the first to go"
    assert tier.admit(b"f", 2 * 4096, []) is not None
    assert tier.find(b"a") is None, "then the oldest"
    assert (tier.find(b"b"), tier.find(b"d")) != (None, None)
    tier.close()


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def server(
    config: ServerConfig, small_granules: None, card: Card, monkeypatch: pytest.MonkeyPatch, request: Any
) -> Iterator[ServerThread]:
    """A tier of three models, or of as many KiB as the test says, beside an arena of one."""
    monkeypatch.setattr(ram_tier, "SLAB_BYTES", 16 * UNIT)
    monkeypatch.setattr(ram_tier, "SLOT_BYTES", 1024)
    tier_bytes = getattr(request, "param", 640) << 10
    config = replace(config, arena_bytes={"cpu": GRANULES * UNIT}, ram_tier_bytes=tier_bytes)
    with running_server(config, lambda _: card) as running:
        while tier(running).locked_bytes < tier(running).nbytes:
            running.settle()
        yield running
        for name in list(running.sites["cpu"].catalog.models):
            ask({"op": "unload", "model": name}, socket_path=running.socket_path)
        assert set(running.gauges().values()) == {0}
        assert running.sites["cpu"].leaving.pending_count == 0
        left = running.on_loop(lambda: list(tier(running)._kept.values()))
        assert not any(kept.holds for kept in left)
        assert all(kept.is_complete for kept in left)
        for kept in left:
            running.on_loop(lambda kept=kept: tier(running).drop(kept))
        assert set(running.on_loop(tier(running).gauges).values()) == {0}


def tier(server: ServerThread) -> RamTier:
    found = server.sites["cpu"].tier
    assert found is not None
    return found


def made(folder: Path, seed: int, **changed: torch.Tensor) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = random_tensors(seed, SHAPES) | changed
    return write(folder / f"{seed}-{len(changed)}.safetensors", tensors), tensors


def load(server: ServerThread, path: Path, model: str, **options: Any) -> dict[str, Any]:
    reply = load_resident(path, model, "cpu", socket_path=server.socket_path, options=options)
    report: dict[str, Any] = reply["report"]
    ways = ("bytes_kept", "bytes_moved_inside", "bytes_copied", "bytes_from_ram")
    assert sum(report[way] for way in ways) == report["bytes_total"]
    return report


def check(server: ServerThread, model: str, tensors: dict[str, torch.Tensor]) -> None:
    assert_same(attach(model, socket_path=server.socket_path), tensors)


def settled(server: ServerThread) -> None:
    """Nothing leaves the card any more."""
    leaving = server.sites["cpu"].leaving
    assert leaving is not None
    while leaving.pending_count or any(
        not k.is_complete for k in server.on_loop(lambda: [*tier(server)._kept.values()])
    ):
        server.settle()


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = loader.open_source
    monkeypatch.setattr(loader, "open_source", lambda *args: FaultySource(opened(*args), Gate(0)))


def test_an_evicted_model_comes_back_without_its_files(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, want), (two, other) = made(tmp_path, 1), made(tmp_path, 2)
    load(server, one, "one")
    assert load(server, two, "two")["evicted"] == ["one"]
    check(server, "two", other)
    settled(server)
    forbid_reading(monkeypatch)
    report = load(server, one, "one")
    assert report["bytes_from_ram"] == report["bytes_total"]
    assert (report["bytes_hashed"], report["evicted"]) == (0, ["two"])
    check(server, "one", want)
    assert load(server, two, "two")["bytes_from_ram"] == report["bytes_total"]
    check(server, "two", other)
    saved = tier(server).totals.saved
    load(server, one, "one")
    settled(server)
    assert tier(server).totals.saved == saved, "what is there already is not copied again"
    found = ask({"op": "status"}, socket_path=server.socket_path)["ram_tiers"]
    assert [(t["blocks"] > 0, t["returned_bytes"]) for t in found] == [(True, 3 * report["bytes_total"])]
    text = ask({"op": "metrics"}, socket_path=server.socket_path)["text"]
    assert f'gpuload_load_bytes_total{{way="from_ram"}} {float(3 * report["bytes_total"])}' in text
    assert 'gpuload_ram_tier_bytes{state="used"}' in text


IDENTITY = Identity("digest-1", "engine 1.0")


def evicted_commit(server: ServerThread, folder: Path) -> dict[str, torch.Tensor]:
    """What was committed as IDENTITY, and left the card for "other"."""
    want = {n: t.t() if t.dim() == 2 else t for n, t in random_tensors(1, SHAPES).items()}
    commit(IDENTITY, want, socket_path=server.socket_path)
    gc.collect()
    server.settle()
    assert load(server, made(folder, 2)[0], "other")["evicted"] == [IDENTITY.name]
    settled(server)
    return want


def test_a_commit_that_was_evicted_comes_back_by_its_identity(server: ServerThread, tmp_path: Path) -> None:
    want = evicted_commit(server, tmp_path)
    held = committed(IDENTITY, socket_path=server.socket_path)
    assert_same(held, want)
    assert held["l.0"].stride() == want["l.0"].stride()
    assert held.report is not None
    assert held.report["bytes_from_ram"] == held.report["bytes_total"]
    assert held.report["evicted"] == ["other"]
    del held
    gc.collect()
    server.settle()
    assert load(server, made(tmp_path, 2)[0], "other")["evicted"] == [IDENTITY.name]
    into = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    restore(IDENTITY, into, socket_path=server.socket_path)
    assert_same(into, want)
    gc.collect()


def test_a_commit_that_is_nowhere_any_more_is_to_be_made_anew(server: ServerThread, tmp_path: Path) -> None:
    evicted_commit(server, tmp_path)
    kept = server.on_loop(lambda: next(iter(tier(server)._kept.values())))
    server.on_loop(lambda: tier(server).drop(kept))
    with pytest.raises(NotFoundError, match="not all of it is in RAM any more: commit it again"):
        committed(IDENTITY, socket_path=server.socket_path)
    check(server, "other", made(tmp_path, 2)[1])


def test_a_commit_that_was_unloaded_or_held_by_leases_alone_does_not_come_back(
    server: ServerThread, tmp_path: Path
) -> None:
    where = {"socket_path": server.socket_path}
    commit(IDENTITY, random_tensors(1, SHAPES), **where)
    gc.collect()
    server.settle()
    ask({"op": "unload", "model": IDENTITY.name}, **where)
    with pytest.raises(NotFoundError, match="no model"):
        committed(IDENTITY, **where)
    commit(IDENTITY, random_tensors(1, SHAPES), retain="lease", **where)
    gc.collect()
    server.settle()
    with pytest.raises(NotFoundError, match="no model"):
        committed(IDENTITY, **where)


def test_pieces_come_from_ram_and_the_rest_from_files(server: ServerThread, tmp_path: Path) -> None:
    one, _ = made(tmp_path, 1)
    load(server, one, "one")
    load(server, made(tmp_path, 2)[0], "two")
    settled(server)
    changed = random_tensors(7, {"l": (8, 2048), "n": (100,)})
    tuned, want = made(tmp_path, 1, **{"l.3": changed["l"], "n.2": changed["n"]})
    assert ask({"op": "status"}, socket_path=server.socket_path)["devices"][0]["gauges"]["models"] == 1
    load(server, tuned, "tuned")  # not known yet: read and hashed
    load(server, made(tmp_path, 3)[0], "three")
    settled(server)
    ask({"op": "unload", "model": "three"}, socket_path=server.socket_path)
    for kept in server.on_loop(lambda: list(tier(server)._kept.values())):  # all but what both have
        if kept.digest not in {k.digest for k in _of(server, one)}:
            server.on_loop(lambda kept=kept: tier(server).drop(kept))
    report = load(server, tuned, "tuned")
    assert report["bytes_copied"] == 32768 + 200
    assert report["bytes_from_ram"] == report["bytes_total"] - report["bytes_copied"]
    check(server, "tuned", want)


def _of(server: ServerThread, path: Path) -> list[ram_tier.Kept]:
    """The blocks in RAM that `path`'s model left there: those that came first."""
    kept = server.on_loop(lambda: list(tier(server)._kept.values()))
    wanted = {k.digest: k for k in kept}
    load(server, path, "again")
    model = server.sites["cpu"].catalog.models["again"]
    found = [wanted[b.digest] for p in model.parts for b in p.blocks if b.digest in wanted]
    ask({"op": "unload", "model": "again"}, socket_path=server.socket_path)
    return found


def test_a_swapped_out_model_is_kept_and_an_unloaded_one_is_not(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stand in the arena while one takes the other's place, so they are small here."""
    small = {f"l.{i}": (6, 2048) for i in range(3)}
    one, two = (write(tmp_path / f"{i}.safetensors", random_tensors(i, small)) for i in (1, 2))
    load(server, one, "m")
    load_resident(two, "m", "cpu", is_swap=True, socket_path=server.socket_path)
    settled(server)
    assert tier(server).blocks_count > 0
    forbid_reading(monkeypatch)
    back = load_resident(one, "m", "cpu", is_swap=True, socket_path=server.socket_path)["report"]
    assert back["bytes_from_ram"] == back["bytes_total"]
    check(server, "m", random_tensors(1, small))
    settled(server)
    before = tier(server).totals.saved
    ask({"op": "unload", "model": "m"}, socket_path=server.socket_path)
    settled(server)
    assert tier(server).totals.saved == before


@pytest.mark.parametrize("server", [256], indirect=True)
def test_it_is_bounded_and_the_oldest_go(server: ServerThread, tmp_path: Path) -> None:
    """Room for one model and a little more."""
    for seed in (1, 2, 3):
        load(server, made(tmp_path, seed)[0], str(seed))
        settled(server)
        assert tier(server).used_bytes <= tier(server).nbytes == 256 << 10
    report = load(server, made(tmp_path, 2)[0], "2")
    assert report["bytes_from_ram"] > 0.8 * report["bytes_total"], "evicted last"
    settled(server)
    report = load(server, made(tmp_path, 1)[0], "1")
    assert report["bytes_from_ram"] < 0.3 * report["bytes_total"], "evicted first"


@pytest.mark.parametrize("server", [64], indirect=True)
def test_what_finds_no_room_is_dropped(server: ServerThread, tmp_path: Path) -> None:
    load(server, made(tmp_path, 1)[0], "1")
    two, want = made(tmp_path, 2)
    load(server, two, "2")
    settled(server)
    assert tier(server).totals.dropped > 0
    assert load(server, made(tmp_path, 1)[0], "1")["bytes_from_ram"] <= 64 << 10
    load(server, two, "2")
    check(server, "2", want)


def test_whoever_writes_waits_until_what_stood_there_is_out(server: ServerThread, card: Card, tmp_path: Path) -> None:
    (one, want), (two, other) = made(tmp_path, 1), made(tmp_path, 2)
    load(server, one, "one")
    card.out = Gate(1, blocks=True)
    swapping = threading.Thread(target=load, args=(server, two, "two"))
    swapping.start()
    assert card.out.reached.wait(60)
    catalog = server.sites["cpu"].catalog
    assert not catalog.models, "one has made room, two is not complete"
    assert swapping.is_alive()
    card.out.opened.set()
    swapping.join()
    check(server, "two", other)
    settled(server)
    card.out = Gate(1 << 30)
    assert load(server, one, "one")["bytes_copied"] == 0
    check(server, "one", want)


def test_memory_is_not_given_back_before_what_stood_there_is_out(
    server: ServerThread, card: Card, tmp_path: Path
) -> None:
    one, want = made(tmp_path, 1)
    load(server, one, "one")
    card.out = Gate(0, blocks=True)
    request = {"op": "resize", "device": "cpu", "bytes": 0, "evict": True}
    resizing = threading.Thread(target=ask, args=(request,), kwargs={"socket_path": server.socket_path})
    resizing.start()
    assert card.out.reached.wait(60)
    assert ask({"op": "ping"}, socket_path=server.socket_path)["pid"] == os.getpid(), "only the granules wait"
    assert resizing.is_alive()
    card.out.opened.set()
    resizing.join()
    card.out = Gate(1 << 30)
    ask({"op": "resize", "device": "cpu", "bytes": GRANULES * UNIT}, socket_path=server.socket_path)
    assert load(server, one, "one")["bytes_copied"] == 0
    check(server, "one", want)


def test_a_copy_that_fails_costs_the_copy_alone(server: ServerThread, card: Card, tmp_path: Path) -> None:
    (one, want), (two, other) = made(tmp_path, 1), made(tmp_path, 2)
    load(server, one, "one")
    card.out = Gate(2)
    load(server, two, "two")
    check(server, "two", other)
    settled(server)
    card.out = Gate(1 << 30)
    report = load(server, one, "one")
    assert report["bytes_copied"] > 0
    check(server, "one", want)


def test_random_swaps_with_failures(server: ServerThread, card: Card, tmp_path: Path) -> None:
    """What is attached is what was loaded, wherever it came from."""
    chance = random.Random(12)
    models = [made(tmp_path, seed) for seed in range(4)]
    changed = random_tensors(9, {"l": (8, 2048)})["l"]
    models += [made(tmp_path, seed, **{f"l.{seed}": changed}) for seed in range(4)]
    seen = dict.fromkeys(("bytes_from_ram", "bytes_copied", "bytes_kept"), 0)
    for _ in range(40):
        path, tensors = chance.choice(models)
        card.out = Gate(chance.choice((3, 1 << 30, 1 << 30)))
        if chance.random() < 0.1:
            ask({"op": "resize", "device": "cpu", "bytes": 0, "evict": True}, socket_path=server.socket_path)
            ask({"op": "resize", "device": "cpu", "bytes": GRANULES * UNIT}, socket_path=server.socket_path)
        report = load(server, path, path.name)
        for way in seen:
            seen[way] += report[way]
        check(server, path.name, tensors)
        server.settle()
    assert min(seen.values()) > 0, f"something was never seen: {seen}"


def test_a_tier_needs_a_card_and_room(config: ServerConfig) -> None:
    with (
        pytest.raises(ConfigError, match="a RAM tier stands behind cards"),
        running_server(replace(config, ram_tier_bytes=1 << 20), lambda _: HostDevice(granule_bytes=UNIT)),
    ):
        raise AssertionError("it started")
    with (
        pytest.raises(FitError, match=r"staging and RAM tier \d.* short by .*; nothing was taken"),
        running_server(replace(config, ram_tier_bytes=1 << 50), lambda _: Card()),
    ):
        raise AssertionError("it started")


def test_each_node_with_cards_has_a_tier_of_its_own(
    config: ServerConfig, small_granules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    @contextmanager
    def recorded(node: int | None) -> Iterator[bool]:
        asked.append(node)
        with on_node(node) as is_set:
            yield is_set

    monkeypatch.setattr(ram_tier, "on_node", recorded)
    monkeypatch.setattr(ram_tier, "SLAB_BYTES", 16 * UNIT)
    nodes = {"cuda:0": 0, "cuda:1": 1, "cuda:2": 0}

    def open_one(name: str) -> Card:
        made = Card()
        made.name, made.node = name, nodes[name]
        return made

    config = replace(config, arena_bytes=dict.fromkeys(nodes, 8 * UNIT), ram_tier_bytes=32 * UNIT)
    with running_server(config, open_one) as server:
        tiers = [server.sites[name].tier for name in nodes]
        assert tiers[0] is tiers[2] is not tiers[1]
        while any(found.locked_bytes < found.nbytes for found in tiers if found is not None):
            server.settle()
        found = ask({"op": "status"}, socket_path=server.socket_path)["ram_tiers"]
        assert [(t["node"], t["bytes"]) for t in found] == [(0, 32 * UNIT), (1, 32 * UNIT)]
    assert sorted(asked, key=str) == [0, 0, 1, 1]


def test_memory_comes_to_stand_on_a_node_while_that_is_asked_for() -> None:
    policy = ctypes.c_int(-1)
    libc, get_mempolicy = ctypes.CDLL(None), {"x86_64": 239, "aarch64": 236}[platform.machine()]
    seen = []
    for node in (0, 1023, None):
        with on_node(node) as is_set:
            libc.syscall(get_mempolicy, ctypes.byref(policy), None, 0, None, 0)
            seen.append((is_set, policy.value))
        libc.syscall(get_mempolicy, ctypes.byref(policy), None, 0, None, 0)
        assert policy.value == 0, "as it was"
    assert seen == [(True, 1), (False, 0), (False, 0)]


def test_a_policy_that_was_there_is_there_again() -> None:
    """numactl --interleave=0, as a thread of a program that was started so has it."""
    policy, mask, interleave = ctypes.c_int(-1), (ctypes.c_ulong * 16)(1), 3
    libc = ctypes.CDLL(None)
    set_mempolicy, get_mempolicy = {"x86_64": (238, 239), "aarch64": (237, 236)}[platform.machine()]

    def work() -> None:
        assert libc.syscall(set_mempolicy, interleave, mask, 1025) == 0
        with on_node(0) as is_set:
            assert is_set
        mask[0] = 0
        libc.syscall(get_mempolicy, ctypes.byref(policy), mask, 1025, None, 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (policy.value, mask[0]) == (interleave, 1)
