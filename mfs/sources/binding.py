"""What binds the bytes of an answer to the version that was listed, on S3 and on the web.

A listing leaves what it knows of a version in `ObjectId.locator`, as one header line:

    If-Match: "v1"                        an ETag: sent with every range, and compared with the answer's
    ETag: W/"v1"                          a weak one: If-Match never matches it, so it is compared only
    If-Unmodified-Since: <HTTP date>      a date in whole seconds: sent and compared
    Last-Modified: <ns since the epoch>   a finer date: sent as the second after it, compared as the one it is in
    (nothing)                             no basis

An answer is taken if it says the same, or if it says nothing and this server is known to keep the condition that was
sent: one request with a condition that cannot hold tells, and 412 is the proof. All else is refused: without either, a
read over a replaced object is a mixture and nobody sees it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from http.client import HTTPMessage
from typing import NamedTuple, Protocol

from mfs.errors import ChangedError, IntegrityError, MfsError, TransientStoreError
from mfs.fetch.dates import epoch_s, http_date
from mfs.fetch.transport import Reply
from mfs.fetch.validators import is_weak, opaque_of
from mfs.types import ByteRange

UNBOUND = "unbound"
"""Begins the version of what no listing binds: it never stood in a cache, and is never read."""

_NS = 1_000_000_000
_SENDABLE = re.compile(r"[\x21\x23-\x7e]+")  # RFC 9110 §8.8.3 etagc, without what headers cannot carry
_ETAG_OF_NOTHING = '"mfs-asks-whether-conditions-are-kept"'
_DAY_S = 86_400
_END_OF_TIME = "Fri, 31 Dec 9999 23:59:59 GMT"
_NOT_TAKEN = (412, 501)
"""501: what some stores say to any condition."""

Check = Callable[[HTTPMessage], None]


class Send(Protocol):
    """One range request of the source's own making: address, credentials, redirects."""

    def __call__(
        self, span: ByteRange, out: memoryview, condition: dict[str, str], check: Check | None, /
    ) -> Reply: ...


class Binding(NamedTuple):
    """What a listing said of a version, as far as an answer can confirm it."""

    etag: str = ""
    """Its opaque part."""
    is_weak: bool = False
    modified_ns: int | None = None
    """Used where there is no ETag."""

    @property
    def is_nothing(self) -> bool:
        return not self.etag and self.modified_ns is None

    def condition(self) -> dict[str, str]:
        """The header that has a replaced object refused, or none where no header can."""
        if self.etag:
            return {"If-Match": f'"{self.etag}"'} if not self.is_weak and _SENDABLE.fullmatch(self.etag) else {}
        assert self.modified_ns is not None
        # A server that compares finer than it answers would call the object's own second too early.
        return _unmodified_since(-(-self.modified_ns // _NS))

    def impossible(self) -> dict[str, str]:
        """The same header, as it cannot hold."""
        if self.etag:
            return {"If-Match": _ETAG_OF_NOTHING}
        assert self.modified_ns is not None
        return _unmodified_since(self.modified_ns // _NS - _DAY_S)

    def certain(self) -> dict[str, str]:
        """The same header, as it holds for whatever version there is."""
        return {"If-Match": "*"} if self.etag else {"If-Unmodified-Since": _END_OF_TIME}

    def is_confirmed_by(self, headers: HTTPMessage) -> bool | None:
        """Whether an answer says that it is of this version; None if it says nothing."""
        if self.etag:
            etag = opaque_of(headers.get("ETag", ""))
            return etag == self.etag if etag else None
        assert self.modified_ns is not None
        seconds = epoch_s(headers.get("Last-Modified", ""))
        return None if seconds is None else seconds == self.modified_ns // _NS

    def is_said_by(self, headers: HTTPMessage) -> bool:
        """Whether an answer itself says that it is of this version: all that counts of one that a cache gives."""
        return self.is_confirmed_by(headers) is True

    def describe(self, headers: HTTPMessage | None = None) -> str:
        """Name and value, this version's or what an answer says in its place."""
        name = "ETag" if self.etag else "Last-Modified"
        if headers is not None:
            return f"{name} {headers.get(name, '').strip()}"
        return f"{name} {self.etag}" if self.etag else f"{name} {(self.modified_ns or 0) // _NS} s since 1970"


def _unmodified_since(seconds: int) -> dict[str, str]:
    try:
        return {"If-Unmodified-Since": http_date(seconds)}
    except (ValueError, OverflowError, OSError):
        return {}  # a year that no header can carry


def locator_of(etag: str | None, modified_ns: int | None) -> str:
    """The locator for what is known of a version: the ETag if there is one, else the date."""
    if etag and (opaque := opaque_of(etag)):
        return f'ETag: W/"{opaque}"' if is_weak(etag) else f'If-Match: "{opaque}"'
    if modified_ns is None:
        return ""
    whole = {} if modified_ns % _NS else _unmodified_since(modified_ns // _NS)
    return (
        f"If-Unmodified-Since: {date}"
        if (date := whole.get("If-Unmodified-Since"))
        else f"Last-Modified: {modified_ns}"
    )


@functools.lru_cache(maxsize=256)  # an object's comes with each of its ranges
def binding_of(locator: str) -> Binding:
    """Inverse of `locator_of`; what it did not write binds nothing."""
    name, _, value = locator.partition(": ")
    match name:
        case "If-Match" | "ETag":
            return Binding(opaque_of(value), is_weak(value))
        case "If-Unmodified-Since" if (seconds := epoch_s(value)) is not None:
            return Binding(modified_ns=seconds * _NS)
        case "Last-Modified" if value.removeprefix("-").isdecimal():
            return Binding(modified_ns=int(value))
    return Binding()


class Binder:
    """Reads ranges of listed versions from one origin, and remembers what its conditions are worth. Thread-safe."""

    def __init__(self, *, trusts_dates: bool, advice: str) -> None:
        """trusts_dates: whether an equal Last-Modified alone confirms a version.
        advice: what to do where nothing does; ends the message.
        """
        self._trusts_dates = trusts_dates
        self._advice = advice
        self._kept: set[str] = set()
        """Conditions that were seen to be kept. That one is ignored is not remembered: servers are mended."""
        self._misread: set[str] = set()
        """Conditions that refused an unchanged object: not sent any more, the answers tell."""

    def read(self, binding: Binding, span: ByteRange, out: memoryview, send: Send, where: str) -> Reply:
        """Fill `out` with a range of the bound version. An answer other than 200 and 206 is the caller's to explain.

        span: not empty.
        Raises: ChangedError if the answer is of another version; IntegrityError if nothing tells of which it is;
            whatever `send` does.
        """
        if binding.is_nothing:
            raise IntegrityError(f"{where}: neither ETag nor date is known of it, so nothing would tell that it was "
                                 f"replaced while it is read; {self._advice}")  # fmt: skip
        condition = binding.condition()
        name = next(iter(condition), "")
        if name in self._misread:
            condition = {}
        reply = self._ask(binding, span, out, send, where, condition)
        may_be_misread = bool(binding.etag) or self._trusts_dates
        if condition and may_be_misread and reply.status in _NOT_TAKEN:
            # The server may compare as text, or call its own ETag weak: what comes without a condition tells.
            try:
                again = send(span, out, {}, lambda headers: self._settle(binding, headers, where))
            except _UnprovenError:
                raise self._verdict(binding, name, span, send, where) from None
            except TransientStoreError:
                if reply.status == 412:
                    return reply  # nothing speaks against it
                raise
            if again.status in (200, 206):
                self._misread.add(name)
            return again
        if condition and reply.status == 501:
            raise self._refusal(binding, name, where)
        return reply

    def _ask(
        self, binding: Binding, span: ByteRange, out: memoryview, send: Send, where: str, condition: dict[str, str]
    ) -> Reply:
        name = next(iter(condition), "")

        def check(headers: HTTPMessage) -> None:
            answer = binding.is_confirmed_by(headers)
            if answer is False:
                raise self._changed(binding, headers, where)
            if (answer and (binding.etag or self._trusts_dates)) or name in self._kept:
                return
            raise _UnprovenError

        try:
            return send(span, out, condition, check)
        except _UnprovenError:
            pass
        if condition:
            proof = send(ByteRange(span.start, span.start + 1), memoryview(bytearray(1)), binding.impossible(), None)
            if proof.status not in (200, 206, *_NOT_TAKEN):
                return proof
            if proof.status == 412:
                self._kept.add(name)
        try:
            return send(span, out, condition, check)
        except _UnprovenError:
            pass
        raise self._refusal(binding, name, where)

    def _refusal(self, binding: Binding, name: str, where: str) -> IntegrityError:
        lacks = "ETag" if binding.etag else "Last-Modified" if self._trusts_dates else "ETag to go by"
        ignored = f"does not keep {name}" if name else "can be given no condition for it"
        return IntegrityError(f"{where}: the answer has no {lacks} and the server {ignored}, so nothing would tell "
                              f"that the object was replaced; {self._advice}")  # fmt: skip

    def _settle(self, binding: Binding, headers: HTTPMessage, where: str) -> None:
        """An answer without a condition, after one with it was refused: believed if it says the same version."""
        answer = binding.is_confirmed_by(headers)
        if answer is None:
            raise _UnprovenError
        if not answer:
            raise self._changed(binding, headers, where)

    def _verdict(self, binding: Binding, name: str, span: ByteRange, send: Send, where: str) -> MfsError:
        """What to say where a condition was refused and answers say nothing of their version.

        A server without ETags may refuse any If-Match, of an unchanged object too: one that cannot fail tells.
        """
        if name not in self._kept:
            one = ByteRange(span.start, span.start + 1)
            if send(one, memoryview(bytearray(1)), binding.certain(), None).status in _NOT_TAKEN:
                return self._refusal(binding, name, where)
        return ChangedError(f"{where}: replaced since it was listed: the server refuses {name} of the listed version; "
                            f"refresh to see the new one")  # fmt: skip

    def _changed(self, binding: Binding, headers: HTTPMessage, where: str) -> ChangedError:
        return ChangedError(f"{where}: replaced since it was listed: expected {binding.describe()}, got "
                            f"{binding.describe(headers)}; refresh to see the new version")  # fmt: skip


class _UnprovenError(MfsError):
    """An answer that says nothing of its version, from a server of which it is not known that it keeps conditions."""
