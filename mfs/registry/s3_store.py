"""A registry in an S3 bucket: `mfs+s3://bucket/prefix`, at AWS or any endpoint.

What mounts do, reading and listing, goes over our own transport; what `push`, `tag` and `gc` do beside it, writing and
deleting, over boto3. Neither retries by itself: every request is one, so that what an answer means is known, and trying
again is this module's business.

What servers do with `If-None-Match: *` over an object that is there: AWS and Ceph refuse it (412); so does
Swift 2.38, but it looks first and writes then, so that of eight at once two to six were told that they had created it;
Debian's Swift 2.30 knows no such thing (501); rclone and juicefs overwrite. So the server is asked once.
Objects are removed one by one: DeleteObjects wants a checksum that old servers and new boto3 do not agree upon.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from mfs.errors import NotFoundError, StoreError
from mfs.errors import TransientStoreError as Transient
from mfs.fetch.retry import Rest, with_retries
from mfs.fetch.route import Route, Shared, proves_itself
from mfs.fetch.transport import Reply, Transport
from mfs.registry.layout import is_key
from mfs.registry.parallel import for_each
from mfs.registry.s3_writing import S3Writer
from mfs.registry.store import SMALL_BYTES_MAX, Stored
from mfs.sources.options import SourceOptions
from mfs.sources.s3_access import S3Access, parse_s3_url
from mfs.sources.s3_again import ask
from mfs.sources.s3_answers import error_of
from mfs.sources.s3_listing import S3Listing
from mfs.types import ByteRange

log = logging.getLogger(__name__)


DELETES_PARALLEL = 8
"""Requests under way at once."""

COMPARED_BYTES_MAX = 64 << 10
"""An object up to here is compared with ours whenever it is said to be there already: a proxy between may have sent our
request twice. A longer one only where an answer was lost: reading 8 MiB back for each chunk that others have is dear,
and of chunks it does not matter whose they are."""

PROBES_COUNT = 6
"""Writers at once that find out whether a server decides."""

_UNKNOWN_STATUSES = (400, 405, 501)
"""Said to a condition by servers that do not know it."""


class _Conditions(NamedTuple):
    """What `If-None-Match: *` is worth on a server."""

    is_known: bool
    """An object that has been there for long is not replaced."""
    is_decisive: bool
    """Nor is one that is written at the same moment."""


class S3Store:
    """One prefix of one bucket; see `registry.store.Store`. Thread-safe."""

    can_write = True

    def __init__(self, bucket: str, prefix: str, options: SourceOptions) -> None:
        """prefix: '' or ending in '/'. Raises: ConfigError if the AWS configuration cannot work."""
        self._access = S3Access(bucket, options)
        self._writer = S3Writer(self._access, options)
        self._prefix = prefix
        self._transport = Transport(connections_max=options.connections_max, ca_bundle=self._access.ca_bundle)
        self._route = Route(self._transport, options.cache)
        self._closed = threading.Event()
        self._listing = S3Listing(self._access, self._transport, self._closed)
        self._conditions: _Conditions | None = None
        self._probing = threading.Lock()
        self.identity = f"mfs+s3://{bucket}/{prefix}".rstrip("/")
        if self._access.endpoint:
            self.identity += f"@{self._access.endpoint}"

    def read(self, key: str, *, bytes_max: int = SMALL_BYTES_MAX, deadline_s: float) -> bytes:
        """A small object, whole; see `Store.read`."""

        def send(url: str, headers: dict[str, str]) -> Reply:
            return self._transport.request(url, headers=headers, body_bytes_max=bytes_max, deadline_s=deadline_s)

        return self._asked(key, send, deadline_s).body

    def read_range(self, key: str, span: ByteRange, *, size: int, out: memoryview, deadline_s: float) -> None:
        """Fill `out` with a range of an object; see `Store.read_range`."""

        rest = Rest(span, out)

        def send(url: str, headers: dict[str, str]) -> Reply:
            shared = None
            if self._route.is_shared:
                shared = Shared(self._named(key, size), self._access.presign(url), {}, proves_itself)
            return rest.take(lambda part, view: self._route.read_range(
                url, part, out=view, size=size, headers=headers, shared=shared, deadline_s=deadline_s
            ))  # fmt: skip

        if span:
            self._asked(key, send, deadline_s)

    def doubt(self, key: str) -> None:
        """Ask no cache for an object, for a while; see `Store.doubt`."""
        self._route.doubt(self._access.object_url(self._whole(key)))

    def size(self, key: str, *, deadline_s: float) -> int | None:
        """Bytes of an object, None if there is none; see `Store.size`."""
        try:
            said = self._asked(key, self._heading(deadline_s), deadline_s, method="HEAD").headers.get(
                "Content-Length", ""
            )
        except NotFoundError:
            return None
        if not said.isdecimal():
            raise StoreError(f"{self._shown(key)}: S3 does not say how long it is")
        return int(said)

    def list(self, prefix: str, *, deadline_s: float) -> Iterator[Stored]:
        """Every object below `prefix`; see `Store.list`. A page at a time is held in memory."""
        for page in self._listing.pages({"prefix": self._prefix + prefix}, self._shown(prefix), deadline_s):
            for key, entry in page.files:
                name = key.removeprefix(self._prefix)
                if is_key(name):
                    yield Stored(name, entry.size, entry.mtime_ns)

    def names(self, prefix: str, *, deadline_s: float) -> Iterator[str]:
        """The first components below `prefix`; see `Store.names`."""
        whole = self._prefix + prefix
        for page in self._listing.pages({"prefix": whole, "delimiter": "/"}, self._shown(prefix), deadline_s):
            found = sorted((*(key for key, _ in page.files), *page.prefixes))
            names = (key.removeprefix(whole).removesuffix("/") for key in found)
            yield from (name for name in names if is_key(name))

    def create(self, key: str, body: bytes, *, deadline_s: float) -> bool:
        """Write an object unless there is one; see `Store.create`, and FORMAT.md for what a lost answer means."""
        if not self._worth(deadline_s).is_known:
            if self.size(key, deadline_s=deadline_s) is not None:
                return False
            self.write(key, body, deadline_s=deadline_s)
            return True
        whole, was_lost = self._whole(key), False

        def attempt() -> bool:
            nonlocal was_lost
            try:
                status = self._writer.put(whole, body, is_new=True)
            except Transient:
                was_lost = True  # it may have been written all the same
                raise
            if status == 200:
                return True
            if status == 409:  # AWS: another one is writing it; who wins is not known yet
                raise Transient(f"{self._shown(key)}: written by somebody else at this moment (409)")
            if not was_lost and len(body) > COMPARED_BYTES_MAX:
                return False
            try:
                return self.read(key, deadline_s=deadline_s) == body
            except NotFoundError:  # removed meanwhile
                raise Transient(f"{self._shown(key)}: was there, and is not") from None

        return with_retries(attempt, what=self._shown(key), deadline_s=deadline_s, stopped=self._closed)

    def write(self, key: str, body: bytes | memoryview, *, deadline_s: float) -> None:
        """Write an object, replacing what is there; see `Store.write`."""

        def attempt() -> None:
            self._writer.put(whole, bytes(body))

        whole = self._whole(key)
        with_retries(attempt, what=self._shown(key), deadline_s=deadline_s, stopped=self._closed)

    def delete(self, keys: Iterable[str], *, deadline_s: float) -> None:
        """Remove objects; see `Store.delete`."""
        for_each(keys, lambda key: self._delete(key, deadline_s), at_once=DELETES_PARALLEL)

    def is_conditional(self, *, deadline_s: float) -> bool:
        """Whether the server lets one of several at once create an object; see `Store.is_conditional`."""
        return self._worth(deadline_s).is_decisive

    def close(self) -> None:
        """Drop connections; see `Store.close`."""
        self._closed.set()
        self._route.close()
        self._transport.close()
        self._writer.close()

    def _worth(self, deadline_s: float) -> _Conditions:
        """What conditions are worth here. The server is asked once, by writes to a key that nobody else has."""
        with self._probing:
            if self._conditions is None:
                what = f"{self._shown('work/probe-…')}"
                self._conditions = with_retries(
                    lambda: self._probe(deadline_s), what=what, deadline_s=deadline_s, stopped=self._closed
                )
                if not self._conditions.is_decisive:
                    log.warning("%s: this server does not decide who is first (If-None-Match): of two who move a tag "
                                "at once both are kept in its history, and all readers agree which holds",
                                self.identity)  # fmt: skip
            return self._conditions

    def _probe(self, deadline_s: float) -> _Conditions:
        key = f"work/probe-{secrets.token_hex(16)}"
        whole, statuses = self._whole(key), list[int]()

        def create(number: int) -> None:
            statuses.append(self._writer.put(whole, b"%d" % number, is_new=True, also=_UNKNOWN_STATUSES))

        try:
            for_each(range(PROBES_COUNT), create, at_once=PROBES_COUNT)
            is_refused_alone = self._writer.put(whole, b"last", is_new=True, also=_UNKNOWN_STATUSES) == 412
            headers = self._asked(key, self._heading(deadline_s), deadline_s, method="HEAD").headers
        except NotFoundError:  # none of them was written, so the condition is not known
            return _Conditions(is_known=False, is_decisive=False)
        finally:
            self.delete([key], deadline_s=deadline_s)
        is_swift = "x-openstack-request-id" in headers or "x-trans-id" in headers
        is_decisive = is_refused_alone and statuses.count(200) == 1 and not is_swift
        return _Conditions(is_refused_alone, is_decisive)

    def _delete(self, key: str, deadline_s: float) -> None:
        whole = self._whole(key)
        what = f"deleting {self._shown(key)}"
        with_retries(lambda: self._writer.delete(whole), what=what, deadline_s=deadline_s, stopped=self._closed)

    def _whole(self, key: str) -> str:
        if not is_key(key):
            raise NotFoundError(f"{self.identity}: {key!r:.200} is no key of a registry")
        return self._prefix + key

    def _named(self, key: str, size: int) -> str:
        return f"{self.identity}/{key}:{size}"

    def _shown(self, key: str) -> str:
        return f"s3://{self._access.bucket}/{self._prefix}{key}"

    def _heading(self, deadline_s: float) -> Callable[[str, dict[str, str]], Reply]:
        return lambda url, headers: self._transport.request(
            url, method="HEAD", headers=headers, deadline_s=deadline_s
        )  # fmt: skip

    def _asked(
        self, key: str, send: Callable[[str, dict[str, str]], Reply], deadline_s: float, *, method: str = "GET"
    ) -> Reply:
        """The answer of an object, signed and tried again as it takes. Raises: as `error_of`."""
        whole = self._whole(key)

        def attempt() -> Reply:
            reply = ask(
                self._access,
                self._transport,
                lambda: self._access.object_url(whole),
                send,
                method=method,
                deadline_s=deadline_s,
            )
            if reply.status not in (200, 206):
                raise error_of(reply, self._shown(key), self._access.region)
            return reply

        return with_retries(attempt, what=self._shown(key), deadline_s=deadline_s, stopped=self._closed)


def open_place(place: str, options: SourceOptions) -> S3Store:
    """The store at s3://bucket/prefix. Raises: UsageError, ConfigError."""
    bucket, prefix = parse_s3_url(place)
    return S3Store(bucket, prefix, options)
