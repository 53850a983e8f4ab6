"""Which way a byte comes: from its origin, or through a cache that many nodes share. The only place that decides.

    no cache is set, or nothing may be asked of one           the origin
    the cache failed a moment ago                             the origin; one request tries the cache again
    it brings the bytes, and says that they are this version  taken
    the origin asks everybody to wait (429)                   that is the answer
    it brings anything else, or nothing in time               the origin, whose word counts

A cache is asked by absolute address: a forward proxy (dfdaemon, squid) takes host and path from there, a cache that
stands before one origin (nginx, varnish) the path alone. `Mfs-Object` names the bytes, so that no two versions share an
entry; Dragonfly has headers of its own for that. Listings, tokens and whatever else is no range of an object never come
here.

Which of our credentials a cache sees is the sources' decision, in `Shared`: signed addresses, whose query is no part of
the name. decisions/0019.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from http.client import HTTPMessage
from typing import Generic, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

from mfs.errors import IntegrityError, MfsError, StoreError, TransientStoreError
from mfs.fetch.connections import Origin
from mfs.fetch.dates import epoch_s
from mfs.fetch.redirects import REDIRECT_STATUSES
from mfs.fetch.retry import wished_pause_s
from mfs.fetch.told import note_way
from mfs.fetch.transport import Reply, Transport, parse_target
from mfs.fetch.validators import opaque_of
from mfs.types import ByteRange

log = logging.getLogger(__name__)

SHARE_OF_TIME = 0.5
"""Of what is left of a read, given to the cache; the origin has the rest. Silence ends it after a third of that."""

FIRST_PAUSE_S = 2.0
"""Without the cache after it failed; doubled while it fails again. To try costs one reader a wait, so not at once."""

PAUSE_S_MAX = 60.0

UNFIT_S = 60.0
"""Without the cache for one object of which it had something else."""

WAIT_S_MAX = 30.0
"""Of a wait that came through the cache, what is believed of it alone: the cache may have said it by itself."""

WAITING_GRACE_S = 5.0
"""Beyond that: who is still put off then asks the origin whether that is so."""

REMEMBERED_MAX = 4096
"""Objects of which something is remembered; at the limit all is forgotten, which costs a request each."""

_NAME = "Mfs-Object"
_WAIT_STATUS = 429
"""And not 503, even with Retry-After: caches say that too, by themselves, where they cannot reach the origin."""
_DRAGONFLY_FAULTS = ("proxy", "dfdaemon")  # and not 'backend', which is the origin

Check = Callable[[HTTPMessage], None]
T = TypeVar("T")


class Cache(NamedTuple):
    """A cache on this node or near it."""

    origin: Origin
    is_dragonfly: bool = False

    @property
    def is_private(self) -> bool:
        """Whether nobody between us and it can read along."""
        try:
            is_here = ipaddress.ip_address(self.origin.host).is_loopback
        except ValueError:
            is_here = self.origin.host == "localhost"
        return is_here or self.origin.scheme == "https"

    def headers(self, shared: Shared) -> dict[str, str]:
        """What tells it under which name to keep an answer."""
        if not self.is_dragonfly:
            return {_NAME: shared.key}
        # The name alone makes a task; a dfdaemon that is too old for that goes by address and tag.
        names = dict.fromkeys(name for name, _ in parse_qsl(urlsplit(shared.url).query, keep_blank_values=True))
        return {
            "X-Dragonfly-Use-P2P": "true",
            "X-Dragonfly-Content-For-Calculating-Task-ID": shared.key,
            "X-Dragonfly-Tag": shared.key,
            **({"X-Dragonfly-Filtered-Query-Params": "&".join(names)} if names else {}),
        }


def cache_at(via: str | None, dragonfly: str | None) -> Cache | None:
    """The cache that one of two settings names, if any. Raises: StoreError for what is no http(s) address."""
    address = dragonfly or via
    return Cache(parse_target(address).origin, bool(dragonfly)) if address else None


def proves_itself(headers: HTTPMessage) -> bool:
    """A `Shared.confirm` for bytes that their reader compares with a digest."""
    return True


class Shared(NamedTuple):
    """How bytes may be asked of a cache."""

    key: str
    """Names them: equal on all nodes, another one for another version. No secret."""
    url: str
    """Their address, with what lets us in, if anything, in its query."""
    headers: Mapping[str, str]
    """Without what no cache may see."""
    confirm: Callable[[HTTPMessage], bool] | None = None
    """Whether an answer says that it is of this version. None where no listing says what it would have to say: then
    the origin is asked for one byte first, and the cache must name the same ETag or date."""


class Route:
    """Reads ranges for one source. Thread-safe."""

    def __init__(self, transport: Transport, cache: Cache | None) -> None:
        """transport: to the origins; it stays its owner's."""
        self._transport = transport
        self._cache = cache
        self._to_cache = transport.past_proxies()
        self._health = _Health(str(cache.origin) if cache else "")
        self._proofs = _Remembered[str]()
        self._unfit = _Remembered[float]()
        """time.monotonic() until which the cache is not asked for an object."""

    @property
    def is_shared(self) -> bool:
        """Whether there is a cache to ask: what makes a `Shared` may be left undone otherwise."""
        return self._cache is not None

    @property
    def takes_tokens(self) -> bool:
        """Whether a header may carry a token of some minutes to the cache."""
        return self._cache is not None and self._cache.is_private

    def read_range(
        self,
        url: str,
        span: ByteRange,
        *,
        out: memoryview,
        size: int,
        headers: Mapping[str, str] | None = None,
        name: str | None = None,
        check: Check | None = None,
        shared: Shared | None = None,
        deadline_s: float,
    ) -> Reply:
        """Fill `out` with a range of an object; as `Transport.read_range`, whose errors are those of the origin.

        shared: how a cache may be asked for it; None where it may not.
        """
        asked = _Asked(url, size, headers or {}, name, check, deadline_s)
        if self._cache is None:
            return asked.send(self._transport, span, out)
        try:
            reply, way = self._read(self._cache, asked, shared, span, out)
        except TransientStoreError as error:
            if error.received_bytes:  # it is read on from there, and what fails here is the origin
                note_way("direct_bytes", error.received_bytes)
            raise
        if reply.status in (200, 206):
            note_way(way, len(span))
        return reply

    def _read(
        self, cache: Cache, asked: _Asked, shared: Shared | None, span: ByteRange, out: memoryview
    ) -> tuple[Reply, str]:
        """The answer, and which way it came, as `taken_ways` calls it."""
        if shared is None or not span:
            return asked.send(self._transport, span, out), "direct_bytes"
        address = _bare(shared.url)
        if time.monotonic() < (self._unfit.get(address) or 0.0):
            return asked.send(self._transport, span, out), "direct_bytes"
        ticket = self._health.enter()
        if ticket is None:
            return asked.send(self._transport, span, out), "direct_bytes"
        confirm = shared.confirm
        if confirm is None:
            what = f"{address} {shared.key}"
            proof = self._proofs.get(what)
            if proof is None:
                reply = asked.send(self._transport, ByteRange(span.start, span.start + 1), memoryview(bytearray(1)))
                if reply.status not in (200, 206):
                    return reply, "direct_bytes"
                proof = self._proofs.put(what, _validator(reply.headers))
            confirm = partial(_says, proof)
        found = self._from_cache(cache, asked, shared, confirm, span, out, ticket)
        if found.is_answer and found.reply is not None:
            return found.reply, "cache_bytes"
        decisive = asked.send(self._transport, span, out)
        if found.has_answered and decisive.status in (200, 206, *REDIRECT_STATUSES):
            if found.reply is not None and found.reply.status >= 500:
                self._health.fail(ticket, f"status {found.reply.status}, where the origin answers")
            else:
                self._health.succeed()
                self._unfit.put(address, time.monotonic() + UNFIT_S)
        return decisive, "direct_bytes"

    def doubt(self, url: str) -> None:
        """Bytes that were taken for an object's were not: its origin is asked, for a while."""
        if self._cache is not None:
            self._unfit.put(_bare(url), time.monotonic() + UNFIT_S)

    def close(self) -> None:
        """Drop the connections to the cache."""
        self._to_cache.close()

    def _from_cache(
        self, cache: Cache, asked: _Asked, shared: Shared, confirm: Callable[[HTTPMessage], bool], span: ByteRange,
        out: memoryview, ticket: int,
    ) -> _Found:  # fmt: skip
        def check(headers: HTTPMessage) -> None:
            if not confirm(headers):
                raise IntegrityError("the answer is of another version, or does not say of which")
            if asked.check:
                asked.check(headers)

        now_s = time.monotonic()
        wanted = asked._replace(
            url=shared.url, headers={**shared.headers, **cache.headers(shared)}, check=check,
            deadline_s=now_s + (asked.deadline_s - now_s) * SHARE_OF_TIME,
        )  # fmt: skip
        try:
            reply = wanted.send(self._to_cache, span, out, through=cache.origin)
        except StoreError as error:
            self._health.fail(ticket, str(error))
            return _Found(has_answered=False)
        except MfsError as error:
            log.debug("%s is not read through the cache: %s", _bare(shared.url), error)
            return _Found()
        if reply.status in (200, 206):
            self._health.succeed()
            return _Found(reply, is_answer=True)
        if reply.headers.get("X-Dragonfly-Error-Type", "").lower() in _DRAGONFLY_FAULTS:
            self._health.fail(ticket, f"status {reply.status} of its own")
            return _Found(reply, has_answered=False)
        # Who is asked to wait does not go past the cache to the one that asks for it.
        wish_s = wished_pause_s(reply.headers) if reply.status == _WAIT_STATUS else None
        return _Found(reply, is_answer=wish_s is not None and self._health.waits(wish_s))


class _Asked(NamedTuple):
    """What the caller of `Route.read_range` wants, but for the range."""

    url: str
    size: int
    headers: Mapping[str, str]
    name: str | None
    check: Check | None
    deadline_s: float

    def send(self, transport: Transport, span: ByteRange, out: memoryview, *, through: Origin | None = None) -> Reply:
        return transport.read_range(
            self.url, span, out=out, size=self.size, headers=self.headers, name=self.name, check=self.check,
            through=through, deadline_s=self.deadline_s,
        )  # fmt: skip


class _Found(NamedTuple):
    """What a cache had to say."""

    reply: Reply | None = None
    is_answer: bool = False
    """To be passed on."""
    has_answered: bool = True
    """It works, whatever it says."""


class _Health:
    """Whether the cache is asked: not after a failure, for a pause that doubles."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._failures = 0
        """Since it worked last."""
        self._closed_until_s = 0.0
        self._waiting_until_s = 0.0

    def enter(self) -> int | None:
        """A ticket to ask it, None if it is not to be asked now. After a pause one gets one, and the others if he does
        not come back.
        """
        if not self._failures:
            return 0
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._closed_until_s:
                return None
            self._closed_until_s = now_s + self._pause_s()
            return self._failures

    def fail(self, ticket: int, why: str) -> None:
        """It brought nothing; whoever else was under way then is no further failure."""
        with self._lock:
            if ticket != self._failures:
                return
            self._failures += 1
            note_way("cache_faults", 1)
            pause_s = self._pause_s()
            self._closed_until_s = time.monotonic() + pause_s
        log.warning(
            "cache %s: %s: reading from the origin, the cache is tried again in %.0f s", self._name, why, pause_s
        )

    def succeed(self) -> None:
        """It works."""
        if not self._failures and not self._waiting_until_s:
            return
        with self._lock:
            had_failed, self._failures = self._failures, 0
            self._waiting_until_s = 0.0
        if had_failed:
            log.info("cache %s: in use again", self._name)

    def waits(self, wish_s: float) -> bool:
        """Whether an answer 'not now' through the cache is believed: as long as was asked for and a little longer, and
        never longer than WAIT_S_MAX and that little.
        """
        with self._lock:
            now_s = time.monotonic()
            if not self._waiting_until_s:
                self._waiting_until_s = now_s + min(wish_s, WAIT_S_MAX) + WAITING_GRACE_S
            if now_s < self._waiting_until_s:
                return True
            self._waiting_until_s = 0.0
            return False

    def _pause_s(self) -> float:
        return float(min(PAUSE_S_MAX, FIRST_PAUSE_S * 2 ** min(16, self._failures - 1)))


class _Remembered(Generic[T]):
    """Something about each of at most REMEMBERED_MAX objects."""

    def __init__(self) -> None:
        self._values: dict[str, T] = {}

    def get(self, what: str) -> T | None:
        return self._values.get(what)

    def put(self, what: str, value: T) -> T:
        if len(self._values) >= REMEMBERED_MAX:
            self._values.clear()
        self._values[what] = value
        return value


def _bare(url: str) -> str:
    return url.partition("?")[0]


def _validator(headers: HTTPMessage) -> str:
    """What an answer says of its version, '' if nothing."""
    if etag := opaque_of(headers.get("ETag", "")):
        return f"ETag {etag}"
    seconds = epoch_s(headers.get("Last-Modified", ""))
    return "" if seconds is None else f"Last-Modified {seconds}"


def _says(proof: str, headers: HTTPMessage) -> bool:
    """Whether an answer says the same as the origin's; nothing proves nothing."""
    return bool(proof) and _validator(headers) == proof
