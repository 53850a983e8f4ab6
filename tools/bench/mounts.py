"""What is compared and mounted, on our side: `mfs mount`, a stub that is the price of FUSE, and no mount at all.

The peers stand in `peers`. Each is started on its cache folder as it is found, and surely unmounted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfs.control import mountinfo, runtime
from mfs.control.client import Client
from mfs.fuse import kernel
from tests.servers.process import ServerProcess
from tools.bench.processes import BenchError, cpu_seconds, run, tree, wait_for
from tools.bench.workload import Model

RAM_BYTES = 1 << 30
"""Our RAM tier: the default of `mfs mount`. The workload is larger, so it cannot simply stay in it."""
BEFORE = "before"
"""What our own from another checkout is called."""
_QUIET_FOR_S, _QUIET_CPU_S, _QUIET_TIMEOUT_S = 0.3, 0.02, 60.0


class MountedSystem:
    """Something that shows a tree at `mountpoint` while the context is open."""

    name = ""
    cache: Path
    """What it keeps on the disk, from mount to mount; another may be set while it is not mounted."""

    def __init__(self, folder: Path) -> None:
        """folder: for its mount point, cache and log; what is in it stays until removed."""
        self.folder = folder
        self.cache = folder / "cache"
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self.pid = 0

    def prepare(self, tree: Path) -> None:
        """Once, before the first mount: put `tree` where the origin alone does not have it."""

    def forget(self) -> None:
        """Empty the cache. Not while mounted."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def cpu_s(self) -> float:
        """CPU seconds so far of everything that serves this mount."""
        return cpu_seconds(tree(self.pid))

    def wait_quiet(self, kept_bytes: int = 0) -> None:
        """Until it has stopped computing: what a pass costs includes what it leaves to be done.

        kept_bytes: what its cache should hold then, if it can be asked.
        """
        last_s, deadline_s = -1.0, time.monotonic() + _QUIET_TIMEOUT_S
        while (now_s := self.cpu_s()) > last_s + _QUIET_CPU_S and time.monotonic() < deadline_s:
            last_s = now_s
            time.sleep(_QUIET_FOR_S)

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class Local(MountedSystem):
    """The tree as it lies on the disk."""

    name = "local"

    def __init__(self, tree: Path) -> None:
        self.folder = tree.parent
        self.mountpoint = tree

    def forget(self) -> None:
        """Nothing to forget but the page cache."""

    def cpu_s(self) -> float:
        return 0.0

    def start(self) -> None:
        """There is nothing to start."""

    def stop(self) -> None:
        """And nothing to stop."""


class Ours(MountedSystem):
    """`mfs mount`, as a user types it."""

    name = "mfs"

    def __init__(
        self,
        folder: Path,
        url: str,
        env: Mapping[str, str],
        *,
        ram_bytes: int = RAM_BYTES,
        checkout: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        """checkout: run the mfs that lies there instead of this one. options: further ones of `mfs mount`."""
        super().__init__(folder)
        self._url = url
        self._options = options
        self.ram_bytes = ram_bytes
        self._env = {**env, "MFS_RUNTIME_DIR": str(folder / "run")}
        if checkout:
            self.name, self._env["PYTHONPATH"] = BEFORE, str(checkout)

    def command(self, *words: object) -> str:
        """Run an `mfs` command."""
        return run([sys.executable, "-P", "-m", "mfs", *words], env=self._env)

    def start(self) -> None:
        """Mount."""
        self.command(
            "mount", self._url, self.mountpoint, "--cache-dir", self.cache, "--ram-size", self.ram_bytes,
            "--log-file", self.folder / "mfs.log", *self._options,
        )  # fmt: skip
        self.pid = self.status()["pid"]

    def status(self) -> dict[str, Any]:
        """Asked through the socket, not by a command: a new process every poll would be load of our own."""
        socket = runtime.socket_path(os.path.realpath(self.mountpoint), self.folder / "run")
        return Client(socket, timeout_s=30).status()

    def wait_quiet(self, kept_bytes: int = 0) -> None:
        def is_quiet() -> bool:
            status = self.status()
            quiet = not status["origin"]["inflight"] and not status["prefetch"]["queued_bytes"]
            return bool(quiet and status["ssd"]["used_bytes"] >= kept_bytes)

        wait_for(is_quiet, f"{self.mountpoint} has {kept_bytes} bytes on SSD", timeout_s=_QUIET_TIMEOUT_S)

    def set_read_ahead(self, kib: int) -> None:
        """Override the kernel's read-ahead of this mount."""
        _bdi(self.mountpoint).write_text(f"{kib}\n")

    def stop(self) -> None:
        if mountinfo.mount_at(os.path.realpath(self.mountpoint)) is not None:
            self.command("umount", self.mountpoint)


class Foreground(MountedSystem):
    """A file system that stays in the foreground; killed by the kernel if we die."""

    def argv(self) -> list[object]:
        raise NotImplementedError

    def environ(self) -> Mapping[str, str]:
        return {}

    def start(self) -> None:
        self.cache.mkdir(exist_ok=True)
        argv = [str(word) for word in self.argv()]
        self._process = ServerProcess(self.name, argv, log=self.folder / "log", env=self.environ())
        self.pid = self._process.pid
        point = os.path.realpath(self.mountpoint)
        self._process.wait_until(lambda: mountinfo.mount_at(point) is not None)
        run(["ls", self.mountpoint], timeout_s=30)  # by another process, which may hang

    def stop(self) -> None:
        subprocess.run(["fusermount3", "-u", "-z", str(self.mountpoint)], capture_output=True, timeout=30)
        self._process.stop()


class ZeroFuse(Foreground):
    """The stub of `zeros`, with the kernel tuned as for ours."""

    name = "zeros"

    def __init__(self, folder: Path, model: Model) -> None:
        super().__init__(folder)
        self._shard = model.files[0]

    def argv(self) -> list[object]:
        size = self._shard.stat().st_size
        return [sys.executable, "-m", "tools.bench.zeros", self._shard, size, self.mountpoint]

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
