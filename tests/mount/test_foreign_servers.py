"""Mounts of other people's servers, each with habits of its own: what is listed is read, and replaced as a whole."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Mapping

from mfs.testing import ramp
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.juicefs import JuiceGateway
from tests.servers.rclone import RcloneServer

SIZE = (9 << 20) + 17
OLD, NEW = ramp(SIZE), ramp(SIZE, 100)


class Foreign:
    """An origin whose replacements of equal size are always in another second: most of these servers have no finer."""

    def __init__(self, inner: origins.S3Origin | origins.WebOrigin) -> None:
        self.inner = inner
        self.url, self.source, self.env = inner.url, inner.source, inner.env

    def put_all(self, files: Mapping[str, bytes]) -> None:
        begun_s = int(time.time())
        while int(time.time()) == begun_s:
            time.sleep(0.01)
        self.inner.put_all(files)
        if isinstance(self.inner, origins.WebOrigin):
            stated = [{"path": path, "size": len(content)} for path, content in files.items()]
            (self.inner.root / "mfs-manifest.json").write_text(json.dumps({"files": stated}))


def check(origin: Foreign, mounted: Mounted) -> None:
    files = {"m/config.json": b"{}", "m/w.bin": OLD, "m/sub dir/\u6a21.txt": b"1", "m/empty": b""}
    origin.put_all(files)
    mount = mounted(origin, workers_count=1)  # type: ignore[arg-type]  # has all that a mount asks of an origin
    names = {name for name in mount.call(touching.tree, str(mount.path)) if name != "mfs-manifest.json"}
    assert names == set(files)
    assert {name: mount.call(touching.read, str(mount.path / name)) for name in files if name != "m/w.bin"} == {
        name: content for name, content in files.items() if name != "m/w.bin"
    }
    path = str(mount.path / "m/w.bin")
    generator = random.Random(1)
    for _ in range(8):
        offset = generator.randrange(SIZE)
        assert mount.call(touching.pread, path, 5_000, offset) == OLD[offset : offset + 5_000]
    mount.client.evict(["m/w.bin"], "all")
    mount.call(touching.drop_pages, path)
    mount.call(touching.hold, "old", path)
    origin.put_all({**files, "m/w.bin": NEW})
    found = {offset: mount.call(touching.held_outcome, "old", offset, 4_096) for offset in range(0, SIZE, 4 << 20)}
    assert all(got in ("ESTALE", OLD[offset : offset + 4_096]) for offset, got in found.items())
    mount.client.refresh()
    assert mount.wait_for(lambda: mount.call(touching.read, path) == NEW)
    assert mount.call(touching.held_outcome, "old", SIZE - 4_000, 4_000) in ("ESTALE", OLD[-4_000:])
    mount.call(touching.release, "old")


def test_rclone_as_s3(rclone_s3: RcloneServer, mounted: Mounted) -> None:
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    rclone_s3.client().create_bucket(Bucket=bucket)
    check(Foreign(origins.S3Origin(rclone_s3, bucket)), mounted)


def test_juicefs_which_has_no_etags(juice: JuiceGateway, mounted: Mounted) -> None:
    check(Foreign(origins.S3Origin(juice, juice.bucket, f"p-{uuid.uuid4().hex[:12]}")), mounted)


def test_rclone_on_the_web_by_a_manifest_that_states_sizes_alone(rclone_web: RcloneServer, mounted: Mounted) -> None:
    check(Foreign(origins.WebOrigin(rclone_web)), mounted)
