"""How to reach one folder of a web server: its address, credentials, redirects, and what its refusals mean."""

from __future__ import annotations

import logging
import netrc
import os
import threading
from collections.abc import Callable, Mapping
from urllib.parse import quote, urlsplit

from mfs.errors import AccessError, ChangedError, MfsError, NotFoundError, StoreError, TransientStoreError, UsageError
from mfs.fetch.environment import basic_authorization
from mfs.fetch.redirects import Hop, follow
from mfs.fetch.retry import TRANSIENT_STATUSES, wished_pause_s, with_retries
from mfs.fetch.route import Route
from mfs.fetch.transport import Reply, Transport, parse_target
from mfs.sources.options import SourceOptions

log = logging.getLogger(__name__)


class HttpAccess:
    """Addresses and requests below one folder. Construction does no I/O beside ~/.netrc. Thread-safe."""

    def __init__(self, folder_url: str, authorization: str | None, options: SourceOptions) -> None:
        """folder_url: percent-encoded, ending in '/', without userinfo.
        authorization: None for what ~/.netrc says, now and whenever that is refused.
        """
        self.folder_url = folder_url
        self.transport = Transport(connections_max=options.connections_max)
        self.route = Route(self.transport, options.cache)
        self.closed = threading.Event()
        self._netrc_host = None if authorization else parse_target(folder_url).origin.host
        self._authorization = authorization or _netrc_authorization(self._netrc_host or "")

    def url(self, path: str) -> str:
        """The address of a path below the folder."""
        return self.folder_url + quote(path, safe="/-_.~")

    def get(self, url: str, deadline_s: float, *, method: str = "GET", body_bytes_max: int = 64 << 20) -> Reply:
        """A small answer, whatever its status unless that is transient."""

        def send(hop: Hop) -> Reply:
            return self.transport.request(
                hop.url,
                method=method,
                headers=self.headers(hop, {}),
                body_bytes_max=body_bytes_max,
                deadline_s=deadline_s,
            )

        def attempt() -> Reply:
            reply = self.follow(url, send)
            if reply.status in TRANSIENT_STATUSES:
                raise error_of(reply, parse_target(url).shown)
            return reply

        what = f"listing {parse_target(url).shown}"
        return with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self.closed)

    def follow(self, url: str, send: Callable[[Hop], Reply]) -> Reply:
        """The last answer; asked for once more if it is a refusal and ~/.netrc says something else by now."""
        used = self._authorization
        reply, _ = follow(Hop(url), send)
        if reply.status in (401, 403) and self._netrc_host:
            if self._authorization == used:
                self._authorization = _netrc_authorization(self._netrc_host)
            if self._authorization != used:
                reply, _ = follow(Hop(url), send)
        return reply

    def headers(self, hop: Hop, headers: Mapping[str, str]) -> dict[str, str]:
        """`headers` and, at home, the credentials."""
        if not self.is_open(hop):
            assert self._authorization is not None
            return {**headers, "Authorization": self._authorization}
        return dict(headers)

    def is_open(self, hop: Hop) -> bool:
        """Whether it is asked without credentials. With a password no cache is asked: it would have to see it."""
        return not (self._authorization and hop.is_home)

    def close(self) -> None:
        """Drop connections."""
        self.closed.set()
        self.route.close()
        self.transport.close()


def parse_http_url(url: str) -> tuple[str, str, str | None]:
    """('http://host/folder/', what follows its last '/', the Authorization that user and password make, if any).

    Raises: UsageError.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if not parts.hostname or port == -1 or parts.query or parts.fragment:
        raise UsageError("an http source is http(s)://[user:password@]host[:port]/folder/, without '?' or '#'")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    folder, _, name = path.rpartition("/")
    authority = host if port is None else f"{host}:{port}"
    authorization = None if parts.username is None else basic_authorization(parts.username, parts.password)
    return f"{parts.scheme}://{authority}{folder}/", name, authorization


def error_of(reply: Reply, where: str) -> MfsError:
    """Our error for an answer that is neither 200 nor 206."""
    match reply.status:
        case 401:
            return AccessError(f"{where}: wants a user and a password; put them into the URL or into ~/.netrc")
        case 403 | 407:
            return AccessError(f"{where}: status {reply.status}: the server refuses this; check its configuration")
        case 404 | 410:
            return NotFoundError(f"{where}: status {reply.status}: not there (any more)")
        case 412:
            return ChangedError(f"{where}: replaced since it was listed; refresh to see the new version")
        case 416:
            return ChangedError(f"{where}: shorter than when it was listed; refresh to see the new version")
        case status if status in TRANSIENT_STATUSES:
            return TransientStoreError(f"{where}: status {status}", retry_after_s=wished_pause_s(reply.headers))
        case status:
            return StoreError(f"{where}: unexpected status {status}")


def _netrc_authorization(host: str) -> str | None:
    """Basic credentials from ~/.netrc, or the file that NETRC names, as for curl and requests; else None."""
    named = os.environ.get("NETRC")
    try:
        found = netrc.netrc(named or None).authenticators(host)
    except FileNotFoundError:
        return None
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as e:
        log.warning("%s is not used: %s", named or "~/.netrc", e)
        return None
    return basic_authorization(quote(found[0]), quote(found[2] or "")) if found else None
