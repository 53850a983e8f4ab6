"""What a registry stands on: a folder, three S3 servers with habits of their own, a web server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.errors import AccessError, StoreError
from mfs.registry.web_store import WebStore, open_place
from mfs.sources.options import SourceOptions
from mfs.testing.store_suite import ReadingSuite, StoreSuite, keys
from mfs.testing.suite import deadline
from tests.registry.places import FolderPlace, S3Place
from tests.servers.juicefs import JuiceGateway
from tests.servers.nginx import NginxServer
from tests.servers.rclone import RcloneServer
from tests.servers.s3_client import S3Account
from tests.servers.swift import SwiftServer


def _place(account: S3Account, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
    place = S3Place(account, bucket, monkeypatch)
    yield place
    place.close()


class TestFolder(StoreSuite):
    @pytest.fixture
    def place(self, tmp_path: Path) -> FolderPlace:
        return FolderPlace(tmp_path / "reg")


class TestSwift(StoreSuite):
    is_conditional = False

    @pytest.fixture
    def place(self, swift: SwiftServer, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
        yield from _place(swift, s3_bucket, monkeypatch)


class TestRclone(StoreSuite):
    is_conditional = False

    @pytest.fixture
    def place(self, rclone_s3: RcloneServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        rclone_s3.client().create_bucket(Bucket=bucket)
        yield from _place(rclone_s3, bucket, monkeypatch)


class TestJuice(StoreSuite):
    is_conditional = False

    @pytest.fixture
    def place(self, juice: JuiceGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
        yield from _place(juice, juice.bucket, monkeypatch)


class WebPlace(FolderPlace):
    """A folder that nginx shows."""

    def __init__(self, nginx: NginxServer) -> None:
        name = f"reg-{uuid.uuid4().hex[:12]}"
        super().__init__(nginx.files / name)
        self.root.mkdir()
        self.place = f"{nginx.url}{name}"

    def store(self) -> WebStore:  # type: ignore[override]
        return open_place(self.place, SourceOptions())


class TestWeb(ReadingSuite):
    @pytest.fixture
    def place(self, nginx: NginxServer) -> WebPlace:
        return WebPlace(nginx)

    def test_nothing_is_written(self, place: WebPlace) -> None:
        store = place.store()
        for write in (
            lambda: store.create("work/a", b"", deadline_s=deadline()),
            lambda: store.write("work/a", b"", deadline_s=deadline()),
            lambda: store.delete(["work/a"], deadline_s=deadline()),
        ):
            with pytest.raises(AccessError):
                write()
        assert not store.can_write
        store.close()

    def test_a_server_that_lists_for_people_only_is_an_error(self, nginx: NginxServer, place: WebPlace) -> None:
        place.put("tags/m/t/1", b"x")
        store = open_place(place.place.replace(nginx.url, f"{nginx.url}~html-index/"), SourceOptions())
        with pytest.raises(StoreError) as caught:
            keys(store, "tags/")
        assert "JSON index" in str(caught.value)
        store.close()
