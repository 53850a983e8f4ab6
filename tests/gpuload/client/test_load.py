"""The public loader against safetensors itself: the same bits, whatever the dtype, the device's way or the slice."""

from __future__ import annotations

import json
import struct
import threading
import weakref
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as reference_load_file

import gpuload
from gpuload.client import into_tensors, tensors
from gpuload.client import load as loading
from gpuload.client.door import run_inside
from gpuload.client.tensors import TORCH_DTYPES
from gpuload.moving.pipeline import Limits
from gpuload.testing import assert_same, bits, random_tensors, write
from mfs.errors import IntegrityError, NotFoundError, UsageError
from mfs.safetensors import DTYPE_BITS


def raw_file(path: Path, dtype: str, shape: list[int], *, lead: int = 0) -> Path:
    """A file of one tensor of any dtype, random bytes, `lead` bytes of another in front of it."""
    nbytes = DTYPE_BITS[dtype]
    for n in shape:
        nbytes *= n
    nbytes //= 8
    table = {"lead": {"dtype": "U8", "shape": [lead], "data_offsets": [0, lead]}}
    table["a"] = {"dtype": dtype, "shape": shape, "data_offsets": [lead, lead + nbytes]}
    header = json.dumps(table).encode()
    generator = torch.Generator().manual_seed(nbytes)
    high = 2 if dtype == "BOOL" else 256
    data = bytes(torch.randint(0, high, (lead + nbytes,), generator=generator, dtype=torch.uint8).tolist())
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize("lead", [0, 1], ids=["aligned or not", "shifted by one"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_is_bit_identical(dtype: str, lead: int, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", dtype, [3, 4, 6], lead=lead)
    want = reference_load_file(path)
    assert_same(gpuload.load_file(path), want)
    with gpuload.safe_open(path) as f:
        assert_same({name: f.get_tensor(name) for name in f.offset_keys()}, want)
        assert_same(f.get_tensors(), want)
    assert_same(dict(gpuload.stream(path)), want)


@pytest.mark.parametrize(("dtype", "shape"), [("F6_E2M3", [4, 4]), ("F6_E3M2", [4]), ("F4", [16, 1])])
def test_what_torch_does_not_have_is_refused_as_safetensors_does(dtype: str, shape: list[int], tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", dtype, shape)
    with pytest.raises(safetensors.SafetensorError):
        reference_load_file(path)
    with pytest.raises(UsageError, match="'a' is F"):
        gpuload.load_file(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and their index."""
    folder = tmp_path_factory.mktemp("model")
    first = random_tensors(1, {"model.embed_tokens.weight": (64, 16), "l.0.q_proj.weight": (32, 16), "norm": (16,)})
    second = random_tensors(2, {"l.0.o_proj.weight": (16, 32), "scalar": (), "nothing": (0, 4)}, "F32")
    write(folder / "model-00001-of-00002.safetensors", first)
    write(folder / "model-00002-of-00002.safetensors", second)
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in reference_load_file(path).items()}


def test_a_folder_and_its_index_are_the_model(model: Path) -> None:
    assert_same(gpuload.load_model(model), whole(model))
    assert_same(gpuload.load_model(model / "model.safetensors.index.json"), whole(model))


def test_ranks_hold_their_parts(model: Path) -> None:
    want = whole(model)
    for rank in (0, 1):
        got = gpuload.load_model(model, rank=rank, world=2)
        want_q = want["l.0.q_proj.weight"].chunk(2, 0)[rank]
        want_o = want["l.0.o_proj.weight"].chunk(2, 1)[rank]
        assert torch.equal(got["l.0.q_proj.weight"].view(torch.uint8), want_q.contiguous().view(torch.uint8))
        assert torch.equal(got["l.0.o_proj.weight"].view(torch.int32), want_o.contiguous().view(torch.int32))
        assert got["norm"].shape == want["norm"].shape


def test_stream_keeps_the_order_and_ends_early(model: Path) -> None:
    names = [name for name, _ in gpuload.stream(model)]
    ordered = [name for name, _ in gpuload.stream(model, order=["norm", "scalar"])]
    assert ordered == ["norm", "scalar", *[n for n in names if n not in ("norm", "scalar")]]
    with pytest.raises(UsageError, match="'absent'"):
        next(iter(gpuload.stream(model, order=["absent"])))
    some = gpuload.stream(model)
    next(some)
    some.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("gpuload")]


def test_a_stream_needs_only_a_window_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drops each tensor holds at most the window and what shares a batch with the next, not the model."""
    made = random_tensors(1, {f"t{i}": (1000 + i,) for i in range(200)}, "U8")
    path = write(tmp_path / "x.safetensors", made)
    alive, most = 0, 0

    def gone(nbytes: int) -> None:
        nonlocal alive
        alive -= nbytes

    def empty(*args: object) -> torch.Tensor:
        nonlocal alive, most
        tensor = real_empty(*args)  # type: ignore[arg-type]
        alive += tensor.nbytes
        most = max(most, alive)
        weakref.finalize(tensor, gone, tensor.nbytes)
        return tensor

    real_empty = tensors.empty
    monkeypatch.setattr(tensors, "empty", empty)
    limits = Limits(buffer_bytes=5000, buffers_count=2, readers_count=2, ahead_bytes=20_000)
    for name, tensor in gpuload.stream(path, limits=limits):
        assert bits(tensor) == bits(made[name])
        del tensor
    assert alive == 0
    assert most <= 20_000 + 5000 + 1200


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=14),
    order=st.randoms(use_true_random=False),
    second=st.sets(st.integers(0, 13)),
    ahead_bytes=st.sampled_from([0, 1000, 1 << 20]),
)
def test_a_stream_in_any_order_over_any_devices_arrives(
    sizes: list[int], order: Random, second: set[int], ahead_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No order, no spread over devices and no window makes a tensor wait for one that comes after it."""
    made = random_tensors(4, {f"t{i}": (n,) for i, n in enumerate(sizes)}, "U8")
    path = write(tmp_path_factory.getbasetemp() / "order.safetensors", made)
    names = list(made)
    order.shuffle(names)
    device_map = {name: "cpu:1" for i, name in enumerate(made) if i in second}
    limits = Limits(buffer_bytes=4096, buffers_count=2, readers_count=2, ahead_bytes=ahead_bytes)
    got = list(gpuload.stream(path, device_map=device_map, order=names, limits=limits))
    assert [name for name, _ in got] == names
    assert_same(dict(got), made)


KEYS = st.one_of(
    st.integers(-8, 7),
    st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.none() | st.integers(1, 3)),
)


@settings(max_examples=150, deadline=None)
@given(key=st.lists(KEYS, max_size=4).map(tuple) | KEYS | st.just(...))
def test_slices_are_what_safetensors_gives(key: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "slices.safetensors"
    if not path.exists():
        write(path, random_tensors(5, {"a": (8, 5, 6)}, "I16"))
    with safetensors.safe_open(path, "pt") as f, gpuload.safe_open(path) as g:
        try:
            want = f.get_slice("a")[key]
        except IndexError:
            with pytest.raises(IndexError):
                g.get_slice("a")[key]
            return
        got = g.get_slice("a")[key]
    assert got.shape == want.shape
    assert torch.equal(got, want)


def test_safe_open_has_the_shape_of_safetensors(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", random_tensors(1, {"b": (3,), "a": (2, 2)}))
    with safetensors.safe_open(path, "pt") as f, gpuload.safe_open(path, framework="pt", device="cpu") as g:
        assert (g.keys(), g.offset_keys(), g.metadata()) == (f.keys(), f.offset_keys(), f.metadata())
        assert g.get_slice("a").get_shape() == f.get_slice("a").get_shape()
        assert g.get_slice("a").get_dtype() == f.get_slice("a").get_dtype()
        with pytest.raises(NotFoundError, match="does not contain tensor 'zz'"):
            g.get_tensor("zz")
        kept = g.get_tensor("a")
    with pytest.raises(UsageError, match="is closed"):
        g.keys()
    assert kept.shape == (2, 2)


def test_tensors_are_ours_to_write(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", random_tensors(1, {"a": (1000,)}, "I32"))
    before = path.read_bytes()
    gpuload.load_file(path)["a"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "names",
    [
        ["../../etc/passwd"],
        ["a/../../b"],
        ["/etc/passwd"],
        ["."],
        ["\ud800"],
        [".."],
        [""],
        [7],
        ["a\0b"],
        ["a\nb"],
        ["x" * 5000],
    ],
)
def test_an_index_reaches_no_file_outside_its_folder(names: list[object], tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(i): n for i, n in enumerate(names)}}))
    with pytest.raises(IntegrityError, match="expected a file beside the index or below it"):
        gpuload.load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"index\.json"):
        gpuload.load_model(tmp_path)


@pytest.mark.parametrize("blob", [b"", b"\0" * 8, b"\xff" * 100, struct.pack("<Q", 9) + b"{}"])
def test_a_hostile_file_is_one_clear_line(blob: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    for load in (gpuload.load_file, gpuload.safe_open, gpuload.load_model, lambda p: list(gpuload.stream(p))):
        with pytest.raises(IntegrityError, match=r"x\.safetensors: ") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    for load in (gpuload.load_file, gpuload.load_model, gpuload.safe_open):
        with pytest.raises(NotFoundError):
            load(tmp_path / "absent")
    with pytest.raises(NotFoundError, match=r"holds no \.safetensors"):
        gpuload.load_model(tmp_path)


async def test_loading_inside_an_event_loop(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", random_tensors(1, {"a": (10,)}))
    assert_same(gpuload.load_file(path), reference_load_file(path))


def test_the_door_raises_the_one_error() -> None:
    async def work() -> None:
        raise NotFoundError("nothing there")

    with pytest.raises(NotFoundError, match="nothing there"):
        run_inside(work)


def test_what_is_one_read_is_moved_by_the_callers_own_thread_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(1, {"a.q_proj.weight": (64, 30), "a.o_proj.weight": (16, 64), "b": (7,), "c": (0, 3)})
    path = write(tmp_path / "a.safetensors", tensors)
    ways: list[int] = []

    def counted(work: Any) -> Any:
        ways.append(1)
        return run_inside(work)

    monkeypatch.setattr(loading, "run_inside", counted)
    whole, rank = gpuload.load_file(path), gpuload.load_model(path, rank=1, world=2)
    assert not ways
    monkeypatch.setattr(into_tensors, "DIRECT_BYTES", 1000)
    assert_same(gpuload.load_file(path), whole)
    assert_same(gpuload.load_model(path, rank=1, world=2), rank)
    assert len(ways) == 2
    assert_same(whole, tensors)
