"""The Link header: which page comes after this one. Pure; no I/O.

Source: RFC 8288 §3 and appendix B.2. Nothing in the standard library reads it; what requests and httpx offer splits at
commas and semicolons inside quotes.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from urllib.parse import quote, urldefrag, urljoin

from mfs.errors import StoreError
from mfs.fetch.transport import parse_target

_END = re.compile(r"[\s,]*\Z")
_TARGET = re.compile(r"[\s,]*<([^>]*)>")
_PARAMETER = re.compile(r'\s*;\s*(?:([^\s;,="]+)\s*(?:=\s*("(?:[^"\\]|\\.)*"|[^\s;,"]*))?)?', re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_REFERENCE_SAFE = "%:/?#[]@!$&'()*+,;=~"


def next_url(headers: http.client.HTTPMessage, page_url: str) -> str | None:
    """The absolute address that the answer at `page_url` names as its rel=next, or None if it names none.

    Raises: StoreError for a `next` that is no http(s) address, for two that differ, and for a header that speaks of a
    `next` and cannot be read: whoever took that for the last page would show a part as the whole.
    """
    shown = parse_target(page_url).shown
    found: set[str] = set()
    for line in headers.get_all("Link", []):
        for target, parameters in _links(line, shown):
            relations = parameters.get("rel", "").lower().split()
            if "next" in relations and _is_about(parameters.get("anchor"), page_url):
                found.add(_absolute(target, page_url, shown))
    if len(found) > 1:
        raise StoreError(f"{shown}: the listing names {len(found)} different next pages; expected one")
    return found.pop() if found else None


def _links(line: str, shown: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(target, parameters by lower-case name; of a name that comes twice the first counts) of each link of a header."""
    at = 0
    while not _END.match(line, at):
        match = _TARGET.match(line, at)
        if match is None:
            if "next" in line[at:].lower():
                raise StoreError(f'{shown}: expected a Link header like <address>; rel="next", got {line[at:][:80]!r}')
            return
        target, at = match[1].strip(), match.end()
        parameters: dict[str, str] = {}
        while match := _PARAMETER.match(line, at):
            name, value, at = match[1], match[2] or "", match.end()
            if name:
                parameters.setdefault(name.lower(), _unquoted(value))
        yield target, parameters


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        return _ESCAPED.sub(r"\1", value[1:-1])
    return value.strip("'")  # no quotes by the grammar, but meant as such, and huggingface_hub takes them so


def _is_about(anchor: str | None, page_url: str) -> bool:
    """Whether a link speaks of this page: an anchor may say that it speaks of another (RFC 8288 §3.2)."""
    return anchor is None or urldefrag(urljoin(page_url, anchor)).url == urldefrag(page_url).url


def _absolute(target: str, page_url: str, shown: str) -> str:
    # What no URI may hold (spaces, bytes beyond ASCII) is encoded, as browsers and requests do.
    url = urldefrag(urljoin(page_url, quote(target.encode("latin-1"), safe=_REFERENCE_SAFE))).url
    try:
        parse_target(url)
    except StoreError as e:
        raise StoreError(f"{shown}: the next page of the listing cannot be asked for: {target[:200]!r}: {e}") from e
    return url
