"""The tree that a mount shows is read-only POSIX, and its bytes are the origin's: the same on every kind of origin."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mfs.config import SourceConfig
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

BIG = "model/weights.bin"
BIG_BYTES = (9 << 20) + 12_345  # three chunks, the last one ends inside a block
FILES = {
    "README.md": b"# a registry\n",
    "model/config.json": b'{"hidden_size": 384}',
    BIG: ramp(BIG_BYTES),
    "model/empty.txt": b"",
    "model/one": b"x",
    "model/экзамен 模型 🤗/a b&c%41?d#e'f\"g;+=.bin": ramp(5_000, 7),
    "deep/a/b/c/d/leaf.bin": ramp(300_000, 11),
    "n" * 200 + ".bin": ramp(100, 3),
}


@dataclass
class Served:
    """A tree that is mounted, and a local copy of it."""

    kind: str
    origin: origins.Origin
    mount: TestMount
    copy: Path

    def path(self, name: str = "") -> str:
        return str(self.mount.path / name)


@pytest.fixture(scope="module", params=["folder", "s3", "web", "hub"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Every kind of origin in turn, mounted once for all tests here."""
    base = tmp_path_factory.mktemp("semantics")
    kind = request.param
    origin: origins.Origin
    swift: SwiftServer | None = None
    match kind:
        case "folder":
            origin = origins.FolderOrigin(base / "registry")
        case "s3":
            swift = request.getfixturevalue("swift")
            assert swift is not None
            swift.client().create_bucket(Bucket="semantics")
            origin = origins.S3Origin(swift, "semantics")
        case "web":
            nginx: NginxServer = request.getfixturevalue("nginx")
            origin = origins.WebOrigin(nginx)
        case _:
            hub: HubServer = request.getfixturevalue("hub")
            origin = origins.HubOrigin(hub)
    origin.put_all(FILES)
    copy = base / "copy"
    for name, content in FILES.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    with origins.mount(origin, base / "m") as mount:
        mount.call(os.getpid)  # the process outside is there before any test counts processes
        yield Served(kind, origin, mount, copy)
    if swift is not None:
        swift.remove_bucket("semantics")


class TestTree:
    def test_all_names_and_sizes(self, served: Served) -> None:
        found = served.mount.call(touching.tree, served.path())
        assert found == {name: len(content) for name, content in FILES.items()}

    def test_readdir_agrees_with_stat(self, served: Served) -> None:
        for folder in ("", "model", "deep/a"):
            for name, (inode, is_directory, is_file, is_link) in served.mount.call(
                touching.scan, served.path(folder)
            ).items():
                found = served.mount.call(touching.stat, served.path(f"{folder}/{name}" if folder else name))
                assert found["st_ino"] == inode
                assert (is_directory, is_file, is_link) == (
                    stat.S_ISDIR(found["st_mode"]), stat.S_ISREG(found["st_mode"]), False,
                )  # fmt: skip

    def test_modes_owners_and_times(self, served: Served) -> None:
        for name in (BIG, "model", ""):
            first = served.mount.call(touching.stat, served.path(name))
            is_directory = name != BIG
            assert stat.S_IMODE(first["st_mode"]) == (0o555 if is_directory else 0o444)
            assert (first["st_uid"], first["st_gid"]) == (os.getuid(), os.getgid())
            assert first["st_nlink"] == (2 if is_directory else 1)
            assert first["st_mtime_ns"] > 0
            assert served.mount.call(touching.stat, served.path(name)) == first
        big = served.mount.call(touching.stat, served.path(BIG))
        assert big["st_blocks"] == -(-BIG_BYTES // 512)

    def test_mtimes_are_the_origins(self, served: Served) -> None:
        if isinstance(served.origin, origins.FolderOrigin | origins.WebOrigin):
            expected = (served.origin.root / BIG).stat().st_mtime_ns
            found = served.mount.call(touching.stat, served.path(BIG))["st_mtime_ns"]
            assert found == expected if served.kind == "folder" else found == expected // 10**9 * 10**9

    def test_missing_names(self, served: Served) -> None:
        assert served.mount.call(touching.failure, "stat", served.path("missing")) == "ENOENT"
        assert served.mount.call(touching.failure, "stat", served.path("model/missing/deeper")) == "ENOENT"
        assert served.mount.call(touching.failure, "stat", served.path(f"{BIG}/x")) == "ENOTDIR"
        assert served.mount.call(touching.failure, "stat", served.path("x" * 256)) == "ENAMETOOLONG"
        assert served.mount.call(touching.failure, "listdir", served.path(BIG)) == "ENOTDIR"
        assert served.mount.call(touching.failure, "stat", os.fsencode(served.path()) + b"\xff\xfe") == "ENOENT"

    def test_statfs(self, served: Served) -> None:
        bsize, blocks, bfree, bavail, files, namemax, flag = served.mount.call(touching.statvfs, served.path())
        assert (bsize, bfree, bavail, namemax) == (4096, 0, 0, 255)
        assert blocks * bsize >= BIG_BYTES - bsize
        assert files >= len(FILES)
        assert flag & os.ST_RDONLY

    def test_attributes(self, served: Served) -> None:
        found = served.mount.call(touching.attributes, served.path(BIG))
        expected = {"source", "revision", "resident.ssd", "resident.ram", "pinned"}
        if served.origin.has_digests:
            expected.add("digest")
            assert found["user.mfs.digest"] == f"sha256:{hashlib.sha256(FILES[BIG]).hexdigest()}"
        assert set(found) == {f"user.mfs.{name}" for name in expected}
        assert found["user.mfs.source"].endswith(f"/{BIG}")
        assert found["user.mfs.pinned"] == "0"
        assert served.mount.call(touching.failure, "getxattr", served.path(BIG), "user.other") == "ENODATA"
        assert served.mount.call(touching.failure, "getxattr", served.path(BIG), "security.selinux") in (
            "ENODATA", "EOPNOTSUPP",
        )  # fmt: skip
        assert served.mount.call(touching.attributes, served.path("model")) == {}


class TestBytes:
    def test_whole_files(self, served: Served) -> None:
        for name, content in FILES.items():
            assert served.mount.call(touching.read, served.path(name)) == content, name

    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (0, 1), (4095, 2), ((4 << 20) - 1, 2), ((4 << 20) - 3, (4 << 20) + 7), ((8 << 20) - 5, 10), (1, BIG_BYTES),
            (BIG_BYTES - 1, 1), (BIG_BYTES - 10, 100), (BIG_BYTES, 1), (BIG_BYTES + (1 << 30), 4096),
            (131_071, 131_074),
        ],
    )  # fmt: skip
    def test_ranges(self, served: Served, offset: int, length: int) -> None:
        served.mount.call(touching.drop_pages, served.path(BIG))
        assert served.mount.call(touching.pread, served.path(BIG), length, offset) == FILES[BIG][offset:][:length]

    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (0, 4096), (4096, 1 << 20), ((4 << 20) - 4096, 8192), (BIG_BYTES // 4096 * 4096, 4096),
            ((BIG_BYTES // 4096 + 1) * 4096, 4096), ((BIG_BYTES // 4096 + 3) * 4096, 4096),
        ],
    )  # fmt: skip
    def test_direct_reads(self, served: Served, offset: int, length: int) -> None:
        found = served.mount.call(touching.pread_direct, served.path(BIG), length, offset)
        assert found == FILES[BIG][offset:][:length]

    @pytest.mark.parametrize(
        ("offset", "length"), [(512, 1000), (1, 3), ((4 << 20) - 1, 4097), (BIG_BYTES - 1, 4096), (BIG_BYTES, 4096)]
    )
    def test_unaligned_direct_reads(self, served: Served, offset: int, length: int) -> None:
        """Right, or refused as a disk does: by whom depends on whether the file is whole by now."""
        try:
            found = served.mount.call(touching.pread_direct, served.path(BIG), length, offset)
        except OSError as error:
            assert error.errno == errno.EINVAL  # noqa: PT017
        else:
            assert found == FILES[BIG][offset:][:length]

    @pytest.mark.parametrize("kind", ["shared", "private", "writable"])
    def test_mappings(self, served: Served, kind: str) -> None:
        served.mount.call(touching.drop_pages, served.path(BIG))
        assert served.mount.call(touching.map_file, served.path(BIG), kind) == FILES[BIG]
        assert served.mount.call(touching.read, served.path(BIG)) == FILES[BIG]

    def test_many_readers_at_once(self, served: Served) -> None:
        served.mount.client.evict([""], "all")
        served.mount.call(touching.drop_pages, served.path(BIG))
        outsiders = [served.mount.outside() for _ in range(6)]
        for number, outsider in enumerate(outsiders):
            outsider.start(*((touching.map_file, served.path(BIG), "shared") if number % 2 else
                             (touching.read, served.path(BIG))))  # fmt: skip
        for outsider in outsiders:
            assert outsider.finish() == FILES[BIG]
            outsider.close()


class TestReadOnly:
    def test_nothing_can_be_written(self, served: Served) -> None:
        path, model = served.path(BIG), served.path("model")
        for call in (
            ("open", path, os.O_WRONLY), ("open", path, os.O_RDWR), ("open", f"{model}/new", os.O_CREAT | os.O_WRONLY),
            ("open", path, os.O_WRONLY | os.O_TRUNC), ("truncate", path, 0), ("rename", path, f"{model}/other"),
            ("unlink", path), ("mkdir", f"{model}/dir"), ("rmdir", model), ("chmod", path, 0o600),
            ("chown", path, 1, 1), ("utime", path, (0, 0)), ("link", path, f"{model}/hard"),
            ("symlink", "x", f"{model}/soft"), ("mkfifo", f"{model}/fifo"), ("removexattr", path, "user.mfs.source"),
        ):  # fmt: skip
            assert served.mount.call(touching.failure, *call) == "EROFS", call
        assert served.mount.call(touching.setxattr_failure, path) == "EROFS"
        assert served.mount.call(touching.failure, "access", path, os.W_OK) == ""  # access says yes or no by value
        assert served.mount.call(os.access, path, os.W_OK) is False
        assert served.mount.call(os.access, path, os.R_OK) is True


class TestTools:
    def test_find(self, served: Served) -> None:
        out = served.mount.run("find", served.path(), "-type", "f", "-printf", "%P\\0%s\\0")
        fields = out.split("\0")[:-1]
        assert dict(zip(fields[::2], map(int, fields[1::2]), strict=True)) == {n: len(c) for n, c in FILES.items()}

    def test_diff(self, served: Served) -> None:
        assert served.mount.run("diff", "-r", served.path(), served.copy) == ""

    def test_tar(self, served: Served, tmp_path: Path) -> None:
        served.mount.run("tar", "-C", served.path(), "-cf", tmp_path / "all.tar", ".")
        (tmp_path / "out").mkdir()
        served.mount.run("tar", "-C", tmp_path / "out", "-xf", tmp_path / "all.tar")
        served.mount.run("diff", "-r", tmp_path / "out", served.copy)

    def test_rsync(self, served: Served) -> None:
        assert shutil.which("rsync"), "rsync is not installed: run tools/setup test"
        out = served.mount.run("rsync", "-rnci", f"{served.path()}/", f"{served.copy}/")
        assert out == ""

    def test_sha256sum(self, served: Served, tmp_path: Path) -> None:
        lines = [f"{hashlib.sha256(FILES[name]).hexdigest()}  {served.path(name)}" for name in (BIG, "README.md")]
        (tmp_path / "sums").write_text("\n".join(lines) + "\n")
        assert served.mount.run("sha256sum", "-c", tmp_path / "sums").count("OK") == 2


class TestLinks:
    def test_links_inside_a_folder_are_links(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("blobs/abc", ramp(100_000))
        (folder.root / "snapshots" / "main").mkdir(parents=True)
        (folder.root / "snapshots" / "main" / "model.bin").symlink_to("../../blobs/abc")
        (folder.root / "latest").symlink_to("snapshots/main")
        mount = mounted(folder)
        link = str(mount.path / "snapshots/main/model.bin")
        assert mount.call(touching.readlink, link) == "../../blobs/abc"
        assert mount.call(touching.stat, link)["st_size"] == len("../../blobs/abc")
        assert mount.call(touching.scan, str(mount.path / "snapshots/main"))["model.bin"][3] is True
        assert mount.call(touching.read, str(mount.path / "latest/model.bin")) == ramp(100_000)
        assert mount.call(touching.failure, "readlink", str(mount.path / "blobs/abc")) == "EINVAL"

    def test_links_that_lead_outside_are_what_they_point_to(
        self, folder: origins.FolderOrigin, mounted: Mounted, tmp_path: Path
    ) -> None:
        (tmp_path / "elsewhere.bin").write_bytes(ramp(5_000))
        (folder.root / "model.bin").symlink_to(tmp_path / "elsewhere.bin")
        (folder.root / "dangling").symlink_to(tmp_path / "nowhere")
        mount = mounted(folder)
        assert list(mount.call(touching.scan, str(mount.path))) == ["model.bin"]
        assert mount.call(touching.scan, str(mount.path))["model.bin"][2] is True
        assert mount.call(touching.read, str(mount.path / "model.bin")) == ramp(5_000)


class TestOwners:
    def test_uid_gid_and_umask_are_as_told(self, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        folder.put("d/x", b"x")
        mount = mounted(folder, uid=12, gid=34, umask=0o027)
        for name, mode in (("d", 0o550), ("d/x", 0o440)):
            found = mount.call(touching.stat, str(mount.path / name))
            assert (found["st_uid"], found["st_gid"], stat.S_IMODE(found["st_mode"])) == (12, 34, mode)


class TestSeveralSources:
    def test_each_source_is_a_directory(
        self, folder: origins.FolderOrigin, swift: SwiftServer, s3_bucket: str, tmp_path: Path
    ) -> None:
        folder.put("model/x", ramp(1_000))
        bucket = origins.S3Origin(swift, s3_bucket)
        bucket.put_all({"model/x": ramp(2_000, 5)})
        sources = (
            SourceConfig(url=folder.url, name="local"),
            SourceConfig(url=bucket.url, name="имя в облаке", endpoint_url=swift.endpoint),
        )
        with TestMount(tmp_path / "m", sources=sources, env=bucket.env) as mount:
            assert mount.call(touching.list_names, str(mount.path)) == ["local", "имя в облаке"]
            assert mount.call(touching.read, str(mount.path / "local/model/x")) == ramp(1_000)
            assert mount.call(touching.read, str(mount.path / "имя в облаке/model/x")) == ramp(2_000, 5)
            assert mount.call(touching.failure, "stat", str(mount.path / "other")) == "ENOENT"
            names = [source["name"] for source in mount.client.status()["sources"]]
            assert names == ["local", "имя в облаке"]
