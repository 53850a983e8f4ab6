"""A listing in pages comes to an end, or is an error: never a loop, never a part shown as the whole."""

from __future__ import annotations

from collections.abc import Hashable

from mfs.errors import StoreError

PAGES_MAX = 10_000
"""Of one listing: ten million names, where a page holds a thousand as everywhere."""


class Trail:
    """What was seen of one listing. One thread only."""

    def __init__(self, where: str) -> None:
        """where: names the listing in errors."""
        self._where = where
        self._asked: set[str] = set()
        self._contents: set[int] = set()

    def ask(self, page: str) -> None:
        """Before a page is asked for by its address or token. Raises: StoreError if it was asked for before, or is
        one too many.
        """
        if page in self._asked:
            raise StoreError(f"{self._where}: the listing goes in circles: a page names one before it as the next")
        if len(self._asked) >= PAGES_MAX:
            raise StoreError(f"{self._where}: the listing does not end: more than {PAGES_MAX:,} pages")
        self._asked.add(page)

    def see(self, content: Hashable) -> None:
        """After a page came; an empty one (false) may come again. Raises: StoreError if it is one seen before."""
        if not content:
            return
        if hash(content) in self._contents:
            raise StoreError(f"{self._where}: the listing goes in circles: the same page came twice")
        self._contents.add(hash(content))
