"""Models in an S3 bucket: `s3://bucket/prefix`, at AWS or any endpoint.

Version: the ETag, sent as If-Match with every range, so a replaced object is never mixed with its successor.
Requests for a first listing: one, if at most 1000 keys lie below the prefix: then every directory comes at once.
Otherwise one more per 1000 names of a directory, each directory when it is looked at.

Traps: a multipart ETag is no digest of the content; equal bytes uploaded in other parts are another version, and cost a
refetch. An overwrite with equal bytes keeps the ETag and stays the same version, which is right. Stores that ignore
If-Match are caught by the ETag of the answer. Keys with empty, '.' or '..' parts have no place in a tree.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from mfs.errors import ChangedError, NotFoundError, StoreError
from mfs.fetch.retry import with_retries
from mfs.fetch.transport import Reply, Transport
from mfs.sources.base import Page
from mfs.sources.options import SourceOptions
from mfs.sources.s3_access import S3Access, parse_s3_url
from mfs.sources.s3_answers import ListingPage, error_of, parse_listing, region_hint
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange, ObjectId

WARM_CONNECTIONS = 3
"""Opened beside the first listing, so that the first reads find them ready and save a handshake's round trips."""


KEYS_PER_PAGE = 1000
"""The most that S3 gives in one page."""


class S3Source:
    """One prefix of one bucket. Listing and data share a transport. Thread-safe."""

    def __init__(self, bucket: str, prefix: str, options: SourceOptions) -> None:
        """prefix: '' or ending in '/'. Raises: ConfigError if the AWS configuration cannot work."""
        self._access = S3Access(bucket, options)
        self._prefix = prefix
        self._transport = Transport(connections_max=options.connections_max)
        self._closed = threading.Event()
        self._is_warm = False
        self.identity = f"s3://{bucket}/{prefix}".rstrip("/")
        if self._access.endpoint:
            self.identity += f"@{self._access.endpoint}"

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Yield one directory, and all below it where one request says it all; see `Source.list`."""
        if not self._is_warm:
            self._is_warm = True
            self._transport.preconnect(self._access.object_url(""), WARM_CONNECTIONS, deadline_s=deadline_s)
        prefix = f"{self._prefix}{path}/" if path else self._prefix
        where = f"s3://{self._access.bucket}/{prefix}"
        tree = TreeBuilder(where, path)
        has_any = False
        for page in self._pages(prefix, where, deadline_s):
            has_any = has_any or bool(page.files or page.prefixes)
            _add(tree, page, prefix)
        if prefix and not has_any:
            raise NotFoundError(f"{where}: no keys with this prefix; check the path")
        yield from tree.pages()

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Fill `out` from exactly this version; see `Source.get_range`."""
        where = f"s3://{self._access.bucket}/{self._prefix}{obj.path}"

        def attempt() -> None:
            reply = self._read(obj, span, out, deadline_s)
            if reply.status not in (200, 206):
                raise error_of(reply, where, self._access.region)
            etag = reply.headers.get("ETag")
            if etag and etag.strip().removeprefix("W/").strip('"') != obj.version:
                raise ChangedError(
                    f"{where}: expected ETag {obj.version}, got {etag.strip()}: the store ignores If-Match"
                )

        what = f"{where}: bytes {span.start}-{span.stop}"
        with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self._closed)

    def close(self) -> None:
        """Drop connections; see `Source.close`."""
        self._closed.set()
        self._transport.close()

    def _read(self, obj: ObjectId, span: ByteRange, out: memoryview, deadline_s: float) -> Reply:
        """A range GET; once more where the bucket really is, if the first answer says so."""
        for _ in range(2):
            url = self._access.object_url(self._prefix + obj.path)
            headers = {**self._access.headers(url), "If-Match": f'"{obj.version}"'}
            reply = self._transport.read_range(
                url, span, out=out, size=obj.size, headers=headers, deadline_s=deadline_s
            )
            if not self._moved_region(reply):
                break
        return reply

    def _pages(self, prefix: str, where: str, deadline_s: float) -> Iterator[ListingPage]:
        """The pages that together say what is in a directory: one flat page if it says all, else page by page."""
        flat = self._page({"prefix": prefix}, where, deadline_s)
        if flat.next_token is None:
            yield flat
            return
        token: str | None = ""
        while token is not None:
            query = {"prefix": prefix, "delimiter": "/"}
            if token:
                query["continuation-token"] = token
            page = self._page(query, where, deadline_s)
            yield page
            if page.next_token == token:
                raise StoreError(f"{where}: the listing goes in circles: the same continuation token came twice")
            token = page.next_token

    def _page(self, query: dict[str, str], where: str, deadline_s: float) -> ListingPage:
        query = {"list-type": "2", "encoding-type": "url", "max-keys": str(KEYS_PER_PAGE), **query}

        def attempt() -> ListingPage:
            for _ in range(2):
                url = self._access.listing_url(query)
                reply = self._transport.request(url, headers=self._access.headers(url), deadline_s=deadline_s)
                if not self._moved_region(reply):
                    break
            if reply.status != 200:
                raise error_of(reply, where, self._access.region)
            return parse_listing(reply.body, where)

        return with_retries(attempt, what=f"listing {where}", deadline_s=deadline_s, stopped=self._closed)

    def _moved_region(self, reply: Reply) -> bool:
        """Whether the answer named another region, which is used from now on."""
        region = region_hint(reply)
        if not region or region == self._access.region:
            return False
        self._access.region = region
        return True


def _add(tree: TreeBuilder, page: ListingPage, prefix: str) -> None:
    """Put a page into the tree. A marker key 'a/' says that the directory exists, and is no file."""
    for key, entry in page.files:
        name = key.removeprefix(prefix)
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
