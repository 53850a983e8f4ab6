"""layout = "hub-cache": the real huggingface_hub, offline, finds a mounted repository by its name on the Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mfs.config import MountConfig, SourceConfig
from mfs.errors import ConfigError
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.hub import HubServer

WEIGHTS = ramp((5 << 20) + 3)
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "onnx/model.onnx": ramp(70_000, 3)}
_ASK = """
import json, sys
from huggingface_hub import hf_hub_download, snapshot_download, scan_cache_dir, try_to_load_from_cache
repo = sys.argv[1]
paths = {name: hf_hub_download(repo, name) for name in sys.argv[2:]}
assert snapshot_download(repo) == paths["config.json"].rpartition("/")[0]
assert try_to_load_from_cache(repo, "config.json") == paths["config.json"]
print(json.dumps(paths))
"""


def ask(mount: TestMount, repo: str) -> dict[str, str]:
    """Where huggingface_hub finds the files of a repository, without a network."""
    env = {"HF_HUB_CACHE": str(mount.path), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    found: dict[str, str] = json.loads(mount.run(sys.executable, "-c", _ASK, repo, *FILES, env=env))
    return found


def commit_of(mount: TestMount, repo: str) -> str:
    folder = f"models--{repo.replace('/', '--')}"
    text: bytes = mount.call(touching.read, str(mount.path / folder / "refs/main"))
    return text.decode()


def test_files_are_found_by_the_name_on_the_hub(hub: HubServer, mounted: Mounted) -> None:
    """Before and after the branch moves: the reference and the snapshot change together."""
    origin = origins.HubOrigin(hub)
    origin.source = {"layout": "hub-cache"}
    origin.put_all(FILES)
    mount = mounted(origin)
    first = commit_of(mount, origin.repo)
    for name, path in ask(mount, origin.repo).items():
        assert path == f"{mount.path}/models--{origin.repo.replace('/', '--')}/snapshots/{first}/{name}"
        assert mount.call(touching.read, path) == FILES[name]
    mount.wait_saved(f"models--{origin.repo.replace('/', '--')}/snapshots/{first}/model.safetensors")
    origin.put_all(FILES | {"config.json": b'{"a": 2}'})
    before = mount.origin_bytes
    assert mount.client.refresh()["errors"] == []
    assert mount.wait_for(lambda: commit_of(mount, origin.repo) != first)
    second = commit_of(mount, origin.repo)
    paths = ask(mount, origin.repo)
    assert f"/snapshots/{second}/" in paths["config.json"]
    assert mount.call(touching.read, paths["config.json"]) == b'{"a": 2}'
    assert mount.call(touching.read, paths["model.safetensors"]) == WEIGHTS
    assert mount.origin_bytes < before + (1 << 20), "the weights are the same bytes, whatever the commit"


def test_several_repositories_make_one_cache(hub: HubServer, mounted: Mounted) -> None:
    repos = [origins.HubOrigin(hub) for _ in range(2)]
    for number, origin in enumerate(repos):
        origin.put_all(FILES | {"config.json": b"%d" % number})
    sources = tuple(SourceConfig(o.url, str(n), layout="hub-cache") for n, o in enumerate(repos))
    mount = mounted("", sources=sources, env=repos[0].env)
    for number, origin in enumerate(repos):
        assert mount.call(touching.read, ask(mount, origin.repo)["config.json"]) == b"%d" % number


def test_a_named_revision_has_its_reference_too(hub: HubServer, mounted: Mounted) -> None:
    origin = origins.HubOrigin(hub)
    commit = hub.commit(origin.repo, FILES, ref="v1")
    hub.commit(origin.repo, FILES | {"config.json": b"later"})
    origin.url += "@v1"
    origin.source = {"layout": "hub-cache"}
    mount = mounted(origin)
    folder = str(mount.path / f"models--{origin.repo.replace('/', '--')}")
    assert mount.call(touching.list_names, f"{folder}/refs") == ["main", "v1"]
    assert mount.call(touching.list_names, f"{folder}/snapshots") == [commit] == [commit_of(mount, origin.repo)]
    assert mount.call(touching.read, ask(mount, origin.repo)["config.json"]) == FILES["config.json"]


@pytest.mark.parametrize(
    ("url", "layout", "complaint"),
    [("s3://b/p", "hub-cache", "is for hf:// sources"), ("hf://a/b", "cache", "expected one of plain, hub-cache")],
)
def test_what_cannot_be_shown_that_way_is_said(url: str, layout: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SourceConfig(url, layout=layout)


def test_the_directory_is_named_after_the_repository() -> None:
    source = SourceConfig("hf://org/name@v1", "whatever", layout="hub-cache")
    assert source.name == "models--org--name"
    config = MountConfig(mountpoint=Path("/m"), sources=(source,))
    assert MountConfig.from_json(config.to_json()) == config
