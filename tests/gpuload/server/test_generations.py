"""What is served under a name gets a number, can be waited for, and who keeps the old one is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuload.client import asking
from gpuload.client.asking import ask, load_resident, wait_resident
from gpuload.client.attached import attach
from gpuload.device.host import HostDevice
from gpuload.errors import AwayError, BusyError, FitError
from gpuload.server import generations
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, random_tensors, running_server, write
from mfs.errors import ChangedError, UsageError

pytestmark = pytest.mark.parametrize("server", [True], indirect=True, ids=["direct"])


@pytest.fixture
def waits(server: ServerThread) -> Iterator[Any]:
    """`waits(...)`: a `wait_resident` that is under way at the server, as a future."""
    with ThreadPoolExecutor(8) as pool:

        def begin(*args: Any, **kwargs: Any) -> Future[dict[str, Any]]:
            before = waiting(server)
            made = pool.submit(wait_resident, *args, socket_path=server.socket_path, **{"timeout_s": 60, **kwargs})
            while waiting(server) == before and not made.done():
                pass
            return made

        yield begin


def waiting(server: ServerThread) -> int:
    server.settle()
    return int(ask({"op": "status"}, socket_path=server.socket_path)["waiting"])


def make(server: ServerThread, folder: Path, seed: int, name: str = "m", **options: Any) -> dict[str, Any]:
    file = write(folder / f"{seed}.safetensors", random_tensors(seed, {"w": (50, 50)}))
    options = {"is_swap": True, "socket_path": server.socket_path} | options
    return load_resident(file, name, None, **options)


def test_later_content_has_the_higher_number_whatever_becomes_of_its_name(server: ServerThread, tmp_path: Path) -> None:
    seen = [make(server, tmp_path, 1)["generation"], make(server, tmp_path, 2)["generation"]]
    assert make(server, tmp_path, 2)["generation"] == seen[-1], "nothing was changed"
    ask({"op": "unload", "model": "m"}, socket_path=server.socket_path)
    seen += [make(server, tmp_path, 3, "other")["generation"], make(server, tmp_path, 1)["generation"]]
    assert seen == sorted(set(seen))
    assert attach("m", socket_path=server.socket_path).generation == seen[-1]


def test_a_wait_ends_with_the_swap(server: ServerThread, waits: Any, tmp_path: Path) -> None:
    first = make(server, tmp_path, 1)
    waiter = waits("m", after=first["generation"])
    make(server, tmp_path, 1, "another")
    assert not waiter.done(), "it is another name's"
    second = make(server, tmp_path, 2)
    told = waiter.result(60)
    assert told["changed"]
    assert (told["generation"], told["digest"]) == (second["generation"], second["digest"])
    assert waiting(server) == 0
    at_once = wait_resident("m", after=first["generation"], socket_path=server.socket_path, timeout_s=0)
    assert at_once["generation"] == second["generation"]


def test_a_wait_for_a_model_that_is_not_there_yet(server: ServerThread, waits: Any, tmp_path: Path) -> None:
    assert not wait_resident("m", socket_path=server.socket_path, timeout_s=0)["changed"]
    waiter = waits("m")
    made = make(server, tmp_path, 1)
    assert waiter.result(60)["generation"] == made["generation"]


def test_a_wait_that_is_over_says_what_there_is(server: ServerThread, tmp_path: Path) -> None:
    made = make(server, tmp_path, 1)
    told = wait_resident("m", after=made["generation"], socket_path=server.socket_path, timeout_s=0.01)
    assert (told["changed"], told["generation"], told["digest"]) == (False, made["generation"], made["digest"])


def test_a_number_of_another_server_is_refused_unless_the_content_is_known(
    server: ServerThread, waits: Any, tmp_path: Path
) -> None:
    made = make(server, tmp_path, 1)
    with pytest.raises(ChangedError, match=r"generation 70 is not this server's, which has given out 1: .* anew"):
        wait_resident("m", after=70, socket_path=server.socket_path, timeout_s=0)
    told = wait_resident("m", after=70, unlike="of another", socket_path=server.socket_path, timeout_s=0)
    assert told["changed"]
    waiter = waits("m", after=70, unlike=made["digest"])
    assert not waiter.done()
    make(server, tmp_path, 2)
    assert waiter.result(60)["changed"]


@pytest.mark.parametrize(
    "request_", [{"after": -1}, {"after": "1"}, {"after": True}, {"timeout_s": 5000}, {"timeout_s": "1"}]
)
def test_nonsense_is_refused(server: ServerThread, request_: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ask({"op": "wait", "model": "m", **request_}, socket_path=server.socket_path)


def test_waiters_are_bounded_and_one_that_leaves_makes_room(
    server: ServerThread, waits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "WAITERS_MAX", 1)
    sock = asking.connect(server.socket_path, 60)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(asking.exchange, sock, {"op": "wait", "model": "m", "timeout_s": 60}, ())
        while not waiting(server):
            pass
        with pytest.raises(BusyError, match="1 programs wait for a generation already"):
            wait_resident("m", socket_path=server.socket_path, timeout_s=0)
        sock.shutdown(2)
        with pytest.raises(AwayError):
            held.result(60)
    sock.close()
    assert waiting(server) == 0


def test_a_server_that_ends_ends_its_waits(server: ServerThread, config: ServerConfig, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        config = replace(config, socket_path=str(tmp_path / "other.sock"))
        with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as ending:
            held = pool.submit(wait_resident, "m", socket_path=ending.socket_path, timeout_s=60)
            while not waiting(ending):
                pass
        with pytest.raises(AwayError):
            held.result(60)


def test_who_keeps_an_old_generation_is_named(server: ServerThread, tmp_path: Path) -> None:
    """By status, and by the refusal of a swap that would fit without them."""
    made = write(tmp_path / "1.safetensors", random_tensors(1, {"w": (150, 2048)}))
    old = load_resident(made, "m", None, socket_path=server.socket_path)
    held = attach("m", socket_path=server.socket_path)
    made = write(tmp_path / "2.safetensors", random_tensors(2, {"w": (60, 2048)}))
    load_resident(made, "m", None, is_swap=True, socket_path=server.socket_path)
    (device,) = ask({"op": "status"}, socket_path=server.socket_path)["devices"]
    now, before = device["models"]
    assert (now["holders"], before["model"], before["was"]) == ([], None, "m")
    assert (before["generation"], before["bytes_alone"]) == (old["generation"], 150 * 4096)
    assert before["holders"] == [{"pid": os.getpid(), "uid": os.getuid()}]
    made = write(tmp_path / "3.safetensors", random_tensors(3, {"w": (100, 2048)}))
    held_by = rf"'m' generation {old['generation']} by pid {os.getpid()} \(user {os.getuid()}\)"
    with pytest.raises(FitError, match=rf"old generations still hold 600 K, enough if .* let go: {held_by}"):
        load_resident(made, "m", None, is_swap=True, socket_path=server.socket_path)
    del held
    load_resident(made, "m", None, is_swap=True, socket_path=server.socket_path)
