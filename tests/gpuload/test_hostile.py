"""Files from strangers: every door of the loader gives what safetensors gives, or one clear line, and nothing else."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as reference_load_file

import gpuload
from gpuload.testing import assert_same
from mfs.errors import MfsError, UsageError
from mfs.safetensors import DTYPE_BITS

NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**200]),
    st.floats(),
    st.booleans(),
)
ODD = st.one_of(NUMBERS, st.none(), st.text(max_size=5), st.lists(NUMBERS, max_size=3))
TENSOR = st.one_of(
    ODD,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from([*DTYPE_BITS, "F33", ""]), ODD),
            "shape": st.one_of(st.lists(st.one_of(st.integers(0, 4), NUMBERS), max_size=4), ODD),
            "data_offsets": st.one_of(st.lists(st.one_of(st.integers(0, 40), NUMBERS), max_size=3), ODD),
            "more": ODD,
        },
    ),
)
PLAIN = st.builds(
    lambda dtype, shape: {"dtype": dtype, "shape": shape},
    st.sampled_from(["U8", "F16", "I32", "F8_E4M3", "F4", "BOOL"]),
    st.lists(st.integers(0, 4), max_size=3),
)


@st.composite
def blobs(draw: st.DrawFn) -> bytes:
    """A file that is nearly right: tables of odd entries or of right ones, then cut, padded, or hit by a byte."""
    names = draw(st.lists(st.text(max_size=3), max_size=4, unique=True))
    if draw(st.booleans()):
        table: dict[str, Any] = {name: draw(TENSOR) for name in names}
        at = draw(st.integers(0, 80))
    else:
        table, at = {}, 0
        for name in names:
            entry = draw(PLAIN)
            bits = DTYPE_BITS[entry["dtype"]]
            for n in entry["shape"]:
                bits *= n
            table[name] = entry | {"data_offsets": [at, at + bits // 8]}
            at += bits // 8
    if draw(st.booleans()):
        table["__metadata__"] = draw(st.one_of(st.dictionaries(st.text(max_size=3), st.text(max_size=3)), ODD))
    header = json.dumps(table).encode()
    length = draw(
        st.one_of(
            st.just(len(header)), st.just(len(header)), st.integers(0, 2 * len(header)), st.sampled_from([2**63, 10**8])
        )
    )
    blob = bytearray(struct.pack("<Q", length) + header + bytes(at))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        blob[draw(st.integers(0, len(blob) - 1))] = draw(st.integers(0, 255))
    return bytes(blob[: draw(st.one_of(st.just(len(blob)), st.just(len(blob)), st.integers(0, len(blob))))])


DOORS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    "load_file": gpuload.load_file,
    "load_model": gpuload.load_model,
    "stream": lambda path: dict(gpuload.stream(path)),
}


def through_safe_open(path: Path) -> dict[str, torch.Tensor]:
    with gpuload.safe_open(path) as f:
        return {name: f.get_tensor(name) for name in f.offset_keys()}


@settings(max_examples=400, deadline=None)
@given(blob=blobs())
def test_any_file_gives_what_safetensors_gives_or_one_line(
    blob: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    path.write_bytes(blob)
    before = len(os.listdir("/proc/self/fd"))
    try:
        want = reference_load_file(path)
    except (safetensors.SafetensorError, OSError, RuntimeError, KeyError, ValueError, OverflowError):
        want = None
    for name, door in [*DOORS.items(), ("safe_open", through_safe_open)]:
        got: dict[str, torch.Tensor] | MfsError
        try:
            got = door(path)
        except MfsError as error:
            got = error
        if isinstance(got, MfsError):
            assert want is None, f"{name} refuses what safetensors loads: {got}"
            assert str(path) in str(got) or isinstance(got, UsageError), name
            assert "\n" not in str(got), name
        else:
            assert want is not None, f"{name} loads what safetensors refuses"
            assert_same(got, want)
    event("loaded" if want else "loaded, empty" if want == {} else "refused")
    assert len(os.listdir("/proc/self/fd")) <= before, "a descriptor is left open"
