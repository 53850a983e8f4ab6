"""The page's door: HTTP on an address of this machine, for a browser of the user who mounted.

    GET  /, /page.js, …                  the page itself, which shows nothing without the token
    GET  /v1/… POST /v1/…                operations of `control.wire`, those in OPERATIONS
    GET  /timeline?path=&number=         a load of a model as SVG, the last one or so many before it
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

import json
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import trio

from mfs.control import listening, wire
from mfs.control.api import DaemonApi
from mfs.control.http import HttpConnection, Limits, Request
from mfs.control.server import Server, ServerConfig
from mfs.errors import AccessError, NotFoundError, StoreError, UsageError
from mfs.page import gpus
from mfs.page.timeline import STYLE, timeline_svg
from mfs.units import LOCAL_HOSTS

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
_TOKEN_BYTES = 32
_TOKEN_LENGTH_MAX = 128
_FILE_BYTES_MAX = 4096
_AGAIN_S = 1.0


def page_file(control_socket: Path) -> Path:
    """Where address and token of a mount's page stand."""
    return control_socket.with_suffix(".page")


def page_url(control_socket: Path) -> str:
    """What to open in a browser, the token behind its '#'. Raises: NotFoundError, AccessError."""
    try:
        known = json.loads(_read_own(page_file(control_socket)))
        return f"{known['url']}#token={known['token']}"
    except FileNotFoundError:
        raise NotFoundError("this mount serves no page") from None
    except PermissionError as error:
        raise AccessError("the page is for root and the user who mounted") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{page_file(control_socket)} cannot be read: {error}") from error


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
    fault, is_first = "", True
    while True:
        try:
            with listening.tcp(*address) as listener, _announced(listener, control_socket, stays) as token:
                if fault:
                    on_fault("")
                if is_first:
                    task_status.started()
                is_first = False
                await Site(api, config, token).run(listener)
        except OSError as error:
            said = f"{address[0]}:{address[1]}: {error.strerror or error}"
            if said != fault:
                log.warning("the page cannot be served at %s; trying again", said)
                on_fault(said)
            fault = said
        if is_first:
            task_status.started()
        is_first = False
        await trio.sleep(_AGAIN_S)


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
            await connection.send_whole(200, _FILES.get(path, ("", "text/css; charset=utf-8"))[1], await self._file(path))
            return True
        self._check_token(request)
        if path not in ("/timeline", "/gpus"):
            return False
        if request.method != "GET":
            raise UsageError(f"{path} is asked for with GET, not {request.method}")
        if path == "/gpus":
            await connection.send_json(200, await trio.to_thread.run_sync(gpus.look))
        else:
            svg = await self._timeline(dict(parse_qsl(request.target.partition("?")[2])))
            await connection.send_whole(200, "image/svg+xml", svg.encode())
        return True

    def admit(self, request: Request, name: str, operation: wire.Operation, who: int) -> None:
        if name not in OPERATIONS:
            raise AccessError(f"{name} is not for the page: use the shell command")

    def _check_token(self, request: Request) -> None:
        kind, _, given = (request.header("authorization") or "").partition(" ")
        known = given.strip().encode("latin-1", "replace")[:_TOKEN_LENGTH_MAX]
        if kind.lower() != "bearer" or not secrets.compare_digest(known, self._token):
            raise AccessError("no token, or not this mount's: open the address that 'mfs page PATH' prints")

    async def _file(self, path: str) -> bytes:
        """A file of the page, read when somebody asks for the first time."""
        if path == "/timeline.css":
            return STYLE.encode()
        if path not in self._files:
            self._files[path] = await trio.Path(_ASSETS / _FILES[path][0]).read_bytes()
        return self._files[path]

    async def _timeline(self, query: dict[str, str]) -> str:
        """Raises: NotFoundError if there is no such load."""
        number = query.get("number", "0")
        if not number.isascii() or not number.isdecimal() or len(number) > 6:
            raise UsageError(f"number is {number[:20]!r}: expected how many loads ago")
        arguments = wire.parse_arguments(wire.Operation("GET", takes_path=True), {"path": query.get("path", "")})
        ask: Any = getattr(self._api, "loads", None)
        loads = (await ask(**arguments))["loads"] if ask is not None else []
        if int(number) >= len(loads):
            raise NotFoundError("nothing was loaded since the mount began")
        latest_first = sorted(loads, key=lambda load: load["began_at"], reverse=True)
        return await trio.to_thread.run_sync(lambda: timeline_svg(latest_first[int(number)], bare=True))


def check_where_from(request: Request) -> None:
    """Raises: AccessError unless a request was meant for this machine, by the page itself or by no page at all."""
    host = request.header("host") or ""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in LOCAL_HOSTS:
        raise AccessError(f"Host is {host[:100]!r}: expected 127.0.0.1, [::1] or localhost")
    origin = request.header("origin")
    if origin is not None and origin != f"http://{host}":
        raise AccessError(f"a page of {origin[:100]!r} may not ask here")
    if request.header("sec-fetch-site") not in (None, "same-origin", "none"):
        raise AccessError("a page of another site may not ask here")


# -- where the token stands


@contextmanager
def _announced(
    listener: trio.socket.SocketType, control_socket: Path, stays: Callable[[], bool]
) -> Iterator[str]:
    """Write down where the page is and with which token; yields the token. Raises: OSError."""
    file = page_file(control_socket)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    token = _known_token(file) or secrets.token_urlsafe(_TOKEN_BYTES)
    text = json.dumps({"url": url, "token": token})
    temporary = file.with_suffix(f".{os.getpid()}.ptmp")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as written:
        written.write(text)
    temporary.replace(file)
    try:
        yield token
    finally:
        with suppress(OSError):
            if not stays() and file.read_text() == text:
                file.unlink()


def _known_token(file: Path) -> str | None:
    """The token that an earlier daemon of the mount has left, if nobody else can have read or written it."""
    try:
        token = json.loads(_read_own(file))["token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return token if isinstance(token, str) and _TOKEN_BYTES <= len(token) < _TOKEN_LENGTH_MAX else None


def _read_own(file: Path) -> bytes:
    """A small file that only its owner could read: ours, or of the user whose mount it is. Raises: OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as opened:
        status = os.fstat(fd)
        is_private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
        if not is_private or status.st_uid not in (os.geteuid(), os.stat(file.parent).st_uid):
            raise PermissionError(f"{file} is of uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}")
        return opened.read(_FILE_BYTES_MAX)
