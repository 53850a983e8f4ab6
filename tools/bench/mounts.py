"""The systems that mount: each is started with empty caches (or its own, kept), readied, and surely unmounted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfs.control import mountinfo, runtime
from mfs.control.client import Client
from mfs.fuse import kernel
from mfs.types import CHUNK_BYTES
from tests.servers.process import ServerProcess
from tools.bench.origin import BUCKET, Origin
from tools.bench.processes import BenchError, cpu_seconds, run, tree, wait_for
from tools.bench.workload import FILE_NAME, Model

RAM_BYTES = 1 << 30
"""Our RAM tier: the default of `mfs mount`. The workload is larger, so it cannot simply stay in it."""


class MountedSystem:
    """A mount that shows the model as `file` while the context is open."""

    name = ""

    def __init__(self, folder: Path) -> None:
        """folder: for its mount point, cache and log; what is in it stays until removed."""
        self.folder = folder
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self.pid = 0

    @property
    def file(self) -> Path:
        return self.mountpoint / FILE_NAME

    def cpu_s(self) -> float:
        """CPU seconds so far of everything that serves this mount."""
        return cpu_seconds(tree(self.pid))

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class Ours(MountedSystem):
    """`mfs mount`, as a user types it."""

    name = "mfs"

    def __init__(self, folder: Path, url: str, env: Mapping[str, str], *, ram_bytes: int = RAM_BYTES) -> None:
        super().__init__(folder)
        self._url = url
        self._ram_bytes = ram_bytes
        self._env = {**env, "MFS_RUNTIME_DIR": str(folder / "run")}

    def forget(self) -> None:
        """Empty the SSD cache."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def command(self, *words: object) -> str:
        """Run an `mfs` command."""
        return run([sys.executable, "-P", "-m", "mfs", *words], env=self._env)

    def start(self, *, settle: bool = True) -> None:
        """Mount. settle: wait until all RAM slots are touched and locked, as they are in a daemon that has been up
        for a while; their first touch would otherwise run beside the measured pass."""
        self.command(
            "mount", self._url, self.mountpoint, "--cache-dir", self.folder / "cache", "--ram-size", self._ram_bytes,
            "--log-file", self.folder / "mfs.log",
        )  # fmt: skip
        self.pid = self.status()["pid"]
        if settle:
            wait_for(self._populated, "the RAM slots of mfs mount are populated")

    def _populated(self) -> bool:
        ram = self.status()["ram"]
        return bool(ram["slots_free"] + ram["used_bytes"] // CHUNK_BYTES == ram["slots_count"])

    def status(self) -> dict[str, Any]:
        """Asked through the socket, not by a command: a new process every poll would be load of our own."""
        socket = runtime.socket_path(os.path.realpath(self.mountpoint), self.folder / "run")
        return Client(socket, timeout_s=30).status()

    def wait_quiet(self, size_bytes: int) -> None:
        """Until nothing is fetched and the SSD tier holds the file: what a pass costs includes its writing back."""

        def is_quiet() -> bool:
            status = self.status()
            quiet = not status["origin"]["inflight"] and not status["prefetch"]["queued_bytes"]
            return bool(quiet and status["ssd"]["used_bytes"] >= size_bytes)

        wait_for(is_quiet, f"{self.file} is on SSD", timeout_s=60)

    def set_read_ahead(self, kib: int) -> None:
        """Override the kernel's read-ahead of this mount."""
        _bdi(self.mountpoint).write_text(f"{kib}\n")

    def stop(self) -> None:
        if mountinfo.mount_at(os.path.realpath(self.mountpoint)) is not None:
            self.command("umount", self.mountpoint)


class _Foreground(MountedSystem):
    """A file system that stays in the foreground; killed by the kernel if we die."""

    def argv(self) -> list[object]:
        raise NotImplementedError

    def environ(self) -> Mapping[str, str]:
        return {}

    def start(self) -> None:
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        (self.folder / "cache").mkdir()
        argv = [str(word) for word in self.argv()]
        self._process = ServerProcess(self.name, argv, log=self.folder / "log", env=self.environ())
        self.pid = self._process.pid
        point = os.path.realpath(self.mountpoint)
        self._process.wait_until(lambda: mountinfo.mount_at(point) is not None)
        # Asked by another process, which may hang: the mount answers, and knows the file's size, as after any `ls -l`.
        run(["stat", self.file], timeout_s=30)

    def stop(self) -> None:
        subprocess.run(["fusermount3", "-u", "-z", str(self.mountpoint)], capture_output=True, timeout=30)
        self._process.stop()
        shutil.rmtree(self.folder / "cache", ignore_errors=True)


class S3fs(_Foreground):
    """s3fs with a disk cache, parallel requests and larger parts than its defaults: the best found here."""

    name = "s3fs"

    def __init__(self, folder: Path, origin: Origin, name: str) -> None:
        super().__init__(folder)
        self._origin = origin
        self._path = name
        password_file = folder / "passwd"
        password_file.write_text(f"{origin.access_key}:{origin.secret_key}\n")
        password_file.chmod(0o600)

    def argv(self) -> list[object]:
        options = (
            f"url={self._origin.endpoint}", "use_path_request_style", f"passwd_file={self.folder / 'passwd'}",
            f"endpoint={self._origin.region}", "ro", f"use_cache={self.folder / 'cache'}", "parallel_count=16",
            "multireq_max=32", "multipart_size=16", "max_background=128", "complement_stat",
        )  # fmt: skip
        return ["s3fs", f"{BUCKET}:/{self._path}", self.mountpoint, "-f", *(w for o in options for w in ("-o", o))]


class Rclone(_Foreground):
    """rclone mount with its full VFS cache, large growing ranges and read-ahead: the best found here."""

    name = "rclone"

    def __init__(self, folder: Path, origin: Origin, name: str) -> None:
        super().__init__(folder)
        self._origin = origin
        self._path = name

    def argv(self) -> list[object]:
        remote = f":s3,provider=Ceph,env_auth=true,region={self._origin.region},endpoint='{self._origin.endpoint}'"
        return [
            "env", "-u", "AWS_CA_BUNDLE",  # rclone 1.60 refuses to start where it is set
            "rclone", "mount", f"{remote}:{BUCKET}/{self._path}", self.mountpoint, "--config", "", "--read-only",
            "--vfs-cache-mode", "full", "--cache-dir", self.folder / "cache", "--vfs-read-ahead", "128M",
            "--vfs-read-chunk-size", "32M", "--buffer-size", "64M", "--max-read-ahead", "4M", "--no-modtime",
            "--attr-timeout", "1h", "--dir-cache-time", "1h", "--vfs-fast-fingerprint",
        ]  # fmt: skip

    def environ(self) -> Mapping[str, str]:
        return self._origin.environ


class ZeroFuse(_Foreground):
    """The stub of `zeros`, with the kernel tuned as for ours."""

    name = "zeros"

    def __init__(self, folder: Path, model: Model) -> None:
        super().__init__(folder)
        self._model = model

    def argv(self) -> list[object]:
        size = self._model.size_bytes
        return [sys.executable, "-m", "tools.bench.zeros", self._model.path, size, self.mountpoint]

    def start(self) -> None:
        super().start()
        mount = mountinfo.mount_at(os.path.realpath(self.mountpoint))
        if mount is None:
            raise BenchError(f"{self.mountpoint} is not mounted")
        kernel.tune(mount.device)


def _bdi(mountpoint: Path) -> Path:
    mount = mountinfo.mount_at(os.path.realpath(mountpoint))
    if mount is None:
        raise BenchError(f"{mountpoint} is not mounted")
    return Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb")
