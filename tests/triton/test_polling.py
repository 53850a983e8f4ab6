"""Mode poll on a mounted S3 bucket: what changes is noticed, and nothing else ever reloads or unloads."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import origins, touching
from tests.servers.chaos import ChaosProxy
from tests.servers.swift import SwiftServer
from tests.servers.triton import TritonServer
from tests.triton import models
from tests.triton.conftest import Repository, Serve, wait_for

POLL_S = 1
IDLE_POLLS = 10
ALL = "version_policy: { all { } }"


@pytest.fixture(scope="module")
def proxy(swift: SwiftServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosProxy]:
    """The way to the store."""
    with ChaosProxy(swift.endpoint, tmp_path_factory.mktemp("chaos")) as made:
        yield made


@pytest.fixture(scope="module")
def repository(swift: SwiftServer, proxy: ChaosProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """A prefix of a bucket, looked at every second while mounted; each look that fails does so within three."""
    bucket = f"triton-{uuid.uuid4().hex[:12]}"
    swift.client().create_bucket(Bucket=bucket)
    origin = origins.S3Origin(swift, bucket)
    origin.source = {"endpoint_url": proxy.url}
    made = Repository(origin, tmp_path_factory.mktemp("repo"), refresh_s=1.0, timeout_s=3.0)
    made.publish(models.model("still", 1, 2, extra=ALL))
    made.mount.alarms_expected.append("refresh")
    with made.mount:
        yield made
    swift.ensure_started()
    swift.remove_bucket(bucket)


@pytest.fixture(scope="module")
def server(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Polls every second."""
    folder = tmp_path_factory.mktemp("triton")
    options = ("--model-control-mode=poll", f"--repository-poll-secs={POLL_S}")
    with TritonServer(folder, repository.path, *options) as made:
        yield made


def polls(server: TritonServer, count: int) -> None:
    """Let so many polls pass: Triton says nothing of a poll that found nothing, so this waits for the clock."""
    server_time_s = time.monotonic() + count * POLL_S
    while time.monotonic() < server_time_s:
        assert server.is_live
        time.sleep(0.2)


def test_nothing_reloads_while_nothing_changes(repository: Repository, server: TritonServer) -> None:
    polls(server, IDLE_POLLS)
    assert (server.loads("still"), server.unloads("still")) == (2, 0)


def test_a_published_model_and_version_are_noticed_and_no_other_model_is_touched(
    repository: Repository, server: TritonServer
) -> None:
    repository.add(models.model("grow", 1, extra=ALL))
    wait_for(lambda: server.versions("grow") == ["1"], "the new model")
    repository.add(models.version("grow", 2))
    wait_for(lambda: server.versions("grow") == ["1", "2"], "the new version")
    assert models.scale_of(server, "grow", 2) == 2
    assert (server.loads("still"), server.unloads("still")) == (2, 0)


def test_a_removed_version_is_no_longer_served(repository: Repository, server: TritonServer) -> None:
    """Rollback: seen only if the directory's own time moved."""
    repository.add(models.model("back", 1, 2))
    wait_for(lambda: server.versions("back") == ["2"], "the newest version")
    repository.remove("back/2/")
    wait_for(lambda: server.versions("back") == ["1"], "the version before")
    assert models.scale_of(server, "back") == 1


def test_a_renamed_version_is_served_under_its_new_number(repository: Repository, server: TritonServer) -> None:
    repository.add(models.model("renamed", 1))
    wait_for(lambda: server.versions("renamed") == ["1"], "the version")
    files = {name: content for name, content in repository.files.items() if not name.startswith("renamed/1/")}
    repository.publish({**files, **models.version("renamed", 5, scale=1)})
    wait_for(lambda: server.versions("renamed") == ["5"], "the new number")
    assert models.scale_of(server, "renamed") == 1


def test_retrained_weights_of_the_same_size_are_reloaded(repository: Repository, server: TritonServer) -> None:
    repository.add(models.model("retrained", 1))
    wait_for(lambda: server.versions("retrained") == ["1"], "the model")
    assert models.scale_of(server, "retrained") == 1
    repository.add(models.version("retrained", 1, scale=9))
    wait_for(lambda: models.scale_of(server, "retrained") == 9, "the new weights")
    assert server.loads("retrained") == 2


def test_a_removed_model_is_unloaded_and_may_come_back(repository: Repository, server: TritonServer) -> None:
    repository.add(models.model("guest", 1))
    wait_for(lambda: server.versions("guest") == ["1"], "the model")
    repository.remove("guest/")
    wait_for(lambda: server.unloads("guest") == 1, "its removal")
    repository.add(models.model("guest", 1))
    wait_for(lambda: server.versions("guest") == ["1"], "its return")


def test_a_store_that_is_away_unloads_nothing(repository: Repository, server: TritonServer, proxy: ChaosProxy) -> None:
    """Triton takes one failed look at a directory for the removal of every model."""
    before = server.index()
    unloads = server.log.count("successfully unloaded")
    for weather in ({"stall_after_bytes": 0}, {"reset_after_bytes": 0}, None):
        if weather is None:
            proxy.stop()
        else:
            proxy.set(**weather)
        polls(server, 5)
        assert server.index() == before
        assert models.scale_of(server, "still", 1) == 1
    failed = repository.mount.client.status()["sources"][0]["last_error"]
    assert failed, "the store was not even missed"
    proxy.start()
    wait_for(lambda: not repository.mount.client.status()["sources"][0]["last_error"], "the store's return")
    polls(server, 2)
    assert server.index() == before
    assert server.log.count("successfully unloaded") == unloads
    assert (server.loads("still"), server.unloads("still")) == (2, 0)


def test_a_slow_listing_shows_a_version_whole_or_not_at_all(
    repository: Repository, server: TritonServer, proxy: ChaosProxy
) -> None:
    """Triton hangs for ever on a version directory without its model.py."""
    name, path = "slow", str(repository.path / "slow")
    repository.add(models.model(name, 1, extra=ALL))
    wait_for(lambda: server.versions(name) == ["1"], "the model")
    proxy.set(rtt_ms=400)
    try:
        repository.publish({**repository.files, **models.version(name, 2)}, refresh=False)
        seen: set[tuple[str, ...]] = set()

        def is_served() -> bool:
            found = repository.look(touching.tree, path)
            if names := tuple(sorted(file.removeprefix("2/") for file in found if file.startswith("2/"))):
                seen.add(names)
            return server.versions(name) == ["1", "2"]

        wait_for(is_served, "the new version", timeout_s=30)
        assert seen == {("model.py", "model.safetensors")}
    finally:
        proxy.clear()


def test_an_exchange_of_the_daemon_reloads_nothing(tmp_path: Path, serve: Serve) -> None:
    """`mfs mount --handover` while Triton polls; afterwards a new version is noticed as before."""
    repository = Repository(origins.FolderOrigin(tmp_path / "registry"), tmp_path / "m")
    repository.publish(models.model("stays", 1))
    with repository.mount:
        server = serve(repository.path, "--model-control-mode=poll", f"--repository-poll-secs={POLL_S}")
        polls(server, 2)
        repository.mount.hand_over()
        polls(server, 3)
        assert (server.loads("stays"), server.unloads("stays")) == (1, 0)
        assert models.total_of(server, "stays") == models.filler_sum(1)
        repository.add(models.version("stays", 2))
        wait_for(lambda: server.versions("stays") == ["2"], "the new version")
        assert models.scale_of(server, "stays") == 2
        server.stop()
