"""The loader that stands in for safetensors' own of 0.9, and what of a plan is left to the library to refuse."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from gpuload.hooks import safetensors_patch
from gpuload.hooks.counts import counts
from gpuload.hooks.prefetched import Prefetched, plan_of
from gpuload.testing import assert_same, random_tensors, write

SHAPES = {"b": [6, 4], "a": [3], "s": [], "e": [0, 3]}


class SaidError(Exception):
    """As SafetensorError."""


@pytest.mark.parametrize(
    ("plan", "is_good"),
    [
        ({"b": None}, True), ({"b": slice(1, 3), "a": None}, True), ({"b": slice(None, 2)}, True), ({"s": None}, True),
        ({"b": slice(-2, None)}, True), ({"b": slice(4, 1)}, True), ({"b": slice(0, 6, 1)}, True),
        ({"e": slice(0, 0)}, True), ({"b": slice(-7, 2)}, False), ({"b": slice(0, 7)}, False), ({"b": 3}, False),
        ({"b": slice(0, 4, 2)}, False), ({"b": slice(None, None, -1)}, False), ({"b": slice(1.0, 2)}, False),
        ({"s": slice(0, 1)}, False), ({"x": None}, False), ({1: None}, False), ({}, False), ([], False), ("b", False),
    ],
)  # fmt: skip
def test_a_plan_is_followed_or_left_to_the_library(plan: Any, is_good: bool) -> None:
    """Which those are: as safetensors 0.9.0rc1 took and refused them."""
    made = plan_of(plan, SHAPES)
    assert made == (plan if is_good else None)
    assert made is None or list(made) == [name for name in SHAPES if name in plan], "in the order of the file"


def test_no_plan_is_all_of_it() -> None:
    assert plan_of(None, SHAPES) == dict.fromkeys(SHAPES)


def test_each_tensor_is_handed_out_once_by_either_way() -> None:
    held = random_tensors(1, {"a": (6, 4), "b": (3,), "c": (5,)})
    want = {name: tensor.clone() for name, tensor in held.items()}
    before = counts.served
    with Prefetched(held, {"a": slice(1, 3), "b": None, "c": None}, "cuda:0", SaidError) as loader:
        assert (loader.names(), len(loader)) == (["a", "b", "c"], 3)
        taken = loader.take("b")
        got = dict(loader)
        assert_same(got | {"b": taken}, want | {"a": want["a"][1:3]})
        assert dict(loader) == {}
        for name, words in (("b", "taken before"), ("x", "does not name")):
            with pytest.raises(SaidError, match=words):
                loader.take(name)
    assert counts.served - before == 3
    taken.zero_()
    got["a"].zero_()
    assert_same(held, want)
    with pytest.raises(SaidError, match="closed"):
        loader.take("c")
    with pytest.raises(SaidError, match="closed"):
        next(iter(loader))
    loader.close()


@pytest.mark.skipif(not hasattr(safetensors.safe_open, "prefetch"), reason="safetensors before 0.9 has no prefetch")
def test_prefetch_of_the_library_is_served_and_else_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's part is played by host memory; without one it is the library that refuses."""
    want = random_tensors(1, {"w": (6, 4), "v": (3,)})
    path = write(tmp_path / "a.safetensors", want)
    module = importlib.reload(safetensors_patch)
    asked: list[Any] = []
    held: list[Any] = [dict(want)]

    def attach(path: str, device: str, **_: Any) -> Any:
        asked.append((path, device))
        return held[0] if device == "cuda:1" else None

    monkeypatch.setattr(module, "attach_file", attach)
    monkeypatch.setattr(module, "is_away", lambda: False)
    names = ("__init__", "__exit__", "get_tensor", "get_slice", "get_tensors", "prefetch")
    real = {name: getattr(safetensors.safe_open, name) for name in names}
    slices = safetensors.PySafeSlice.__getitem__
    module.install()
    try:
        with safetensors.safe_open(str(path), "pt") as opened:
            with opened.prefetch({"w": slice(2, 5)}, device="cuda:1", threads=3) as loader:
                assert type(loader) is Prefetched
                assert torch.equal(loader.take("w").view(torch.int16), want["w"][2:5].view(torch.int16))
            assert asked == [(str(path), "cuda:1")]
            for given in ({"device": "cuda:0"}, {}, {"plan": {"nothing": None}, "device": "cuda:1"}):
                with pytest.raises(safetensors.SafetensorError):
                    opened.prefetch(**given)
            assert asked[1:] == [(str(path), "cuda:0")], "a bad plan, or no card, asks nobody"
    finally:
        for name, method in real.items():
            setattr(safetensors.safe_open, name, method)
        safetensors.PySafeSlice.__getitem__ = slices
