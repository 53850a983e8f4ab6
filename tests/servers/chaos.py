"""A TCP proxy that makes a network slow or broken: round trips, rates, windows, resets, stalls, wrong bytes.

It knows nothing of HTTP or TLS, so it stands before any server; `tests.servers.chaos_proxy` is the process itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.servers.process import ServerError, wait_for_signal
from tests.servers.remote import Remote, RemoteServer


@dataclass
class Weather:
    """How the network behaves. Faults fall at an exact byte of an *answer*: of what flowed to the client since the
    client last sent something; on HTTP without pipelining, one response with its head, also when kept alive.
    """

    rtt_ms: float = 0.0
    """Added round trip: half in each direction, and one whole at connect as TCP's handshake costs."""
    rate_mb_s: float = 0.0
    """Downstream cap shared by all connections, in 10^6 bytes/s; 0 is none. Good to about 600."""
    connection_rate_mb_s: float = 0.0
    """Downstream cap of each connection; 0 is none."""
    window_kib: int = 0
    """Bytes a connection may have in flight, so that it reaches at most window/rtt; 0 is none."""
    reset_after_bytes: int | None = None
    """Deliver this many bytes of an answer, then RST."""
    truncate_after_bytes: int | None = None
    """Deliver this many bytes of an answer, then an orderly end of stream."""
    stall_after_bytes: int | None = None
    """Deliver this many bytes of an answer, then nothing until the weather changes."""
    corrupt_after_bytes: int | None = None
    """Invert the byte that follows this many bytes of an answer. Behind the response's head, to hit its body."""
    refuse: bool = False
    """Reset new connections as soon as they are accepted. For ECONNREFUSED, `stop` the proxy."""
    faults_count: int | None = None
    """How many of the faults above happen before they cease; None is all."""


class Stats(NamedTuple):
    """Counts since the start."""

    connections: int
    """Accepted, refused ones included."""
    open: int
    """Connections at this moment."""
    faults: int
    up_bytes: int
    down_bytes: int


class ChaosProxy(RemoteServer):
    """Listens at `port` before `upstream`; `url` is upstream's address with the proxy in its place."""

    def __init__(self, upstream: str, root: Path, *, port: int | None = None) -> None:
        """upstream: a URL ('http://127.0.0.1:8000/path/') or 'host:port'. root: where its log goes."""
        super().__init__("chaos proxy", root, port)
        parts = urllib.parse.urlsplit(upstream if "://" in upstream else f"tcp://{upstream}")
        if parts.hostname is None or parts.port is None:
            raise ServerError(f"upstream {upstream!r} names no host and port")
        # A certificate for 'localhost' stays valid through the proxy.
        host = parts.hostname if parts.hostname == "localhost" else "127.0.0.1"
        self.url = parts._replace(netloc=f"{host}:{self.port}").geturl()
        self._upstream = {"upstream_host": parts.hostname, "upstream_port": parts.port}

    def begin(self, log: Path) -> Remote:
        """In fair weather."""
        settings = {"port": self.port, **self._upstream}
        return Remote("tests.servers.chaos_proxy", log=log, settings=settings)

    def set(self, **weather: Any) -> None:
        """Make exactly this weather: fields of `Weather`; what is not named is fair. Open connections feel it too."""
        self.running.call("change", **dataclasses.asdict(Weather(**weather)))

    def clear(self) -> None:
        """Fair weather; stalled connections go on."""
        self.set()

    def stats(self) -> Stats:
        """Counts since the start."""
        return Stats(**self.running.call("stats"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upstream", help="URL or host:port")
    parser.add_argument("--port", type=int)
    for field in dataclasses.fields(Weather):
        if field.name != "refuse":
            kind = float if "float" in str(field.type) else int
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    args = vars(parser.parse_args())
    with ChaosProxy(args.pop("upstream"), Path(tempfile.mkdtemp(prefix="chaos-")), port=args.pop("port")) as proxy:
        proxy.set(**args)
        print(proxy.url, flush=True)
        wait_for_signal()
        print(proxy.stats())


if __name__ == "__main__":
    main()
