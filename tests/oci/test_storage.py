"""A registry that keeps blobs on S3 and redirects there: addresses are kept, and credentials stay with the registry."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from mfs.errors import AccessError
from mfs.oci.push import push
from mfs.sources import open_source
from mfs.sources.base import Source
from mfs.testing import ramp
from mfs.testing.suite import list_tree, object_of, read
from mfs.types import EntryKind
from tests.oci.artifacts import MODEL, PASSWORD, USER, Repository, packed, tar_of
from tests.oci.recorder import Recorder
from tests.servers.docker_registry import DockerRegistry
from tests.servers.swift import SwiftServer


class Stored(NamedTuple):
    registry: DockerRegistry
    recorder: Recorder


@pytest.fixture(scope="module")
def stored(swift: SwiftServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    swift.client().create_bucket(Bucket="oci")
    with (
        Recorder(swift.endpoint, "mfs/") as recorder,
        DockerRegistry(
            tmp_path_factory.mktemp("registry-s3"), auth="htpasswd", s3=swift, s3_endpoint=recorder.url, bucket="oci"
        ) as registry,
    ):
        yield Stored(registry, recorder)
    swift.ensure_started()
    swift.remove_bucket("oci")


FILES = {"w.bin": ramp(100_000), "tar/w.bin": ramp(70_000, 3), "a/w.bin": ramp(200_000), "config.json": b"{}"}


@pytest.fixture(scope="module")
def filled(stored: Stored) -> Iterator[Repository]:
    """FILES: the first a raw layer, the second in a tar, the others in a compressed one."""
    repository = Repository(stored.registry, secret=PASSWORD)
    parts = [{name: FILES[name] for name in names} for names in (["tar/w.bin"], ["a/w.bin", "config.json"])]
    repository.manifest([
        repository.file("w.bin", FILES["w.bin"]),
        repository.layer(tar_of(parts[0]), f"{MODEL}.weight.v1.tar"),
        repository.layer(packed(tar_of(parts[1]), "gzip"), f"{MODEL}.weight.v1.tar+gzip"),
    ])  # fmt: skip
    yield repository
    repository.close()


@pytest.fixture
def login(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    auths = {stored.registry.host: {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))


@pytest.fixture
def source(filled: Repository, login: None) -> Iterator[Source]:
    source = open_source(f"{filled.url}:v1")
    yield source
    source.close()


def test_addresses_are_asked_for_once_and_carry_no_credentials(stored: Stored, source: Source) -> None:
    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
    stored.recorder.heads.clear()
    before = len(stored.registry.requests())
    assert b"".join(read(source, obj, at, at + 10_000) for at in range(0, 100_000, 10_000)) == ramp(100_000)
    assert len([line for line in stored.registry.requests()[before:] if "/blobs/" in line]) == 1
    assert len(stored.recorder.heads) == 10
    for head in stored.recorder.heads:
        assert b"\r\nRange: " in head
        assert b"authorization" not in head.lower()
        assert b"X-Amz-Signature=" in head


def test_an_address_that_is_refused_is_asked_for_again(stored: Stored, source: Source) -> None:
    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
    assert read(source, obj, 0, 10) == ramp(10)
    refused = stored.recorder.refused_count
    stored.recorder.refuse(1)
    assert read(source, obj, 50, 60) == ramp(10, 50)
    stored.recorder.refuse(1)
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda at: read(source, obj, at, at + 1000), range(0, 3000, 1000)))
    assert b"".join(parts) == ramp(3000)
    assert stored.recorder.refused_count - refused == 2


def test_storage_that_refuses_a_new_address_too_is_named(stored: Stored, source: Source) -> None:
    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
    stored.recorder.refuse(1000)
    try:
        with pytest.raises(AccessError, match=rf"w\.bin: {stored.recorder.url}, where the registry redirects to"):
            read(source, obj, 0, 10)
    finally:
        stored.recorder.refuse(0)
    assert read(source, obj, 0, 10) == ramp(10)


def test_an_address_that_expires_is_renewed_before(
    stored: Stored, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mfs.oci.client.expiry_s", lambda url: 0.0)
    obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
    before = len(stored.registry.requests())
    assert [read(source, obj, 0, 10) for _ in range(3)] == [ramp(10)] * 3
    assert len([line for line in stored.registry.requests()[before:] if "/blobs/" in line]) == 3


def test_tars_and_compressed_layers_come_from_storage_too(source: Source) -> None:
    found = {path: read(source, object_of(source, path, entry)) for path, entry in list_tree(source).items()
             if entry.kind is EntryKind.FILE}  # fmt: skip
    assert found == FILES


def test_a_push_into_storage(stored: Stored, login: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfs.oci.upload.PIECE_BYTES", 400_000)
    repository = Repository(stored.registry, secret=PASSWORD)
    repository.close()
    folder = tmp_path / "model"
    folder.mkdir()
    content = ramp(700_000)
    (folder / "w.gguf").write_bytes(content)
    pushed = push(folder, f"{repository.url}:v1")
    assert pushed.sent_bytes == len(content)
    again = push(folder, f"{repository.url}:v2")
    assert (again.sent_bytes, again.digest) == (0, pushed.digest)
    source = open_source(f"{repository.url}:v1")
    assert read(source, object_of(source, "w.gguf", list_tree(source)["w.gguf"])) == content
    source.close()
