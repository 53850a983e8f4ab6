"""In other people's programs: torch's modes, copies of what `attach` gives, and their own limit of descriptors."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gpuload
from gpuload.client.asking import load_resident
from gpuload.client.attached import Attached, attach
from gpuload.descriptors import park, room_for
from gpuload.testing import ServerThread, assert_same, random_tensors, write
from mfs.errors import UsageError

one_way = pytest.mark.parametrize("server", [True], indirect=True, ids=["direct"])
SHAPES = {"w": (16, 16), "v": (5,), "none": (0, 3)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.safetensors", random_tensors(1, SHAPES, "F32"))


@pytest.fixture
def attached(server: ServerThread, file: Path) -> Callable[[], Attached]:
    """What attaches to a resident model, by a test's own hand: pytest would hold on to what a fixture gives."""
    load_resident(file, "модель", "cpu", socket_path=server.socket_path)
    return lambda: attach("модель", socket_path=server.socket_path)


def _saved(tensors: Any) -> Any:
    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@one_way
@pytest.mark.parametrize(
    ("do", "is_shared"),
    [
        (_saved, False),
        (copy.deepcopy, False),
        (lambda m: pickle.loads(pickle.dumps(m)), False),
        (lambda m: pickle.loads(pickle.dumps(m, protocol=2)), False),
        (lambda m: copy.deepcopy({"inside": [m]})["inside"][0], False),
        (lambda m: _saved({"inside": m})["inside"], False),
        (copy.copy, True),
        (lambda m: m.copy(), True),
        (dict, True),
    ],
    ids=["torch.save", "deepcopy", "pickle", "pickle 2", "deepcopy inside", "saved inside", "copy", ".copy", "dict"],
)  # fmt: skip
def test_what_was_attached_is_copied_as_a_dictionary(
    attached: Callable[[], Attached], server: ServerThread, do: Callable[[Any], Any], is_shared: bool
) -> None:
    held = attached()
    want = {name: tensor.clone() for name, tensor in held.items()}
    got = do(held)
    assert_same(got, want)
    assert list(got) == list(held)
    held["w"].zero_()
    assert torch.equal(got["w"], held["w"]) == is_shared, "on memory of its own, unless it is a shallow copy"
    assert server.gauges()["leases"] == 1
    del held
    gc.collect()
    assert server.gauges()["leases"] == is_shared


@one_way
def test_who_attaches_in_one_mode_says_nothing_about_the_next(
    server: ServerThread, attached: Callable[[], Attached]
) -> None:
    outside = attached()
    with torch.inference_mode():
        inside = attached()
    with torch.no_grad():
        beside = attached()
    for name in SHAPES:
        assert [m[name].is_inference() for m in (outside, inside, beside)] == [False, True, False]
    outside[next(iter(SHAPES))].add_(1).add_(1)
    assert [m[name]._version for m in (outside, beside) for name in SHAPES] == [2, 0, 0, 0, 0, 0]
    beside["w"].requires_grad_().sum().backward()
    assert not outside["w"].requires_grad


DOORS: dict[str, Callable[[Path, str], object]] = {
    "load_file": lambda path, _: gpuload.load_file(path),
    "load_model": lambda path, _: gpuload.load_model(path),
    "stream": lambda path, _: list(gpuload.stream(path)),
    "get_tensor": lambda path, _: gpuload.safe_open(path).get_tensor("w"),
    "get_tensors": lambda path, _: gpuload.safe_open(path).get_tensors(),
    "get_slice": lambda path, _: gpuload.safe_open(path).get_slice("w")[1:3],
    "attach": lambda _, socket_path: attach("модель", socket_path=socket_path),
}


@one_way
@pytest.mark.parametrize("door", DOORS)
def test_where_tensors_have_no_memory_the_mode_is_named(
    server: ServerThread, attached: Callable[[], Attached], file: Path, door: str
) -> None:
    with FakeTensorMode(), pytest.raises(UsageError, match="FakeTensorMode is active"):
        DOORS[door](file, server.socket_path)
    assert server.gauges()["leases"] == 0
    with torch.device("meta"):  # as where models are made empty: it is about tensors that nobody loads
        DOORS[door](file, server.socket_path)
    gc.collect()
    assert server.gauges()["leases"] == 0


def test_the_meta_device_is_no_place_to_load_to(file: Path) -> None:
    with pytest.raises(UsageError, match="no such device: 'meta'"):
        gpuload.load_file(file, "meta")


@contextmanager
def _soft_limit(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_room_for_descriptors_is_lent_and_put_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = len(os.listdir("/proc/self/fd")) + 100
    entered, leave = threading.Barrier(5), threading.Event()

    def work() -> None:
        with room_for(soft):
            entered.wait(30)
            leave.wait(30)

    with _soft_limit(soft):
        with room_for(10):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft, "they fit"
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        entered.wait(30)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
        leave.set()
        for thread in threads:
            thread.join()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft
        with room_for(soft):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft + 1, before[1]))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft + 1, "what the program says itself counts"


def test_a_socket_is_parked_only_where_numbers_are_scarce() -> None:
    import socket

    one, other = socket.socketpair()
    with one, other:
        one.settimeout(7)
        assert park(one) is one
        with _soft_limit(one.fileno() + 10):
            parked = park(one)
            assert parked.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            assert one.fileno() == -1
            assert parked.gettimeout() == 7
            assert not parked.get_inheritable()
        with parked:
            parked.sendall(b"x")
            assert other.recv(1) == b"x"
