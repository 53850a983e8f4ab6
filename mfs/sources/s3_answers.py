"""S3's answers made sense of: listing pages, and errors with what to check. Pure; no I/O.

Source: the ListObjectsV2 and Error Responses pages of the S3 API reference.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import unquote_plus

from mfs.errors import AccessError, ChangedError, MfsError, NotFoundError, StoreError, TransientStoreError
from mfs.fetch.retry import TRANSIENT_STATUSES, wished_pause_s
from mfs.fetch.transport import Reply
from mfs.types import Entry, EntryKind

_TAG = re.compile(rb"<(Code|Message|Region)>([^<]*)<")

_TRANSIENT_CODES = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"})

_ADVICE = {
    "InvalidAccessKeyId": "the access key is not known there: check the credentials and --endpoint-url",
    "SignatureDoesNotMatch": "the secret key is wrong, or a proxy rewrites requests",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "ExpiredToken": "the session token has expired: renew it",
    "AccessDenied": "these credentials may not: check that s3:ListBucket and s3:GetObject are allowed",
}


@dataclass
class ListingPage:
    """One page of keys."""

    files: list[tuple[str, Entry]] = field(default_factory=list)
    """(whole key, entry without a name)."""
    prefixes: list[str] = field(default_factory=list)
    """Common prefixes, each ending in the delimiter."""
    next_token: str | None = None
    """Where the next page starts, or None after the last."""


def parse_listing(body: bytes, where: str) -> ListingPage:
    """Read a ListObjectsV2 answer. Raises: StoreError if it is none."""
    try:
        root = ET.fromstring(body)
        if not root.tag.endswith("ListBucketResult"):
            raise StoreError(f"{where}: expected an S3 listing, got <{root.tag}>; is this an S3 endpoint?")
        space = root.tag.removesuffix("ListBucketResult")
        is_encoded = root.findtext(f"{space}EncodingType") == "url"
        page = ListingPage()
        for item in root.iterfind(f"{space}Contents"):
            page.files.append(_file(item, space, is_encoded))
        for item in root.iterfind(f"{space}CommonPrefixes"):
            prefix = item.findtext(f"{space}Prefix") or ""
            page.prefixes.append(unquote_plus(prefix, errors="surrogateescape") if is_encoded else prefix)
        if root.findtext(f"{space}IsTruncated") == "true":
            page.next_token = root.findtext(f"{space}NextContinuationToken")
            if not page.next_token:
                raise StoreError(f"{where}: a listing that says it goes on but not where")
    except (ET.ParseError, ValueError) as e:
        raise StoreError(f"{where}: expected an S3 listing, got {body[:60]!r}: {e}") from e
    return page


def _file(item: ET.Element, space: str, is_encoded: bool) -> tuple[str, Entry]:
    key = item.findtext(f"{space}Key") or ""
    if is_encoded:
        key = unquote_plus(key, errors="surrogateescape")
    modified = item.findtext(f"{space}LastModified")
    entry = Entry(
        name="",
        kind=EntryKind.FILE,
        size=int(item.findtext(f"{space}Size") or ""),
        mtime_ns=_nanoseconds(modified) if modified else 0,
        version=(item.findtext(f"{space}ETag") or "").strip('"'),
    )
    return key, entry


def _nanoseconds(timestamp: str) -> int:
    """'2026-01-02T03:04:05.678Z' as ns since the epoch, exactly."""
    moment = datetime.fromisoformat(timestamp)
    return int(moment.replace(microsecond=0).timestamp()) * 1_000_000_000 + moment.microsecond * 1000


def error_fields(reply: Reply) -> dict[str, str]:
    """Code, Message and Region of an error's XML, as far as given."""
    return {name.decode(): text.decode("utf-8", "replace") for name, text in _TAG.findall(reply.body)}


def region_hint(reply: Reply) -> str | None:
    """The region where the bucket is, if the answer says that it was asked in another."""
    if reply.status not in (301, 307, 400, 403):
        return None
    fields = error_fields(reply)
    if reply.status == 301 or fields.get("Code") in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        return reply.headers.get("x-amz-bucket-region") or fields.get("Region")
    return None


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
    if reply.status in (301, 307) or code == "AuthorizationHeaderMalformed":
        return StoreError(f"{said}: the bucket is not in region {region}; set --region or AWS_REGION")
    return StoreError(said)
