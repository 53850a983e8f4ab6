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


class Bucket(issuers.Issuer):
    """S3 that keeps what is put, and knows If-None-Match; every answer takes a moment, as on a network."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self._writing = threading.Lock()

    def answer(self, request: Request) -> Answer:
        threading.Event().wait(0.02)
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


@pytest.fixture
def bucket() -> Iterator[tuple[Bucket, str]]:
    bucket = Bucket()
    with ScriptedServer(bucket.answer) as server:
        yield bucket, server.url


def test_a_push_outlives_its_keys(bucket: tuple[Bucket, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer, url = bucket
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    keys = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\naws_session_token = t\n"
    (tmp_path / "m").mkdir()
    chance = np.random.default_rng(7)
    for number in range(60):
        tensors = {"w": chance.standard_normal(3000).astype(np.float32)}
        save_file(tensors, tmp_path / "m" / f"{number:02}.safetensors")
    options = SourceOptions(endpoint_url=url, region="us-east-1")
    with issuers.Rotation({issuer: lambda word: issuers.put(tmp_path / "credentials", keys.format(word))}):
        said = pushing.Options()
        address = layout.parse_address("mfs+s3://b/reg/m:v1")
        examined = pushing.examine(str(tmp_path / "m"), said)
        turns = 0
        while issuer.count < 6 or turns == 0:  # new files each time: a push of what is there sends nothing
            turns += 1
            save_file({"w": chance.standard_normal(3000).astype(np.float32)}, tmp_path / "m" / "00.safetensors")
            examined = pushing.examine(str(tmp_path / "m"), said)
            place = opening.open_or_create(address, options, deadline_s=deadline(60))
            try:
                assert pushing.push(place, *examined, said).is_moved
            finally:
                place.store.close()
        source = open_source("mfs+s3://b/reg/m:v1", options)
        assert len(list_tree(source)) == 60
        source.close()
    assert issuer.refused_count > 0, "nobody was ever refused: nothing was tried"
