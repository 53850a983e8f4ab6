"""Model repositories pushed as revisions: Triton sees a tag move as one whole new version, and a rollback as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.registry.folder_store import FolderStore
from mfs.testing.mounting import TestMount
from tests.mount import touching
from tests.registry import made
from tests.triton import models
from tests.triton.conftest import Serve, wait_for

ALL = "version_policy: { all { } }"


@pytest.fixture
def registry(tmp_path: Path) -> made.Registry:
    return made.Registry(FolderStore(str(tmp_path / "registry")))


@pytest.fixture
def mount(registry: made.Registry, tmp_path: Path) -> Iterator[TestMount]:
    """Of the whole registry: /mnt/<model>/<tag>/…"""
    with TestMount(tmp_path / "m", f"mfs+file://{tmp_path}/registry", refresh_s=1.0, workers_count=2) as mount:
        yield mount


def repository(number: int) -> dict[str, bytes]:
    """Two models of which each has one version; all of it is made of `number`."""
    return models.model("left", number) | models.model("right", number, extra=ALL)


def test_a_tag_that_moves_is_a_whole_new_version_and_a_rollback_too(
    registry: made.Registry, mount: TestMount, serve: Serve
) -> None:
    old = registry.push("rank", "v1", repository(1))
    registry.move("rank", "prod", old)
    assert mount.client.refresh()["errors"] == []
    path = mount.path / "rank" / "prod"
    assert mount.call(touching.list_names, str(path)) == ["left", "right"]
    server = serve(path, "--model-control-mode=poll", "--repository-poll-secs=1")
    assert [server.versions(name) for name in ("left", "right")] == [["1"], ["1"]]
    assert models.scale_of(server, "left") == models.scale_of(server, "right") == 1

    new = registry.push("rank", "v2", repository(2))
    registry.move("rank", "prod", new)
    wait_for(lambda: [server.versions(name) for name in ("left", "right")] == [["2"], ["2"]], "the move")
    assert models.scale_of(server, "left") == models.scale_of(server, "right") == 2
    assert models.total_of(server, "right") == models.filler_sum(2)

    registry.move("rank", "prod", old)
    wait_for(lambda: [server.versions(name) for name in ("left", "right")] == [["1"], ["1"]], "the rollback")
    assert models.scale_of(server, "left") == models.scale_of(server, "right") == 1
    assert server.log.count("failed to load") == 0
    server.stop()


def test_other_weights_under_the_same_number_are_reloaded_with_each_move(
    registry: made.Registry, mount: TestMount, serve: Serve
) -> None:
    """The version's directory keeps its name: times alone tell, and they must move forward in a rollback too."""
    pushed = [
        registry.push("rank", "v1", models.model("one") | models.version("one", 1, scale=scale))
        for scale in (3, 4)
    ]  # fmt: skip
    registry.move("rank", "prod", pushed[0])
    assert mount.client.refresh()["errors"] == []
    server = serve(mount.path / "rank" / "prod", "--model-control-mode=poll", "--repository-poll-secs=1")
    assert models.scale_of(server, "one") == 3
    for number, scale in ((1, 4), (0, 3), (1, 4)):
        registry.move("rank", "prod", pushed[number])
        wait_for(lambda scale=scale: models.scale_of(server, "one") == scale, f"the weights of {scale}")
    server.stop()
