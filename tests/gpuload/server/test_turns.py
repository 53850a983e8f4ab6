"""A load whose bytes do not come stands aside: others have their turn, and it decides nothing without its own."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpuload.client import committed as committing
from gpuload.client.asking import ask, load_resident
from gpuload.client.attached import attach
from gpuload.client.committed import Identity, commit
from gpuload.errors import DeviceError
from gpuload.moving import staging
from gpuload.moving.source import FileSource
from gpuload.server import loader, pulled, turns
from gpuload.server.digests import DigestCache
from gpuload.testing import ServerThread, assert_same, random_tensors, write
from mfs.errors import StoreError, UsageError
from tests.gpuload.conftest import GRANULE

IDENTITY = Identity("digest-1", "engine 1.0")


class Stuck:
    """Reads of files whose names begin with 'stuck' give nothing until `go`."""

    def __init__(self) -> None:
        self.asked: dict[str, threading.Event] = {}
        self.gives: dict[str, threading.Event] = {}

    def add(self, path: Path) -> Path:
        self.asked[str(path)], self.gives[str(path)] = threading.Event(), threading.Event()
        return path

    def wait_asked(self, path: Path) -> None:
        assert self.asked[str(path)].wait(60)

    def go(self, path: Path) -> None:
        self.gives[str(path)].set()

    def read(self, path: str) -> None:
        if path in self.asked:
            self.asked[path].set()
            assert self.gives[path].wait(150)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    made, read_into = Stuck(), FileSource.read_into

    def read(self: FileSource, shard: int, start: int, views: Sequence[memoryview]) -> None:
        made.read(self._shards[shard].path)
        read_into(self, shard, start, views)

    monkeypatch.setattr(FileSource, "read_into", read)
    yield made
    for gives in made.gives.values():
        gives.set()


@pytest.fixture
def load(server: ServerThread, stuck: Stuck) -> Iterator[Callable[..., Future[dict[str, Any]]]]:
    """`load(path, name)`: a load in a thread."""
    with ThreadPoolExecutor(8) as threads:

        def begin(path: Path, name: str, **more: Any) -> Future[dict[str, Any]]:
            return threads.submit(load_resident, path, name, "cpu", socket_path=server.socket_path, **more)

        yield begin
        for path in stuck.gives:
            stuck.go(Path(path))


def model(folder: Path, seed: int, granules: int = 10) -> Path:
    return write(folder / f"{seed}.safetensors", random_tensors(seed, {"w": (granules - 1, GRANULE // 2)}))


def test_a_file_that_gives_nothing_keeps_nobody_waiting(
    server: ServerThread, stuck: Stuck, load: Callable[..., Future[dict[str, Any]]], tmp_path: Path
) -> None:
    slow = stuck.add(model(tmp_path, 1))
    waiting = load(slow, "slow")
    stuck.wait_asked(slow)
    assert load(model(tmp_path, 2), "other").result(60)["model"] == "other"
    assert load(model(tmp_path, 3), "other", is_swap=True).result(60)["model"] == "other"
    assert not waiting.done()
    stuck.go(slow)
    assert waiting.result(60)["report"]["bytes_copied"] > 0
    held = attach("slow", socket_path=server.socket_path)
    assert_same(held, random_tensors(1, {"w": (9, GRANULE // 2)}))
    del held
    gc.collect()
    site = server.sites["cpu"]
    assert (site.aside_count, site.loads_count) == (0, 0)


@pytest.mark.parametrize(
    ("owner", "call"),
    [(loader, "open_source"), (loader, "stamp_of"), (DigestCache, "add")],
    ids=["opened", "looked at", "remembered"],
)
def test_a_file_that_hangs_outside_its_reads_keeps_nobody_waiting(
    server: ServerThread,
    load: Callable[..., Future[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    call: str,
) -> None:
    """The first such call hangs; whoever takes the name meanwhile has it."""
    real, hangs, gives = getattr(owner, call), threading.Event(), threading.Event()

    def hang(*args: Any, **more: Any) -> Any:
        if not hangs.is_set():
            hangs.set()
            assert gives.wait(150)
        return real(*args, **more)

    monkeypatch.setattr(owner, call, hang)
    waiting = [load(model(tmp_path, 1), "m")]
    try:
        assert hangs.wait(60)
        assert load(model(tmp_path, 2), "m").result(60)["report"]["bytes_copied"] > 0
        assert not waiting[0].done()
    finally:
        gives.set()
    with pytest.raises(UsageError, match="'m' on cpu is other content"):
        waiting[0].result(60)
    assert_same(attach("m", socket_path=server.socket_path), random_tensors(2, {"w": (9, GRANULE // 2)}))
    gc.collect()
    site = server.sites["cpu"]
    assert (site.aside_count, site.loads_count) == (0, 0)


def test_a_load_is_counted_once_wherever_it_waits(
    server: ServerThread, stuck: Stuck, load: Callable[..., Future[dict[str, Any]]], tmp_path: Path
) -> None:
    """At work, aside, and waiting for its turn again."""
    site = server.sites["cpu"]
    first, second = stuck.add(model(tmp_path, 1)), stuck.add(model(tmp_path, 2))
    waiting = [load(first, "first")]
    stuck.wait_asked(first)
    waiting.append(load(second, "second"))
    stuck.wait_asked(second)
    assert (site.loads_count, site.aside_count) == (2, 1)
    stuck.go(first)
    _until(lambda: site.turn.statistics().tasks_waiting == 1)
    assert site.loads_count == 2
    stuck.go(second)
    for one in waiting:
        one.result(60)
    assert site.loads_count == 0


def test_a_program_that_commits_and_gives_nothing_keeps_nobody_waiting(
    server: ServerThread, load: Callable[..., Future[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, gives, give = threading.Event(), threading.Event(), committing._Form.write

    def late(self: Any, *args: Any) -> None:
        asked.set()
        assert gives.wait(150)
        give(self, *args)

    monkeypatch.setattr(committing._Form, "write", late)
    made = random_tensors(1, {"a": (64, 512), "b": (64, 512)})
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(commit, IDENTITY, made, socket_path=server.socket_path)
        try:
            assert asked.wait(60)
            assert load(model(tmp_path, 2), "other").result(60)["model"] == "other"
            assert not waiting.done()
        finally:
            gives.set()
        assert_same(waiting.result(60), made)
    del waiting
    gc.collect()


def test_a_name_that_others_took_meanwhile_is_theirs(
    stuck: Stuck, load: Callable[..., Future[dict[str, Any]]], tmp_path: Path
) -> None:
    slow = stuck.add(model(tmp_path, 1))
    waiting = load(slow, "m")
    stuck.wait_asked(slow)
    digest = load(model(tmp_path, 2), "m").result(60)["digest"]
    stuck.go(slow)
    with pytest.raises(UsageError, match="'m' on cpu is other content"):
        waiting.result(60)
    assert load(model(tmp_path, 2), "m").result(60)["digest"] == digest


def test_without_room_beside_it_one_waits_as_for_a_turn(
    stuck: Stuck, load: Callable[..., Future[dict[str, Any]]], tmp_path: Path, server: ServerThread
) -> None:
    slow = stuck.add(model(tmp_path, 1, 200))
    waiting = load(slow, "slow")
    stuck.wait_asked(slow)
    larger = load(model(tmp_path, 2, 200), "large")
    _until(lambda: server.sites["cpu"].aside_count == 1)
    assert load(model(tmp_path, 3, 20), "small").result(60)["report"]["evicted"] == []
    assert not larger.done()
    stuck.go(slow)
    assert waiting.result(60)["model"] == "slow"
    assert "slow" in larger.result(60)["report"]["evicted"]


def test_a_pin_that_is_set_while_a_swap_is_under_way_stays(
    server: ServerThread, stuck: Stuck, load: Callable[..., Future[dict[str, Any]]], tmp_path: Path
) -> None:
    load(model(tmp_path, 1), "m").result(60)
    slow = stuck.add(model(tmp_path, 2))
    waiting = load(slow, "m", is_swap=True)
    stuck.wait_asked(slow)
    ask({"op": "pin", "model": "m", "pinned": True}, socket_path=server.socket_path)
    stuck.go(slow)
    assert waiting.result(60)["pinned"]


@pytest.mark.parametrize("error", [DeviceError("no"), OSError("no")], ids=["device", "system"])
def test_where_there_is_no_second_ring_it_keeps_its_turn(
    stuck: Stuck,
    load: Callable[..., Future[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    tries = list[int]()

    class Ring(staging.Ring):
        def grow(self) -> None:
            tries.append(1)
            raise error

    monkeypatch.setattr(turns, "Ring", Ring)
    monkeypatch.setattr(turns, "STALL_S", 0.02)
    slow = stuck.add(model(tmp_path, 1))
    waiting = load(slow, "slow")
    stuck.wait_asked(slow)
    other = load(model(tmp_path, 2), "other")
    _until(lambda: bool(tries))
    time.sleep(0.3)
    assert not other.done()
    stuck.go(slow)
    assert waiting.result(60)["model"] == "slow"
    assert other.result(60)["model"] == "other"
    assert len(tries) == 1


def test_only_so_many_stand_aside(
    stuck: Stuck,
    load: Callable[..., Future[dict[str, Any]]],
    tmp_path: Path,
    server: ServerThread,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "ASIDE_MAX", 1)
    first, second = stuck.add(model(tmp_path, 1)), stuck.add(model(tmp_path, 2))
    waiting = [load(first, "first")]
    stuck.wait_asked(first)
    waiting.append(load(second, "second"))
    stuck.wait_asked(second)
    other = load(model(tmp_path, 3), "other")
    _until(lambda: server.sites["cpu"].loads_count == 3)
    assert not other.done()
    stuck.go(second)
    assert waiting[1].result(60)["model"] == "second"
    assert other.result(60)["model"] == "other"
    assert not waiting[0].done()
    stuck.go(first)
    assert waiting[0].result(60)["model"] == "first"


def test_who_leaves_while_aside_leaves_nothing(
    stuck: Stuck, load: Callable[..., Future[dict[str, Any]]], tmp_path: Path, server: ServerThread
) -> None:
    slow = stuck.add(model(tmp_path, 1))
    with pytest.raises(Exception, match="answer"):
        load(slow, "slow", timeout_s=0.5).result(60)
    assert load(model(tmp_path, 2), "other").result(60)["model"] == "other"
    stuck.go(slow)
    _until(lambda: server.sites["cpu"].loads_count == 0)
    assert server.sites["cpu"].aside_count == 0
    assert "slow" not in server.sites["cpu"].catalog.models


def test_waiting_for_a_commits_bytes_is_bounded_as_a_whole(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulled, "WAIT_S", 0.3)
    monkeypatch.setattr(pulled, "BYTES_PER_S_MIN", 1 << 60)
    give = committing._Form.write

    def slowly(self: Any, *args: Any) -> None:
        time.sleep(0.1)  # each range in time by itself
        give(self, *args)

    monkeypatch.setattr(committing._Form, "write", slowly)
    with pytest.raises(StoreError, match="let its bytes be waited for"):
        commit(IDENTITY, random_tensors(1, {f"w{i}": (32, 1024) for i in range(9)}), socket_path=server.socket_path)


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
