"""From an URL to a registry: the marker on the way up, and the first push."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mfs.errors import MfsError, NotFoundError, StoreError, UsageError
from mfs.registry import layout
from mfs.registry.layout import parse_address
from mfs.registry.opening import Place, create_root, open_or_create, open_url
from mfs.sources.options import SourceOptions
from mfs.testing.suite import deadline
from tests.registry.places import S3Place
from tests.servers.swift import SwiftServer

NONE = SourceOptions()


def opened(url: str, options: SourceOptions = NONE) -> Place:
    return open_url(url, options, deadline_s=deadline())


def created(url: str, options: SourceOptions = NONE) -> Place:
    return open_or_create(parse_address(url), options, deadline_s=deadline())


def test_root_model_tag_and_revision(tmp_path: Path) -> None:
    root = f"mfs+file://{tmp_path}/deep/reg"
    assert created(f"{root}/llama:v1")[1:] == ("llama", "v1", None)
    assert (tmp_path / "deep/reg" / layout.MARKER_KEY).read_bytes() == layout.MARKER_BODY
    assert opened(root)[1:] == (None, None, None)
    assert opened(f"{root}/")[1:] == (None, None, None)
    assert opened(f"{root}/llama")[1:] == ("llama", None, None)
    assert opened(f"{root}/other:v2")[1:] == ("other", "v2", None)
    assert opened(f"{root}/llama@sha256:{'1' * 64}")[1:] == ("llama", None, "1" * 64)
    assert {opened(url).store.identity for url in (root, f"{root}/llama", f"{root}/llama:v1")} == {root}


def test_the_first_push_makes_no_registry_in_one_that_is_there(tmp_path: Path) -> None:
    created(f"mfs+file://{tmp_path}/reg/llama:v1")
    assert created(f"mfs+file://{tmp_path}/reg/bert")[1:] == ("bert", None, None)
    with pytest.raises(UsageError) as caught:
        created(f"mfs+file://{tmp_path}/reg")
    assert "MODEL:TAG" in str(caught.value)
    assert list(tmp_path.rglob(layout.MARKER_KEY)) == [tmp_path / "reg" / layout.MARKER_KEY]


def test_two_first_pushes_at_once(tmp_path: Path) -> None:
    ready = threading.Barrier(8)

    def create(number: int) -> str:
        ready.wait()
        return created(f"mfs+file://{tmp_path}/reg/m{number}:v1").store.identity

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(create, range(8)))) == 1
    assert (tmp_path / "reg" / layout.MARKER_KEY).read_bytes() == layout.MARKER_BODY


def test_what_was_looked_for_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        opened(f"mfs+file://{tmp_path}/reg/llama")
    said = str(caught.value)
    assert f"{tmp_path}/reg/llama/{layout.MARKER_KEY}" in said
    assert f"{tmp_path}/reg/{layout.MARKER_KEY}" in said
    assert "mfs push" in said


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"format":"mfs-registry"}', b"\xff", b'{"format":"x","version":1}']
)
def test_a_marker_that_is_none(tmp_path: Path, body: bytes) -> None:
    (tmp_path / layout.MARKER_KEY).write_bytes(body)
    with pytest.raises(StoreError) as caught:
        opened(f"mfs+file://{tmp_path}")
    assert "marker" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["mfs+s3://bucket", "mfs+s3://bucket:v1", "mfs+file:///x y:v1", "mfs+http://host/reg/llama:v1"]
)  # fmt: skip
def test_where_no_registry_is_made(url: str) -> None:
    with pytest.raises(MfsError):
        create_root(parse_address(url), NONE, deadline_s=deadline(1))


@pytest.fixture
def bucket(swift: SwiftServer, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
    place = S3Place(swift, s3_bucket, monkeypatch)
    yield place
    place.close()


def test_in_a_bucket(bucket: S3Place) -> None:
    place = created(f"{bucket.url}/llama:v1", bucket.options)
    assert place.model == "llama"
    assert bucket.get(layout.MARKER_KEY) == layout.MARKER_BODY
    place.store.close()
    for url, model in ((bucket.url, None), (f"{bucket.url}/llama", "llama")):
        place = opened(url, bucket.options)
        assert place.model == model
        place.store.close()
    whole = created(f"mfs+s3://{bucket.bucket}/m:v1", bucket.options)
    assert whole.store.identity.startswith(f"mfs+s3://{bucket.bucket}@")
    whole.store.close()
