"""A thousand random operations against a dict: what is attached is what was loaded, and nothing is left behind."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpuload.client.attached
from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import Attached, attach
from gpuload.device.host import HostDevice
from gpuload.errors import DeviceError, FitError
from gpuload.server import versions
from gpuload.server.daemon import ServerConfig
from gpuload.testing import FaultyDevice, Gate, ServerThread, assert_same, random_tensors, running_server, write
from mfs.errors import NotFoundError, UsageError

OPERATIONS = 1000
SPREAD_OPERATIONS = 250
GRANULES = 110
"""The models need 26 to 90: sometimes two fit, sometimes one, sometimes none beside what is leased."""
NAMES = ["a", "b", "c", "d", "e"]


def family(folder: Path) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Twelve models: three bases, and three relatives of each that share most of their bytes with it."""
    made = []
    for base in range(3):
        shapes = {f"l.{i}": (4 + 3 * base, 2048) for i in range(6)} | {f"n.{i}": (50,) for i in range(4)}
        tensors = random_tensors(base, shapes)
        made.append(tensors)
        for relative in range(3):
            other = dict(tensors)
            other[f"l.{relative}"] = random_tensors(100 + base * 10 + relative, {"x": shapes[f"l.{relative}"]})["x"]
            if relative == 2:
                other["extra"] = random_tensors(7, {"x": (30, 2048)})["x"]
            made.append(other)
    return [(write(folder / f"{i}.safetensors", t), t) for i, t in enumerate(made)]


def test_a_thousand_operations(config: ServerConfig, small_granules: None, tmp_path: Path) -> None:
    chance = random.Random(20_26)
    models = family(tmp_path)
    served: dict[str, dict[str, torch.Tensor]] = {}
    pinned: set[str] = set()
    leases: list[tuple[str, Attached, dict[str, torch.Tensor]]] = []
    seen = dict.fromkeys(("load", "swap", "unload", "attach", "release", "pin", "refused", "evicted", "gap"), 0)

    config = replace(config, arena_bytes={"cpu": GRANULES * 4096})
    with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
        where = {"socket_path": server.socket_path}
        for _ in range(OPERATIONS):
            name, (path, tensors) = chance.choice(NAMES), chance.choice(models)
            match chance.choice(
                ["load", "load", "swap", "swap", "attach", "attach", "release", "release", "unload", "pin"]
            ):
                case "load" | "swap" as verb:
                    options = {"allow_gap": verb == "swap" and chance.random() < 0.3}
                    server.settle()
                    try:
                        reply = load_resident(path, name, "cpu", is_swap=verb == "swap", options=options, **where)
                    except FitError:
                        seen["refused"] += 1
                    except UsageError:
                        assert verb == "load"
                        assert served[name] is not tensors
                    else:
                        report = reply["report"]
                        moved = report["bytes_kept"] + report["bytes_moved_inside"] + report["bytes_copied"]
                        assert moved == report["bytes_total"] == sum(t.nbytes for t in tensors.values())
                        for victim in report["evicted"]:
                            assert (victim == name and options["allow_gap"]) or victim not in pinned
                            assert not any(n == victim and served[victim] is t for n, _, t in leases)
                            del served[victim]
                            pinned.discard(victim)
                        served[name] = tensors
                        pinned = pinned | {name} if reply["pinned"] else pinned - {name}
                        seen[verb] += 1
                        seen["evicted"] += len(report["evicted"])
                        seen["gap"] += report["had_gap"]
                case "attach":
                    if name in served:
                        leases.append((name, attach(name, **where), served[name]))
                        seen["attach"] += 1
                case "release":
                    if leases:
                        leases.pop(chance.randrange(len(leases)))
                        gc.collect(0)
                        seen["release"] += 1
                case "unload":
                    if name in served:
                        ask({"op": "unload", "model": name}, **where)
                        del served[name]
                        pinned.discard(name)
                        seen["unload"] += 1
                case "pin":
                    if name in served and chance.random() < 0.3:
                        value = chance.random() < 0.3
                        ask({"op": "pin", "model": name, "pinned": value}, **where)
                        pinned = pinned | {name} if value else pinned - {name}
                        seen["pin"] += 1
            if leases and chance.random() < 0.2:
                assert_same(*chance.choice(leases)[1:])
            del leases[:-4]

        assert min(seen.values()) > 0, f"an operation was never seen: {seen}"
        gc.collect()
        gauges = server.gauges()
        assert (gauges["models"], gauges["leases"]) == (len(served), len(leases))
        for name, tensors in served.items():
            assert_same(attach(name, **where), tensors)
        for lease in leases:
            assert_same(*lease[1:])
        lease = None
        leases.clear()
        for name in list(served):
            ask({"op": "unload", "model": name}, **where)
        try:
            attach(NAMES[0], **where)
        except NotFoundError:
            pass
        gc.collect()
        assert set(server.gauges().values()) == {0}
        granules = server.sites["cpu"].catalog.granules
        assert granules.coming(granules.count) == [(0, GRANULES)], "all memory went back, no fragment is left"


def test_random_operations_on_several_devices_with_failures_and_forgetting(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Spread in all ways, digests known or not, devices that fail now and then: what is attached is what was loaded,
    what failed changed nothing, and every arena is one free run in the end."""
    chance = random.Random(7)
    models = family(tmp_path)
    devices = ["cpu", "cpu:1", "cpu:2"]
    gates = {name: Gate(1 << 30) for name in devices}
    monkeypatch.setattr(gpuload.client.attached, "open_device", lambda name: HostDevice(name=name, granule_bytes=4096))
    trusted = versions.CHANGE_STAMPED
    served: dict[str, dict[str, torch.Tensor]] = {}
    leases: list[tuple[Attached, dict[str, torch.Tensor]]] = []
    seen = dict.fromkeys(("swapped", "refused", "failed", "evicted", "one pass", "hash pass", "known"), 0)

    config = replace(config, arena_bytes=dict.fromkeys(devices, 70 * 4096))
    with running_server(config, lambda n: FaultyDevice(HostDevice(name=n, granule_bytes=4096), gates[n])) as server:
        where = {"socket_path": server.socket_path}
        for _ in range(SPREAD_OPERATIONS):
            name, (path, tensors) = chance.choice(NAMES[:3]), chance.choice(models)
            device_map = dict(zip(("l.0", "l.1", "l.2"), chance.sample(devices, 3), strict=True))  # on all three
            device_map |= {prefix: chance.choice(devices) for prefix in ("", "l.3", "n", "n.1", "extra")}
            monkeypatch.setattr(versions, "CHANGE_STAMPED", trusted if chance.random() < 0.5 else set())
            broken = chance.choice(devices) if chance.random() < 0.2 else None
            if broken:
                gates[broken]._passes = chance.randrange(4)
            server.settle()
            before = {n: server.gauges(n) for n in devices}
            try:
                options = {"device_map": device_map}
                report = load_resident(path, name, None, is_swap=True, options=options, **where)["report"]
            except (FitError, DeviceError) as error:
                seen["refused" if isinstance(error, FitError) else "failed"] += 1
                left = set(ask_models(server))
                if isinstance(error, FitError):
                    assert {n: server.gauges(n) for n in devices} == before
                assert name in left or name not in served
                served = {n: t for n, t in served.items() if n in left}
            else:
                seen["swapped"] += 1
                seen["evicted"] += len(report["evicted"])
                kind = (
                    "hash pass" if report["bytes_hashed_before"] else "one pass" if report["bytes_hashed"] else "known"
                )
                seen[kind] += 1
                for victim in report["evicted"]:
                    del served[victim]
                served[name] = tensors
            for gate in gates.values():
                gate._passes = 1 << 30
            if chance.random() < 0.4 and served:
                which = chance.choice(sorted(served))
                leases.append((attach(which, **where), served[which]))
                assert_same(*leases[-1])
            del leases[: chance.randrange(3)]
            gc.collect(0)
        assert min(seen.values()) > 0, f"something was never seen: {seen}"
        for which, tensors in served.items():
            assert_same(attach(which, **where), tensors)
        leases.clear()
        for which in list(served):
            ask({"op": "unload", "model": which}, **where)
        gc.collect()
        for name in devices:
            assert set(server.gauges(name).values()) == {0}
            granules = server.sites[name].catalog.granules
            assert granules.coming(granules.count) == [(0, 70)]


def ask_models(server: ServerThread) -> list[str]:
    """Names that are served."""
    found = ask({"op": "status"}, socket_path=server.socket_path)["devices"]
    return [m["model"] for d in found for m in d["models"] if m["model"]]
