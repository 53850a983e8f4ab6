"""The page's door: HTTP on an address of this machine, for a browser of the user who mounted.

    GET  /, /page.js, …                  the page itself, which shows nothing without the token
    GET  /v1/… POST /v1/…                operations of `control.wire`, those in OPERATIONS
    GET  /timeline?path=&number=         {count: loads that are known, svg: the last one drawn, or so many before it}
    GET  /gpus                           what gpuload says of this node's GPUs

Any program of this machine can connect, and any web page of the same browser can have requests sent here. So:

- whatever tells or changes anything needs the token of the runtime directory's `.page` file, which only the user who
  mounted can read. It comes as `Authorization: Bearer`, which no other site's page can send without asking first, and
  nobody who asks is answered (no CORS). It is never in a URL that is sent: the page gets it behind a '#';
- `Host` must name this machine: a name of an attacker's that leads here (DNS rebinding) is refused;
- `Origin`, where a browser states it, must be the page's own.

The token outlives the daemon: who goes on with the mount goes on with it, and open pages go on too.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

import trio

from mfs.control import listening, wire
from mfs.control.api import DaemonApi, Json
from mfs.control.http import HttpConnection, Limits, Request
from mfs.control.server import Server, ServerConfig
from mfs.errors import AccessError, UsageError
from mfs.page import gpus, where
from mfs.page.timeline import STYLE, timeline_svg

log = logging.getLogger(__name__)

OPERATIONS = frozenset({"status", "overview", "heat", "loads", "prefetch", "pin", "unpin", "evict", "refresh"})
"""Of `wire.OPERATIONS`, what the page may ask for."""

CONFIG = ServerConfig(connections_max=32, limits=Limits(header_bytes=16 << 10, body_bytes=64 << 10, idle_s=30.0))
"""A browser opens six connections; nothing the page sends is long."""

_HEADERS = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy",
     "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
     "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)  # fmt: skip
_ASSETS = Path(__file__).parent / "assets"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/parts.js": ("parts.js", "text/javascript; charset=utf-8"),
    "/numbers.js": ("numbers.js", "text/javascript; charset=utf-8"),
    "/ask.js": ("ask.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/vendor/htm-preact.js": ("vendor/htm-preact.js", "text/javascript; charset=utf-8"),
    "/vendor/uplot.js": ("vendor/uplot.js", "text/javascript; charset=utf-8"),
    "/vendor/uplot.css": ("vendor/uplot.css", "text/css; charset=utf-8"),
}
"""All there are: no path of a client's is ever one of the file system's."""
_LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
"""A `Host` of this machine, by any port: who comes through `ssh -L` may have another one than ours."""
_AGAIN_S = 1.0


async def serve(
    api: DaemonApi,
    address: tuple[str, int],
    control_socket: Path,
    stays: Callable[[], bool] = lambda: False,
    on_fault: Callable[[str], None] = lambda fault: None,
    *,
    config: ServerConfig = CONFIG,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the page until cancelled. Started once that was tried; an address that is taken is tried again and again.

    A daemon that takes a mount over wants the address of the one that still has it. So nothing of the page ever fails a
    mount: on_fault is told why it is not there, and '' once it is.
    stays: asked at the end, whether the token is to stay for who goes on with the mount.
    """
    fault, is_told = "", False
    while True:
        try:
            with (
                listening.tcp(*address) as listener,
                where.announced(_url(listener), control_socket, stays) as token,
            ):
                if fault:
                    on_fault("")
                if not is_told:
                    task_status.started()
                is_told = True
                await Site(api, config, token).run(listener)
        except OSError as error:
            said = f"{address[0]}:{address[1]}: {error.strerror or error}"
            if said != fault:
                log.warning("the page cannot be served at %s; trying again", said)
                on_fault(said)
            fault = said
        if not is_told:
            task_status.started()
        is_told = True
        await trio.sleep(_AGAIN_S)


def _url(listener: trio.socket.SocketType) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class Site(Server):
    """Who may ask for what on the page's address."""

    headers = _HEADERS

    def __init__(self, api: DaemonApi, config: ServerConfig, token: str) -> None:
        super().__init__(api, config)
        self._token = token.encode()
        self._files: dict[str, bytes] = {}

    def identify(self, stream: trio.SocketStream) -> int:
        return -1  # all who come are alike: the token tells

    async def answer_other(self, connection: HttpConnection, request: Request) -> bool:
        check_where_from(request)
        path = request.target.partition("?")[0]
        if path in _FILES or path == "/timeline.css":
            if request.method not in ("GET", "HEAD"):
                raise UsageError(f"{path} is asked for with GET, not {request.method}")
            await connection.send_whole(
                200, _FILES.get(path, ("", "text/css; charset=utf-8"))[1], await self._file(path)
            )
            return True
        self._check_token(request)
        if path not in ("/timeline", "/gpus"):
            return False
        if request.method != "GET":
            raise UsageError(f"{path} is asked for with GET, not {request.method}")
        if path == "/gpus":
            await connection.send_json(200, await trio.to_thread.run_sync(gpus.look))
        else:
            await connection.send_json(200, await self._timeline(dict(parse_qsl(request.target.partition("?")[2]))))
        return True

    def admit(self, request: Request, name: str, operation: wire.Operation, who: int) -> None:
        if name not in OPERATIONS:
            raise AccessError(f"{name} is not for the page: use the shell command")

    def _check_token(self, request: Request) -> None:
        kind, _, given = (request.header("authorization") or "").partition(" ")
        known = given.strip().encode("latin-1", "replace")
        if kind.lower() != "bearer" or not secrets.compare_digest(known, self._token):
            raise AccessError("no token, or not this mount's: open the address that 'mfs page PATH' prints")

    async def _file(self, path: str) -> bytes:
        """A file of the page, read when somebody asks for the first time."""
        if path == "/timeline.css":
            return STYLE.encode()
        if path not in self._files:
            self._files[path] = await trio.Path(_ASSETS / _FILES[path][0]).read_bytes()
        return self._files[path]

    async def _timeline(self, query: dict[str, str]) -> Json:
        number = query.get("number", "0")
        if not number.isascii() or not number.isdecimal() or len(number) > 6:
            raise UsageError(f"number is {number[:20]!r}: expected how many loads ago")
        arguments = wire.parse_arguments(wire.Operation("GET", takes_path=True), {"path": query.get("path", "")})
        found = await self._api.latest_load(**arguments, number=int(number))
        if found["load"] is None:
            return {"count": found["count"], "svg": None}
        svg = await trio.to_thread.run_sync(lambda: timeline_svg(found["load"], bare=True))
        return {"count": found["count"], "svg": svg}


def check_where_from(request: Request) -> None:
    """Raises: AccessError unless a request was meant for this machine, by the page itself or by no page at all."""
    host = request.header("host") or ""
    if not _LOCAL_HOST.fullmatch(host):
        raise AccessError(f"Host is {host[:100]!r}: expected 127.0.0.1, [::1] or localhost")
    origin = request.header("origin")
    if origin is not None and origin != f"http://{host}":
        raise AccessError(f"a page of {origin[:100]!r} may not ask here")
    if request.header("sec-fetch-site") not in (None, "same-origin", "none"):
        raise AccessError("a page of another site may not ask here")
