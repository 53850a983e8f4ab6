"""Models in a folder of a web server: `http(s)://host/path/`, with nginx's JSON index or a manifest.

Version: the manifest's etag or sha256, else modification time (seconds) and size. With every range goes If-Match or
If-Unmodified-Since, and the answer's ETag, Last-Modified and total size are compared as well.
Requests for a first listing: one per directory, looked at when needed; with a manifest two, for the whole tree, or one
where the URL names the manifest.

Traps: a file rewritten within the same second and with equal size is not noticed by time and size; publish by rename
with a new time, or write a manifest with sha256. An entry with sha256 alone is not bound at the server, only by size,
and by whoever verifies the digest. Servers must do ranges. Format of the manifest: `mfs.sources.http_listing`.
"""

from __future__ import annotations

import logging
import netrc
import threading
from collections.abc import Iterator, Mapping
from urllib.parse import quote, unquote, urlsplit

from mfs.errors import (
    AccessError,
    ChangedError,
    MfsError,
    NotFoundError,
    StoreError,
    TransientStoreError,
    UsageError,
)
from mfs.fetch.environment import basic_authorization
from mfs.fetch.redirects import Hop, follow
from mfs.fetch.retry import TRANSIENT_STATUSES, wished_pause_s, with_retries
from mfs.fetch.transport import Reply, Transport, parse_target
from mfs.sources.base import Page
from mfs.sources.http_listing import MANIFEST_NAME, add_autoindex, add_manifest, is_autoindex
from mfs.sources.options import SourceOptions
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, ObjectId

log = logging.getLogger(__name__)

WARM_CONNECTIONS = 3
"""Opened beside the first listing, so that the first reads find them ready."""


class HttpSource:
    """One folder. Thread-safe."""

    def __init__(
        self, folder_url: str, manifest: str | None, authorization: str | None, options: SourceOptions
    ) -> None:
        """folder_url: percent-encoded, ending in '/', without userinfo. manifest: its name, if the user named one."""
        self.identity = folder_url
        self._folder_url = folder_url
        self._manifest = manifest
        self._authorization = authorization
        self._transport = Transport(connections_max=options.connections_max)
        self._closed = threading.Event()
        self._is_warm = False

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield one directory, or with a manifest all of it at once; see `Source.list`."""
        if not self._is_warm:
            self._is_warm = True
            self._transport.preconnect(self._folder_url, WARM_CONNECTIONS, deadline_s=deadline_s)
        if self._manifest:
            yield from self._manifest_pages(self._manifest, path, deadline_s)
            return
        url = self._url(f"{path}/" if path else "")
        where = parse_target(url).shown
        reply = self._get(url, deadline_s)
        if reply.status == 200 and is_autoindex(reply.body):
            tree = TreeBuilder(where, path)
            names = add_autoindex(tree, reply.body, where)
            if not path and MANIFEST_NAME in names:
                yield from self._adopt_manifest(deadline_s)
            else:
                yield from tree.pages()
            return
        if not path and reply.status in (200, 403, 404):
            try:
                yield from self._adopt_manifest(deadline_s)
                return
            except (NotFoundError, AccessError):
                pass  # then what the folder itself answered is the news
        raise _listing_error(reply, where)

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Fill `out` from exactly this version; see `Source.get_range`."""
        url = self._url(obj.path)
        where = parse_target(url).shown
        condition, _, value = obj.locator.partition(": ")
        headers = {condition: value} if condition.startswith("If-") else {}

        def send(hop: Hop) -> Reply:
            return self._transport.read_range(
                hop.url, span, out=out, size=obj.size, headers=self._headers(hop, headers), deadline_s=deadline_s
            )

        def attempt() -> None:
            reply, _ = follow(Hop(url), send)
            if reply.status not in (200, 206):
                raise _error_of(reply, where)
            _check_version(reply, condition, value, where)

        if not span:
            return
        what = f"{where}: bytes {span.start}-{span.stop}"
        with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self._closed)

    def close(self) -> None:
        """Drop connections; see `Source.close`."""
        self._closed.set()
        self._transport.close()

    def _adopt_manifest(self, deadline_s: float) -> Iterator[Page]:
        """The pages of the manifest in the folder, which is asked first from now on. Raises: NotFoundError if none."""
        pages = list(self._manifest_pages(MANIFEST_NAME, "", deadline_s))
        self._manifest = MANIFEST_NAME
        return iter(pages)

    def _manifest_pages(self, name: str, path: str, deadline_s: float) -> Iterator[Page]:
        url = self._url(name)
        where = parse_target(url).shown
        reply = self._get(url, deadline_s)
        if reply.status != 200:
            raise _error_of(reply, where)
        tree = TreeBuilder(where, "")
        add_manifest(tree, reply.body, where)
        pages = [page for page in tree.pages() if not path or page[0] == path or page[0].startswith(f"{path}/")]
        if not pages:
            raise NotFoundError(f"{where}: names nothing below {path!r}")
        yield from pages

    def _get(self, url: str, deadline_s: float) -> Reply:
        """A small answer, whatever its status unless that is transient."""

        def send(hop: Hop) -> Reply:
            return self._transport.request(hop.url, headers=self._headers(hop, {}), deadline_s=deadline_s)

        def attempt() -> Reply:
            reply, _ = follow(Hop(url), send)
            if reply.status in TRANSIENT_STATUSES:
                raise _error_of(reply, parse_target(url).shown)
            return reply

        what = f"listing {parse_target(url).shown}"
        return with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self._closed)

    def _headers(self, hop: Hop, headers: Mapping[str, str]) -> dict[str, str]:
        if self._authorization and hop.is_home:
            return {**headers, "Authorization": self._authorization}
        return dict(headers)

    def _url(self, path: str) -> str:
        return self._folder_url + quote(path, safe="/-_.~")


def _check_version(reply: Reply, condition: str, value: str, where: str) -> None:
    """That the answer is of the version asked for, should the server have ignored the condition."""
    name = "Last-Modified" if condition == "If-Unmodified-Since" else "ETag"
    said = reply.headers.get(name)
    if condition and said and said.strip() != value:
        raise ChangedError(f"{where}: expected {name} {value}, got {said.strip()}; refresh to see the new version")


def _error_of(reply: Reply, where: str) -> MfsError:
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


def _listing_error(reply: Reply, where: str) -> MfsError:
    wish = f"expected nginx's JSON index (autoindex on; autoindex_format json;) or {MANIFEST_NAME} in the folder"
    if reply.status == 200:
        kind = reply.headers.get("Content-Type", "something else")
        return StoreError(f"{where}: {wish}; got {kind}")
    error = _error_of(reply, where)
    return AccessError(f"{error}; {wish}") if reply.status == 403 else error


def open_url(url: str, options: SourceOptions) -> HttpSource:
    """The folder, or the manifest, that an http(s) URL names. Raises: UsageError."""
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
    manifest = unquote(name) if name.endswith(".json") else None
    if not manifest and name:
        folder = path
    authority = host if port is None else f"{host}:{port}"
    authorization = _authorization(parts.username, parts.password, parts.hostname)
    return HttpSource(f"{parts.scheme}://{authority}{folder}/", manifest, authorization, options)


def _authorization(username: str | None, password: str | None, host: str) -> str | None:
    """Basic credentials from the URL, else from ~/.netrc, else None."""
    if username is not None:
        return basic_authorization(username, password)
    try:
        found = netrc.netrc().authenticators(host)
    except FileNotFoundError:
        return None
    except (netrc.NetrcParseError, OSError) as e:
        log.warning("~/.netrc is not used: %s", e)
        return None
    return basic_authorization(quote(found[0]), quote(found[2] or "")) if found else None
