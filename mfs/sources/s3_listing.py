"""The pages of an S3 listing, followed to their end: what sources and registries share of ListObjects."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from mfs.fetch.dates import epoch_s
from mfs.fetch.retry import with_retries
from mfs.fetch.transport import Transport
from mfs.sources.paging import Trail
from mfs.sources.s3_access import S3Access
from mfs.sources.s3_again import ask
from mfs.sources.s3_answers import ListingPage, error_of, parse_listing

KEYS_PER_PAGE = 1000
"""The most that S3 gives in one page."""


class S3Listing:
    """Lists one bucket. Thread-safe."""

    def __init__(self, access: S3Access, transport: Transport, closed: threading.Event) -> None:
        """closed: ends what is being tried again."""
        self._access = access
        self._transport = transport
        self._closed = closed

    def pages(self, query: dict[str, str], where: str, deadline_s: float) -> Iterator[ListingPage]:
        """All pages of a query. Raises: AccessError, NotFoundError, StoreError, also for one that does not end well."""
        trail = Trail(where)
        following: dict[str, str] | None = {}
        while following is not None:
            trail.ask(str(following))
            page = self.page({**query, **following}, where, deadline_s)
            trail.see((*(key for key, _ in page.files), *page.prefixes))
            yield page
            following = page.following or None

    def page(self, query: dict[str, str], where: str, deadline_s: float) -> ListingPage:
        """One page; the first, if the query does not say what it goes on from."""
        query = {"encoding-type": "url", "max-keys": str(KEYS_PER_PAGE), **query}
        if "marker" not in query:  # ListObjects' own word: whoever gave us one knows no version 2
            query["list-type"] = "2"

        def attempt() -> ListingPage:
            reply = ask(
                self._access,
                self._transport,
                lambda: self._access.listing_url(query),
                lambda url, headers: self._transport.request(url, headers=headers, deadline_s=deadline_s),
                deadline_s=deadline_s,
            )
            if reply.status != 200:
                raise error_of(reply, where, self._access.region)
            return parse_listing(reply.body, where, answered_s=epoch_s(reply.headers.get("Date", "")))

        return with_retries(attempt, what=f"listing {where}", deadline_s=deadline_s, stopped=self._closed)
