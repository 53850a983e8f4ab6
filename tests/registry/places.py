"""Where the tests' registries lie: looked at and changed without the help of the store under test."""

from __future__ import annotations

import functools
import uuid
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest

from mfs.registry.folder_store import FolderStore
from mfs.registry.s3_store import S3Store
from mfs.sources.options import SourceOptions
from tests.servers.s3_client import S3Account


class FolderPlace:
    """A folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"mfs+file://{root}"

    def store(self) -> FolderStore:
        return FolderStore(str(self.root))

    def put(self, key: str, content: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    def get(self, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.is_file() else None

    def close(self) -> None:
        """Nothing is open."""


class S3Place:
    """A prefix of its own in a bucket, and the account's keys in the environment."""

    def __init__(self, account: S3Account, bucket: str, monkeypatch: pytest.MonkeyPatch, *, endpoint: str = "") -> None:
        """endpoint: of a proxy before the server."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", account.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", account.secret_key)
        self.prefix = f"reg-{uuid.uuid4().hex[:12]}"
        self.bucket = bucket
        self.client = _client(account)
        self.url = f"mfs+s3://{bucket}/{self.prefix}"
        self.options = SourceOptions(endpoint_url=endpoint or account.endpoint, region=account.region)

    def store(self) -> S3Store:
        return S3Store(self.bucket, f"{self.prefix}/", self.options)

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}", Body=content)

    def get(self, key: str) -> bytes | None:
        try:
            body: bytes = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}")["Body"].read()
        except botocore.exceptions.ClientError:
            return None
        return body

    def close(self) -> None:
        """The client is shared by all tests of a server: making one takes longer than most of them."""


@functools.cache
def _client(account: S3Account) -> Any:
    return account.client()
