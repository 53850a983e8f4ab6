"""Models in an S3 bucket: `s3://bucket/prefix`, at AWS or any endpoint.

Version: the ETag, sent as If-Match with every range, so a replaced object is never mixed with its successor. Of a
store that lists none (JuiceFS's gateway), Last-Modified and size: If-Unmodified-Since goes with every range, and the
store must have been seen to keep it. See `mfs.sources.binding`.
Requests for a first listing: one, if at most 1000 keys lie below the prefix: then every directory comes at once.
Otherwise one more per 1000 names of a directory, each directory when it is looked at.

Traps: a multipart ETag is no digest of the content; equal bytes uploaded in other parts are another version, and cost a
refetch. An overwrite with equal bytes keeps the ETag and stays the same version, which is right. Stores that ignore
If-Match are caught by the ETag of the answer. Without ETags two versions of one second and size look alike to a read:
what was written within the second of its listing is listed again a second later. Keys with empty, '.' or '..' parts
have no place in a tree.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from mfs.errors import NotFoundError
from mfs.fetch.retry import Rest, with_retries
from mfs.fetch.route import Route, Shared
from mfs.fetch.transport import Reply, Transport
from mfs.sources.base import Page
from mfs.sources.binding import Binder, Check, binding_of
from mfs.sources.options import SourceOptions
from mfs.sources.s3_access import S3Access, parse_s3_url
from mfs.sources.s3_again import ask
from mfs.sources.s3_answers import ListingPage, error_of
from mfs.sources.s3_listing import S3Listing
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, ObjectId

WARM_CONNECTIONS = 3
"""Opened beside the first listing, so that the first reads find them ready and save a handshake's round trips."""


SETTLE_S = 1.0
"""Pause before objects without ETag that were written within the second of their listing are listed again, once: what
replaces them from then on has another date."""


class S3Source:
    """One prefix of one bucket. Listing and data share a transport. Thread-safe."""

    def __init__(self, bucket: str, prefix: str, options: SourceOptions) -> None:
        """prefix: '' or ending in '/'. Raises: ConfigError if the AWS configuration cannot work."""
        self._access = S3Access(bucket, options)
        self._prefix = prefix
        self._transport = Transport(connections_max=options.connections_max, ca_bundle=self._access.ca_bundle)
        self._route = Route(self._transport, options.cache)
        self._closed = threading.Event()
        self._listing = S3Listing(self._access, self._transport, self._closed)
        self._binder = Binder(trusts_dates=False, advice="let the store give ETags (juicefs gateway --keep-etag, say)")
        self._is_warm = False
        self.identity = f"s3://{bucket}/{prefix}".rstrip("/")
        if self._access.endpoint:
            self.identity += f"@{self._access.endpoint}"

    @property
    def address(self) -> str:
        """The bucket; see `Source.address`. Raises: ConfigError where no region is known."""
        return self._access.object_url("")

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield one directory, and all below it where one request says it all; see `Source.list`."""
        if not self._is_warm:
            self._is_warm = True
            self._transport.preconnect(self._access.object_url(""), WARM_CONNECTIONS, deadline_s=deadline_s)
        prefix = f"{self._prefix}{path}/" if path else self._prefix
        where = f"s3://{self._access.bucket}/{prefix}"
        tree, is_settled = self._tree(prefix, path, where, deadline_s)
        if not is_settled and time.monotonic() + 2 * SETTLE_S < deadline_s:
            self._closed.wait(SETTLE_S)
            tree, _ = self._tree(prefix, path, where, deadline_s)
        yield from tree.pages()

    def _tree(self, prefix: str, path: str, where: str, deadline_s: float) -> tuple[TreeBuilder, bool]:
        """What lies below a prefix, and whether each version in it is told from all that may come."""
        tree = TreeBuilder(where, path)
        has_any, is_settled = False, True
        for page in self._pages(prefix, where, deadline_s):
            has_any = has_any or bool(page.files or page.prefixes)
            is_settled = is_settled and not page.has_unsettled
            _add(tree, page, prefix)
        if prefix and not has_any:
            raise NotFoundError(f"{where}: no keys with this prefix; check the path")
        return tree, is_settled

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Fill `out` from exactly this version; see `Source.get_range`."""
        where = f"s3://{self._access.bucket}/{self._prefix}{obj.path}"

        if not span:
            return
        binding = binding_of(obj.locator or f'If-Match: "{obj.version}"')

        def shared(url: str, condition: dict[str, str]) -> Shared:
            return Shared(obj.cache_id, self._access.presign(url), condition, binding.is_said_by)

        def send(part: ByteRange, view: memoryview, condition: dict[str, str], check: Check | None) -> Reply:
            may_share = self._route.is_shared and check is not None  # else it is the server that is asked about itself
            return ask(
                self._access,
                self._transport,
                lambda: self._access.object_url(self._prefix + obj.path),
                lambda url, headers: self._route.read_range(
                    url, part, out=view, size=obj.size, headers={**headers, **condition}, check=check,
                    shared=shared(url, condition) if may_share else None, deadline_s=deadline_s,
                ),
                deadline_s=deadline_s,
            )  # fmt: skip

        rest = Rest(span, out, is_exact=True)

        def attempt() -> None:
            reply = rest.take(lambda part, view: self._binder.read(binding, part, view, send, where))
            if reply.status not in (200, 206):
                raise error_of(reply, where, self._access.region)

        what = f"{where}: bytes {span.start}-{span.stop}"
        with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self._closed)

    def close(self) -> None:
        """Drop connections; see `Source.close`."""
        self._closed.set()
        self._route.close()
        self._transport.close()

    def _pages(self, prefix: str, where: str, deadline_s: float) -> Iterator[ListingPage]:
        """The pages that together say what is in a directory: one flat page if it says all, else page by page."""
        flat = self._listing.page({"prefix": prefix}, where, deadline_s)
        if not flat.following:
            yield flat
            return
        yield from self._listing.pages({"prefix": prefix, "delimiter": "/"}, where, deadline_s)


def _add(tree: TreeBuilder, page: ListingPage, prefix: str) -> None:
    """Put a page into the tree. A marker key 'a/' says that the directory exists, and is no file."""
    for key, entry in page.files:
        name = key.removeprefix(prefix)
        if key.endswith("/") and entry.size:
            tree.note(key, "content of a key that ends in '/', which no path leads to: the directory is served")
        if name.endswith("/"):
            tree.add_directory(name[:-1])
        elif name:  # the marker of the listed directory itself has none
            tree.add_file(name, entry)
    for inner in page.prefixes:
        tree.add_unlisted_directory(inner.removeprefix(prefix).removesuffix("/"))


def open_url(url: str, options: SourceOptions) -> S3Source:
    """The source that an s3:// URL names. Raises: UsageError, ConfigError."""
    bucket, prefix = parse_s3_url(url)
    return S3Source(bucket, prefix, options)
