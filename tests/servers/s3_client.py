"""What every S3 server of the tests gives its user: a boto3 client, variables for child processes, a clean-up."""

from __future__ import annotations

import functools
import threading
from typing import Any

import boto3
from botocore.config import Config

_making = threading.Lock()
"""boto3 makes clients one at a time."""


@functools.cache
def _session() -> boto3.session.Session:
    """For all clients: each session by itself would read S3's model anew, 70 ms of a client's 75."""
    return boto3.session.Session()


class S3Account:
    """An endpoint and who may use it; subclasses run the server."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str

    def start(self) -> None:
        """Start and return when the endpoint answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop; harmless when stopped."""
        raise NotImplementedError

    def client(self, **kw: Any) -> Any:
        """A boto3 S3 client for this endpoint; `kw` overrides what `boto3.client` is given."""
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"max_attempts": 1},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=16,
        )
        settings: dict[str, Any] = {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "region_name": self.region,
            "config": config,
        }
        with _making:
            return _session().client("s3", **(settings | kw))

    def environ(self) -> dict[str, str]:
        """AWS_* variables with which a child process finds this endpoint."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def remove_bucket(self, name: str) -> None:
        """Delete a bucket with its objects and unfinished uploads."""
        client = self.client()
        for upload in client.list_multipart_uploads(Bucket=name).get("Uploads", []):
            client.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            if found := [{"Key": item["Key"]} for item in page.get("Contents", [])]:
                client.delete_objects(Bucket=name, Delete={"Objects": found})
        client.delete_bucket(Bucket=name)

    def __exit__(self, *exc: object) -> None:
        self.stop()
