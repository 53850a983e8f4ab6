"""Other people's programs, unchanged, as referees: what they read through the mount is what was put into the origin."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import origins
from tests.mount.conftest import Mounted, folder, mounted
from tests.peers import stress
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

__all__ = ["folder", "mounted"]

MIB = 1 << 20
SIZES = {
    "empty": 0, "one": 1, "page": 4096, "page and one": 4097, "block less one": (1 << 17) - 1, "chunk": 4 * MIB,
    "chunks and some": 9 * MIB + 12_345, "deep/below/three": 3 * MIB + 7, "deep/naïve name ‚in‘ words": 777,
}  # fmt: skip


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (tools/setup test installs it)")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of odd sizes on local disk."""
    root = tmp_path_factory.mktemp("local") / "tree"
    for seed, (name, size) in enumerate(SIZES.items()):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random.Random(seed).randbytes(size))
        os.utime(file, (1_700_000_000 + seed, 1_700_000_000 + seed))
    return root


@pytest.fixture
def tree(local: Path, folder: origins.FolderOrigin, mounted: Mounted) -> TestMount:
    """The same tree, mounted."""
    shutil.copytree(local, folder.root, dirs_exist_ok=True)
    return mounted(folder)


class TestWholeTrees:
    def test_diff(self, tree: TestMount, local: Path) -> None:
        assert tree.run("diff", "-r", "--no-dereference", local, tree.path) == ""

    def test_rsync_by_checksum_has_nothing_to_do(self, tree: TestMount, local: Path) -> None:
        needs("rsync")
        assert tree.run("rsync", "-nric", "--times", "--omit-dir-times", f"{local}/", f"{tree.path}/") == ""

    def test_sha256sum(self, tree: TestMount, local: Path, tmp_path: Path) -> None:
        sums = tmp_path / "sums"
        lines = [f"{hashlib.sha256((local / name).read_bytes()).hexdigest()}  {tree.path / name}\n" for name in SIZES]
        sums.write_text("".join(lines))
        assert tree.run("sha256sum", "--strict", "-c", sums).count(": OK\n") == len(SIZES)

    def test_find_sees_names_types_sizes_and_times(self, tree: TestMount, local: Path) -> None:
        def found(root: Path) -> list[str]:
            out = tree.run("find", root, "-type", "f", "-printf", r"%P %y %s %Ts\0")
            out += tree.run("find", root, "-mindepth", "1", "-type", "d", "-printf", r"%P %y\0")
            return sorted(out.split("\0"))

        assert found(tree.path) == found(local)
        assert tree.run("find", tree.path, "-size", "+4M", "-newermt", "@1600000000").count("\n") == 1

    def test_tar_packs_the_same_archive(self, tree: TestMount, local: Path, tmp_path: Path) -> None:
        archives = []
        for root in (tree.path, local):
            archive = tmp_path / f"{len(archives)}.tar"
            plain = ("--sort=name", "--owner=0", "--group=0", "--mode=0644", "--mtime=@0")
            tree.run("tar", "-C", root, *plain, "-cf", archive, ".")
            archives.append(archive.read_bytes())
        assert archives[0] == archives[1]

    def test_cp_of_the_tree(self, tree: TestMount, local: Path, tmp_path: Path) -> None:
        tree.run("cp", "-r", "--sparse=always", tree.path, tmp_path / "copy")
        assert tree.run("diff", "-r", local, tmp_path / "copy") == ""


class TestOddReads:
    @pytest.mark.parametrize("size", [1, 511, 4096, 131_071, 5_000_003])
    def test_dd(self, tree: TestMount, local: Path, tmp_path: Path, size: int) -> None:
        """Whole files in blocks of odd sizes, then from an odd place."""
        name = "page and one" if size == 1 else "chunks and some"
        content = (local / name).read_bytes()
        tree.run("dd", f"if={tree.path / name}", f"of={tmp_path / 'out'}", f"bs={size}", "status=none")
        assert (tmp_path / "out").read_bytes() == content
        tree.run(
            "dd", f"if={tree.path / name}", f"of={tmp_path / 'out'}", f"bs={size}", "skip=1", "count=3", "status=none"
        )
        assert (tmp_path / "out").read_bytes() == content[size : 4 * size]

    def test_dd_around_the_page_cache(self, tree: TestMount, local: Path, tmp_path: Path) -> None:
        """O_DIRECT to the very end, which lies on no boundary."""
        name = "chunks and some"
        argv = ["dd", f"if={tree.path / name}", f"of={tmp_path / 'out'}", "bs=64k", "iflag=direct", "status=none"]
        tree.run(*argv)
        assert (tmp_path / "out").read_bytes() == (local / name).read_bytes()


FIO_BYTES = 24 * MIB
FIO_BLOCK = 4096
_VERIFY = ("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", f"--size={FIO_BYTES}", f"--bs={FIO_BLOCK}")


@pytest.fixture(scope="module")
def fio_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose blocks carry their place and a checksum, written by fio itself."""
    needs("fio")
    file = tmp_path_factory.mktemp("fio") / "fio.bin"
    argv = ["fio", "--name=write", f"--filename={file}", "--rw=write", *_VERIFY, "--do_verify=0", "--end_fsync=1"]
    subprocess.run(argv, check=True, capture_output=True, timeout=60, cwd=file.parent)
    return file


class TestFio:
    """fio verifies place and checksum of each block it reads; its own tally says how many it saw."""

    def test_one_flipped_bit_would_be_found(
        self, fio_file: Path, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        content = bytearray(fio_file.read_bytes())
        content[17 * MIB + 1000] ^= 1
        folder.put("fio.bin", bytes(content))
        mount = mounted(folder)
        with pytest.raises(AssertionError, match="verify"):
            mount.run(
                "fio", "--name=verify", f"--filename={mount.path / 'fio.bin'}", "--rw=read", *_VERIFY, "--readonly"
            )

    @pytest.mark.parametrize(
        "job",
        [
            ("--ioengine=sync", "--rw=read"),
            ("--ioengine=psync", "--rw=randread"),
            ("--ioengine=mmap", "--rw=randread"),
            ("--ioengine=psync", "--rw=randread", "--direct=1"),
            ("--ioengine=libaio", "--rw=randread", "--direct=1", "--iodepth=32"),
            ("--ioengine=libaio", "--rw=read", "--direct=1", "--iodepth=64"),
            ("--ioengine=io_uring", "--rw=randread", "--direct=1", "--iodepth=32"),
            ("--ioengine=io_uring", "--rw=randread", "--iodepth=16"),
            ("--ioengine=psync", "--rw=randread", "--numjobs=4", "--thread=0"),
            ("--ioengine=mmap", "--rw=randread", "--numjobs=4", "--thread=0"),
        ],
        ids=lambda job: " ".join(job).replace("--", ""),
    )
    def test_every_block_verifies(
        self, job: tuple[str, ...], fio_file: Path, nginx: NginxServer, mounted: Mounted, tmp_path: Path
    ) -> None:
        engine = job[0].partition("=")[2]
        if engine == "io_uring" and not _io_uring_works(tmp_path):
            pytest.skip("this kernel or sandbox refuses io_uring")
        origin = origins.WebOrigin(nginx)
        shutil.copy(fio_file, origin.root / "fio.bin")
        mount = mounted(origin)
        argv = ["fio", "--name=verify", f"--filename={mount.path / 'fio.bin'}", *job, *_VERIFY, "--output-format=json"]
        out = mount.run(*argv, "--readonly", "--invalidate=1", timeout_s=120)
        _check_tally(out, jobs_count=int(next((a.partition("=")[2] for a in job if "numjobs" in a), 1)))
        mount.wait_quiet(prefetch=False)
        assert mount.origin_bytes <= FIO_BYTES


def _check_tally(out: str, *, jobs_count: int) -> None:
    jobs = json.loads(out[out.index("{") :])["jobs"]
    assert len(jobs) == jobs_count
    for job in jobs:
        assert job["error"] == 0
        assert job["read"]["io_bytes"] == FIO_BYTES


def _io_uring_works(tmp_path: Path) -> bool:
    file = tmp_path / "uring"
    file.write_bytes(bytes(4096))
    argv = ["fio", "--name=try", f"--filename={file}", "--rw=read", "--ioengine=io_uring", "--size=4096", "--bs=4096"]
    return subprocess.run(argv, capture_output=True, timeout=30, check=False).returncode == 0


class TestMappings:
    def test_processes_that_fault_at_random_all_see_the_same_bytes(
        self, swift: SwiftServer, s3_bucket: str, mounted: Mounted
    ) -> None:
        """Eight processes, each with its own order of pages, half of them mapping privately; the cache holds less
        than the file."""
        content = ramp(96 * MIB + 4321)
        origin = origins.S3Origin(swift, s3_bucket)
        origin.put_all({"model.bin": content})
        mount = mounted(origin, ram_bytes=64 * MIB)
        readers = [mount.outside() for _ in range(8)]
        for seed, reader in enumerate(readers):
            reader.start(stress.fault_at_random, str(mount.path / "model.bin"), len(content), seed, 4000)
        assert [reader.finish(timeout_s=120) for reader in readers] == [""] * 8


class TestLoaders:
    @pytest.mark.parametrize("model", ["minilm"])
    def test_fastsafetensors_without_gpudirect(
        self, model: str, minilm_dir: Path, swift: SwiftServer, s3_bucket: str, mounted: Mounted
    ) -> None:
        if importlib.util.find_spec("fastsafetensors") is None:
            pytest.skip("fastsafetensors has no wheel for this machine")
        origin = origins.S3Origin(swift, s3_bucket)
        origin.client.upload_file(
            str(minilm_dir / "model.safetensors"), s3_bucket, f"{origin.prefix}/model.safetensors"
        )
        mount = mounted(origin)
        program = [sys.executable, "-m", "tests.frameworks.programs", "fastsafetensors_nogds"]
        out = mount.run(*program, mount.path, minilm_dir, timeout_s=120)
        results = [line for line in out.splitlines() if line.startswith("result:")]
        assert len(results) == 2
        assert results[0] == results[1]

    def test_instanttensor(self, minilm_dir: Path, folder: origins.FolderOrigin, mounted: Mounted) -> None:
        """What its own tests/test.py --checksum does: all tensors, against safetensors'."""
        if importlib.util.find_spec("instanttensor") is None or not Path("/dev/nvidiactl").exists():
            pytest.skip("InstantTensor needs its package and a GPU: 'only supports CUDA devices for now' (0.2.2)")
        shutil.copy(minilm_dir / "model.safetensors", folder.root)
        mount = mounted(folder)
        through_mount, reference = (
            mount.run(sys.executable, "-m", "tests.frameworks.programs", program, where, timeout_s=120)
            for program, where in (("instanttensor_cuda", mount.path), ("safetensors_load_file", minilm_dir))
        )
        assert through_mount == reference
