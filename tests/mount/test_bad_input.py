"""What cannot work is said in one clear line, with a non-zero exit and nothing mounted; what can go on, goes on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import ConfigError
from mfs.testing import ramp
from mfs.testing.mounting import MountFailedError, TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.hub import HubServer
from tests.servers.liar import LiarServer
from tests.servers.nginx import NginxServer
from tests.servers.process import free_port
from tests.servers.swift import SwiftServer

MIB = 1 << 20
WHEN = "Tue, 01 Jul 2025 00:00:00 GMT"


def refusal(mount: TestMount) -> str:
    """The one line with which the daemon declines to serve."""
    with pytest.raises(MountFailedError) as caught, mount:
        pass
    error = caught.value
    assert error.status not in (0, None)
    assert not mount.is_mounted
    assert error.message
    assert "\n" not in error.message
    assert "Traceback" not in mount.log
    assert error.message in mount.log
    print(f"{error.kind}: {error.message}")
    return f"{error.kind}: {error.message}"


class TestSources:
    def test_unreachable_endpoint(self, tmp_path: Path, swift: SwiftServer) -> None:
        settings = {"endpoint_url": f"http://127.0.0.1:{free_port()}"}
        mount = TestMount(tmp_path, "s3://bucket/prefix", source=settings, env=swift.environ(), timeout_s=2.0)
        line = refusal(mount)
        assert "Error: " in line
        assert settings["endpoint_url"] in line
        assert "refused" in line.lower()

    def test_unknown_host(self, tmp_path: Path) -> None:
        line = refusal(TestMount(tmp_path, "http://no-such-host.invalid/models/", timeout_s=2.0))
        assert "no-such-host.invalid" in line

    def test_wrong_credentials(self, tmp_path: Path, swift: SwiftServer, s3_bucket: str) -> None:
        environ = swift.environ() | {"AWS_SECRET_ACCESS_KEY": "wrong"}
        line = refusal(TestMount(tmp_path, f"s3://{s3_bucket}/", env=environ))
        assert line.startswith("AccessError: ")
        assert s3_bucket in line

    def test_no_credentials(self, tmp_path: Path, swift: SwiftServer, s3_bucket: str) -> None:
        line = refusal(TestMount(tmp_path, f"s3://{s3_bucket}/", source={"endpoint_url": swift.endpoint}))
        assert line.startswith("AccessError: ")
        assert "AWS_ACCESS_KEY_ID" in line

    @pytest.mark.parametrize("url", ["s3://no-such-bucket-here/", "s3://{bucket}/no/such/prefix"])
    def test_missing_bucket_or_prefix(self, tmp_path: Path, swift: SwiftServer, s3_bucket: str, url: str) -> None:
        line = refusal(TestMount(tmp_path, url.format(bucket=s3_bucket), env=swift.environ()))
        assert line.startswith("NotFoundError: ")

    def test_missing_repository(self, tmp_path: Path, hub: HubServer) -> None:
        line = refusal(TestMount(tmp_path, "hf://org/no-such-repo", env=hub.environ(hub.token)))
        assert line.startswith("NotFoundError: ")
        assert "org/no-such-repo" in line

    def test_gated_repository(self, tmp_path: Path, hub: HubServer) -> None:
        hub.commit("org/gated-here", {"w.bin": ramp(100)}, gated=True)
        line = refusal(TestMount(tmp_path, "hf://org/gated-here", env=hub.environ(hub.other_token)))
        assert line.startswith("AccessError: ")
        assert "org/gated-here" in line
        assert "accept its licence" in line

    def test_missing_folder(self, tmp_path: Path) -> None:
        line = refusal(TestMount(tmp_path, str(tmp_path / "nowhere")))
        assert line.startswith("NotFoundError: ")
        assert str(tmp_path / "nowhere") in line

    def test_not_a_source(self, tmp_path: Path) -> None:
        assert refusal(TestMount(tmp_path, "ftp://host/x")).startswith("UsageError: ")

    def test_one_bad_source_of_several_is_named(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        from mfs.config import SourceConfig

        sources = (SourceConfig(url=folder.url, name="good"), SourceConfig(url=str(tmp_path / "no"), name="bad"))
        assert "'bad'" in refusal(TestMount(tmp_path, sources=sources))

    def test_a_server_without_ranges(self, nginx: NginxServer, mounted: Mounted) -> None:
        origin = origins.WebOrigin(nginx)
        origin.put_all({"w.bin": ramp(9 * MIB)})
        mount = mounted(origin.url.replace(nginx.url, f"{nginx.url}~no-ranges/"), timeout_s=3.0)
        assert mount.call(touching.read_failure, str(mount.path / "w.bin"), 5 * MIB) == "EIO"
        assert "no range support" in mount.log

    @pytest.mark.parametrize("prefix", ["~no-index", "~html-index", "~forbidden", "~unavailable", "~private"])
    def test_a_server_that_does_not_list(self, tmp_path: Path, nginx: NginxServer, prefix: str) -> None:
        origin = origins.WebOrigin(nginx)
        line = refusal(TestMount(tmp_path, origin.url.replace(nginx.url, f"{nginx.url}{prefix}/"), timeout_s=2.0))
        assert str(nginx.port) in line

    def test_hostile_names_are_left_out(self, liar: LiarServer, mounted: Mounted) -> None:
        names = [
            "..",
            ".",
            "a/b",
            "/etc/passwd",
            "../../x",
            "\x1b[31mred",
            "new\nline",
            "\x7f",
            "",
            "n" * 256,
            "good.bin",
        ]
        entries: list[dict[str, Any]] = [{"name": n, "type": "file", "size": 5, "mtime": WHEN} for n in names]
        entries.append({"name": "../up", "type": "directory", "mtime": WHEN})
        entries.append({"name": "huge", "type": "file", "size": 1 << 62, "mtime": WHEN})
        liar.set_listing("/", json.dumps(entries))
        mount = mounted(liar.url)
        assert set(mount.call(touching.list_names, str(mount.path))) <= {"good.bin", "huge"}
        assert "good.bin" in mount.call(touching.list_names, str(mount.path))
        assert "\x1b" not in mount.log

    @pytest.mark.parametrize(
        "body",
        [
            "[", "[]x", "null", "[1, 2]", '[{"name": 5}]', '[{"name": "a", "type": "file"}]', "",
            '[{"name": "a", "type": "file", "size": -5, "mtime": "WHEN"}]',
            '[{"name": "a", "type": "file", "size": 1e99, "mtime": "WHEN"}]',
            '[{"name": "a", "type": "file", "size": 99999999999999999999999, "mtime": "WHEN"}]',
            '[{"name": "a", "type": "file", "size": 5, "mtime": "never"}]',
            '[{"name": "\\ud800", "type": "file", "size": 5, "mtime": "WHEN"}]',
        ],
    )  # fmt: skip
    def test_listings_of_nonsense(self, liar: LiarServer, tmp_path: Path, body: str) -> None:
        liar.set_listing("/", body.replace("WHEN", WHEN))
        mount = TestMount(tmp_path, liar.url, timeout_s=2.0, workers_count=1)
        try:
            with mount:
                assert set(mount.call(touching.list_names, str(mount.path))) <= {"a"}
        except MountFailedError as error:
            refused = error
        else:
            return
        assert refused.status == 1
        assert "\n" not in refused.message
        assert "Traceback" not in mount.log


class TestFoldersOfOurs:
    """A source that lies in a mount, or in the cache, would show or feed itself."""

    def test_in_its_own_mount_point(self, tmp_path: Path) -> None:
        assert "inside the mount point" in refusal(TestMount(tmp_path, str(tmp_path / "mnt")))

    def test_in_its_own_cache(self, tmp_path: Path) -> None:
        (tmp_path / "cache" / "models").mkdir(parents=True)
        (tmp_path / "link").symlink_to("cache/models")
        assert "in the cache directory" in refusal(TestMount(tmp_path, f"file://{tmp_path}/link"))

    def test_in_a_mount(self, tmp_path: Path, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put_all({"m/w.bin": b"1"})
        first = mounted(folder)
        line = refusal(TestMount(tmp_path / "n", str(first.path / "m")))
        assert f"lies in the mfs mount {first.path}" in line


class TestMountPoint:
    def test_missing(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        mount = TestMount(tmp_path / "m", folder.url)
        mount.path.rmdir()
        assert str(mount.path) in refusal(mount)

    def test_a_file(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        mount = TestMount(tmp_path / "m", folder.url)
        mount.path.rmdir()
        mount.path.write_text("")
        assert str(mount.path) in refusal(mount)

    def test_not_empty(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        mount = TestMount(tmp_path / "m", folder.url)
        (mount.path / "precious").write_text("")
        assert "not empty" in refusal(mount)

    def test_served_already(self, tmp_path: Path, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        first = mounted(folder)
        first.alarms_expected.append("is being served already")  # both write to one log here
        again = TestMount(tmp_path / "m", folder.url, cache_dir=None)
        with pytest.raises(MountFailedError) as caught:
            again.start()
        assert str(first.path) in caught.value.message
        assert first.is_mounted
        assert first.client.status()["mountpoint"] == str(first.path)


class TestCache:
    def test_inside_the_mount(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        mount = TestMount(tmp_path, folder.url, cache_dir=tmp_path / "mnt" / "cache")
        with pytest.raises(ConfigError, match="inside the mount point"):
            mount.start()

    def test_inside_the_mount_through_a_link(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        mount = TestMount(tmp_path / "m", folder.url, cache_dir=tmp_path / "link")
        (tmp_path / "link").symlink_to(mount.path)
        assert "cache" in refusal(mount)

    def test_of_another_version(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "mfs-cache.json").write_text('{"format": 99}')
        line = refusal(TestMount(tmp_path, folder.url))
        assert "99" in line
        assert "another version" in line

    def test_of_somebody_else(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "thesis.tex").write_text("precious")
        assert "neither empty nor an mfs cache" in refusal(TestMount(tmp_path, folder.url))
        assert (tmp_path / "cache" / "thesis.tex").read_text() == "precious"

    def test_a_file_where_the_directory_should_be(self, tmp_path: Path, folder: origins.FolderOrigin) -> None:
        (tmp_path / "cache").write_text("")
        assert str(tmp_path / "cache") in refusal(TestMount(tmp_path, folder.url))

    @pytest.mark.parametrize("setting", [{"ram_bytes": 4 * MIB}, {"cache_bytes": MIB}, {"ram_bytes": 1 << 50}])
    def test_budgets(self, tmp_path: Path, folder: origins.FolderOrigin, setting: dict[str, int]) -> None:
        mount = TestMount(tmp_path, folder.url, **setting)
        if setting["ram_bytes" if "ram_bytes" in setting else "cache_bytes"] > 1 << 40:
            assert "available" in refusal(mount)
        else:
            with pytest.raises(ConfigError, match="budget"):
                mount.start()

    @pytest.fixture
    def tiny_disk(self, tmp_path: Path) -> Iterator[Path]:
        path = tmp_path / "tiny"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], check=True, timeout=30)
        yield path
        subprocess.run(["umount", "-l", path], check=True, timeout=30)

    def test_a_full_disk_costs_only_the_caching(
        self, folder: origins.FolderOrigin, mounted: Mounted, tiny_disk: Path
    ) -> None:
        files = {f"{number}.bin": ramp(9 * MIB + number, number) for number in range(4)}
        folder.put_all(files)
        mount = mounted(folder, cache_dir=tiny_disk)
        for _ in range(2):
            for name, content in files.items():
                assert mount.call(touching.read, str(mount.path / name)) == content
            mount.client.evict([""], "ram")
            for name in files:
                mount.call(touching.drop_pages, str(mount.path / name))
        assert mount.client.status()["ssd"]["state"] == "not writing"
        assert mount.log.count("disk is full") == 1
        assert not list(tiny_disk.rglob("*.tmp"))
        assert list(mount.client.verify([""]))[-1]["bad"] == []

    def test_a_disk_full_from_the_start(self, folder: origins.FolderOrigin, tiny_disk: Path, tmp_path: Path) -> None:
        folder.put("w.bin", ramp(9 * MIB))
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={tiny_disk}/lost+found", "bs=1M"],
            check=False,
            stderr=subprocess.DEVNULL,
            timeout=30,
        )
        line = refusal(TestMount(tmp_path / "m", folder.url, cache_dir=tiny_disk))
        assert line.startswith("ConfigError: ")
        assert str(tiny_disk) in line


def test_an_unwritable_log_file_is_said(tmp_path: Path, folder: origins.FolderOrigin) -> None:
    mount = TestMount(tmp_path / "m", folder.url, log_file=tmp_path / "no" / "such" / "log")
    with pytest.raises(MountFailedError) as caught:
        mount.start()
    assert str(tmp_path / "no") in caught.value.message
