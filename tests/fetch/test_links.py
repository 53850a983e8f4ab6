"""The Link header in every legal form; what cannot be followed is an error, never the end."""

from __future__ import annotations

import http.client

import pytest

from mfs.errors import StoreError
from mfs.fetch.links import next_url

PAGE = "http://hub:8080/api/models/o/n/tree/c?recursive=true"


def headers(*lines: str, name: str = "Link") -> http.client.HTTPMessage:
    found = http.client.HTTPMessage()
    for line in lines:
        found[name] = line
    return found


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['<http://o/a?c=1>; rel="next"'], "http://o/a?c=1"),
        (["<http://o/a>;rel=next"], "http://o/a"),
        (["<http://o/a> ; REL = NEXT ;"], "http://o/a"),
        (['<http://o/a>; rel="first Next"'], "http://o/a"),
        (['<http://o/a>; rel="http://o/rels/x\tnext"'], "http://o/a"),
        (['<http://o/a>; title="x"; rel="next"; type="a/b"'], "http://o/a"),
        (["<http://o/a>; crossorigin; rel=next"], "http://o/a"),
        (['<http://o/a>; title="<http://o/b>; rel=\\"prev\\", x;y"; rel=next'], "http://o/a"),
        (["<http://o/a>; title*=UTF-8''x%2C; rel=next"], "http://o/a"),
        (['<http://o/0>; rel="prev", <http://o/a>; rel="next", <http://o/9>; rel=last'], "http://o/a"),
        (['<http://o/0>; rel="prev"', '<http://o/a>; rel="next"'], "http://o/a"),
        ([", ,<http://o/a>; rel=next,,"], "http://o/a"),
        (["<http://o/a,b;c?d=1,2;3>; rel=next"], "http://o/a,b;c?d=1,2;3"),
        (["<http://o/a>;\r\n rel=next"], "http://o/a"),
        (["<?cursor=2>; rel=next"], "http://hub:8080/api/models/o/n/tree/c?cursor=2"),
        (["</x?y>; rel=next"], "http://hub:8080/x?y"),
        (["<d>; rel=next"], "http://hub:8080/api/models/o/n/tree/d"),
        (["<../d>; rel=next"], "http://hub:8080/api/models/o/n/d"),
        (["<//o/a>; rel=next"], "http://o/a"),
        (["< http://o/a#frag >; rel=next"], "http://o/a"),
        (["<http://o/a b>; rel=next"], "http://o/a%20b"),
        (["<http://o/a%20b>; rel=next"], "http://o/a%20b"),
        (["<http://o/a>; rel=next, <http://o/a>; rel=next; type=x"], "http://o/a"),
        (['<http://o/a>; rel=next; anchor="#part"'], "http://o/a"),
        (["<http://o/a>; rel='next'"], "http://o/a"),  # what huggingface_hub takes, too
    ],
)
def test_next_is_found(lines: list[str], expected: str) -> None:
    assert next_url(headers(*lines), PAGE) == expected
    assert next_url(headers(*lines, name="link"), PAGE) == expected


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [""],
        ['<http://o/a>; rel="prev"'],
        ['<http://o/a>; rel="nextpage"'],
        ["<http://o/next>"],
        ['<http://o/a>; title="rel=next"'],
        ["<http://o/a>; rev=next"],
        ['<http://o/a>; rel="prev"; rel="next"'],  # RFC 8288 §3.3: the first counts
        ['<http://o/a>; rel=next; anchor="http://o/other"'],  # §3.2: it speaks of another page
        ["preload"],
    ],
)
def test_other_links_name_no_next(lines: list[str]) -> None:
    assert next_url(headers(*lines), PAGE) is None


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("http://o/a; rel=next", "expected a Link header"),
        ('<http://o/a>; rel="next', "expected a Link header"),
        ("<http://o/a; rel=next", "expected a Link header"),
        ('<http://o/a>; rel="prev" and <b; rel=next', "expected a Link header"),
        ("<mailto:a@b>; rel=next", "cannot be asked for"),
        ("<http://o:port/>; rel=next", "cannot be asked for"),
        ("<a>; rel=next, <b>; rel=next", "2 different next pages"),
    ],
)
def test_a_next_that_cannot_be_followed_is_an_error(line: str, why: str) -> None:
    with pytest.raises(StoreError, match=why):
        next_url(headers(line), PAGE)


def test_long_headers_take_no_time() -> None:
    for part in ("<>,", '<a>; t="', '\\"', "<", ";", " ", "<a>;x;"):
        line = (part * 65536)[:65536]
        assert next_url(headers(line), PAGE) is None
