"""Devices as callers of torch, transformers and accelerate name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gpuload
from gpuload.client.device_maps import STRATEGIES, by_strategy, check_there
from gpuload.errors import DeviceError
from gpuload.moving.plan import Placement
from gpuload.testing import assert_same, random_tensors, write
from mfs.errors import UsageError
from mfs.safetensors import Header, TensorInfo

LAYERS = 12


def table() -> Header:
    """A model of 12 layers of 100 bytes, in the order of a file: layer 10 before layer 2."""
    names = ["lm_head.weight", "model.embed.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("mlp", "q_proj")]
    sizes = dict.fromkeys(sorted(names), 50)
    made, at = [], 8
    for name, nbytes in sizes.items():
        made.append(TensorInfo(name, "U8", (nbytes,), at, at + nbytes))
        at += nbytes
    return Header(tuple(made), None, 8, at, ())


def spread(strategy: str, *free: int) -> dict[str, str]:
    """Tensor -> device."""
    free_bytes = {f"cuda:{i}": int(n / 0.9) + 1 for i, n in enumerate(free)}
    placement = Placement("nowhere", by_strategy(strategy, [table()], free_bytes))
    return {tensor.name: placement.device_of(tensor.name) for tensor in table().tensors}


def bytes_on(found: dict[str, str]) -> dict[str, int]:
    return {device: 50 * list(found.values()).count(device) for device in sorted(set(found.values()))}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_takes_all(strategy: str) -> None:
    assert by_strategy(strategy, [table()], {}) == {"": "cpu"}
    assert by_strategy(strategy, [table()], {"cuda:0": 1 << 20}) == {"": "cuda:0"}
    assert by_strategy(strategy, [], {"cuda:0": 1 << 20}) in ({}, {"": "cuda:0"})


def test_strategies_are_accelerates() -> None:
    total = 100 * LAYERS + 150
    even = bytes_on(spread("auto", 10_000, 10_000, 10_000))
    assert sum(even.values()) == total
    assert max(even.values()) <= total // 3 + 100
    assert set(even) == {"cuda:0", "cuda:1", "cuda:2"}
    assert spread("balanced", 10_000, 10_000, 10_000) == spread("auto", 10_000, 10_000, 10_000)
    assert bytes_on(spread("sequential", 1000, 10_000)) == {"cuda:0": 1000, "cuda:1": total - 1000}
    assert set(bytes_on(spread("balanced_low_0", 10_000, 10_000, 10_000))) == {"cuda:1", "cuda:2"}
    assert bytes_on(spread("balanced_low_0", 10_000, 500, 500))["cuda:0"] == 300, "whole layers of what the others lack"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layers_stay_whole_and_what_does_not_fit_goes_to_the_cpu(strategy: str) -> None:
    found = spread(strategy, 400, 400)
    assert "cpu" in found.values()
    assert all(n <= 400 for device, n in bytes_on(found).items() if device != "cpu")
    devices = [found[f"model.layers.{i}.mlp.weight"] for i in range(LAYERS)]
    assert devices == [found[f"model.layers.{i}.q_proj.weight"] for i in range(LAYERS)]
    assert devices == sorted(devices, key=["cuda:0", "cuda:1", "cpu"].index), "in the order of their numbers"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "x.safetensors", random_tensors(1, {"a.w": (3,), "b": (4,)}))


@pytest.mark.parametrize("device_map", [None, {}, *STRATEGIES, "cpu", torch.device("cpu"), {"a": torch.device("cpu")}])
def test_maps_as_callers_write_them(device_map: Any, file: Path) -> None:
    want = gpuload.load_file(file, torch.device("cpu"))
    assert_same(gpuload.load_model(file, device_map=device_map), want)
    assert_same(dict(gpuload.stream(file, device_map=device_map)), want)


@pytest.mark.parametrize(
    "device_map", ["autos", "disk", "mps", 1.5, True, -1, [], {1: "cpu"}, {None: "cpu"}, {"a": "disk"}, {"": None}]
)
def test_maps_that_mean_nothing_here(device_map: Any, file: Path) -> None:
    for load in (gpuload.load_model, lambda *a, **k: list(gpuload.stream(*a, **k))):
        with pytest.raises(UsageError, match=r"device_map: .*expected") as caught:
            load(file, device_map=device_map)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", torch.device("meta"), -1, "cuda:x", ""])
def test_devices_that_mean_nothing_here(device: Any, file: Path) -> None:
    for load in (gpuload.load_file, gpuload.load_model, lambda p, d: gpuload.safe_open(p, device=d)):
        with pytest.raises(UsageError, match="expected 'cpu' or 'cuda:N'"):
            load(file, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", 0, torch.device("cuda", 1)])
def test_a_gpu_that_is_not_there(device: Any, file: Path) -> None:
    doors = (
        gpuload.load_file,
        gpuload.load_model,
        lambda p, d: gpuload.safe_open(p, device=d),
        lambda p, d: list(gpuload.stream(p, d)),
        lambda p, d: gpuload.load_model(p, device_map={"b": d}),
    )
    for load in doors:
        with pytest.raises(DeviceError, match=r"cuda:\d is not there: torch") as caught:
            load(file, device)
        assert "\n" not in str(caught.value)


def test_fewer_gpus_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_there("cuda:1")
    with pytest.raises(DeviceError, match="torch sees 2 GPUs"):
        check_there("cuda:2")
