"""An origin that fails while Triton loads: a wait, or a failed load with a reason; no dead server, no wrong answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount import origins, touching
from tests.servers.hub import HubServer
from tests.servers.liar import LiarServer, Lie
from tests.servers.triton import TritonError, TritonServer
from tests.triton import models
from tests.triton.conftest import LiarOrigin, Repository, Serve, wait_for

TIMEOUT_S = 3.0
FILLER_BYTES = 24 << 20
"""More than a read ahead of the headers brings along."""


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiarServer]:
    """A web folder, honest unless told otherwise."""
    with LiarServer(tmp_path_factory.mktemp("liar")) as made:
        yield made


@pytest.fixture(scope="module")
def repository(liar: LiarServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """Its mount; a read that gets no answer fails after three seconds."""
    made = Repository(LiarOrigin(liar), tmp_path_factory.mktemp("repo"), timeout_s=TIMEOUT_S)
    made.publish(models.model("good", 1))
    with made.mount:
        yield made


@pytest.fixture(autouse=True)
def _honest(liar: LiarServer) -> Iterator[None]:
    yield
    liar.tell_truth()


class Background:
    """One call in a thread of its own; `finish` returns or raises what it did."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def finish(self, timeout_s: float = 60.0) -> None:
        self._thread.join(timeout_s)
        assert not self.is_running, "the call did not end"
        if self._error is not None:
            raise self._error


def test_a_stall_delays_the_load_and_it_succeeds(
    repository: Repository, server: TritonServer, liar: LiarServer
) -> None:
    repository.add(models.model("stalled", 1, filler_bytes=FILLER_BYTES))
    liar.lie(Lie.SILENCE, pattern="/stalled/*.safetensors")
    load = Background(lambda: server.load("stalled"))
    wait_for(lambda: liar.lies_told() > 0, "the stall")
    assert load.is_running
    liar.tell_truth()
    load.finish()
    assert models.total_of(server, "stalled") == models.filler_sum(1, FILLER_BYTES)


@pytest.mark.parametrize(
    ("name", "lie", "count"),
    [("status", Lie.STATUS, 2), ("hangup", Lie.HANG_UP, 2), ("truncated", Lie.TRUNCATED, 2)],
)
def test_a_passing_fault_is_not_noticed(
    repository: Repository, server: TritonServer, liar: LiarServer, name: str, lie: Lie, count: int
) -> None:
    repository.add(models.model(name, 1))
    told = liar.lies_told()
    liar.lie(lie, pattern=f"/{name}/*.safetensors", count=count, status=500)
    server.load(name)
    assert liar.lies_told() > told
    assert models.total_of(server, name) == models.filler_sum(1)


@pytest.mark.parametrize("reads", ["all", "lazy"])
def test_a_lasting_fault_is_a_failed_load_and_the_next_one_succeeds(
    repository: Repository, server: TritonServer, liar: LiarServer, reads: str
) -> None:
    """Under a mapping too: the reader dies of SIGBUS, the server and its other models do not."""
    name = f"lasting-{reads}"
    server.load("good")
    repository.add(models.model(name, 1, reads=reads))
    liar.lie(Lie.STATUS, pattern=f"/{name}/*.safetensors", status=404)
    with pytest.raises(TritonError):
        server.load(name)
    assert models.scale_of(server, "good") == 1
    liar.tell_truth()
    server.load(name)
    assert models.total_of(server, name) == models.filler_sum(1)


def test_a_model_whose_reads_hang_delays_no_other(
    repository: Repository, server: TritonServer, liar: LiarServer
) -> None:
    """Another model of the same origin loads, answers, and is listed meanwhile."""
    server.load("good")
    repository.add(models.model("usual", 2))
    began_s = time.monotonic()
    server.load("usual")
    usual_s = time.monotonic() - began_s  # on this machine, as busy as it is
    repository.add({**models.model("hangs", 1, filler_bytes=FILLER_BYTES), **models.model("goes", 2)})
    versions = {("hangs", "1"): "LOADING", ("goes", "2"): "READY", ("good", "1"): "READY"}
    liar.lie(Lie.SILENCE, pattern="/hangs/*.safetensors")
    load = Background(lambda: server.load("hangs"))
    wait_for(lambda: liar.lies_told() > 0, "the stall")
    with server.kept_connection():
        start_s = time.monotonic()
        server.load("goes")
        took_s = time.monotonic() - start_s
        assert models.scale_of(server, "goes") == 2
        assert models.scale_of(server, "good") == 1
        if load.is_running:
            assert versions.items() <= server.index().items()
    assert load.is_running or took_s < TIMEOUT_S + 2 * usual_s, "the other model waited for the hanging one's deadline"
    liar.tell_truth()
    load.finish()


def test_small_files_are_there_before_anybody_asks(
    repository: Repository, server: TritonServer, liar: LiarServer
) -> None:
    """Configuration and code came with the publication: the origin may be silent about them when Triton reads them.

    Triton 2.51 holds one lock while it walks and reads configurations, so a slow one would delay every other model.
    """
    liar.forget_requests()
    repository.add(models.model("small", 1))
    wait_for(lambda: all(liar.requests(f"/small/{name}") for name in ("config.pbtxt", "1/model.py")), "the small files")
    repository.mount.wait_quiet()
    liar.lie(Lie.SILENCE, pattern="/small/*[!s]")  # all but the .safetensors
    server.load("small")
    assert models.scale_of(server, "small") == 1


def test_a_lazily_mapped_version_that_was_removed_answers_rightly(hub: HubServer, tmp_path: Path, serve: Serve) -> None:
    """An open file keeps its revision where the source does: a repository of the Hub, by its commit."""
    repository = Repository(origins.HubOrigin(hub), tmp_path / "h")
    repository.publish(models.model("lazy", 1, 2, reads="lazy", filler_bytes=FILLER_BYTES))
    with repository.mount:
        server = serve(repository.path, "--model-control-mode=explicit", "--load-model=lazy")
        assert models.scale_of(server, "lazy") == 2
        repository.remove("lazy/2/")
        names = repository.look(touching.list_names, str(repository.path / "lazy"))
        assert names == ["1", "config.pbtxt"]
        assert models.total_of(server, "lazy") == models.filler_sum(2, FILLER_BYTES)
        server.load("lazy")
        assert models.total_of(server, "lazy") == models.filler_sum(1, FILLER_BYTES)
