"""The liar's own process: an honest folder server in nginx's JSON listing format, and one function per lie.

Run by `tests.servers.liar`, whose `Lie` names what each of them does.
"""

from __future__ import annotations

import datetime
import email.utils
import fnmatch
import json
import os
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers import remote, web
from tests.servers.liar import Lie


@dataclass
class Orders:
    """What to lie about, changed by the parent while requests are answered."""

    files: Path
    lie: Lie | None = None
    pattern: str = "*"
    left: int | None = None
    """Lies still to tell; None is no end."""
    after_bytes: int = 0
    interval_s: float = 0.0
    status: int = 503
    retry_after_s: int | None = None
    listings: dict[str, str] = field(default_factory=dict)
    requests: list[list[Any]] = field(default_factory=list)
    told: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    changed: threading.Event = field(default_factory=threading.Event)
    """Set, and replaced, whenever the orders change: silent answers then end."""

    def set(self, lie: str | None, **details: Any) -> None:
        with self.lock:
            self.lie = Lie(lie) if lie else None
            for name, value in details.items():
                setattr(self, name, value)
            self.changed.set()
            self.changed = threading.Event()

    def take(self, path: str) -> Lie | None:
        """The lie to tell about `path` now, counted; None for the truth."""
        with self.lock:
            if self.lie is None or self.left == 0 or not fnmatch.fnmatchcase(path, self.pattern):
                return None
            if self.left is not None:
                self.left -= 1
            self.told += 1
            return self.lie

    def set_listing(self, path: str, body: str | None) -> None:
        self.listings.pop(path, None)
        if body is not None:
            self.listings[path] = body

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {"requests": list(self.requests), "told": self.told}

    def forget_stats(self) -> None:
        with self.lock:
            self.requests.clear()
            self.told = 0


ORDERS: Orders


def http_date(mtime_s: float) -> str:
    return email.utils.format_datetime(datetime.datetime.fromtimestamp(int(mtime_s), datetime.UTC), usegmt=True)


def listing(folder: Path) -> bytes:
    """What nginx's `autoindex_format json` says of a folder."""
    entries = []
    for entry in sorted(os.scandir(folder), key=lambda entry: (not entry.is_dir(), entry.name)):
        facts: dict[str, Any] = {"name": entry.name, "type": "directory" if entry.is_dir() else "file"}
        facts["mtime"] = http_date(entry.stat().st_mtime)
        if entry.is_file():
            facts["size"] = entry.stat().st_size
        entries.append(facts)
    return json.dumps(entries).encode()


_INVERTED = bytes(255 - byte for byte in range(256))


@dataclass
class Answer:
    """A response about to be sent; lies change it."""

    status: int
    headers: dict[str, str]
    content: bytes
    """The whole object as this answer sees it."""
    start: int
    stop: int

    @property
    def body(self) -> bytes:
        return self.content[self.start : self.stop]


class Site(web.Handler):
    """Truth first; a lie is a change of the true answer, or an answer of its own."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        with ORDERS.lock:
            ORDERS.requests.append([self.command, path, self.headers.get("Range", "")])
        lie = ORDERS.take(path)
        match lie:
            case Lie.STATUS:
                wait = [] if ORDERS.retry_after_s is None else [("Retry-After", str(ORDERS.retry_after_s))]
                return self.answer(ORDERS.status, b"go away", wait)
            case Lie.SILENCE:
                ORDERS.changed.wait()
                return self._hang_up()
            case Lie.HANG_UP:
                return self._hang_up()
            case Lie.NOT_HTTP:
                self.wfile.write(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
                return self._hang_up()
            case Lie.ENDLESS_HEADERS:
                return self._endless_headers()
        local = ORDERS.files / path.lstrip("/")
        if path in ORDERS.listings or local.is_dir():
            if not path.endswith("/"):
                return self.answer(301, b"", [("Location", urllib.parse.quote(path) + "/")])
            body = ORDERS.listings[path].encode() if path in ORDERS.listings else listing(local)
            return self.answer(200, body, [("Content-Type", "application/json")])
        if not local.is_file():
            return self.answer(404, b"not here")
        return self._file(local, lie)

    def _file(self, local: Path, lie: Lie | None) -> None:
        content, mtime_s = local.read_bytes(), local.stat().st_mtime
        etag = f'"{int(mtime_s):x}-{len(content):x}"'
        match lie:
            case Lie.SHRUNK:
                content = content[: len(content) // 2]
            case Lie.GROWN:
                content += content
            case Lie.CHANGED:
                content, etag = content.translate(_INVERTED), '"changed"'
            case Lie.NEW_ETAGS:
                etag = f'"{time.monotonic_ns():x}"'
        if self.headers.get("If-Match") not in (None, "*", etag) and lie not in (Lie.NEW_ETAGS, Lie.IGNORES_IF_MATCH):
            return self.answer(412, b"", [("ETag", etag)])
        try:
            span = web.parse_range(self.headers.get("Range"), len(content))
        except web.UnsatisfiableRangeError:
            return self.answer(416, b"", [("Content-Range", f"bytes */{len(content)}")])
        if lie is Lie.IGNORES_RANGE:
            span = None
        if lie is Lie.IGNORES_IF_MATCH:
            content = content.translate(_INVERTED)
        start, stop = span or (0, len(content))
        headers = {"ETag": etag, "Last-Modified": http_date(mtime_s), "Accept-Ranges": "bytes"}
        if span:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(Answer(206 if span else 200, headers, content, start, stop), lie)

    def _send(self, answer: Answer, lie: Lie | None) -> None:
        body, headers = answer.body, answer.headers
        headers["Content-Length"] = str(len(body))
        size, first = len(answer.content), answer.start
        match lie:
            case Lie.LONG_LENGTH:
                headers["Content-Length"] = str(len(body) + 10)
            case Lie.SHORT_LENGTH:
                headers["Content-Length"] = str(max(0, len(body) - 10))
            case Lie.NO_LENGTH:
                del headers["Content-Length"]
                body = body[: ORDERS.after_bytes]
            case Lie.TRUNCATED:
                body = body[: ORDERS.after_bytes]
            case Lie.OTHER_RANGE:
                body = answer.content[first + 1 : answer.stop + 1]
                headers["Content-Range"] = f"bytes {first + 1}-{first + len(body)}/{size}"
                headers["Content-Length"] = str(len(body))
            case Lie.SHORT_RANGE:
                body = body[: len(body) // 2]
                headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{size}"
                headers["Content-Length"] = str(len(body))
            case Lie.OTHER_TOTAL:
                headers["Content-Range"] = f"bytes {first}-{answer.stop - 1}/{size + 1}"
            case Lie.NO_CONTENT_RANGE:
                headers.pop("Content-Range", None)
            case Lie.NO_ETAG:
                del headers["ETag"]
            case Lie.WRONG_BYTES:
                at = min(ORDERS.after_bytes, len(body) - 1)
                body = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
        self.head(answer.status, list(headers.items()))
        if self.command == "HEAD":
            return
        if lie is Lie.DRIP:
            self._drip(body)
        else:
            self.wfile.write(body)
        if headers.get("Content-Length") != str(len(body)):
            self._hang_up()

    def _drip(self, body: bytes) -> None:
        orders_changed = ORDERS.changed
        for at in range(len(body)):
            self.wfile.write(body[at : at + 1])
            if orders_changed.wait(ORDERS.interval_s):
                self.wfile.write(body[at + 1 :])
                return

    def _endless_headers(self) -> None:
        """Headers until the client has had enough."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        orders_changed = ORDERS.changed
        try:
            while not orders_changed.is_set():
                self.wfile.write(b"X-More: and more\r\n" * 100)
        except ConnectionError:
            pass
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True


def main() -> None:
    global ORDERS
    settings = remote.read_settings()
    ORDERS = Orders(Path(settings["files"]))
    web.serve(Site, "127.0.0.1", settings["port"])
    remote.obey({name: getattr(ORDERS, name) for name in ("set", "set_listing", "stats", "forget_stats")})


if __name__ == "__main__":
    main()
