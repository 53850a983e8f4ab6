"""The requests of the distribution API: manifests, tags, blobs by range. Thread-safe.

A blob's address is where the registry redirected to the last time (storage, signed for some minutes), until that
fails in any way or expires. Credentials go to the registry alone: never again once another host was in between. Where
the registry is https, nothing goes over plain http, wherever it redirects to.

Traps: docker-registry 2.8 announces the whole blob with a 416 or 412 and sends 33 bytes (`Transport` reads errors under
a time-out of their own). It knows no referrers.
Source: distribution-spec 1.1, "Pulling", "Content Discovery"; error codes: its "Error Codes".
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPMessage
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from mfs.errors import (
    AccessError,
    ChangedError,
    IntegrityError,
    MfsError,
    NotFoundError,
    StoreError,
    TransientStoreError,
)
from mfs.fetch.links import next_url
from mfs.fetch.redirects import REDIRECT_STATUSES, Hop, follow
from mfs.fetch.retry import TRANSIENT_STATUSES, wished_pause_s, with_retries
from mfs.fetch.route import Cache, Route, Shared
from mfs.fetch.transport import Reply, Transport, parse_target
from mfs.oci import media
from mfs.oci.artifact import MANIFEST_BYTES_MAX, check_digest, digest_of
from mfs.oci.auth import Authenticator, Scopes
from mfs.oci.reference import Reference, is_digest, is_tag
from mfs.sources.bounds import ENTRIES_MAX, parse_json
from mfs.sources.hf_access import expiry_s
from mfs.sources.paging import Trail
from mfs.types import ByteRange

T = TypeVar("T")

ADDRESSES_MAX = 4096
"""Of blobs, remembered; at the limit all are forgotten, which costs one request per blob in use."""
TAGS_PAGE = 1000

_CODE = re.compile(rb'"code"\s*:\s*"([A-Z_]{1,60})"')


class Document(NamedTuple):
    """A manifest or an index, as it stands."""

    body: bytes
    digest: str
    media_type: str


class _Address(NamedTuple):
    hop: Hop
    expires_s: float
    """time.time() value."""


class RegistryClient:
    """One repository of a registry."""

    def __init__(self, reference: Reference, *, connections_max: int = 32, cache: Cache | None = None) -> None:
        """cache: to ask for blobs."""
        self.reference = reference
        self.transport = Transport(connections_max=connections_max)
        self._route = Route(self.transport, cache)
        self.api = f"{reference.base_url}/v2/{reference.repository}"
        self.stopped = threading.Event()
        self.pull_scopes: Scopes = (f"repository:{reference.repository}:pull",)
        self._auth = Authenticator(reference.registry, reference.base_url, self.transport)
        self._addresses: dict[str, _Address] = {}
        self._guard = threading.Lock()

    def close(self) -> None:
        """Drop connections; requests under way end with StoreError."""
        self.stopped.set()
        self._route.close()
        self.transport.close()

    # -- reading

    def document(self, name: str, where: str, *, deadline_s: float) -> Document:
        """The manifest of a tag or digest, its bytes checked against its digest where that is known.

        Raises: NotFoundError, AccessError, IntegrityError, StoreError.
        """

        def attempt() -> Document:
            reply = self._get(f"{self.api}/manifests/{name}", where, deadline_s, {"Accept": media.ACCEPTED})
            stated = name if is_digest(name) else reply.headers.get("Docker-Content-Digest", "")
            if is_digest(stated):
                check_digest(reply.body, stated, where)
            media_type = reply.headers.get("Content-Type", "").partition(";")[0].strip()
            return Document(reply.body, stated if is_digest(stated) else digest_of(reply.body), media_type)

        return self.retried(attempt, f"the manifest of {where}", deadline_s)

    def digest_now(self, tag: str, where: str, *, deadline_s: float) -> str | None:
        """What a tag stands for now, None where the registry does not say, or knows no HEAD: `document` tells then.
        (Registries count GETs of manifests, and refuse who makes many; not this.)
        """

        def attempt() -> str | None:
            url = f"{self.api}/manifests/{tag}"
            headers = {"Accept": media.ACCEPTED}
            reply = self.send("HEAD", url, self.pull_scopes, headers=headers, deadline_s=deadline_s)
            if reply.status in (405, 501, *REDIRECT_STATUSES):
                return None
            if reply.status != 200:
                raise self.error_of(reply, where)
            stated = reply.headers.get("Docker-Content-Digest", "")
            return stated if is_digest(stated) else None

        return self.retried(attempt, f"the manifest of {where}", deadline_s)

    def tags(self, where: str, *, deadline_s: float) -> Iterator[str]:
        """All tags of the repository, page by page. Raises: StoreError for a listing that does not end."""
        trail = Trail(where)
        url: str | None = f"{self.api}/tags/list?n={TAGS_PAGE}"
        count = 0
        while url:
            trail.ask(url)
            page_url = url
            reply = self.retried(partial(self._get, page_url, where, deadline_s), f"tags of {where}", deadline_s)
            try:
                found = parse_json(reply.body)["tags"] or []
                if not isinstance(found, list):
                    raise ValueError("no list")
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{where}: expected a list of tags, got {reply.body[:60]!r}: {error!r}") from error
            trail.see(reply.body if found else b"")
            count += len(found)
            if count > ENTRIES_MAX:
                raise StoreError(f"{where}: more than {ENTRIES_MAX} tags")
            yield from (tag for tag in found if isinstance(tag, str) and is_tag(tag))
            url = self.at_home(next_url(reply.headers, page_url))

    def read_blob(self, digest: str, size: int, start: int, out: memoryview, where: str, *, deadline_s: float) -> None:
        """Fill `out` from a blob of `size` bytes, from `start` on. One try; see `mfs.fetch.retry`.

        Raises: IntegrityError if the blob has another size, since a digest names one content for ever.
        """
        span = ByteRange(start, start + len(out))
        home = Hop(f"{self.api}/blobs/{digest}")

        def check(headers: HTTPMessage) -> None:
            stated = headers.get("Docker-Content-Digest", digest)
            if stated != digest:
                raise IntegrityError(f"{where}: expected the blob {digest}, the answer is of {stated!r:.90}")

        def send(hop: Hop) -> Reply:
            def ask(headers: dict[str, str]) -> Reply:
                return self._route.read_range(
                    hop.url, span, out=out, size=size, headers=headers, name=where, check=check,
                    shared=self._shared(digest, hop.url, headers), deadline_s=deadline_s,
                )  # fmt: skip

            return self._authorized(hop, self.pull_scopes, deadline_s, ask)

        def fetch(hop: Hop) -> tuple[Reply, Hop]:
            try:
                return follow(hop, send, self.settled)
            except ChangedError as error:
                raise IntegrityError(f"{where}: not the blob that its digest names: {error}") from None

        reply: Reply | None = None
        kept = self._addresses.get(digest)
        if kept and time.time() < kept.expires_s:
            # An address that brings anything but the bytes has died before its time, or another server stands there.
            try:
                reply, hop = fetch(kept.hop)
            except TransientStoreError:
                self._forget(digest, kept)
                raise
            except MfsError:
                pass
            if reply is None or reply.status not in (200, 206):
                self._forget(digest, kept)
        if reply is None or reply.status not in (200, 206, *TRANSIENT_STATUSES):
            reply, hop = fetch(home)
        if reply.status not in (200, 206):
            if reply.status in (401, 403) and not hop.is_home:
                place = parse_target(hop.url).origin
                raise AccessError(
                    f"{where}: {place}, where the registry redirects to, refuses it: status {reply.status}"
                )
            raise self.error_of(reply, where)
        if hop == home:
            return
        with self._guard:
            known = self._addresses.get(digest)
            if known is None or known.hop != hop:  # forgotten above, it may have come again: signed in the same second
                if len(self._addresses) >= ADDRESSES_MAX:
                    self._addresses.clear()
                self._addresses[digest] = _Address(hop, expiry_s(hop.url))

    def _shared(self, digest: str, url: str, headers: dict[str, str]) -> Shared | None:
        """How a cache may be asked for a blob: with a token, which lives for minutes, if nobody between can read it;
        never with a password.
        """
        authorization = headers.get("Authorization", "")
        if authorization and not (self._route.takes_tokens and authorization.startswith("Bearer ")):
            return None
        return Shared(digest, url, headers)

    # -- for those beside us that write

    def send(
        self,
        method: str,
        url: str,
        scopes: Scopes,
        *,
        headers: dict[str, str] | None = None,
        body: bytes | bytearray | None = None,
        deadline_s: float,
    ) -> Reply:
        """One request, with credentials if `url` is the registry's; an answer 401 is met once. Redirects are followed
        where nothing is sent; of a HEAD only within the registry, since what storage signs is a GET.
        """

        def send_to(hop: Hop) -> Reply:
            return self._authorized(hop, scopes, deadline_s, lambda authorization: self.transport.request(
                hop.url, method=method, headers={**(headers or {}), **authorization}, body=body,
                body_bytes_max=MANIFEST_BYTES_MAX, deadline_s=deadline_s,
            ))  # fmt: skip

        start = Hop(url, self.is_ours(url))
        if body is not None:
            return send_to(start)
        return follow(start, send_to, self.settled, is_home_only=method == "HEAD")[0]

    def retried(self, attempt: Callable[[], T], what: str, deadline_s: float) -> T:
        """Try until it succeeds, fails for good, or the deadline comes too near."""
        return with_retries(attempt, what=what, deadline_s=deadline_s, stopped=self.stopped)

    def error_of(self, reply: Reply, where: str) -> MfsError:
        """Our error for an answer that is no success."""
        found = _CODE.search(reply.body)
        code = found[1].decode() if found else ""
        said = f"{where}: the registry answered {reply.status} {code}".rstrip()
        login = f"`docker login {self.reference.registry}`"
        match reply.status:
            case status if status in TRANSIENT_STATUSES:
                return TransientStoreError(said, retry_after_s=wished_pause_s(reply.headers))
            case 401 | 403 | 407:
                return AccessError(f"{said}: refused: a private repository, or one that is not there; {login}")
            case 404 if code == "NAME_UNKNOWN":
                return NotFoundError(f"{said}: no such repository")
            case 404 | 410:
                return NotFoundError(f"{said}: not there (any more)")
            case 416:
                return IntegrityError(f"{said}: not the blob that its digest names: it is shorter")
            case status if status in REDIRECT_STATUSES:
                return StoreError(f"{said}: a redirect where none is expected")
        return StoreError(said)

    def _get(self, url: str, where: str, deadline_s: float, headers: dict[str, str] | None = None) -> Reply:
        reply = self.send("GET", url, self.pull_scopes, headers=headers, deadline_s=deadline_s)
        if reply.status != 200:
            raise self.error_of(reply, where)
        return reply

    def _authorized(self, hop: Hop, scopes: Scopes, deadline_s: float, ask: Callable[[dict[str, str]], Reply]) -> Reply:
        if not hop.is_home:
            return ask({})
        sent = self._auth.header(scopes, deadline_s)
        reply = ask(sent)
        if reply.status != 401:
            return reply
        better = self._auth.answer(reply, scopes, sent, deadline_s)
        return reply if better is None else ask(better)

    def _forget(self, digest: str, known: _Address) -> None:
        """Forget an address, unless somebody has already renewed it."""
        with self._guard:
            if self._addresses.get(digest) == known:
                del self._addresses[digest]

    def is_ours(self, url: str) -> bool:
        """Whether an address is the registry's own, so that credentials may go there."""
        return parse_target(url).origin == parse_target(self.api).origin

    def settled(self, url: str) -> str:
        """The address to use for one that the registry names (a Location): https where the registry is https, so that
        nobody between reads or changes what goes there. One behind a proxy calls itself http: itself is meant then.

        Raises: StoreError for any other that is not https.
        """
        home, there = parse_target(self.api).origin, parse_target(url).origin
        if home.scheme != "https" or there.scheme == "https":
            return url
        if there.host == home.host and there.port in (80, home.port):
            return self.at_home(url) or url
        raise StoreError(
            f"{self.reference.identity}: the registry is https and redirects to {there}, which is not: nothing is sent "
            f"there; its storage must be https too, or be read through the registry (redirect: disable)"
        )

    def at_home(self, url: str | None) -> str | None:
        """The next page, at the registry we asked: a proxy passes on the address of what stands behind it."""
        if url is None or self.is_ours(url):
            return url
        home = urlsplit(self.reference.base_url)
        return urlsplit(url)._replace(scheme=home.scheme, netloc=home.netloc).geturl()
