"""Following redirects without carrying credentials to strangers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urljoin

from mfs.errors import StoreError
from mfs.fetch.transport import Reply, parse_target

HOPS_MAX = 5
"""Redirects followed for one request."""

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})


class Hop(NamedTuple):
    """An address, and whether all on the way to it belonged to the origin we started from."""

    url: str
    is_home: bool = True
    """Credentials may be sent: never again once another host was in between."""


def next_hop(hop: Hop, reply: Reply) -> Hop | None:
    """Where a reply redirects to, or None if it does not. Raises: StoreError if it does not say where."""
    if reply.status not in REDIRECT_STATUSES:
        return None
    origin = parse_target(hop.url)
    location = reply.headers.get("Location")
    if not location:
        raise StoreError(f"{origin.shown}: status {reply.status} redirects to nowhere: no Location")
    url = urljoin(hop.url, location)
    return Hop(url, hop.is_home and parse_target(url).origin == origin.origin)


def follow(hop: Hop, send: Callable[[Hop], Reply]) -> tuple[Reply, Hop]:
    """Send, and send again to wherever the replies redirect; the last reply and who gave it.

    send: adds credentials only where `hop.is_home`. Its errors pass unchanged.
    Raises: StoreError after HOPS_MAX redirects.
    """
    for _ in range(HOPS_MAX + 1):
        reply = send(hop)
        following = next_hop(hop, reply)
        if following is None:
            return reply, hop
        hop = following
    raise StoreError(f"{parse_target(hop.url).shown}: more than {HOPS_MAX} redirects")
