"""Dates in the forms that origins write them. Pure; nothing here fails on what is no date."""

from __future__ import annotations

import email.utils
import math
import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TEXT_MAX = 64
_UTC_BEFORE_OFFSET = re.compile(r"\b(?:GMT|UTC|UT)\s*(?=[+-]\d)", re.IGNORECASE)
_COLON_IN_OFFSET = re.compile(r"(?<=[+-]\d\d):(?=\d\d$)")
_YEAR_BELOW_100 = re.compile(r"(?<![\d:+-])00\d\d(?![\d:])")
_UTC_BEHIND_ISO = re.compile(r"(?<=\d)(?: ?[+-]00:?00)? ?(?:GMT|UTC|UT|Z)\Z")
_SECONDS = re.compile(r"-?\d{1,12}(?:\.\d*)?", re.ASCII)
_FIRST_S = -62_135_596_800  # 0001-01-01
_LAST_S = 253_402_300_799  # 9999-12-31T23:59:59: what HTTP can write, and Python


def epoch_ns(value: object) -> int | None:
    """Nanoseconds since 1970 of a date, exact to the microsecond; None for what is none, or not of the years 1 to 9999.

    value: seconds since 1970 as a number or its digits (whole seconds count), or text in ISO 8601 or one of HTTP's
        three forms, zones by name or number. Without one it is UTC.
    Source: RFC 9110 §5.6.7 HTTP-date; RFC 3339; `parse_timestamp` of botocore, which takes digits too.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        found = math.floor(value) * 10**9 if _FIRST_S <= value <= _LAST_S else None  # not a number is in no range
    elif not isinstance(value, str) or len(value) > _TEXT_MAX:
        found = None
    elif moment := _moment(value.strip()):
        found = (moment - _EPOCH) // timedelta(microseconds=1) * 1000
    else:
        found = epoch_ns(float(value)) if _SECONDS.fullmatch(value.strip()) else None
    return found if found is not None and _FIRST_S <= found // 10**9 <= _LAST_S else None


def epoch_s(value: object) -> int | None:
    """Whole seconds since 1970, as `epoch_ns`: the finest that Last-Modified knows."""
    found = epoch_ns(value)
    return None if found is None else found // 10**9


@lru_cache(maxsize=256)
def http_date(seconds: int) -> str:
    """A time that `epoch_s` gave, as HTTP writes it."""
    return email.utils.formatdate(seconds, usegmt=True)


@lru_cache(maxsize=256)  # an object's date comes with each of its ranges
def _moment(text: str) -> datetime | None:
    for parse in (_iso_moment, _http_moment):
        try:
            found = parse(text.replace(":60", ":59"))  # leap seconds, which both formats know and Python does not
        except (ValueError, TypeError, OverflowError, IndexError):
            continue
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return None


def _iso_moment(text: str) -> datetime:
    """Small letters are as good (RFC 3339), and the zone may be a word of its own ('+0000 UTC', as Go prints)."""
    return datetime.fromisoformat(_UTC_BEHIND_ISO.sub("+00:00", text.upper()))


def _http_moment(text: str) -> datetime:
    found = email.utils.parsedate_to_datetime(_COLON_IN_OFFSET.sub("", _UTC_BEFORE_OFFSET.sub("", text)))
    # Four digits are the year itself ('Mon, 01 Jan 0001', Go's zero time); `email` takes 0001 for 2001.
    year = _YEAR_BELOW_100.search(text)
    return found.replace(year=int(year[0])) if year else found
