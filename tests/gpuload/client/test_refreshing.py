"""A swap shown under the same addresses: whole or not at all, with its lease, beside other swaps, under kill -9."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpuload.client.attached
from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import Attached, attach, open_resident
from gpuload.client.refreshing import _uninterrupted
from gpuload.device.host import HostChange, HostDevice, HostMapping
from gpuload.errors import BusyError, DeviceError
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, assert_same, bits, random_tensors, running_server, write
from mfs.errors import ChangedError, NotFoundError, UsageError

SHAPES = {"big": (40, 2048), "small": (50, 50), "none": (0, 3), "odd": (7,)}
one_way = pytest.mark.parametrize("server", [True], indirect=True, ids=["direct"])


def content(seed: int) -> dict[str, torch.Tensor]:
    return random_tensors(seed, SHAPES)


def serve(
    server: ServerThread, folder: Path, tensors: Mapping[str, torch.Tensor], name: str = "m", **options: Any
) -> None:
    number = len(list(folder.glob("*.safetensors")))
    file = write(folder / f"{number}.safetensors", tensors)
    load_resident(
        file, name, options.pop("device", None), is_swap=True, options=options, socket_path=server.socket_path
    )


def graph(attached: Attached) -> dict[str, tuple[int, int]]:
    """As a captured graph has them: bare addresses."""
    return {name: (tensor.data_ptr(), tensor.nbytes) for name, tensor in attached.items()}


def replay(captured: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    return {name: ctypes.string_at(at, nbytes) if nbytes else b"" for name, (at, nbytes) in captured.items()}


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def behind(server: ServerThread, folder: Path, **options: Any) -> tuple[Attached, dict[str, tuple[int, int]]]:
    """What shows the first content, and a graph captured over it, while the second is served."""
    serve(server, folder, content(1), **options)
    held = attach("m", socket_path=server.socket_path)
    captured = graph(held)
    serve(server, folder, content(2), **options)
    return held, captured


def test_new_content_stands_where_the_old_one_stood(server: ServerThread, tmp_path: Path) -> None:
    serve(server, tmp_path, content(1))
    held = attach("m", socket_path=server.socket_path)
    tensors, captured, first = dict(held), graph(held), held.generation
    view = held["big"][3:5]
    serve(server, tmp_path, {**content(1), "small": content(2)["small"]})
    assert_same(held, content(1))
    assert held.refresh()
    now = {**content(1), "small": content(2)["small"]}
    assert_same(tensors, now)
    assert graph(held) == captured
    assert replay(captured) == bytes_of(now)
    assert bits(view) == bits(now["big"][3:5])
    assert (held.generation > first, held.digest) == (True, attach("m", socket_path=server.socket_path).digest)
    gc.collect()
    assert (server.gauges()["retired"], server.gauges()["leases"]) == (0, 1), "the old lease was given back"
    assert not held.refresh(), "nothing is new"
    assert server.gauges()["leases"] == 1


@one_way
def test_it_is_waited_for(server: ServerThread, tmp_path: Path) -> None:
    serve(server, tmp_path, content(1))
    held = attach("m", socket_path=server.socket_path)
    assert not held.wait(timeout_s=0)
    serve(server, tmp_path, content(2))
    assert held.wait(timeout_s=60)
    assert held.refresh()
    assert not held.wait(timeout_s=0)
    assert held.wait(held.generation - 1, timeout_s=0)
    opened = open_resident(
        [os.open(tmp_path / "1.safetensors", os.O_RDONLY)], ["x"], None, socket_path=server.socket_path
    )
    for call in (opened.wait, opened.refresh):
        with pytest.raises(UsageError, match="only what was attached by a name"):
            call()


@one_way
def test_what_was_written_here_is_gone_wherever_that_was(server: ServerThread, tmp_path: Path) -> None:
    """Else a program that edits its weights would edit some of them twice."""
    serve(server, tmp_path, content(1))
    held = attach("m", socket_path=server.socket_path)
    for tensor in held.values():
        tensor.zero_()
    serve(server, tmp_path, {**content(1), "small": content(2)["small"]})
    held.refresh()
    assert_same(held, {**content(1), "small": content(2)["small"]})


@one_way
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({**SHAPES, "odd": (8,)}, r"tensor 'odd' was BF16 of shape \[7\], is BF16 of shape \[8\]"),
        ({**SHAPES, "more": (3,)}, "it has a tensor 'more' that was not there"),
        ({name: shape for name, shape in SHAPES.items() if name != "odd"}, "it has no tensor 'odd' any more"),
    ],
)
def test_another_table_is_refused_in_one_line(server: ServerThread, tmp_path: Path, other: Any, said: str) -> None:
    serve(server, tmp_path, content(1))
    held = attach("m", socket_path=server.socket_path)
    serve(server, tmp_path, random_tensors(2, other))
    with pytest.raises(
        ChangedError, match=rf"'m' cannot be refreshed in place, only attached anew: {said} \(generation"
    ):
        held.refresh()
    assert_same(held, content(1))
    assert server.gauges()["leases"] == 1, "what was refused is not held"


@one_way
def test_a_type_of_the_same_size_is_refused(server: ServerThread, tmp_path: Path) -> None:
    serve(server, tmp_path, content(1))
    held = attach("m", socket_path=server.socket_path)
    serve(server, tmp_path, {**content(1), "odd": content(1)["odd"].view(torch.float16)})
    with pytest.raises(ChangedError, match=r"'odd' was BF16 of shape \[7\], is F16"):
        held.refresh()


@one_way
def test_ranks_change_together_or_not_at_all(server: ServerThread, tmp_path: Path) -> None:
    """A swap falls between two ranks' preparations: what the first one holds the second gets all the same."""
    serve(server, tmp_path, content(1))
    ranks = [attach("m", socket_path=server.socket_path) for _ in range(2)]
    serve(server, tmp_path, content(2))
    first = ranks[0].prepare()
    serve(server, tmp_path, content(3))
    ready = [first, ranks[1].prepare(digest=first.digest)]
    serve(server, tmp_path, content(4))
    assert all(one.apply() for one in ready)
    for rank in ranks:
        assert_same(rank, content(2))
    assert len({rank.digest for rank in ranks}) == 1
    with pytest.raises(ChangedError, match="swapped in between, and nobody holds the other any more"):
        ranks[0].prepare(digest="of content that was never here")
    first = ranks[0].prepare()
    first.close()  # the other said no
    for rank in ranks:
        assert_same(rank, content(2))


@one_way
def test_one_refresh_at_a_time_and_each_once(server: ServerThread, tmp_path: Path) -> None:
    serve(server, tmp_path, content(1))
    held = attach("m", socket_path=server.socket_path)
    ready = held.prepare()
    with pytest.raises(BusyError, match="another refresh of 'm' is under way"):
        held.refresh()
    assert not ready.apply()
    with pytest.raises(UsageError, match="applied or closed before"):
        ready.apply()
    held.prepare()  # dropped
    gc.collect()
    assert not held.refresh()
    assert server.gauges()["leases"] == 1


@one_way
def test_no_capture_is_refreshed_into(server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(server, tmp_path, content(1))
    held = attach("m", socket_path=server.socket_path)
    ready = held.prepare()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for call in (ready.apply, held.refresh):
            with pytest.raises(UsageError, match="this thread captures a CUDA graph"):
                call()
    ready.close()


@one_way
def test_what_is_unloaded_cannot_be_refreshed_to(server: ServerThread, tmp_path: Path) -> None:
    serve(server, tmp_path, content(1))
    held = attach("m", socket_path=server.socket_path)
    ask({"op": "unload", "model": "m"}, socket_path=server.socket_path)
    with pytest.raises(NotFoundError):
        held.refresh()
    assert_same(held, content(1))


class Broken:
    """`HostMapping._mmap` that fails the given calls, counted from when it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failing: int) -> None:
        self.calls, real = 0, HostMapping._mmap

        def fails(mapping: HostMapping, *args: Any) -> int:
            self.calls += 1
            if self.calls in failing:
                raise DeviceError("the kernel refuses, as asked")
            return real(mapping, *args)

        monkeypatch.setattr(HostMapping, "_mmap", fails)


def scattered(server: ServerThread, tmp_path: Path) -> Attached:
    """Attached to content in several runs of granules, with other content of several runs to come."""
    for i in range(20):
        serve(server, tmp_path, random_tensors(i, {"x": (1, 2048)}), name=f"hole {i}")
    ask({"op": "unload", "model": "hole 3"}, socket_path=server.socket_path)
    for i in range(0, 20, 2):
        ask({"op": "unload", "model": f"hole {i}"}, socket_path=server.socket_path)
    small = {f"s{i}": (9, 2048) for i in range(3)}
    serve(server, tmp_path, random_tensors(1, small))
    held = attach("m", socket_path=server.socket_path)
    serve(server, tmp_path, random_tensors(2, small))
    return held


@one_way
def test_an_error_in_the_middle_leaves_the_old_content_whole(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = scattered(server, tmp_path)
    before, small = graph(held), {f"s{i}": (9, 2048) for i in range(3)}
    ready = held.prepare()
    runs = len(ready._reply["parts"][0]["runs"])
    for call in range(1, runs + 1):
        with monkeypatch.context() as patch:
            Broken(patch, call)
            with pytest.raises(DeviceError, match="as asked"):
                ready.apply()
        assert replay(before) == bytes_of(random_tensors(1, small))
        assert server.gauges()["leases"] == 1
        ready = held.prepare()
    assert ready.apply()
    assert replay(before) == bytes_of(random_tensors(2, small))


@one_way
def test_where_there_is_no_way_back_nothing_is_shown(
    server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = scattered(server, tmp_path)
    (at, _), *_ = graph(held).values()
    ready = held.prepare()
    with monkeypatch.context() as patch:
        Broken(patch, 1, 2)
        with pytest.raises(DeviceError, match=r"lost to this process: a refresh failed .*; let go of all tensors"):
            ready.apply()
    (line,) = [x for x in Path("/proc/self/maps").read_text().splitlines() if int(x.split("-")[0], 16) == at]
    assert line.split()[1] == "---p"
    for call in (held.refresh, held.wait, lambda: held["s0"]):
        with pytest.raises(DeviceError, match="lost to this process"):
            call()


def test_a_server_that_was_started_anew_is_followed(config: ServerConfig, small_granules: None, tmp_path: Path) -> None:
    """Its arena is another: equal numbers of granules mean nothing."""
    open_one = lambda _: HostDevice(granule_bytes=4096)  # noqa: E731
    with running_server(config, open_one) as server:
        serve(server, tmp_path, content(1))
        held = attach("m", socket_path=server.socket_path)
    assert_same(held, content(1))
    captured = graph(held)
    with running_server(config, open_one) as server:
        serve(server, tmp_path, content(2))
        assert held.wait(timeout_s=0)
        assert held.refresh()
        assert replay(captured) == bytes_of(content(2))
        assert server.gauges()["leases"] == 1
        del held
        gc.collect()
        assert server.gauges()["leases"] == 0


@contextmanager
def two_devices(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ServerThread, dict[str, Any]]]:
    """A server with two arenas, and how a model is spread over them."""
    monkeypatch.setattr(gpuload.client.attached, "open_device", lambda name: HostDevice(name=name, granule_bytes=4096))
    config = replace(config, arena_bytes=dict.fromkeys(["cpu", "cpu:1"], 100 * 4096))
    with running_server(config, lambda name: HostDevice(name=name, granule_bytes=4096)) as server:
        yield server, {"device_map": {"big": "cpu:1", "": "cpu"}}


def test_parts_on_several_devices_change_together(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with two_devices(config, monkeypatch) as (server, spread):
        held, captured = behind(server, tmp_path, **spread)
        ready = held.prepare()
        with monkeypatch.context() as patch:
            Broken(patch, 2)  # the second part, when the first is done
            with pytest.raises(DeviceError, match="as asked"):
                ready.apply()
        assert replay(captured) == bytes_of(content(1))
        assert held.refresh()
        assert replay(captured) == bytes_of(content(2))
        serve(server, tmp_path, content(3), device="cpu")
        with pytest.raises(ChangedError, match=r"stands elsewhere|stood on"):
            held.refresh()
        del held, ready
        gc.collect()
        assert server.gauges("cpu:1")["leases"] == 0


@one_way
def test_refreshes_beside_swaps_are_never_mixed(server: ServerThread, tmp_path: Path) -> None:
    """What is shown is one content or another, whole, while others are swapped in all the time."""
    made = [content(i) for i in range(4)]
    files = [write(tmp_path / f"{i}.safetensors", tensors) for i, tensors in enumerate(made)]
    where = {"socket_path": server.socket_path}
    load_resident(files[0], "m", None, **where)
    wanted = [bytes_of(tensors) for tensors in made]
    faults: list[str] = []
    ready, over = threading.Barrier(4), threading.Event()

    def follow() -> None:
        held = attach("m", **where)
        captured = graph(held)
        ready.wait(60)
        while not over.is_set():
            held.refresh()
            if replay(captured) not in wanted:
                faults.append("mixed")
        held.refresh()
        if replay(captured) != wanted[2]:
            faults.append("not the last")

    threads = [threading.Thread(target=follow) for _ in range(3)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    for i in range(1, 31):
        load_resident(files[i % 4], "m", None, is_swap=True, **where)
    over.set()
    for thread in threads:
        thread.join()
    assert not faults


KILLED = """
import sys
from gpuload.client import attached, refreshing
from gpuload.device.host import HostChange, HostDevice, HostMapping
attached.open_device = lambda name: HostDevice(granule_bytes=4096)
held = attached.attach("m", socket_path=sys.argv[1])
print("attached", flush=True)
sys.stdin.readline()
real = HostMapping.show
def stops(mapping, fd, runs):
    if fd >= 0 and armed:
        print("in the middle", flush=True)
        sys.stdin.readline()
    real(mapping, fd, runs)
armed = False
ready = held.prepare()
armed = True
HostMapping.show = stops
ready.apply()
"""


@one_way
def test_a_program_killed_in_the_middle_leaves_nothing(server: ServerThread, tmp_path: Path) -> None:
    serve(server, tmp_path, content(1))
    command = [sys.executable, "-c", KILLED, server.socket_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "attached\n"
        serve(server, tmp_path, content(2))
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.stdout.readline() == "in the middle\n"
        assert server.gauges()["leases"] == 2
        program.send_signal(signal.SIGKILL)
    assert (server.gauges()["leases"], server.gauges()["retired"]) == (0, 0)


@one_way
def test_a_forked_child_refreshes_for_itself(server: ServerThread, tmp_path: Path) -> None:
    held, captured = behind(server, tmp_path)
    child = os.fork()
    if not child:
        ok = held.refresh() and replay(captured) == bytes_of(content(2))
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert replay(captured) == bytes_of(content(1))
    assert server.gauges()["leases"] == 1


def test_who_forks_beside_a_refresh_has_no_mix(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with two_devices(config, monkeypatch) as (server, spread):
        held, captured = behind(server, tmp_path, **spread)
        began, forked, exchange = threading.Event(), threading.Event(), HostChange.exchange

        def slow(change: HostChange) -> None:
            exchange(change)
            began.set()
            forked.wait(0.3)  # a child that is made here has the first part alone

        monkeypatch.setattr(HostChange, "exchange", slow)
        refresh = threading.Thread(target=held.refresh)
        refresh.start()
        began.wait()
        child = os.fork()
        if not child:
            os._exit(8 if replay(captured) == bytes_of(content(2)) else 7)
        forked.set()
        refresh.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8
        del held
        gc.collect()
        assert server.gauges()["leases"] == 0


def test_an_interrupt_waits_until_it_is_done() -> None:
    """What is shown and what is leased would differ otherwise."""
    done: list[str] = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(3):
            threading.Event().wait(0.01)  # the main thread has its turns
        done.append("done")

    with pytest.raises(KeyboardInterrupt):
        _uninterrupted(work)
    assert done == ["done"]


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    gc.collect()
