"""Where everything is read from, on this machine's loopback and in its memory: radosgw (S3) and nginx (HTTP).

Each says how the systems find it. Both keep what they serve in memory, so emptying the page cache slows neither.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig

from tests.servers.nginx import NginxServer
from tests.servers.radosgw import RadosGateway
from tools.bench.processes import run
from tools.bench.workload import MODEL, SHARD_NAMES, Model

BUCKET = "bench"
_JUICEFS_BUCKET = "juicefs"


class Origin:
    """A running radosgw; what is put into it is a folder of one bucket, `<name>/…`."""

    name = "radosgw"

    def __init__(self, root: Path) -> None:
        self._server = RadosGateway(root)
        self.port = self._server.port
        self.endpoint = self._server.endpoint
        self.access_key = self._server.access_key
        self.secret_key = self._server.secret_key
        self.region = self._server.region
        self.environ: Mapping[str, str] = self._server.environ()
        """AWS_* variables for whoever reads from here."""
        self.url = f"s3://{BUCKET}"
        self.rclone_remote = f":s3,provider=Ceph,env_auth=true,region={self.region},endpoint='{self.endpoint}':{BUCKET}"
        self.juicefs_storage: tuple[str, ...] = (
            "--storage", "s3", "--bucket", f"{self.endpoint}/{_JUICEFS_BUCKET}",
            "--access-key", self.access_key, "--secret-key", self.secret_key,
        )  # fmt: skip

    def __enter__(self) -> Origin:
        self._server.start()
        for bucket in (BUCKET, _JUICEFS_BUCKET):
            self._server.client().create_bucket(Bucket=bucket)
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()

    def put_tree(self, tree: Path) -> None:
        """Upload every file of a folder, under its path in there."""
        client = self._server.client()  # making one takes longer than a small file
        files = [path for path in tree.rglob("*") if path.is_file()]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda path: _upload(client, path, str(path.relative_to(tree))), files))

    def put(self, name: str, model: Model) -> None:
        """Upload a model under `name`."""
        for path in model.files:
            self.put_file(path, f"{name}/{path.name}")

    def put_file(self, path: Path, key: str) -> None:
        """Upload one file."""
        _upload(self._server.client(), path, key)

    def keys(self, name: str) -> list[str]:
        """Of a model's shards."""
        return [f"{name}/{shard}" for shard in SHARD_NAMES]

    def shard_urls(self) -> list[str]:
        """Addresses from which anyone may GET the model's shards for an hour."""
        client = self._server.client()
        return [
            client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key}, ExpiresIn=3600)
            for key in self.keys(MODEL)
        ]


def _upload(client: Any, path: Path, key: str) -> None:
    parts = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
    client.upload_file(str(path), BUCKET, key, Config=parts)


class NginxOrigin:
    """A running nginx over a tmpfs: JSON listings for us, HTML ones for rclone, and a place for JuiceFS's objects."""

    name = "nginx"
    environ: Mapping[str, str] = {}

    def __init__(self, root: Path) -> None:
        self._memory = root / "memory"
        self._memory.mkdir(parents=True)
        self._server = NginxServer(root / "server", files=self._memory / "files")
        address = self._server.url
        self.port = self._server.port
        self.url = f"{address}tree/"
        self.rclone_remote = f":http,url='{address}~html-index/tree/':"
        self.juicefs_storage: tuple[str, ...] = ("--storage", "webdav", "--bucket", f"{address}~store/")

    def __enter__(self) -> NginxOrigin:
        run(["mount", "-t", "tmpfs", "-o", "size=75%", "bench", self._memory])  # in a namespace of ours: see there
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()
        run(["umount", self._memory])

    def put_tree(self, tree: Path) -> None:
        """Copy a folder to where it is served from."""
        shutil.copytree(tree, self._server.files / "tree")

    def show_again(self, name: str, other: str) -> None:
        """Show a folder of the tree by another name too, in the same memory."""
        tree = self._server.files / "tree"
        shutil.copytree(tree / name, tree / other, copy_function=os.link)

    def shard_urls(self) -> list[str]:
        """Addresses of the model's shards."""
        return [f"{self.url}{MODEL}/{shard}" for shard in SHARD_NAMES]


AnyOrigin = Origin | NginxOrigin
ORIGINS: dict[str, type[Origin] | type[NginxOrigin]] = {kind.name: kind for kind in (NginxOrigin, Origin)}
