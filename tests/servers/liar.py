"""A folder server that lies as told: faults no real server makes on demand. Without a lie it answers as nginx does.

What it does stands in `tests.servers.liar_site`; tests/test_servers_faults.py runs nginx's honest checks on it too.
"""

from __future__ import annotations

import argparse
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from tests.servers.process import wait_for_signal
from tests.servers.remote import Remote, RemoteServer


class Lie(StrEnum):
    """What is wrong with an answer. Where a whole answer is replaced, folders are lied about too; else only files."""

    LONG_LENGTH = "long length"
    """Content-Length is 10 more than the body; then the connection ends."""
    SHORT_LENGTH = "short length"
    """Content-Length is 10 less than the body, whose rest follows; then the connection ends."""
    NO_LENGTH = "no length"
    """No Content-Length; `after_bytes` of the body, then an orderly end."""
    TRUNCATED = "truncated"
    """True headers, `after_bytes` of the body, then an orderly end."""
    OTHER_RANGE = "other range"
    """206 for a range one byte later than asked, and saying so."""
    SHORT_RANGE = "short range"
    """206 for the first half of the range asked, and saying so."""
    OTHER_TOTAL = "other total"
    """Content-Range speaks of an object one byte longer."""
    NO_CONTENT_RANGE = "no content-range"
    """206 that does not say which range."""
    IGNORES_RANGE = "ignores range"
    """200 and the whole object."""
    IGNORES_IF_MATCH = "ignores if-match"
    """Other bytes (all inverted) of the same size under the old ETag."""
    WRONG_BYTES = "wrong bytes"
    """The body's byte at `after_bytes` is inverted; all else is true."""
    NEW_ETAGS = "new etags"
    """Another ETag in every answer; If-Match is not looked at."""
    NO_ETAG = "no etag"
    """No ETag."""
    SHRUNK = "shrunk"
    """The object has lost its second half; its ETag is the old one."""
    GROWN = "grown"
    """The object stands there twice; its ETag is the old one."""
    CHANGED = "changed"
    """Other bytes (all inverted) of the same size, under another ETag, with If-Match honoured (412)."""
    STATUS = "status"
    """`status` with a Retry-After of `retry_after_s`, if any."""
    SILENCE = "silence"
    """Nothing is answered until the orders change; then the connection ends."""
    HANG_UP = "hang up"
    """The connection ends instead of an answer."""
    NOT_HTTP = "not http"
    """The answer is another protocol's greeting."""
    ENDLESS_HEADERS = "endless headers"
    """Header lines that never end."""
    DRIP = "drip"
    """One body byte every `interval_s`, until the orders change; then the rest."""


class Request(NamedTuple):
    """One request, when it arrived."""

    method: str
    path: str
    """Decoded, without the query."""
    range: str
    """The Range header, '' without one."""


class LiarServer(RemoteServer):
    """Serves `files` at `url`, truthfully until told otherwise. ETags are made of mtime (seconds) and size."""

    def __init__(self, root: Path, *, files: Path | None = None, port: int | None = None) -> None:
        """Keep the log under `root`; serve `files`, by default the new folder `root/files`."""
        super().__init__("liar", root, port)
        self.files = files or root / "files"
        self.url = f"http://127.0.0.1:{self.port}/"

    def begin(self, log: Path) -> Remote:
        """Honest."""
        self.files.mkdir(parents=True, exist_ok=True)
        settings = {"files": str(self.files), "port": self.port}
        return Remote("tests.servers.liar_site", log=log, settings=settings)

    def lie(
        self,
        lie: Lie,
        *,
        pattern: str = "*",
        count: int | None = None,
        after_bytes: int = 0,
        interval_s: float = 0.1,
        status: int = 503,
        retry_after_s: int | None = None,
    ) -> None:
        """Tell this lie, and no other, from now on.

        pattern: shell pattern of the paths ('/folder/*.bin') it is told about; `*` matches '/' too.
        count: how many times, then the truth; None is always.
        The other arguments belong to the lies that name them.
        """
        details: dict[str, Any] = {"pattern": pattern, "left": count, "after_bytes": after_bytes}
        details |= {"interval_s": interval_s, "status": status, "retry_after_s": retry_after_s}
        self.running.call("set", lie=lie.value, **details)

    def tell_truth(self) -> None:
        """Stop lying; silent and dripping answers end."""
        self.running.call("set", lie=None)

    def set_listing(self, path: str, body: str | None) -> None:
        """Answer the folder `path` ('/', '/a/') with this body instead of its true listing; None undoes that."""
        self.running.call("set_listing", path=path, body=body)

    def requests(self, path: str | None = None) -> list[Request]:
        """Requests that arrived, in order; with `path`, those for exactly it."""
        found = [Request(*request) for request in self.running.call("stats")["requests"]]
        return [request for request in found if path in (None, request.path)]

    def wait_for_request(self, path: str, *, timeout_s: float = 20.0) -> None:
        """Return once a request for `path` has arrived. Raises: ServerError after `timeout_s`."""
        self.running.process.wait_until(lambda: bool(self.requests(path)), timeout_s=timeout_s)

    def lies_told(self) -> int:
        """How many answers were lies."""
        told: int = self.running.call("stats")["told"]
        return told

    def forget_requests(self) -> None:
        """Start counting anew."""
        self.running.call("forget_stats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--lie", choices=[lie.value for lie in Lie])
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="liar-"))
    with LiarServer(root, files=args.files.resolve(), port=args.port) as server:
        if args.lie:
            server.lie(Lie(args.lie))
        print(server.url, flush=True)
        wait_for_signal()


if __name__ == "__main__":
    main()
