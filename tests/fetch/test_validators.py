"""One date, one ETag, in the spellings of other people's servers."""

from __future__ import annotations

import pytest

from mfs.fetch.dates import epoch_s, http_date
from mfs.fetch.validators import is_weak, opaque_of

WHEN = 1767323045


@pytest.mark.parametrize(
    "text",
    [
        "Fri, 02 Jan 2026 03:04:05 GMT",
        "Friday, 02-Jan-26 03:04:05 GMT",
        "Fri Jan  2 03:04:05 2026",
        "fri, 2 jan 2026 03:04:05 gmt",
        "Fri, 02 Jan 2026 03:04:05 UTC",
        "Fri, 02 Jan 2026 03:04:05 Z",
        "Fri, 02 Jan 2026 03:04:05 +0000",
        "Fri, 02 Jan 2026 03:04:05 -0000",
        "Fri, 02 Jan 2026 04:04:05 +0100",
        "Thu, 01 Jan 2026 22:04:05 -05:00",
        "Fri, 02 Jan 2026 03:04:05 GMT+00:00",
        "  Fri, 02 Jan 2026 03:04:05 GMT ",
        "02 Jan 2026 03:04:05 GMT",
        "2026-01-02T03:04:05.678Z",
        "2026-01-02T03:04:05",
        "2026-01-02t03:04:05z",
        "2026-01-02 03:04:05 UTC",
        "2026-01-02 03:04:05.678 +0000 UTC",
        "1767323045",
        " 1767323045.9",
    ],
)
def test_spellings_of_one_second(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert epoch_s(text) == WHEN
    assert epoch_s(http_date(WHEN)) == WHEN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "1767323045000",
        "１７６７３２３０４５",
        "1 UTC",
        "Fri, 02 Jan 99999999 03:04:05 GMT",
        "9" * 6000,
    ],
)
def test_what_is_no_date(text: str) -> None:
    assert epoch_s(text) is None


@pytest.mark.parametrize(
    ("etag", "opaque", "weak"),
    [
        ('"v1"', "v1", False),
        ("v1", "v1", False),
        ('W/"v1"', "v1", True),
        ("W/v1", "v1", True),
        (' w/"v1" ', "v1", True),
        ('""', "", False),
        ('W/""', "", True),
        ("", "", False),
        ('"W/v1"', "W/v1", False),
    ],
)
def test_spellings_of_an_etag(etag: str, opaque: str, weak: bool) -> None:
    assert (opaque_of(etag), is_weak(etag)) == (opaque, weak)
