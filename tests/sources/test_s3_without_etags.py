"""A real S3 server that has no ETags: the date binds, and never two versions by one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from mfs.errors import ChangedError
from mfs.sources import SourceOptions, open_source
from mfs.sources.base import Source
from mfs.sources.s3_answers import parse_listing
from mfs.testing import ramp
from mfs.testing.suite import list_tree, object_of, read
from tests.servers.juicefs import JuiceGateway


@pytest.fixture
def prefix() -> str:
    return f"p-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def source(juice: JuiceGateway, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    for name, value in juice.environ().items():
        monkeypatch.setenv(name, value)
    source = open_source(f"s3://{juice.bucket}/{prefix}", SourceOptions())
    yield source
    source.close()


def test_what_was_just_written_and_is_replaced_at_once_is_another_version(
    juice: JuiceGateway, prefix: str, source: Source
) -> None:
    """Without a pause before the listing both would be of one second and one size."""
    client = juice.client()
    key = {"Bucket": juice.bucket, "Key": f"{prefix}/w.bin"}
    client.put_object(**key, Body=ramp(1000))
    old = object_of(source, "w.bin", list_tree(source)["w.bin"])
    assert read(source, old, 0, 10) == ramp(10)
    client.put_object(**key, Body=ramp(1000, 7))
    with pytest.raises(ChangedError):
        read(source, old, 500, 600)
    new = object_of(source, "w.bin", list_tree(source)["w.bin"])
    assert new.cache_id != old.cache_id
    assert read(source, new) == ramp(1000, 7)


def test_only_what_a_date_alone_binds_is_waited_for() -> None:
    written_s = 1767323045
    for etag, answered_s, is_unsettled in (
        ("", written_s, True),
        ("", written_s - 5, True),
        ("", written_s + 1, False),
        ("", None, False),
        ("<ETag>v1</ETag>", written_s, False),
    ):
        entry = f"<Key>k</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified>{etag}<Size>5</Size>"
        body = f"<ListBucketResult><Contents>{entry}</Contents></ListBucketResult>".encode()
        assert parse_listing(body, "s3://b", answered_s=answered_s).has_unsettled is is_unsettled
