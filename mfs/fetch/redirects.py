"""Following redirects without carrying credentials to strangers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, urljoin

from mfs.errors import StoreError
from mfs.fetch.connections import Origin
from mfs.fetch.transport import Reply, parse_target

HOPS_MAX = 10
"""Redirects followed for one request; as many as Go's client, and half of what the fetch standard asks of browsers."""

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})

_LEGAL = "%:/?#[]@!$&'()*+,;=-._~"
"""What may stand in an address beside letters and digits. Source: RFC 3986 §2."""


class Hop(NamedTuple):
    """An address, and what is known of the way that led to it."""

    url: str
    is_home: bool = True
    """Whether all on the way belonged to the origin we started from: only then may credentials be sent."""
    began_plain: bool = False
    """Whether the way began at an http address, or passed one."""


Settle = Callable[[str], str]
"""The address to use for one that a reply names. Raises: StoreError for one that must not be used."""


def next_hop(hop: Hop, reply: Reply, settle: Settle = str) -> Hop | None:
    """Where a reply redirects to, or None if it does not.

    Raises: StoreError if it does not say where, or leads from https to http: what was asked of a server that proves
    who it is, and so that nobody reads along, is not taken from whoever stands on the way. What began at http may go
    on there.
    """
    if reply.status not in REDIRECT_STATUSES:
        return None
    origin = parse_target(hop.url)
    location = reply.headers.get("Location")
    if not location:
        raise StoreError(f"{origin.shown}: status {reply.status} redirects to nowhere: no Location")
    url = settle(urljoin(hop.url, _encoded(location)))
    there = parse_target(url).origin
    began_plain = hop.began_plain or origin.origin.scheme == "http"
    if there.scheme == "http" and not began_plain:
        raise StoreError(
            f"{origin.shown}: redirects from https to {there}: nothing is sent there; the server must redirect to https"
        )
    return Hop(url, hop.is_home and _is_same(origin.origin, there), began_plain)


def _encoded(location: str) -> str:
    """A Location as it should have been written: some servers leave blanks and letters beyond ASCII as they are.

    Its bytes were read as Latin-1. What is encoded stays so.
    """
    return quote(location.strip().encode("latin-1"), safe=_LEGAL)


def _is_same(origin: Origin, other: Origin) -> bool:
    """Whether they are one server: the same, or its https instead of its http, as requests and httpx see it."""
    return other == origin or (origin.scheme == "http" and origin.port == 80 and other == ("https", origin.host, 443))


def follow(
    hop: Hop, send: Callable[[Hop], Reply], settle: Settle = str, *, is_home_only: bool = False
) -> tuple[Reply, Hop]:
    """Send, and send again to wherever the replies redirect; the last reply and who gave it.

    send: adds credentials only where `hop.is_home`. Its errors, and those of `settle`, pass unchanged.
    is_home_only: a redirect that leads to another host is the last reply.
    Raises: StoreError after HOPS_MAX redirects.
    """
    for _ in range(HOPS_MAX + 1):
        reply = send(hop)
        following = next_hop(hop, reply, settle)
        if following is None or (is_home_only and not following.is_home):
            return reply, hop
        hop = following
    raise StoreError(f"{parse_target(hop.url).shown}: more than {HOPS_MAX} redirects")
