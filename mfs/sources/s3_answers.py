"""S3's answers made sense of: listing pages, and errors with what to check. Pure; no I/O.

Source: the ListObjectsV2 and Error Responses pages of the S3 API reference.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_plus

from mfs.errors import AccessError, ChangedError, MfsError, NotFoundError, StoreError, TransientStoreError
from mfs.fetch.dates import epoch_ns
from mfs.fetch.retry import TRANSIENT_STATUSES, wished_pause_s
from mfs.fetch.transport import Reply
from mfs.fetch.validators import is_weak, opaque_of
from mfs.sources.binding import UNBOUND, locator_of
from mfs.sources.bounds import size_of
from mfs.types import Entry, EntryKind

_TAG = re.compile(rb"<(Code|Message|Region)>([^<]*)<")

MOVED_STATUSES = (301, 302, 307, 308)
"""The bucket is elsewhere. Source: RFC 9110 §15.4; S3 uses 301 and 307, stores and proxies before it the others."""
_PARTS_MAX = 500_000  # tags of one page: a thousand keys have some 20,000
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""What XML 1.0 (§2.2, Char) cannot hold. All are below 0x10000."""
_REFERENCE = re.compile("&#(x[0-9a-fA-F]+|[0-9]+);")
_CARRIED = 0xF0000
"""Added to them on their way through the parser: a plane for private use, which a key has no cause to use."""
_CARRIED_CHARACTER = re.compile("[\U000f0000-\U000fffff]")

_TRANSIENT_CODES = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"})

_EXPIRED = "the session token has expired, and no newer one was found where it came from: renew it"

_ADVICE = {
    "InvalidAccessKeyId": "the access key is not known there: check the credentials and --endpoint-url",
    "SignatureDoesNotMatch": "the secret key is wrong, or a proxy rewrites requests",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": "the session token is not known there: check the credentials and --endpoint-url",
    "AccessDenied": "these credentials may not: check that s3:ListBucket and s3:GetObject are allowed, "
    "or whether the bucket wants --requester-pays",
}


@dataclass
class ListingPage:
    """One page of keys."""

    files: list[tuple[str, Entry]] = field(default_factory=list)
    """(whole key, entry without a name)."""
    prefixes: list[str] = field(default_factory=list)
    """Common prefixes, each ending in the delimiter."""
    following: dict[str, str] = field(default_factory=dict)
    """What to add to the query for the next page; empty after the last."""
    has_unsettled: bool = False
    """Whether an object that only its date binds was written within the second of this answer: another version of it
    may yet get the same date."""


def parse_listing(body: bytes, where: str, *, answered_s: int | None = None) -> ListingPage:
    """Read a ListObjectsV2 answer. answered_s: when the server says it gave it. Raises: StoreError if it is none."""
    try:
        root = _parsed(body)
        if not root.tag.endswith("ListBucketResult"):
            raise StoreError(f"{where}: expected an S3 listing, got <{root.tag}>; is this an S3 endpoint?")
        space = root.tag.removesuffix("ListBucketResult")
        is_encoded = root.findtext(f"{space}EncodingType") == "url"
        page = ListingPage()
        for item in root.iterfind(f"{space}Contents"):
            page.files.append(_file(item, space, is_encoded))
            page.has_unsettled |= answered_s is not None and _is_unsettled(page.files[-1][1], answered_s)
        for item in root.iterfind(f"{space}CommonPrefixes"):
            page.prefixes.append(_key(item.findtext(f"{space}Prefix") or "", is_encoded))
        page.following = _following(root, space, page, is_encoded, where)
    except (ET.ParseError, ValueError) as e:
        raise StoreError(f"{where}: expected an S3 listing, got {body[:60]!r}: {e}") from e
    return page


def _following(root: ET.Element, space: str, page: ListingPage, is_encoded: bool, where: str) -> dict[str, str]:
    """How to ask for the next page. A listing that in any way says that it goes on is not over.

    Raises: StoreError if it does not say where, or neither that it goes on nor that it is over.
    Source: ListObjectsV2, and ListObjects for stores that answer so whatever they are asked.
    """

    def said(name: str) -> str:
        return (root.findtext(f"{space}{name}") or "").strip()

    truncated = said("IsTruncated").lower()
    if truncated not in ("true", "1", "false", "0", ""):  # XML's booleans, and what people make of them
        raise StoreError(f"{where}: expected IsTruncated to be true or false, got {truncated[:60]!r}")
    if token := said("NextContinuationToken"):
        return {"continuation-token": token}
    if marker := said("NextMarker"):
        return {"marker": _key(marker, is_encoded)}
    if truncated not in ("true", "1"):
        return {}
    names = [key for key, _ in page.files[-1:]] + page.prefixes[-1:]
    if root.find(f"{space}KeyCount") is not None or not names:
        raise StoreError(f"{where}: a listing that says it goes on but not where")
    return {"marker": max(names)}  # ListObjects: without a delimiter the last key is the marker


def _file(item: ET.Element, space: str, is_encoded: bool) -> tuple[str, Entry]:
    key = _key(item.findtext(f"{space}Key") or "", is_encoded)
    mtime_ns = epoch_ns(item.findtext(f"{space}LastModified")) or 0
    size = size_of(item.findtext(f"{space}Size"))
    version, locator = _version(item.findtext(f"{space}ETag") or "", mtime_ns, size)
    return key, Entry("", EntryKind.FILE, size, mtime_ns, version, None, locator)


def _version(etag: str, mtime_ns: int, size: int) -> tuple[str, str]:
    """(version, locator). A strong ETag needs no locator: a bucket has millions of them."""
    if opaque := opaque_of(etag):
        return opaque, locator_of(etag, None) if is_weak(etag) else ""
    if mtime_ns > 0:
        return f"{mtime_ns}-{size}", locator_of(None, mtime_ns)
    return UNBOUND, UNBOUND


def _is_unsettled(entry: Entry, answered_s: int) -> bool:
    return entry.version == f"{entry.mtime_ns}-{entry.size}" and entry.mtime_ns // 1_000_000_000 >= answered_s


def _parsed(body: bytes) -> ET.Element:
    """The XML of an answer. Raises: ET.ParseError; ValueError for one with more parts than a page can have.

    A key may hold characters that XML has no way to write; servers without `encoding-type` write them all the same,
    raw or as references, and the whole page is no XML then. They are carried past the parser, and the key is refused
    for what it is.
    """
    if (parts_count := body.count(b"<")) > _PARTS_MAX:
        raise ValueError(f"{parts_count} tags, more than {_PARTS_MAX}")
    if b"<!DOCTYPE" in body:  # what it declares may grow beyond measure
        raise ValueError("a document type")
    try:
        return ET.fromstring(body)
    except ET.ParseError:
        text = _REFERENCE.sub(_carried_reference, body.decode("utf-8", "surrogateescape"))
        return ET.fromstring(_UNWRITABLE.sub(lambda match: chr(_CARRIED + ord(match[0])), text))


def _carried_reference(match: re.Match[str]) -> str:
    digits = match[1].lstrip("x0")[:8] or "0"  # eight are more than Unicode has, and quick to read
    code = int(digits, 16 if match[1][0] == "x" else 10)
    if code < 0x110000 and not _UNWRITABLE.fullmatch(chr(code)):
        return match[0]
    return chr(_CARRIED + code) if code < 0x10000 else chr(_CARRIED)  # beyond Unicode: no name either


def _key(text: str, is_encoded: bool) -> str:
    """A key as it is, undecodable bytes as lone surrogates."""
    if is_encoded:
        return unquote_plus(text, errors="surrogateescape")
    return _CARRIED_CHARACTER.sub(lambda match: chr(ord(match[0]) - _CARRIED), text)


def error_fields(reply: Reply) -> dict[str, str]:
    """Code, Message and Region of an error's XML, as far as given."""
    return {name.decode(): text.decode("utf-8", "replace") for name, text in _TAG.findall(reply.body)}


def error_of(reply: Reply, where: str, region: str) -> MfsError:
    """Our error for an answer that is neither 200 nor 206."""
    fields: Mapping[str, str] = error_fields(reply)
    code = fields.get("Code", "")
    said = f"{where}: S3 answered {reply.status} {code}".rstrip() + (f" ({m})" if (m := fields.get("Message")) else "")
    if reply.status == 412:
        return ChangedError(f"{where}: replaced since it was listed; refresh to see the new version")
    if reply.status == 416:
        return ChangedError(f"{where}: shorter than when it was listed; refresh to see the new version")
    if reply.status in TRANSIENT_STATUSES or code in _TRANSIENT_CODES:
        return TransientStoreError(said, retry_after_s=wished_pause_s(reply.headers))
    if reply.status in (401, 403) or code in _ADVICE:
        return AccessError(f"{said}; {_ADVICE.get(code, 'check the credentials and the bucket policy')}")
    if code == "NoSuchBucket":
        return NotFoundError(f"{where}: no such bucket; check its name and --endpoint-url")
    if reply.status == 404:
        return NotFoundError(f"{where}: S3 answered 404 {code}: not there (any more)")
    if reply.status in MOVED_STATUSES or code == "AuthorizationHeaderMalformed":
        return StoreError(f"{said}: the bucket is not in region {region}; set --region or AWS_REGION")
    return StoreError(said)
