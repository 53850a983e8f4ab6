"""S3 as a source, against a real server that checks real signatures. Written through boto3, read through the source."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import (
    AccessError,
    ChangedError,
    ConfigError,
    NotFoundError,
    StoreError,
    TransientStoreError,
    UsageError,
)
from mfs.fetch.transport import Reply
from mfs.sources import SourceOptions, open_source, s3, s3_access, s3_listing
from mfs.sources.base import Source
from mfs.sources.bounds import MTIME_NS_MAX
from mfs.sources.s3_answers import error_of, parse_listing
from mfs.sources.tree import TreeBuilder
from mfs.testing import ramp
from mfs.testing.suite import SourceSuite, deadline, list_tree, object_of, read
from mfs.types import EntryKind, ObjectId
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer


class S3Origin:
    def __init__(self, swift: SwiftServer, bucket: str, prefix: str = "models/prod") -> None:
        self.swift = swift
        self.bucket = bucket
        self.prefix = prefix
        self.client = swift.client()
        self.opened: list[Source] = []

    def source(self, **options: Any) -> Source:
        url = f"s3://{self.bucket}/{self.prefix}"
        source = open_source(url, SourceOptions(**{"endpoint_url": self.swift.endpoint, **options}))
        self.opened.append(source)
        return source

    def close(self) -> None:
        for source in self.opened:
            source.close()
        self.client.close()

    def put(self, path: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=content)

    def delete(self, path: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch, swift: SwiftServer) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", swift.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", swift.secret_key)


@pytest.fixture
def origin(swift: SwiftServer, s3_bucket: str, credentials: None) -> Iterator[S3Origin]:
    origin = S3Origin(swift, s3_bucket)
    yield origin
    origin.close()


@pytest.fixture
def source(origin: S3Origin) -> Source:
    return origin.source()


class TestS3(SourceSuite):
    @pytest.fixture
    def origin(self, origin: S3Origin) -> S3Origin:
        return origin


def test_the_identity_names_bucket_prefix_and_endpoint(origin: S3Origin, source: Source) -> None:
    assert source.identity == f"s3://{origin.bucket}/models/prod@{origin.swift.endpoint}"
    assert open_source("s3://b/p/").identity == "s3://b/p"


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "s3://user@bucket/x", "s3://bucket:80/x"])
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="s3://bucket"):
        open_source(url)


def test_the_endpoint_may_come_from_the_environment(origin: S3Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    origin.put("a", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", origin.swift.endpoint)
    source = origin.source(endpoint_url=None)
    assert set(list_tree(source)) == {"a"}


def test_profile_region_endpoint_and_keys_may_come_from_files(
    origin: S3Origin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    origin.put("a", b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {origin.swift.endpoint}\n"
        f"aws_access_key_id = {origin.swift.access_key}\naws_secret_access_key = {origin.swift.secret_key}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    source = origin.source(endpoint_url=None, profile="lab")
    assert set(list_tree(source)) == {"a"}
    with pytest.raises(ConfigError, match="nobody"):
        origin.source(profile="nobody")


def test_wrong_and_missing_credentials_are_access_errors(origin: S3Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    origin.put("a", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-wrong-secret")
    with pytest.raises(AccessError, match="SignatureDoesNotMatch") as caught:
        list_tree(origin.source())
    assert "very-wrong-secret" not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test:nobody")
    with pytest.raises(AccessError, match="403"):
        list_tree(origin.source())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessError, match="no AWS credentials"):
        list_tree(origin.source())


def test_a_missing_bucket_is_said_so(swift: SwiftServer, credentials: None) -> None:
    origin = S3Origin(swift, "no-such-bucket")
    with pytest.raises(NotFoundError, match="no such bucket"):
        list_tree(origin.source())
    origin.close()


def test_an_empty_bucket_is_an_empty_tree_and_an_empty_prefix_is_an_error(origin: S3Origin) -> None:
    root = S3Origin(origin.swift, origin.bucket, prefix="")
    assert list_tree(root.source()) == {}
    root.close()
    source = origin.source()
    with pytest.raises(NotFoundError, match="models/prod"):
        list_tree(source)


def test_an_unreachable_endpoint_is_one_clear_line_inside_the_deadline(origin: S3Origin) -> None:
    source = origin.source(endpoint_url="http://127.0.0.1:1")
    with pytest.raises(TransientStoreError, match=r"given up after \d+ attempts? in .*refused"):
        list(source.list("", deadline_s=deadline(0.5)))


def test_marker_keys_make_empty_directories(origin: S3Origin, source: Source) -> None:
    origin.put("void/", b"")
    origin.put("full/", b"")
    origin.put("full/x", b"1")
    found = list_tree(source)
    assert set(found) == {"void", "full", "full/x"}
    assert found["void"].kind is EntryKind.DIRECTORY


def test_names_without_a_place_in_a_tree_are_left_out_and_said(
    origin: S3Origin, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("a//b", "../evil", "m/./x", "good", "both", "both/inner"):
        origin.put(path, b"1")
    with caplog.at_level(logging.WARNING, logger="mfs"):
        found = list_tree(source)
    # What is above a bad name is there, as if it were listed one directory at a time.
    assert set(found) == {"good", "both", "both/inner", "a", "m"}
    assert len([line for line in caplog.messages if "left out 3 names" in line]) == 1
    assert "both a file and a directory" in "".join(caplog.messages)


def test_content_of_a_key_that_ends_in_a_slash_is_hidden_and_said(
    origin: S3Origin, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    """As in Mountpoint for S3: the directory is served."""
    origin.put("x/", b"content")
    origin.put("y/", b"content")
    origin.put("y/z", b"1")
    assert set(list_tree(source)) == {"x", "y", "y/z"}
    assert "content of a key that ends in '/'" in caplog.messages[0]
    assert "2 names: 'models/prod/x/', 'models/prod/y/'" in caplog.messages[0]


PAGE = (
    "<ListBucketResult><Contents><Key>good</Key><Size>1</Size></Contents><Contents><Key>{key}</Key>"
    "<LastModified>{date}</LastModified><Size>{size}</Size></Contents></ListBucketResult>"
)


@pytest.mark.parametrize(
    ("key", "true_key"),
    [
        ("a&#1;b", "a\1b"), ("a&#x1;b", "a\1b"), ("&#0;", "\0"), ("a\1b", "a\1b"), ("&#xD800;", "\ud800"),
        ("&#xFFFFFFFFFF;", "\0"), ("a&#10;b", "a\nb"), ("&#27;[31m", "\x1b[31m"), ("&#127;", "\x7f"),
        ("\udcff", "\udcff"), ("&#xFFFE;", "\ufffe"), ("&#1;&#x1F917;", "\1\U0001f917"), ("&#1;&amp;#1;", "\1&#1;"),
    ],
)  # fmt: skip
def test_a_key_that_xml_cannot_write_costs_itself_alone(key: str, true_key: str) -> None:
    """From servers that know no encoding-type; only U+FFFE and U+FFFF may stand in a name."""
    body = PAGE.format(key=key, date="", size=1).encode("utf-8", "surrogateescape")
    assert [found for found, _ in parse_listing(body, "t").files] == ["good", true_key]


@pytest.mark.parametrize(
    ("date", "size", "expected"),
    [
        ("0001-01-01T00:00:00Z", "1", 0),
        ("1969-12-31T23:59:59.5Z", "1", 0),
        ("2026-01-02T03:04:05.678Z", "1", 1767323045678000000),
        ("Fri, 02 Jan 2026 03:04:05 GMT", "1", 1767323045000000000),
        ("2300-01-01T00:00:00.000Z", "1", MTIME_NS_MAX),
        ("9999-12-31T23:59:59.999Z", "1", MTIME_NS_MAX),
        ("99999-01-01T00:00:00Z", "1", 0),
        ("yesterday", "1", 0),
        ("", "1", 0),
        ("", "", None),
        ("", "-1", None),
        ("", "1.5", None),
        ("", "9" * 30, None),
        ("", str(2**63), None),
        ("", "one", None),
    ],
)
def test_odd_dates_and_sizes_of_a_key_cost_it_alone(date: str, size: str, expected: int | None) -> None:
    tree = TreeBuilder("t", "")
    s3._add(tree, parse_listing(PAGE.format(key="odd", date=date, size=size).encode(), "t"), "")
    ((_, entries),) = tree.pages()
    shown = {entry.name: entry.mtime_ns for entry in entries}
    assert shown == {"good": 0} | ({} if expected is None else {"odd": expected})


def test_a_page_of_too_many_parts_or_with_a_document_type_is_no_listing() -> None:
    for body in (b"<ListBucketResult>" + b"<a>" * 600_000, b"<!DOCTYPE x><ListBucketResult/>", b"<a>" * 1000):
        with pytest.raises(StoreError, match="expected an S3 listing"):
            parse_listing(body, "t")


def test_a_multipart_object_reads_exactly_and_is_bound_to_its_etag(origin: S3Origin, source: Source) -> None:
    part_bytes = 5 << 20
    key = {"Bucket": origin.bucket, "Key": f"{origin.prefix}/big"}
    upload = origin.client.create_multipart_upload(**key)["UploadId"]
    parts = []
    for number in (1, 2):
        body = ramp(part_bytes, (number - 1) * part_bytes)
        made = origin.client.upload_part(**key, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"ETag": made["ETag"], "PartNumber": number})
    origin.client.complete_multipart_upload(**key, UploadId=upload, MultipartUpload={"Parts": parts})
    obj = object_of(source, "big", list_tree(source)["big"])
    assert obj.version.endswith("-2")
    assert read(source, obj, part_bytes - 10, part_bytes + 10) == ramp(20, part_bytes - 10)
    origin.put("big", ramp(2 * part_bytes, 1))
    with pytest.raises(ChangedError, match="replaced"):
        read(source, obj, 0, 10)


def test_what_does_not_fit_a_page_is_listed_lazily_by_directory(
    origin: S3Origin, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_listing, "KEYS_PER_PAGE", 4)  # a thousand objects take Swift 20 s
    for i in range(9):
        origin.put(f"m{i}/a", b"1")
        origin.put(f"m{i}/b", b"22")
    origin.put("m3.txt", b"333")  # sorts into the middle
    origin.put("m5", b"hidden by the directory, pages away from it")
    pages = dict(source.list("", deadline_s=deadline()))
    assert set(pages) == {""}
    assert sorted((entry.name, entry.kind, entry.size) for entry in pages[""]) == sorted(
        [(f"m{i}", EntryKind.DIRECTORY, 0) for i in range(9)] + [("m3.txt", EntryKind.FILE, 3)]
    )
    below = dict(source.list("m7", deadline_s=deadline()))
    assert [(entry.name, entry.size) for entry in below["m7"]] == [("a", 1), ("b", 2)]
    assert len(list_tree(source)) == 9 + 18 + 1


def test_a_dead_server_fails_by_the_deadline_and_serves_again_after_its_return(
    origin: S3Origin, source: Source
) -> None:
    origin.put("a", ramp(1000))
    obj = object_of(source, "a", list_tree(source)["a"])
    origin.swift.stop()
    try:
        with pytest.raises(TransientStoreError, match="given up"):
            read(source, obj, deadline_s=deadline(0.3))
    finally:
        origin.swift.ensure_started()
    assert read(source, obj) == ramp(1000)


@pytest.mark.parametrize("status", [301, 308])
def test_a_redirect_that_names_no_region_says_what_to_set(status: int) -> None:
    assert "set --region" in str(error_of(Reply(status, HTTPMessage(), b""), "s3://b", "us-east-1"))


def test_a_wrong_region_is_corrected_by_what_the_server_says(origin: S3Origin) -> None:
    origin.put("a", ramp(1000))
    source = origin.source(region="eu-west-3")
    obj = object_of(source, "a", list_tree(source)["a"])
    other = origin.source(region="eu-west-3")
    assert read(other, obj, 1, 9) == ramp(8, 1)


def test_unsigned_requests_need_no_credentials(nginx: NginxServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """nginx stands for a public bucket: Swift has none without a further middleware."""
    folder = nginx.files / "public-bucket"
    folder.mkdir()
    (folder / "w.bin").write_bytes(ramp(1000))
    status = (folder / "w.bin").stat()
    source = open_source("s3://public-bucket", SourceOptions(endpoint_url=nginx.url, unsigned=True))
    obj = ObjectId(source.identity, "w.bin", 1000, f"{int(status.st_mtime):x}-{status.st_size:x}")
    assert read(source, obj, 10, 20) == ramp(10, 10)
    source.close()


def test_a_replaced_urllib3_is_warned_of_once(
    origin: S3Origin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import urllib3

    monkeypatch.setattr(urllib3, "__version__", "2.13.900")
    monkeypatch.setattr(s3_access, "warned_of", [])
    for _ in range(2):
        origin.source()
    assert [message for message in caplog.messages if "urllib3" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_closing_ends_calls(origin: S3Origin, source: Source) -> None:
    origin.put("a", b"1")
    obj = object_of(source, "a", list_tree(source)["a"])
    source.close()
    with pytest.raises(Exception, match="closed"):
        read(source, obj)


def test_no_secret_in_reprs(origin: S3Origin) -> None:
    assert "hf_secret" not in repr(SourceOptions(token="hf_secret"))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in repr(origin.source())
