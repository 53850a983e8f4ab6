"""The peers that mount, each with the options that were found best here, on the origins it can read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tools.bench.mounts import Foreground
from tools.bench.origin import BUCKET, AnyOrigin, Origin
from tools.bench.processes import BenchError, run

CACHE_SIZE = "6G"


class JuiceFS(Foreground):
    """JuiceFS Community: metadata in SQLite in the run's folder, blocks on the same origin as everybody's bytes."""

    name = "juicefs"

    def __init__(self, folder: Path, origin: AnyOrigin) -> None:
        super().__init__(folder)
        self._origin = origin
        self._metadata = f"sqlite3://{folder / 'metadata.db'}"
        self._options: tuple[str, ...] = ()

    def prepare(self, tree: Path) -> None:
        """Make the volume and copy the tree into it."""
        run(["juicefs", "format", *self._origin.juicefs_storage, "--trash-days", "0", self._metadata, "volume"])
        with self:
            shutil.copytree(tree, self.mountpoint, dirs_exist_ok=True)
        self.forget()
        self._options = ("--read-only",)

    def argv(self) -> list[object]:
        return [
            "juicefs", "mount", self._metadata, self.mountpoint, *self._options, "--cache-dir", self.cache,
            "--cache-size", CACHE_SIZE, "--free-space-ratio", "0.01", "--attr-cache", "1h", "--entry-cache", "1h",
            "--dir-entry-cache", "1h", "--no-usage-report", "--no-syslog", "--no-bgjob", "--backup-meta", "0",
        ]  # fmt: skip


class S3fs(Foreground):
    """s3fs with a disk cache, parallel requests and larger parts than its defaults: the best found here."""

    name = "s3fs"

    def __init__(self, folder: Path, origin: AnyOrigin) -> None:
        if not isinstance(origin, Origin):
            raise BenchError("reads S3 only")
        super().__init__(folder)
        self._origin = origin
        password_file = folder / "passwd"
        password_file.write_text(f"{origin.access_key}:{origin.secret_key}\n")
        password_file.chmod(0o600)

    def argv(self) -> list[object]:
        options = (
            f"url={self._origin.endpoint}", "use_path_request_style", f"passwd_file={self.folder / 'passwd'}",
            f"endpoint={self._origin.region}", "ro", f"use_cache={self.cache}", "parallel_count=16",
            "multireq_max=32", "multipart_size=16", "max_background=128", "complement_stat",
        )  # fmt: skip
        return ["s3fs", BUCKET, self.mountpoint, "-f", *(w for o in options for w in ("-o", o))]


class Rclone(Foreground):
    """rclone mount with its full VFS cache, parallel growing ranges and read-ahead."""

    name = "rclone"

    def __init__(self, folder: Path, origin: AnyOrigin) -> None:
        super().__init__(folder)
        self._origin = origin

    def argv(self) -> list[object]:
        return [
            "rclone", "mount", self._origin.rclone_remote, self.mountpoint, "--config", "", "--read-only",
            "--vfs-cache-mode", "full", "--cache-dir", self.cache, "--vfs-cache-max-size", CACHE_SIZE,
            "--vfs-read-ahead", "128M", "--vfs-read-chunk-size", "4M", "--vfs-read-chunk-streams", "8",
            "--buffer-size", "64M", "--max-read-ahead", "4M", "--no-modtime", "--attr-timeout", "1h",
            "--dir-cache-time", "1h", "--vfs-fast-fingerprint",
        ]  # fmt: skip

    def environ(self) -> Mapping[str, str]:
        return self._origin.environ


MOUNT_PEERS: dict[str, type[JuiceFS] | type[Rclone] | type[S3fs]] = {
    peer.name: peer for peer in (JuiceFS, Rclone, S3fs)
}
