"""A manifest that names 300,000 files in one answer: listing it, twice, stays within the memory the daemon may use."""

from __future__ import annotations

import json
from pathlib import Path

from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.mount.test_scale import MODELS_COUNT, RSS_BYTES_MAX, SHARDS_COUNT, own_bytes
from tests.servers.nginx import NginxServer


def write_manifest(folder: Path, version: str) -> None:
    files = [
        {
            "path": f"org-{model % 100}--model-{model:05d}/model-{shard + 1:05d}-of-{SHARDS_COUNT:05d}.safetensors",
            "size": 1_000_000 + shard,
            "etag": f'"{version if model == 0 else "same"}-{model:05d}-{shard:05d}"',
            "mtime": 1767225600 + model,
        }
        for model in range(MODELS_COUNT)
        for shard in range(SHARDS_COUNT)
    ]
    temporary = folder / "manifest.tmp"
    temporary.write_text(json.dumps({"files": files}))
    temporary.rename(folder / "mfs-manifest.json")


def test_a_manifest_of_300_000_files(nginx: NginxServer, mounted: Mounted) -> None:
    origin = origins.WebOrigin(nginx)
    write_manifest(origin.root, "1")
    mount = mounted(f"{origin.url}mfs-manifest.json", timeout_s=60)
    first = own_bytes(mount.pid)
    assert len(mount.client.ls("")) == MODELS_COUNT
    stat = mount.call(touching.statvfs, str(mount.path))
    assert stat[4] >= MODELS_COUNT * SHARDS_COUNT
    model = str(mount.path / "org-0--model-00000")
    before = mount.call(touching.stat, model)
    write_manifest(origin.root, "2")
    found = mount.client.refresh()
    assert (found["changed_count"], found["errors"]) == (SHARDS_COUNT, [])
    assert mount.wait_for(lambda: mount.call(touching.stat, model)["st_mtime_ns"] > before["st_mtime_ns"])
    second = own_bytes(mount.pid)
    print(f"daemon beyond its slots: {first / 1e6:.0f} MB when listed, {second / 1e6:.0f} MB when listed again")
    assert max(first, second) < RSS_BYTES_MAX
