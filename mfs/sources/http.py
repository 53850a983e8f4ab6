"""Models in a folder of a web server: `http(s)://host/path/`, with nginx's JSON index or a manifest.

Version: the manifest's etag or sha256, else modification time (seconds) and size. With every range goes If-Match or
If-Unmodified-Since, and the answer's ETag, Last-Modified and total size are compared as well: `mfs.sources.binding`.
Requests for a first listing: one per directory, looked at when needed; with a manifest two, for the whole tree, or one
where the URL names the manifest; and a HEAD for each file of which the manifest states neither etag nor mtime.

Traps: a file rewritten within the same second and with equal size is not noticed by time and size; publish by rename
with a new time, or write a manifest with etags. What neither the manifest nor the server can date is not read.
Servers must do ranges. Format of the manifest: `mfs.sources.http_listing`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

from mfs.errors import (
    AccessError,
    MfsError,
    NotFoundError,
    StoreError,
)
from mfs.fetch.dates import epoch_s
from mfs.fetch.redirects import Hop
from mfs.fetch.retry import Rest, with_retries
from mfs.fetch.route import Shared
from mfs.fetch.transport import Reply, parse_target
from mfs.fetch.validators import opaque_of
from mfs.sources.base import Page
from mfs.sources.binding import Binder, Check, binding_of, locator_of
from mfs.sources.http_access import HttpAccess, error_of, parse_http_url
from mfs.sources.http_listing import MANIFEST_NAME, add_autoindex, add_manifest, is_autoindex
from mfs.sources.options import SourceOptions
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, Entry, EntryKind, ObjectId

log = logging.getLogger(__name__)

WARM_CONNECTIONS = 3
"""Opened once the first listing has come, so that the first reads find them ready."""

ASKED_MAX = 10_000
"""Files of one manifest whose validators are asked of the server; what goes beyond is not read."""

ASKED_PARALLEL = 8
"""HEAD requests under way at once."""


class HttpSource:
    """One folder. Thread-safe."""

    def __init__(
        self, folder_url: str, manifest: str | None, authorization: str | None, options: SourceOptions
    ) -> None:
        """folder_url: percent-encoded, ending in '/', without userinfo. manifest: its name, if the user named one.
        authorization: None for what ~/.netrc says, now and whenever that is refused.
        """
        self.identity = folder_url
        self._manifest = manifest
        self._access = HttpAccess(folder_url, authorization, options)
        self._binder = Binder(
            trusts_dates=True, advice="write etag or mtime into the manifest, and let the server send them too"
        )
        self._is_warm = False

    @property
    def address(self) -> str:
        """The folder; see `Source.address`."""
        return self.identity

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield one directory, or with a manifest all of it at once; see `Source.list`."""
        if self._manifest:
            yield from self._manifest_pages(self._manifest, path, deadline_s)
            return
        url = self._access.url(f"{path}/" if path else "")
        where = parse_target(url).shown
        reply = self._access.get(url, deadline_s)
        self._warm(deadline_s)
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
        url = self._access.url(obj.path)
        where = parse_target(url).shown
        binding = binding_of(obj.locator)

        def send(part: ByteRange, view: memoryview, condition: dict[str, str], check: Check | None) -> Reply:
            def send_to(hop: Hop) -> Reply:
                may_share = check is not None and self._access.is_open(hop)
                return self._access.route.read_range(
                    hop.url, part, out=view, size=obj.size, headers=self._access.headers(hop, condition), check=check,
                    shared=Shared(obj.cache_id, hop.url, condition, binding.is_said_by) if may_share else None,
                    deadline_s=deadline_s,
                )  # fmt: skip

            return self._access.follow(url, send_to)

        rest = Rest(span, out, is_exact=True)

        def attempt() -> None:
            reply = rest.take(lambda part, view: self._binder.read(binding, part, view, send, where))
            if reply.status not in (200, 206):
                raise error_of(reply, where)

        if not span:
            return
        what = f"{where}: bytes {span.start}-{span.stop}"
        with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self._access.closed)

    def close(self) -> None:
        """Drop connections; see `Source.close`."""
        self._access.close()

    def _warm(self, deadline_s: float) -> None:
        """Open the connections of the first reads, once, if the server keeps any: one that serves a connection at a
        time, as simple ones do, would wait on an idle one while what we ask of it stands behind.
        """
        transport = self._access.transport
        if not self._is_warm and transport.keeps(self.identity):
            self._is_warm = True
            transport.preconnect(self.identity, WARM_CONNECTIONS, deadline_s=deadline_s)

    def _adopt_manifest(self, deadline_s: float) -> Iterator[Page]:
        """The pages of the manifest in the folder, which is asked first from now on. Raises: NotFoundError if none."""
        pages = list(self._manifest_pages(MANIFEST_NAME, "", deadline_s))
        self._manifest = MANIFEST_NAME
        return iter(pages)

    def _manifest_pages(self, name: str, path: str, deadline_s: float) -> Iterator[Page]:
        url = self._access.url(name)
        where = parse_target(url).shown
        reply = self._access.get(url, deadline_s)
        self._warm(deadline_s)
        if reply.status != 200:
            raise error_of(reply, where)
        tree = TreeBuilder(where, "")
        add_manifest(tree, reply.body, where)
        pages = [page for page in tree.pages() if not path or page[0] == path or page[0].startswith(f"{path}/")]
        if not pages:
            raise NotFoundError(f"{where}: names nothing below {path!r}")
        self._ask_for_validators(pages, where, deadline_s)
        yield from pages

    def _ask_for_validators(self, pages: Sequence[Page], where: str, deadline_s: float) -> None:
        """Bind the files of which a manifest states neither etag nor mtime by what the server says of them now."""
        unbound = [(folder, entries, index) for folder, entries in pages for index, entry in enumerate(entries)
                   if entry.kind is EntryKind.FILE and not entry.locator]  # fmt: skip
        half_s = (time.monotonic() + deadline_s) / 2  # a file that does not answer costs itself, not the listing

        def ask(item: tuple[str, list[Entry], int]) -> bool:
            folder, entries, index = item
            entry = entries[index]
            url = self._access.url(f"{folder}/{entry.name}" if folder else entry.name)
            try:
                entries[index] = _bound(entry, self._access.get(url, half_s, method="HEAD"))
            except MfsError:
                pass  # counted below
            return bool(entries[index].locator)

        with ThreadPoolExecutor(ASKED_PARALLEL) as pool:
            bound_count = sum(pool.map(ask, unbound[:ASKED_MAX]))
        if bound_count < len(unbound):
            log.warning("%s: states neither etag nor mtime of %d files, nor does the server (of %d at most it was "
                        "asked): they are not read, since nothing would tell that they were replaced",
                        where, len(unbound) - bound_count, ASKED_MAX)  # fmt: skip


def _bound(entry: Entry, reply: Reply) -> Entry:
    """A manifest's entry, bound by what the server says of the file; unbound if it says nothing."""
    etag, seconds = reply.headers.get("ETag", ""), epoch_s(reply.headers.get("Last-Modified", ""))
    locator = locator_of(etag, None if seconds is None else seconds * 1_000_000_000)
    if reply.status != 200 or not locator:
        return entry
    version = f'"{opaque_of(etag)}"' if opaque_of(etag) else f"{seconds}-{entry.size}"
    mtime_ns = entry.mtime_ns or max(0, seconds or 0) * 1_000_000_000
    return entry._replace(version=entry.digest or version, mtime_ns=mtime_ns, locator=locator)


def _listing_error(reply: Reply, where: str) -> MfsError:
    wish = f"expected nginx's JSON index (autoindex on; autoindex_format json;) or {MANIFEST_NAME} in the folder"
    if reply.status == 200:
        kind = reply.headers.get("Content-Type", "something else")
        return StoreError(f"{where}: {wish}; got {kind}")
    error = error_of(reply, where)
    return AccessError(f"{error}; {wish}") if reply.status == 403 else error


def open_url(url: str, options: SourceOptions) -> HttpSource:
    """The folder, or the manifest, that an http(s) URL names. Raises: UsageError."""
    folder_url, name, authorization = parse_http_url(url)
    manifest = unquote(name) if name.endswith(".json") else None
    if not manifest and name:
        folder_url = f"{folder_url}{name}/"
    return HttpSource(folder_url, manifest, authorization, options)
