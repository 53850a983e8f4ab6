"""A push that takes longer than its credentials live goes on with those of the moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mfs.registry import layout, opening
from mfs.registry import push as pushing
from mfs.sources import SourceOptions, open_source
from mfs.testing.suite import deadline, list_tree
from tests.mount import issuers
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_bucket, s3_error

TURN_REQUESTS = 40
FILES_COUNT = 200


class Bucket(issuers.Issuer):
    """S3 that keeps what is put, and knows If-None-Match. Every 40 requests there are other keys."""

    def __init__(self, credentials: Path) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self._credentials = credentials
        self._requests_count = 0
        self._writing = threading.Lock()

    def answer(self, request: Request) -> Answer:
        with self._writing:
            self._requests_count += 1
            if self._requests_count % TURN_REQUESTS == 0:
                self.rotate()
        if not self.is_good(request.authorization.partition("Credential=")[2].partition("/")[0]):
            return s3_error(400, "ExpiredToken")
        key = request.path.removeprefix("/b/")
        with self._writing:
            if request.method == "PUT":
                if "if-none-match" in request.headers and key in self.objects:
                    return s3_error(412, "PreconditionFailed")
                self.objects[key] = request.body
                return Answer(200, headers=(("ETag", f'"{len(request.body)}"'),))
            if request.method == "DELETE":
                self.objects.pop(key, None)
                return Answer(204)
            return s3_bucket(request, dict(self.objects))

    def rotate(self) -> None:
        self.turn += 1
        keys = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\naws_session_token = t\n"
        issuers.put(self._credentials, keys.format(self.issue()))


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bucket, str]]:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    bucket = Bucket(tmp_path / "credentials")
    bucket.rotate()
    with ScriptedServer(bucket.answer) as server:
        yield bucket, server.url


def test_a_push_outlives_its_keys(bucket: tuple[Bucket, str], tmp_path: Path) -> None:
    issuer, url = bucket
    (tmp_path / "m").mkdir()
    chance = np.random.default_rng(7)
    for number in range(FILES_COUNT):
        tensors = {"w": chance.standard_normal(3000).astype(np.float32)}
        save_file(tensors, tmp_path / "m" / f"{number:03}.safetensors")
    options = SourceOptions(endpoint_url=url, region="us-east-1")
    said, address = pushing.Options(), layout.parse_address("mfs+s3://b/reg/m:v1")
    place = opening.open_or_create(address, options, deadline_s=deadline(60))
    try:
        assert pushing.push(place, *pushing.examine(str(tmp_path / "m"), said), said).is_moved
    finally:
        place.store.close()
    source = open_source("mfs+s3://b/reg/m:v1", options)
    assert len(list_tree(source)) == FILES_COUNT
    source.close()
    assert issuer.turn > 4
    assert issuer.refused_count > 0, "nobody was ever refused: nothing was tried"
