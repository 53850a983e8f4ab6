"""What is taken for the listed version, and what is refused, by servers of every habit."""

from __future__ import annotations

from dataclasses import dataclass
from http.client import HTTPMessage
from typing import Any

import pytest

from mfs.errors import ChangedError, IntegrityError, TransientStoreError
from mfs.fetch.dates import epoch_s, http_date
from mfs.fetch.transport import Reply
from mfs.sources.binding import Binder, Check, binding_of, locator_of
from mfs.sources.http_listing import add_manifest
from mfs.sources.s3_answers import parse_listing
from mfs.sources.tree import TreeBuilder
from mfs.types import ByteRange

NS = 1_000_000_000
WHEN = 1767323045
DATE = "Fri, 02 Jan 2026 03:04:05 GMT"
LATER = "Fri, 02 Jan 2026 03:04:06 GMT"


@dataclass
class Server:
    """A server reduced to how it treats validators."""

    etag: str | None = None
    date: str | None = None
    conditions: str = "kept"
    """'kept', 'ignored', 'as text', 'unknown' (501), 'never met' (412), or 'busy' for those that cannot hold."""
    finer_ns: int = 0
    """By how much its clock is finer than what it answers."""
    requests_count: int = 0

    def __call__(self, span: ByteRange, out: memoryview, condition: dict[str, str], check: Check | None, /) -> Reply:
        self.requests_count += 1
        headers = HTTPMessage()
        if self.etag is not None:
            headers["ETag"] = self.etag
        if self.date is not None:
            headers["Last-Modified"] = self.date
        if status := self._refusal(condition):
            return Reply(status, headers, b"")
        if check:
            check(headers)
        out[:] = b"x" * len(span)
        return Reply(206, headers, b"")

    def _refusal(self, condition: dict[str, str]) -> int | None:
        match self.conditions, condition:
            case "ignored", _:
                return None
            case "unknown", {}:
                return 501 if condition else None
            case "never met", {}:
                return 412 if condition else None
            case "as text", {"If-Match": wanted}:
                return None if wanted == self.etag else 412
            case _, {"If-Match": wanted}:
                is_kept = wanted == "*" or wanted == f'"{self.hidden or (self.etag or "").strip(chr(34))}"'
                return None if is_kept else 412
            case _, {"If-Unmodified-Since": wanted}:
                since, modified = epoch_s(wanted), epoch_s(self.hidden or self.date or "")
                assert since is not None
                assert modified is not None
                if self.conditions == "busy" and since < modified:
                    return 503
                return 412 if modified * NS + self.finer_ns > since * NS else None
        return None

    hidden: str = ""
    """The validator of a server that answers without one."""


def read(server: Server, locator: str, *, trusts_dates: bool = False, binder: Binder | None = None) -> int:
    """The status of a read of two bytes."""
    binder = binder or Binder(trusts_dates=trusts_dates, advice="do something")
    out = bytearray(2)
    reply = binder.read(binding_of(locator), ByteRange(5, 7), memoryview(out), server, "s3://b/k")
    assert reply.status not in (200, 206) or bytes(out) == b"xx"
    return reply.status


STRONG, WEAK = locator_of('"v1"', None), locator_of('W/"v1"', None)
DATED, FINE = locator_of(None, WHEN * NS), locator_of(None, WHEN * NS + 678_000_000)


@pytest.mark.parametrize(
    ("server", "locator", "trusts_dates"),
    [
        (Server(etag='"v1"'), STRONG, False),
        (Server(etag="v1"), STRONG, False),
        (Server(etag='W/"v1"', conditions="as text"), STRONG, False),
        (Server(etag="v1", conditions="as text"), STRONG, False),
        (Server(etag='"v1"', conditions="unknown"), STRONG, False),
        (Server(etag='"v1"', conditions="ignored"), STRONG, False),
        (Server(hidden="v1"), STRONG, False),
        (Server(etag='W/"v1"', conditions="as text"), WEAK, False),
        (Server(etag='"v1"', conditions="ignored"), WEAK, False),
        (Server(date=DATE), DATED, False),
        (Server(date="Friday, 02-Jan-26 03:04:05 GMT"), DATED, False),
        (Server(hidden=DATE), DATED, False),
        (Server(date=DATE, finer_ns=678_000_000), FINE, False),
        (Server(date=DATE), FINE, False),
        (Server(date=DATE, conditions="ignored"), DATED, True),
        (Server(date=DATE, finer_ns=678_000_000), DATED, True),
        (Server(hidden=DATE), DATED, True),
    ],
)
def test_an_unchanged_object_is_read(server: Server, locator: str, trusts_dates: bool) -> None:
    binder = Binder(trusts_dates=trusts_dates, advice="")
    assert read(server, locator, binder=binder) == 206
    server.requests_count = 0
    assert read(server, locator, binder=binder) == 206
    assert server.requests_count == 1  # what the server's conditions are worth is known now


@pytest.mark.parametrize(
    ("server", "locator", "trusts_dates"),
    [
        (Server(etag='"v2"'), STRONG, False),
        (Server(etag='"v2"', conditions="ignored"), STRONG, False),
        (Server(etag='"v2"', conditions="unknown"), STRONG, False),
        (Server(hidden="v2"), STRONG, False),
        (Server(hidden=LATER), DATED, True),
        (Server(etag='W/"v2"', conditions="ignored"), WEAK, False),
        (Server(date=LATER, conditions="ignored"), DATED, False),
        (Server(date=LATER), DATED, True),
        (Server(date=LATER, conditions="ignored"), FINE, False),
    ],
)
def test_a_replaced_one_is_changed(server: Server, locator: str, trusts_dates: bool) -> None:
    with pytest.raises(ChangedError, match="s3://b/k: replaced"):
        read(server, locator, trusts_dates=trusts_dates)


def test_a_refused_date_is_left_to_the_caller() -> None:
    assert read(Server(date=LATER), DATED) == 412


@pytest.mark.parametrize(
    ("server", "locator", "trusts_dates", "text"),
    [
        (Server(etag='"v1"', date=DATE), "", False, "neither ETag nor date"),
        (Server(conditions="ignored"), STRONG, False, "no ETag and the server does not keep If-Match"),
        (Server(), WEAK, False, "no ETag"),
        (Server(etag='""', conditions="ignored"), STRONG, False, "no ETag"),
        (Server(conditions="never met"), STRONG, False, "no ETag"),
        (Server(conditions="unknown"), STRONG, False, "no ETag"),
        (Server(conditions="never met"), DATED, True, "no Last-Modified"),
        (Server(date=DATE, conditions="ignored"), DATED, False, "does not keep If-Unmodified-Since"),
        (Server(date=DATE, conditions="unknown"), DATED, False, "does not keep If-Unmodified-Since"),
        (Server(conditions="ignored"), DATED, True, "no Last-Modified"),
        (Server(date="yesterday", conditions="ignored"), DATED, True, "no Last-Modified"),
    ],
)
def test_where_nothing_tells_it_is_refused(server: Server, locator: str, trusts_dates: bool, text: str) -> None:
    with pytest.raises(IntegrityError, match=rf"s3://b/k: .*{text}.*; do something"):
        read(server, locator, trusts_dates=trusts_dates)


def test_a_server_too_busy_to_be_tried_is_not_taken_for_one_that_ignores_conditions() -> None:
    assert read(Server(date=DATE, conditions="busy"), DATED) == 503
    with pytest.raises(TransientStoreError):
        read(Failing(), DATED)


def test_a_refusal_that_cannot_be_looked_into_stands() -> None:
    class Fading(Server):
        def __call__(self, *request: Any) -> Reply:
            if not request[2]:
                raise TransientStoreError("reset")
            return super().__call__(*request)

    assert read(Fading(etag='"v2"'), STRONG) == 412
    with pytest.raises(TransientStoreError):
        read(Fading(etag='"v1"', conditions="unknown"), STRONG)


class Failing(Server):
    def __call__(self, *request: Any) -> Reply:
        raise TransientStoreError("reset")


@pytest.mark.parametrize("modified_ns", [-NS, 0, 1, WHEN * NS, WHEN * NS + 5, 2**63 * NS])
def test_locators_keep_dates_exactly(modified_ns: int) -> None:
    assert binding_of(locator_of(None, modified_ns)).modified_ns == modified_ns


def test_an_etag_that_no_header_can_carry_is_compared_only() -> None:
    binding = binding_of(locator_of('"a b\r\nX: y"', None))
    assert binding.etag
    assert binding.condition() == {}
    assert binding_of(f"If-Unmodified-Since: {http_date(WHEN)}").modified_ns == WHEN * NS
    assert binding_of("what an older version wrote").is_nothing


def listed(facts: str) -> tuple[str, str]:
    """(version, locator) of an object that S3 lists with these elements."""
    body = f"<ListBucketResult><Contents><Key>k</Key>{facts}<Size>5</Size></Contents></ListBucketResult>"
    ((_, entry),) = parse_listing(body.encode(), "s3://b").files
    return entry.version, entry.locator


TIME = "<LastModified>2026-01-02T03:04:05.678Z</LastModified>"


def test_versions_in_s3_listings() -> None:
    plain = listed(f"{TIME}<ETag>&quot;v1&quot;</ETag>")
    assert plain == ("v1", "") == listed("<ETag>v1</ETag>")
    assert listed("<ETag>W/&quot;v1&quot;</ETag>") == ("v1", WEAK)
    dated = listed(TIME)
    assert dated == (f"{WHEN}678000000-5", FINE)
    assert dated == listed(f"{TIME}<ETag></ETag>") == listed(f'{TIME}<ETag>""</ETag>')
    assert dated[0] != listed(TIME.replace("678", "679"))[0]
    assert binding_of(listed("")[1]).is_nothing


@pytest.mark.parametrize("spelling", ["v1", '"v1"', 'W/"v1"'])
def test_a_manifests_etag_is_one_version_however_it_is_spelled(spelling: str) -> None:
    tree = TreeBuilder("http://h/", "")
    quoted = spelling.replace('"', '\\"')
    add_manifest(tree, f'{{"files": [{{"path": "a", "size": 1, "etag": "{quoted}"}}]}}'.encode(), "http://h/")
    ((_, (entry,)),) = tree.pages()
    assert entry.version == '"v1"'
    assert binding_of(entry.locator).etag == "v1"
