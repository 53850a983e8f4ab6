"""A registry on a web server, read only: `mfs+https://host/registry`, a folder with nginx's JSON index.

What was pushed to a folder, or copied out of a bucket, can be given to readers by any server that does ranges and lists
its directories so. What is read needs no binding to a version: chunks and manifests are proven by
their names, and moves of tags never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mfs.errors import AccessError, NotFoundError, StoreError
from mfs.fetch.redirects import Hop
from mfs.fetch.retry import Rest, with_retries
from mfs.fetch.route import Shared, proves_itself
from mfs.fetch.transport import Reply, parse_target
from mfs.registry.layout import is_key
from mfs.registry.store import SMALL_BYTES_MAX, Stored
from mfs.sources.http_access import HttpAccess, error_of, parse_http_url
from mfs.sources.http_listing import add_autoindex, is_autoindex
from mfs.sources.options import SourceOptions
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, Entry, EntryKind


class WebStore:
    """One folder of a web server; see `registry.store.Store`. Thread-safe."""

    can_write = False

    def __init__(self, folder_url: str, authorization: str | None, options: SourceOptions) -> None:
        """As `HttpAccess`."""
        self._access = HttpAccess(folder_url, authorization, options)
        self.identity = f"mfs+{folder_url.rstrip('/')}"

    def read(self, key: str, *, bytes_max: int = SMALL_BYTES_MAX, deadline_s: float) -> bytes:
        """A small object, whole; see `Store.read`."""

        def send(hop: Hop) -> Reply:
            return self._access.transport.request(
                hop.url, headers=self._access.headers(hop, {}), body_bytes_max=bytes_max, deadline_s=deadline_s
            )

        return self._asked(key, send, deadline_s).body

    def read_range(self, key: str, span: ByteRange, *, size: int, out: memoryview, deadline_s: float) -> None:
        """Fill `out` with a range of an object; see `Store.read_range`."""

        name = self._named(key, size)
        rest = Rest(span, out)

        def send(hop: Hop) -> Reply:
            return rest.take(lambda part, view: self._access.route.read_range(
                hop.url, part, out=view, size=size, headers=self._access.headers(hop, {}),
                shared=Shared(name, hop.url, {}, proves_itself) if self._access.is_open(hop) else None,
                deadline_s=deadline_s,
            ))  # fmt: skip

        if span:
            self._asked(key, send, deadline_s)

    def size(self, key: str, *, deadline_s: float) -> int | None:
        """Bytes of an object, None if there is none; see `Store.size`."""

        def send(hop: Hop) -> Reply:
            headers = self._access.headers(hop, {})
            return self._access.transport.request(hop.url, method="HEAD", headers=headers, deadline_s=deadline_s)

        try:
            said = self._asked(key, send, deadline_s).headers.get("Content-Length", "")
        except NotFoundError:
            return None
        if not said.isdecimal():
            raise StoreError(f"{self._shown(key)}: the server does not say how long it is")
        return int(said)

    def doubt(self, key: str) -> None:
        """Ask no cache for an object, for a while; see `Store.doubt`."""
        self._access.route.doubt(self._access.url(key))

    def list(self, prefix: str, *, deadline_s: float) -> Iterator[Stored]:
        """Every object below `prefix`; see `Store.list`. A request for each directory."""
        for entry in self._entries(prefix, deadline_s):
            if entry.kind is EntryKind.DIRECTORY:
                yield from self.list(f"{prefix}{entry.name}/", deadline_s=deadline_s)
            else:
                yield Stored(prefix + entry.name, entry.size, entry.mtime_ns)

    def names(self, prefix: str, *, deadline_s: float) -> Iterator[str]:
        """The first components below `prefix`; see `Store.names`. A directory without objects has a name here."""
        yield from (entry.name for entry in self._entries(prefix, deadline_s))

    def create(self, key: str, body: bytes, *, deadline_s: float) -> bool:
        """Raises: AccessError."""
        raise self._only_read()

    def write(self, key: str, body: bytes | memoryview, *, deadline_s: float) -> None:
        """Raises: AccessError."""
        raise self._only_read()

    def delete(self, keys: Iterable[str], *, deadline_s: float) -> None:
        """Raises: AccessError."""
        raise self._only_read()

    def is_conditional(self, *, deadline_s: float) -> bool:
        """False: nothing is written here."""
        return False

    def close(self) -> None:
        """Drop connections; see `Store.close`."""
        self._access.close()

    def _only_read(self) -> AccessError:
        return AccessError(f"{self.identity}: a registry on the web is only read; name the store behind it")

    def _named(self, key: str, size: int) -> str:
        return f"{self.identity}/{key}:{size}"

    def _shown(self, key: str) -> str:
        return parse_target(self._access.url(key)).shown

    def _asked(self, key: str, send: Callable[[Hop], Reply], deadline_s: float) -> Reply:
        """The answer of an object, tried again as it takes. Raises: as `error_of`."""
        if not is_key(key):
            raise NotFoundError(f"{self.identity}: {key!r:.200} is no key of a registry")
        where = self._shown(key)

        def attempt() -> Reply:
            asked: list[str] = []

            def sent(hop: Hop) -> Reply:
                asked.append(hop.url)
                return send(hop)

            reply = self._access.follow(self._access.url(key), sent)
            if parse_target(asked[-1]).request_target.endswith("/"):
                raise NotFoundError(f"{where}: a directory")
            if reply.status not in (200, 206):
                raise error_of(reply, where)
            return reply

        return with_retries(attempt, what=where, deadline_s=deadline_s, stopped=self._access.closed)

    def _entries(self, prefix: str, deadline_s: float) -> Sequence[Entry]:
        """One directory, in the order of keys; empty where there is none."""
        if prefix and not is_key(prefix[:-1]):
            return []
        where = self._shown(prefix)
        reply = self._access.get(self._access.url(prefix), deadline_s)
        if reply.status == 404:
            return []
        if reply.status != 200:
            raise error_of(reply, where)
        if not is_autoindex(reply.body):
            raise StoreError(f"{where}: expected nginx's JSON index (autoindex on; autoindex_format json;), got "
                             f"{reply.headers.get('Content-Type', 'something else')}")  # fmt: skip
        tree = TreeBuilder(where, "")
        add_autoindex(tree, reply.body, where)
        entries = [entry for path, its in tree.pages() if not path for entry in its if is_key(entry.name)]
        return sorted(entries, key=lambda e: f"{e.name}/" if e.kind is EntryKind.DIRECTORY else e.name)


def open_place(place: str, options: SourceOptions) -> WebStore:
    """The store at http(s)://host/folder. Raises: UsageError."""
    folder_url, _, authorization = parse_http_url(f"{place.rstrip('/')}/")
    return WebStore(folder_url, authorization, options)
