"""The process of `tests.servers.dfdaemon`: tasks made of pieces, each fetched from its origin once."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from tests.servers import remote, web

PIECE_BYTES = 4 << 20
_HOP_BY_HOP = {"connection", "host", "proxy-authorization", "proxy-connection", "range", "te", "transfer-encoding"}
_ABOUT_CONTENT = {"connection", "content-length", "content-range", "date", "keep-alive", "server", "transfer-encoding"}


class Fetched(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class RefusedError(Exception):
    """The origin answered something other than bytes."""

    def __init__(self, fetched: Fetched) -> None:
        super().__init__(f"status {fetched.status}")
        self.fetched = fetched


@dataclass
class Task:
    """One object as the network has it."""

    size: int
    headers: list[tuple[str, str]]
    """Of the origin's first answer."""
    pieces: dict[int, bytes] = field(default_factory=dict)
    locks: dict[int, threading.Lock] = field(default_factory=dict)


@dataclass
class Site:
    host: str
    port: int
    ca_file: str
    log: str
    how: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, Task] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)
    making: dict[str, threading.Lock] = field(default_factory=dict)

    def note(self, line: str) -> None:
        with self.guard, Path(self.log).open("a") as out:
            out.write(f"{line}\n")

    # Commands of the parent, called by `remote.obey`.

    def fail(self, *, how: str) -> None:
        self.how = how

    def stats(self) -> dict[str, int]:
        return {**self.counts, "tasks": len(self.tasks)}

    def task_ids(self) -> list[str]:
        return list(self.tasks)

    def named(self) -> list[str]:
        return self.names


SITE: Site


class Proxy(web.Handler):
    """GET of absolute addresses."""

    def do_GET(self) -> None:
        SITE.counts["requests"] += 1
        parts = urlsplit(self.path)
        SITE.note(f"{self.client_address[0]} {self.command} {parts.scheme}://{parts.netloc}{parts.path}")
        if SITE.how in ("proxy", "dfdaemon"):
            return self.answer(500, b"no", [("X-Dragonfly-Error-Type", SITE.how)])
        if SITE.how == "slow":
            time.sleep(60)
        if SITE.how == "limit":
            return self.answer(429)
        if not parts.netloc or self.command != "GET":
            return self.answer(400, b"an absolute address and GET are wanted")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        told = {n.lower(): headers.pop(n) for n in list(headers) if n.lower().startswith("x-dragonfly-")}
        try:
            if told.get("x-dragonfly-use-p2p") != "true":
                SITE.counts["passed"] += 1
                return self._relay(fetch(self.path, headers, self.headers.get("Range")))
            self._serve(self.path, headers, told)
        except RefusedError as refused:
            SITE.counts["refused"] += 1
            self._relay(refused.fetched, [("X-Dragonfly-Error-Type", "backend")])
        except OSError as error:
            self.answer(500, str(error).encode(), [("X-Dragonfly-Error-Type", "backend")])

    def _relay(self, fetched: Fetched, more: list[tuple[str, str]] | None = None) -> None:
        said = [(n, v) for n, v in fetched.headers if n.lower() not in _ABOUT_CONTENT or n.lower() == "content-range"]
        self.answer(fetched.status, fetched.body, [*said, *(more or [])])

    def _serve(self, url: str, headers: Mapping[str, str], told: Mapping[str, str]) -> None:
        task_id = id_of(url, told)
        task = task_of(task_id, url, headers)
        span = web.parse_range(self.headers.get("Range"), task.size)
        start, stop = span or (0, task.size)
        body = b"".join(
            piece_of(task, number, url, headers) for number in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES))
        )
        first = start // PIECE_BYTES * PIECE_BYTES
        body = body[start - first : stop - first]
        if SITE.how == "lie":
            body = bytes(255 - b for b in body[:1]) + body[1:]
        said = [*task.headers, ("X-Dragonfly-Task-ID", task_id)]
        if span:
            said.append(("Content-Range", f"bytes {start}-{stop - 1}/{task.size}"))
        self.answer(206 if span else 200, body, said)


def id_of(url: str, told: Mapping[str, str]) -> str:
    """The content, where it is named; else address without filtered parameters, tag and length of pieces."""
    if content := told.get("x-dragonfly-content-for-calculating-task-id"):
        name = content
    else:
        left_out = set(told.get("x-dragonfly-filtered-query-params", "").split("&"))
        parts = urlsplit(url)
        query = urlencode([(n, v) for n, v in parse_qsl(parts.query, keep_blank_values=True) if n not in left_out])
        name = f"{parts._replace(query=query).geturl()} {told.get('x-dragonfly-tag', '')} {PIECE_BYTES}"
    with SITE.guard:
        SITE.names.append(name)
    return hashlib.sha256(name.encode()).hexdigest()


def task_of(task_id: str, url: str, headers: Mapping[str, str]) -> Task:
    with SITE.guard:
        making = SITE.making.setdefault(task_id, threading.Lock())
    with making:
        if task_id not in SITE.tasks:
            fetched = bytes_of(url, headers, f"bytes=0-{PIECE_BYTES - 1}")
            said = {name.lower(): value for name, value in fetched.headers}
            size = int(said["content-range"].rpartition("/")[2]) if fetched.status == 206 else len(fetched.body)
            kept = [(name, value) for name, value in fetched.headers if name.lower() not in _ABOUT_CONTENT]
            SITE.tasks[task_id] = Task(size, kept, {0: fetched.body[:PIECE_BYTES]})
        return SITE.tasks[task_id]


def piece_of(task: Task, number: int, url: str, headers: Mapping[str, str]) -> bytes:
    with SITE.guard:
        lock = task.locks.setdefault(number, threading.Lock())
    with lock:
        if number not in task.pieces:
            stop = min(task.size, (number + 1) * PIECE_BYTES)
            task.pieces[number] = bytes_of(url, headers, f"bytes={number * PIECE_BYTES}-{stop - 1}").body
        return task.pieces[number]


def bytes_of(url: str, headers: Mapping[str, str], wanted: str) -> Fetched:
    fetched = fetch(url, headers, wanted)
    if fetched.status not in (200, 206):
        raise RefusedError(fetched)
    SITE.counts["pieces"] += 1
    return fetched


def fetch(url: str, headers: Mapping[str, str], wanted: str | None) -> Fetched:
    """Ask an origin."""
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=SITE.ca_file or None)
        connection = http.client.HTTPSConnection(parts.netloc, context=context, timeout=30)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    try:
        target = parts._replace(scheme="", netloc="").geturl()
        connection.request("GET", target, headers={**headers, **({"Range": wanted} if wanted else {})})
        answer = connection.getresponse()
        return Fetched(answer.status, answer.getheaders(), answer.read())
    finally:
        connection.close()


def main() -> None:
    global SITE
    SITE = Site(**remote.read_settings())
    Path(SITE.log).touch()
    web.serve(Proxy, SITE.host, SITE.port)
    remote.obey({name: getattr(SITE, name) for name in ("fail", "stats", "task_ids", "named")})


if __name__ == "__main__":
    main()
