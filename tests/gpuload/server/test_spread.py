"""One model on several devices: placed by a device map, served, swapped, refused and evicted as one."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpuload.client.attached
from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import Attached, attach, open_resident
from gpuload.device.host import HostDevice
from gpuload.errors import DeviceError, FitError
from gpuload.server.daemon import ServerConfig
from gpuload.testing import FaultyDevice, Gate, ServerThread, assert_same, random_tensors, running_server, write
from mfs.errors import ChangedError, NotFoundError, UsageError

DEVICES = ["cpu", "cpu:1", "cpu:2"]
MAP = {"": "cpu", "l.2": "cpu:1", "l.3": "cpu:1", "l.4": "cpu:2", "l.5": "cpu:2"}
SHAPES = {f"l.{i}.w": (8, 2048) for i in range(6)} | {f"l.{i}.norm": (100,) for i in range(6)} | {"nothing": (0, 2)}
ON = {name: next((d for p, d in MAP.items() if p and name.startswith(p + ".")), "cpu") for name in SHAPES}


@pytest.fixture
def spread_config(config: ServerConfig) -> ServerConfig:
    return replace(config, arena_bytes=dict.fromkeys(DEVICES, 64 * 4096))


@pytest.fixture
def gates() -> dict[str, Gate]:
    """One in front of the copies of each device; all are open."""
    return {name: Gate(1 << 30) for name in DEVICES}


@pytest.fixture(params=["direct", "staged"])
def spread(
    request: pytest.FixtureRequest, spread_config: ServerConfig, gates: dict[str, Gate], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServerThread]:
    monkeypatch.setattr(gpuload.client.attached, "open_device", lambda name: HostDevice(name=name, granule_bytes=4096))

    def open_one(name: str) -> HostDevice | FaultyDevice:
        device = HostDevice(name=name, granule_bytes=4096)
        return device if request.param == "direct" else FaultyDevice(device, gates[name])

    with running_server(spread_config, open_one) as running:
        yield running
        gc.collect()
        for site in running.sites.values():
            for model in list(site.catalog.models.values()):
                running.on_loop(model.retire)
        for name in DEVICES:
            assert set(running.gauges(name).values()) == {0}, f"the test left something on {name}"


def load(server: ServerThread, path: Path, model: str = "m", **options: object) -> dict:  # type: ignore[type-arg]
    options = {"device_map": MAP, **options}
    return load_resident(path, model, None, socket_path=server.socket_path, options=options)


def swap(server: ServerThread, path: Path, model: str = "m", **options: object) -> dict:  # type: ignore[type-arg]
    return load_resident(path, model, None, is_swap=True, socket_path=server.socket_path, options=options)


def attached(server: ServerThread, device: str | None = None) -> Attached:
    return attach("m", device, socket_path=server.socket_path)


def all_gauges(server: ServerThread) -> dict[str, dict[str, int]]:
    return {name: server.gauges(name) for name in DEVICES}


def test_a_spread_model_is_the_file(spread: ServerThread, tmp_path: Path) -> None:
    want = random_tensors(1, SHAPES)
    reply = load(spread, write(tmp_path / "a.safetensors", want))
    assert reply["devices"] == DEVICES
    assert reply["report"]["bytes_copied"] == reply["report"]["bytes_total"] == sum(t.nbytes for t in want.values())
    held = attached(spread)
    assert_same(held, want)
    assert list(held.devices) == DEVICES
    for name in DEVICES:
        part = attached(spread, name)
        assert_same(part, {n: t for n, t in want.items() if ON[n] == name})
    del part
    gc.collect()
    status = ask({"op": "status"}, socket_path=spread.socket_path)["devices"]
    here = {d["device"]: d["models"][0]["bytes_here"] for d in status}
    assert here == {d: sum(t.nbytes for n, t in want.items() if ON[n] == d) for d in DEVICES}
    assert all(g["leases"] == 1 for g in all_gauges(spread).values()), "one lease holds all devices"


def test_its_digest_is_the_content_wherever_it_stands(spread: ServerThread, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, SHAPES))
    spread_reply = load(spread, path)
    alone = load(spread, path, "alone", device_map={"": "cpu:1"})
    assert spread_reply["digest"] == alone["digest"]
    assert load(spread, path)["report"]["bytes_kept"] == alone["report"]["bytes_total"]
    with pytest.raises(UsageError, match="other content"):
        load(spread, path, device_map={"": "cpu"})


def test_a_swap_moves_what_differs_on_each_device_and_stays_where_the_model_stands(
    spread: ServerThread, tmp_path: Path
) -> None:
    old = random_tensors(1, SHAPES)
    load(spread, write(tmp_path / "a.safetensors", old), pinned=True)
    held = attached(spread)
    new = {**old, **random_tensors(2, {"l.0.w": (8, 2048), "l.4.w": (8, 2048)})}
    reply = swap(spread, write(tmp_path / "b.safetensors", new))
    assert reply["devices"] == DEVICES, "a swap that names no device keeps the placement"
    assert reply["pinned"]
    assert reply["report"]["bytes_copied"] == 2 * 32768
    assert_same(held, old)
    now = attached(spread)
    assert_same(now, new)
    assert (held.generation, now.generation) == (1, 2)


def test_a_swap_to_other_devices_leaves_nothing_on_the_old_ones(spread: ServerThread, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, SHAPES))
    load(spread, path)
    swap(spread, path, device_map={"": "cpu:2"})
    assert [g["granules_used"] > 0 for g in all_gauges(spread).values()] == [False, False, True]
    assert attached(spread).device == "cpu:2"


@pytest.mark.parametrize("spread", ["staged"], indirect=True)
@pytest.mark.parametrize("broken", DEVICES)
@pytest.mark.parametrize("passes", [0, 2])
def test_a_failure_on_one_device_leaves_the_old_one_serving_on_all(
    spread: ServerThread, gates: dict[str, Gate], broken: str, passes: int, tmp_path: Path
) -> None:
    old, new = random_tensors(1, SHAPES), random_tensors(2, SHAPES)
    load(spread, write(tmp_path / "a.safetensors", old))
    before = all_gauges(spread)
    gates[broken]._passes = passes
    path = write(tmp_path / "b.safetensors", new)
    with pytest.raises(DeviceError, match="as asked"):
        swap(spread, path)
    assert all_gauges(spread) == before
    assert_same(attached(spread), old)
    gates[broken]._passes = 1 << 30
    swap(spread, path)
    assert_same(attached(spread), new)


@pytest.mark.parametrize("spread", ["staged"], indirect=True)
def test_devices_are_filled_at_the_same_time_and_cancelled_as_one(
    spread: ServerThread, gates: dict[str, Gate], tmp_path: Path
) -> None:
    """Every device reaches its gate while all others stand at theirs: none waits for another to be done."""
    for name in DEVICES:
        gates[name]._passes, gates[name]._blocks = 0, True
    path, want = write(tmp_path / "a.safetensors", random_tensors(1, SHAPES)), random_tensors(1, SHAPES)
    ended = threading.Event()
    loading = threading.Thread(target=lambda: (load(spread, path), ended.set()))
    loading.start()
    assert all(gate.reached.wait(30) for gate in gates.values())
    assert not ended.is_set()
    for gate in gates.values():
        gate.opened.set()
    loading.join()
    assert_same(attached(spread), want)


@pytest.mark.parametrize("spread", ["staged"], indirect=True)
def test_a_client_killed_in_the_middle_of_a_swap_leaves_the_old_one_serving_on_all(
    spread: ServerThread, gates: dict[str, Gate], tmp_path: Path
) -> None:
    """However it ends, the kernel closes its connection: that cancels what it asked for, on every device."""
    old, new = random_tensors(1, SHAPES), random_tensors(2, SHAPES)
    load(spread, write(tmp_path / "a.safetensors", old))
    before = all_gauges(spread)
    gates["cpu:1"]._passes, gates["cpu:1"]._blocks = 1, True
    path = write(tmp_path / "b.safetensors", new)
    process = os.fork()
    if not process:
        swap(spread, path)
        os._exit(0)
    assert gates["cpu:1"].reached.wait(30)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    spread.settle()
    gates["cpu:1"]._passes = 1 << 30
    gates["cpu:1"].opened.set()
    assert spread.wait_for(lambda: all_gauges(spread) == before)
    assert_same(attached(spread), old)
    swap(spread, path)
    assert_same(attached(spread), new)


def test_a_device_with_nothing_but_empty_tensors_is_no_trouble(spread: ServerThread, tmp_path: Path) -> None:
    want = random_tensors(1, {"l.1.w": (8, 2048), "nothing": (0, 2)})
    load(spread, write(tmp_path / "a.safetensors", want), device_map={"": "cpu:1", "nothing": "cpu"})
    assert_same(attached(spread), want)
    load(spread, write(tmp_path / "b.safetensors", {}), "none", device_map={"": "cpu:2"})
    assert_same(attach("none", socket_path=spread.socket_path), {})


def test_room_is_found_on_all_devices_or_nobody_goes(spread: ServerThread, tmp_path: Path) -> None:
    load(
        spread, write(tmp_path / "a.safetensors", random_tensors(1, {"w": (40, 2048)})), "first", device_map={"": "cpu"}
    )
    load(
        spread,
        write(tmp_path / "b.safetensors", random_tensors(2, {"w": (60, 2048)})),
        "held",
        device_map={"": "cpu:2"},
    )
    held = attach("held", socket_path=spread.socket_path)
    before = all_gauges(spread)
    wide = {"x.w": (40, 2048), "l.4.w": (40, 2048)}
    path = write(tmp_path / "c.safetensors", random_tensors(3, wide))
    with pytest.raises(FitError, match=r"on cpu:2: .* nothing was evicted") as caught:
        load(spread, path)
    assert caught.value.shortfall_bytes == 36 * 4096
    assert all_gauges(spread) == before, "the one on cpu, which could have gone, is there"
    del held
    gc.collect()
    spread.settle()
    assert sorted(load(spread, path)["report"]["evicted"]) == ["first", "held"]


def test_a_spread_model_is_evicted_whole(spread: ServerThread, tmp_path: Path) -> None:
    load(spread, write(tmp_path / "a.safetensors", random_tensors(1, SHAPES)))
    other = write(tmp_path / "b.safetensors", random_tensors(2, {"w": (60, 2048)}))
    reply = load(spread, other, "other", device_map={"": "cpu:1"})
    assert reply["report"]["evicted"] == ["m"]
    assert [g["granules_used"] for g in all_gauges(spread).values()] == [0, 60, 0]


def test_unload_waits_for_the_lease_on_all_devices(spread: ServerThread, tmp_path: Path) -> None:
    want = random_tensors(1, SHAPES)
    load(spread, write(tmp_path / "a.safetensors", want))
    held = attached(spread, "cpu:1")
    reply = ask({"op": "unload", "model": "m"}, socket_path=spread.socket_path)
    assert (reply["devices"], reply["released"]) == (DEVICES, False)
    assert_same(held, {n: t for n, t in want.items() if ON[n] == "cpu:1"})
    assert all(g["retired"] == 1 for g in all_gauges(spread).values())
    del held
    gc.collect()
    assert all(set(g.values()) == {0} for g in all_gauges(spread).values())


def test_opened_by_content_and_shared(spread: ServerThread, tmp_path: Path) -> None:
    want = random_tensors(1, SHAPES)
    path = write(tmp_path / "a.safetensors", want)
    with open(path, "rb") as file:
        where = {"device_map": MAP, "socket_path": spread.socket_path}
        one = open_resident([file.fileno()], ["a"], None, **where)  # type: ignore[arg-type]
        two = open_resident([file.fileno()], ["a"], None, **where)  # type: ignore[arg-type]
        alone = open_resident([file.fileno()], ["a"], "cpu:1", socket_path=spread.socket_path)
    assert one.model == two.model != alone.model
    assert two.report is not None
    assert two.report["bytes_copied"] == 0
    for got in (one, two, alone):
        assert_same(got, want)


def test_one_name_on_two_devices_is_two_models_unless_it_was_spread(spread: ServerThread, tmp_path: Path) -> None:
    """Ranks of one model may stand on a device each, under one name; whoever changes one says which."""
    path = write(tmp_path / "a.safetensors", random_tensors(1, {"x.q_proj.weight": (64, 64)}))
    for rank, device in enumerate(["cpu", "cpu:1"]):
        load(spread, path, device_map={"": device}, rank=rank, world=2, rules={"*": 0})
    assert torch.equal(
        torch.cat([attached(spread, d)["x.q_proj.weight"] for d in ("cpu", "cpu:1")]).view(torch.int16),
        random_tensors(1, {"x.q_proj.weight": (64, 64)})["x.q_proj.weight"].view(torch.int16),
    )
    with pytest.raises(UsageError, match="say which"):
        ask({"op": "unload", "model": "m"}, socket_path=spread.socket_path)
    ask({"op": "unload", "model": "m", "device": "cpu"}, socket_path=spread.socket_path)
    assert attached(spread).device == "cpu:1"


def rank_of(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    return {n: t.chunk(2, RULES[n])[rank].contiguous() if n in RULES else t for n, t in tensors.items()}


RULES = {"x.q_proj.weight": 0, "x.o_proj.weight": 1}


def test_ranks_never_mix_what_a_swap_falls_between(spread: ServerThread, tmp_path: Path) -> None:
    shapes = {"x.q_proj.weight": (64, 64), "x.o_proj.weight": (64, 64), "norm": (64,)}
    old, new = random_tensors(1, shapes), random_tensors(2, shapes)
    ranks = ["cpu:1", "cpu"]
    load(spread, write(tmp_path / "a.safetensors", old), device_map={}, ranks=ranks, rules=RULES)
    first = attached(spread, ranks[0])
    swap(spread, write(tmp_path / "b.safetensors", new))
    late = attach("m", ranks[1], digest=first.digest, socket_path=spread.socket_path)
    assert_same(late, rank_of(old, 1))
    assert (late.model, late.digest) == ("m", first.digest)
    digest = first.digest
    del first, late
    with pytest.raises(ChangedError, match=f"'m' is now .*asked for was {digest[:16]}.*attach every rank again"):
        attach("m", ranks[1], digest=digest, socket_path=spread.socket_path)
    first = attached(spread, ranks[0])
    second = attach("m", ranks[1], digest=first.digest, socket_path=spread.socket_path)
    assert_same(first, rank_of(new, 0))
    assert_same(second, rank_of(new, 1))


def test_all_ranks_are_one_model_and_swapped_as_one(
    spread: ServerThread, gates: dict[str, Gate], tmp_path: Path
) -> None:
    shapes = {"x.q_proj.weight": (64, 64), "x.o_proj.weight": (64, 64), "norm": (64,)}
    old, new = random_tensors(1, shapes), random_tensors(2, shapes)
    ranks = ["cpu:1", "cpu"]
    reply = load(spread, write(tmp_path / "a.safetensors", old), device_map={}, ranks=ranks, rules=RULES)
    assert (reply["ranks"], reply["bytes"]) == (2, 2 * 64 * 64 * 2 + 2 * 64 * 2)
    with pytest.raises(UsageError, match="stands as 2 ranks on cpu:1, cpu: say whose"):
        attached(spread)
    for rank, device in enumerate(ranks):
        assert_same(attached(spread, device), rank_of(old, rank))
    path = write(tmp_path / "b.safetensors", new)
    for gate in (
        gates["cpu"],
        gates["cpu:1"],
    ):  # a failure on either leaves both old; nothing fails where reads are direct
        gate._passes = 0
        try:
            swap(spread, path)
        except DeviceError:
            for rank, device in enumerate(ranks):
                assert_same(attached(spread, device), rank_of(old, rank))
        gate._passes = 1 << 30
    assert swap(spread, path)["ranks"] == 2, "a swap that says nothing keeps the ranks"
    for rank, device in enumerate(ranks):
        assert_same(attached(spread, device), rank_of(new, rank))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"device_map": {}, "ranks": ["cpu", "cpu:0"]}, UsageError, "a device of its own"),
        ({"device_map": {}, "ranks": "cpu"}, UsageError, "a list of devices"),
        ({"device_map": {}, "ranks": ["cpu", "cpu:1"], "world": 2}, UsageError, "a list of devices"),
        ({"ranks": ["cpu", "cpu:1"]}, UsageError, "a list of devices, without device"),
        ({"device_map": {}, "ranks": ["cpu", "cpu:9"]}, NotFoundError, "no arena on cpu:9"),
        ({"device_map": {"l.0": "cpu:1"}}, UsageError, r"leaves 'l.1.norm' without a device"),
        ({"device_map": {"": "cpu:7"}}, NotFoundError, "no arena on cpu:7; it has: cpu, cpu:1, cpu:2"),
        ({"device_map": {"": "tpu"}}, UsageError, "no such device"),
        ({"device_map": ["cpu"]}, UsageError, "device_map must be an object"),
        ({"device_map": {}}, UsageError, "say which of cpu, cpu:1, cpu:2"),
    ],
)  # fmt: skip
def test_maps_that_mean_nothing(
    spread: ServerThread,
    given: dict,
    error: type[Exception],
    match: str,
    tmp_path: Path,  # type: ignore[type-arg]
) -> None:
    path = write(tmp_path / "a.safetensors", random_tensors(1, SHAPES))
    with pytest.raises(error, match=match):
        load(spread, path, **given)
