"""The fake daemon is held to the suite that the real one passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.config import MountConfig, SourceConfig
from mfs.control.client import Client
from mfs.testing.fake_daemon import FakeDaemon, FakeFile, example_files
from tests.control.serving import serving
from tests.control.suite import ControlSuite, Expected


class TestFakeDaemon(ControlSuite):
    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[Client]:
        source = SourceConfig("s3://bucket/models", token="hush")
        config = MountConfig(tmp_path / "mount", (source,), cache_dir=tmp_path / "cache")
        with serving(FakeDaemon(example_files(), config), tmp_path / "s.sock"):
            yield Client(tmp_path / "s.sock")

    @pytest.fixture
    def expected(self) -> Expected:
        sizes = {path: file.size for path, file in example_files().items()}
        return Expected(files=sizes, directory="llama", source_urls=("s3://bucket/models",))


def test_verify_drops_and_reports_what_is_bad(tmp_path: Path) -> None:
    daemon = FakeDaemon({"a": FakeFile(100, ssd_bytes=100, is_bad=True), "b": FakeFile(5, ssd_bytes=5)})
    with serving(daemon, tmp_path / "s.sock"):
        client = Client(tmp_path / "s.sock")
        last = list(client.verify([""]))[-1]
        assert last["bad"] == [{"path": "a", "chunk": 0, "reason": "checksum mismatch"}]
        assert client.stat("a")["ssd_bytes"] == 0
