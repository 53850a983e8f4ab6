"""Where everything is read from: radosgw on this machine's loopback, filled with models."""

from __future__ import annotations

from pathlib import Path

from boto3.s3.transfer import TransferConfig

from tests.servers.radosgw import RadosGateway
from tools.bench.workload import FILE_NAME, Model

BUCKET = "bench"


class Origin:
    """A running radosgw; each model is a folder of the bucket, `<name>/model.safetensors`."""

    def __init__(self, root: Path) -> None:
        self._server = RadosGateway(root)
        self.port = self._server.port
        self.endpoint = self._server.endpoint
        self.access_key = self._server.access_key
        self.secret_key = self._server.secret_key
        self.region = self._server.region
        self.environ = self._server.environ()
        """AWS_* variables for whoever reads from here."""

    def __enter__(self) -> Origin:
        self._server.start()
        self._server.client().create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()

    def put(self, name: str, model: Model) -> None:
        """Upload a model under `name`."""
        self.put_file(model.path, self.key(name))

    def put_file(self, path: Path, key: str) -> None:
        """Upload one file."""
        parts = TransferConfig(multipart_chunksize=16 << 20, max_concurrency=4)
        self._server.client().upload_file(str(path), BUCKET, key, Config=parts)

    def key(self, name: str) -> str:
        return f"{name}/{FILE_NAME}"

    def presigned_url(self, name: str) -> str:
        """An address from which anyone may GET the model's file for an hour."""
        params = {"Bucket": BUCKET, "Key": self.key(name)}
        url: str = self._server.client().generate_presigned_url("get_object", Params=params, ExpiresIn=3600)
        return url
