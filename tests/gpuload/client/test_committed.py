"""Weights that an engine made ready: committed, looked at in place, brought back; bit by bit."""

from __future__ import annotations

import gc
import os
import socket
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpuload.client import committed as module
from gpuload.client.asking import ask
from gpuload.client.committed import Identity, commit, committed, fill, restore
from gpuload.client.tensors import TORCH_DTYPES
from gpuload.errors import FitError
from gpuload.moving.pipeline import Limits
from gpuload.testing import ServerThread, assert_same, random_tensors
from mfs.errors import ChangedError, NotFoundError, StoreError, UsageError

IDENTITY = Identity("digest-1", "engine 1.0", "fp8", "tp 0/2")


def engine_layout() -> dict[str, torch.Tensor]:
    """What engines make: transposed, strided, tied, padded, empty; each dtype that there is."""
    made = random_tensors(1, {"plain": (70, 130), "wide": (40, 3, 50)})
    for number, dtype in enumerate(TORCH_DTYPES):
        made[f"of {dtype}"] = random_tensors(number, {"x": (3, 4)}, dtype)["x"]
        if dtype == "BOOL":
            made["of BOOL"] = torch.tensor([[True, False], [False, True]])
    made["columns first"] = random_tensors(2, {"x": (50, 90)})["x"].t()
    made["middle first"] = made["wide"].clone().permute(1, 2, 0)
    made["padded"] = random_tensors(3, {"x": (30, 64)})["x"][:, :50]
    made["one row for all"] = random_tensors(4, {"x": (1, 60)})["x"].expand(7, 60)
    made["tied"] = made["plain"]
    made["tied, turned"] = made["plain"].t()
    made["empty"], made["scalar"] = torch.empty(0, 5), torch.tensor(2.5)
    return made


def like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same strides, with other bytes."""
    made = {}
    for name, tensor in tensors.items():
        dense = tensor.clone() if name == "one row for all" else torch.empty_like(tensor)
        flat = torch.zeros(dense.numel() + 8, dtype=torch.uint8)
        made[name] = flat[:0].view(tensor.dtype).reshape(tensor.shape) if not tensor.numel() else dense
        if dense.numel():
            dense.zero_()
    return made


def test_what_was_committed_comes_back_bit_by_bit(server: ServerThread) -> None:
    made = engine_layout()
    held = commit(IDENTITY, made, socket_path=server.socket_path)
    assert_same(held, made)
    assert held["columns first"].stride() == made["columns first"].stride()
    assert held["tied"].data_ptr() == held["plain"].data_ptr() == held["tied, turned"].data_ptr()
    del held
    gc.collect()
    server.settle()
    again = committed(IDENTITY, socket_path=server.socket_path)
    assert_same(again, made)
    into = like(made)
    restore(IDENTITY, into, socket_path=server.socket_path)
    assert_same(into, made)
    del again
    gc.collect()


def test_equal_bytes_are_kept_once_whoever_committed_them(server: ServerThread) -> None:
    made = random_tensors(1, {f"w{i}": (64, 512) for i in range(6)})
    where = {"socket_path": server.socket_path}
    first = commit(IDENTITY, made, **where)
    used = server.gauges()["granules_used"]
    twin = commit(replace(IDENTITY, source="digest-2"), made, **where)
    assert first.report is not None
    assert twin.report is not None
    assert first.report["bytes_copied"] == sum(t.nbytes for t in made.values())
    assert twin.report["bytes_copied"] == 0
    assert server.gauges()["granules_used"] == used
    assert commit(IDENTITY, made, **where).generation == first.generation, "the same again is no swap"
    changed = made | {"w3": random_tensors(9, {"x": (64, 512)})["x"]}
    assert commit(IDENTITY, changed, **where).generation > twin.generation
    assert_same(first, made)
    assert_same(committed(IDENTITY, **where), changed)
    del first, twin
    gc.collect()


def test_other_identities_and_other_tensors_are_refused_before_a_byte_moves(server: ServerThread) -> None:
    made = random_tensors(1, {"a": (64, 64), "b": (8,)})
    where = {"socket_path": server.socket_path}
    with pytest.raises(NotFoundError):
        committed(IDENTITY, **where)
    commit(IDENTITY, made, **where)
    for other in ("source", "engine", "quantization", "layout"):
        with pytest.raises(NotFoundError):
            committed(replace(IDENTITY, **{other: "another"}), **where)
    with pytest.raises(NotFoundError):
        committed(replace(IDENTITY, more={"moe": "marlin"}), **where)
    zeros = {name: torch.zeros_like(t) for name, t in made.items()}
    for into, words in (
        ({"a": zeros["a"]}, "1 names differ: 'b' is committed only"),
        (zeros | {"c": zeros["b"]}, "1 names differ: 'c' is to be filled only"),
        (zeros | {"b": torch.zeros(9, dtype=torch.bfloat16)}, r"'b' is torch.bfloat16 \[9\], committed was"),
        (zeros | {"b": torch.zeros(8)}, r"'b' is torch.float32 \[8\], committed was torch.bfloat16"),
    ):
        with pytest.raises(UsageError, match=words):
            restore(IDENTITY, into, **where)
    assert not any(t.view(torch.int16).any() for t in zeros.values())
    gc.collect()


def test_a_name_that_holds_something_else_is_not_taken_for_it(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(IDENTITY, random_tensors(1, {"a": (8,)}), socket_path=server.socket_path)
    other = replace(IDENTITY, engine="engine 2.0")
    monkeypatch.setattr(Identity, "name", IDENTITY.name)
    with pytest.raises(ChangedError, match="is not what was committed as"):
        committed(other, socket_path=server.socket_path)
    gc.collect()


def test_what_is_held_by_leases_goes_with_the_last(server: ServerThread) -> None:
    made = random_tensors(1, {"a": (64, 64)})
    held = commit(IDENTITY, made, retain="lease", socket_path=server.socket_path)
    other = committed(IDENTITY, socket_path=server.socket_path)
    del held
    gc.collect()
    server.settle()
    assert server.gauges()["models"] == 1
    del other
    gc.collect()
    server.settle()
    assert set(server.gauges().values()) == {0}


def test_a_commit_needs_no_second_room_in_memory(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_tensors(1, {f"w{i}": (100, 1000) for i in range(4)})
    nbytes, most, files = sum(t.nbytes for t in made.values()), [0], list[int]()
    give, write = module._give, module._Form.write

    def watched(asked: socket.socket, fd: int, data_start: int, form: Any) -> None:
        files.append(fd)
        give(asked, fd, data_start, form)

    def counted(form: Any, window: memoryview, start: int, stop: int) -> None:
        write(form, window, start, stop)
        most[0] = max(most[0], os.fstat(files[0]).st_blocks * 512)

    monkeypatch.setattr(module, "_give", watched)
    monkeypatch.setattr(module._Form, "write", counted)
    commit(IDENTITY, made, socket_path=server.socket_path)
    assert 0 < most[0] < nbytes // 3, "two readers of 16 KiB each, and pages that ranges share"
    gc.collect()


def test_an_engine_that_cannot_give_its_bytes_leaves_nothing(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(module._Form, "write", fails)
    with pytest.raises(StoreError, match="could not give its bytes"):
        commit(IDENTITY, random_tensors(1, {"a": (64, 64)}), socket_path=server.socket_path)
    monkeypatch.setattr(module, "_give", lambda asked, *_: asked.shutdown(socket.SHUT_RDWR))
    with pytest.raises(StoreError, match="has left"):
        commit(IDENTITY, random_tensors(1, {"a": (64, 64)}), socket_path=server.socket_path)
    server.settle()
    assert set(server.gauges().values()) == {0}


def test_what_does_not_fit_or_cannot_be_held_is_refused(server: ServerThread) -> None:
    with pytest.raises(FitError, match="short by"):
        commit(IDENTITY, random_tensors(1, {"a": (1024, 1024)}), socket_path=server.socket_path)
    with pytest.raises(UsageError, match="'m' has no memory"):
        commit(IDENTITY, {"m": torch.empty(3, device="meta")}, socket_path=server.socket_path)
    with pytest.raises(UsageError, match=r"'c' is torch\.complex128"):
        commit(IDENTITY, {"c": torch.zeros(3, dtype=torch.complex128)}, socket_path=server.socket_path)
    with pytest.raises(UsageError, match="a commit brings two descriptors"):
        ask({"op": "commit", "model": "x", "device": "cpu", "files": []}, socket_path=server.socket_path)
    fds = [os.open(__file__, os.O_RDONLY), os.open(__file__, os.O_RDONLY)]
    try:
        with pytest.raises(UsageError, match="a commit brings two descriptors"):
            ask({"op": "commit", "model": "x", "device": "cpu", "files": ["x"]}, fds, socket_path=server.socket_path)
    finally:
        for fd in fds:
            os.close(fd)


def test_a_full_arena_makes_room_and_asks_for_the_bytes_twice(server: ServerThread) -> None:
    """What might be there already is hashed first, in a pass that moves nothing."""
    made = random_tensors(1, {f"w{i}": (256, 512) for i in range(3)})
    old = commit(replace(IDENTITY, source="old"), made, socket_path=server.socket_path)
    del old
    gc.collect()
    server.settle()
    new = random_tensors(2, {f"w{i}": (256, 512) for i in range(3)})
    held = commit(IDENTITY, new, socket_path=server.socket_path)
    assert held.report is not None
    assert held.report["bytes_hashed_before"] > 0
    assert_same(held, new)
    del held
    gc.collect()


def test_filling_is_the_same_in_small_steps(server: ServerThread) -> None:
    made = engine_layout()
    held = commit(IDENTITY, made, socket_path=server.socket_path)
    into = like(made)
    fill(into, held, limits=Limits(buffer_bytes=4096, buffers_count=2, readers_count=3))
    assert_same(into, made)
    with pytest.raises(UsageError):
        fill(into, {}, limits=None)
    del held
    gc.collect()


@pytest.mark.parametrize("more", [{"world": 2, "rules": {"*": 0}}, {"device_map": {"w": "cpu"}}])
def test_a_commit_is_of_one_device(server: ServerThread, more: dict[str, Any]) -> None:
    """Parts would ask for the same range, and one punch out what the other had not read yet."""
    request = {"op": "commit", "model": "x", "device": "cpu", "files": ["x"], **more}
    ours, theirs = socket.socketpair()
    refused = pytest.raises(UsageError, match="a commit goes whole to one device")
    with ours, theirs, open(os.memfd_create("table"), "rb") as table, refused:
        ask(request, [table.fileno(), theirs.fileno()], socket_path=server.socket_path)
