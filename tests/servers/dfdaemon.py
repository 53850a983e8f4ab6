"""A stand-in for the proxy of Dragonfly's dfdaemon, of which no real one can be had here.

What it does over HTTP follows the source of dragonflyoss/client: absolute addresses, https ones as well; task ids from
a content named in a header, else from address, tag and filtered query; pieces of 4 MiB, each fetched once; the origin's
headers kept with the task; `X-Dragonfly-Error-Type`. Nothing of scheduling or peers: one process is the whole network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.servers.process import ServerError, free_port
from tests.servers.remote import Remote


class DfdaemonServer:
    """The proxy at `url`."""

    def __init__(self, root: Path, *, host: str = "127.0.0.1", ca_file: Path | None = None) -> None:
        """ca_file: certificates to trust at origins."""
        self.root = root
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        self._settings = {"host": host, "port": self.port, "ca_file": str(ca_file or ""), "log": str(root / "log")}
        self._remote: Remote | None = None

    def start(self) -> None:
        """Start, and return when it listens; it has no pieces. Raises: ServerError."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._remote = Remote("tests.servers.dfdaemon_site", log=self.root / "out", settings=self._settings)

    def stop(self) -> None:
        """Kill it."""
        if self._remote:
            self._remote.stop()
            self._remote = None

    def fail(self, how: str) -> None:
        """From now on: 'proxy' and 'dfdaemon' answer errors of that type, 'slow' answers nothing, 'lie' gives other
        bytes, 'limit' 429 without a word; '' is well again."""
        self._call("fail", how=how)

    def stats(self) -> dict[str, int]:
        """'requests', 'tasks', 'pieces' fetched, 'passed' on for want of X-Dragonfly-Use-P2P, 'refused' by origins."""
        found: dict[str, int] = self._call("stats")
        return found

    def task_ids(self) -> list[str]:
        found: list[str] = self._call("task_ids")
        return found

    def traces(self) -> bytes:
        """What it logged, and what its tasks are made of."""
        return (self.root / "log").read_bytes() + "\n".join(self._call("named")).encode()

    def __enter__(self) -> DfdaemonServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _call(self, command: str, **arguments: object) -> Any:
        if self._remote is None:
            raise ServerError("the stand-in for dfdaemon is not running")
        return self._remote.call(command, **arguments)
