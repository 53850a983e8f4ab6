"""What is shown: secrets out of URLs, escapes for what a terminal would obey, one line a log record."""

from __future__ import annotations

import io
import logging

import pytest

from mfs.errors import StoreError, from_wire, to_wire
from mfs.logs import LogFormatter
from mfs.shown import clean, mask, mask_url
from mfs.sources import SourceOptions, open_source

CANARY = "C4nary"


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c", "hf://org/name@rev", "/dir/a:b@c", "https://host/", "file:///d", "file:///a:b@c/d",
        "https://host:8080/a@b", "http://[::1]:9000/x@y", "s3://b/k?versionId=3&list-type=2&prefix=a",
        "s3://bucket@http://127.0.0.1:9000", "hf://org/name@https://mirror", "relative/path@v1",
    ],
)  # fmt: skip
def test_urls_without_secrets_stay_as_they_are(url: str) -> None:
    assert mask_url(url) == url
    assert mask(f"GET {url}: refused") == f"GET {url}: refused"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"https://{CANARY}@host/p", "https://***@host/p"),
        (f"https://{CANARY}:@host/p", "https://***@host/p"),
        (f"https://:{CANARY}@host:1/p", "https://***@host:1/p"),
        (f"https://user:{CANARY}@host", "https://***@host"),
        (f"HTTPS://user:{CANARY}@host?x=1", "HTTPS://***@host?x=1"),
        (f"https:/user:{CANARY}@host/", "https:/***@host/"),
        (f"https://user:{CANARY}/{CANARY}@host/x", "https://***@host/x"),
        (f"https://user:{CANARY}#{CANARY}@host/x", "https://***@host/x"),
        (f"https://user:{CANARY}@{CANARY}@host/x", "https://***@host/x"),
        (f"http://user:{CANARY}@[::1]:9/", "http://***@[::1]:9/"),
        (f"s3://bucket/p@http://user:{CANARY}@host:9000", "s3://bucket/p@http://***@host:9000"),
        (f"hf://org/name@https://{CANARY}@mirror#hub-cache", "hf://org/name@https://***@mirror#hub-cache"),
        (f"https://h/p?a=1&X-Amz-Signature={CANARY}&b=2", "https://h/p?a=1&X-Amz-Signature=***&b=2"),
        (f"https://h/p?X%2DAmz%2DSecurity%2DToken={CANARY}", "https://h/p?X%2DAmz%2DSecurity%2DToken=***"),
        (f"https://h/p?se=2026&SIG={CANARY}", "https://h/p?se=2026&SIG=***"),
        (f"https://h/p?Policy={CANARY}&Key-Pair-Id={CANARY}", "https://h/p?Policy=***&Key-Pair-Id=***"),
        (f"https://h/p?access_token={CANARY}", "https://h/p?access_token=***"),
        (f"https://h/p#id_token={CANARY}", "https://h/p#id_token=***"),
    ],
)
def test_what_lets_in_is_taken_out(url: str, shown: str) -> None:
    assert mask_url(url) == shown
    assert mask(f"'{url}': refused") == f"'{shown}': refused"


def test_a_query_is_masked_where_a_library_names_no_host() -> None:
    said = f"HTTPPool(host='h'): Max retries exceeded with url: /v1?api_key={CANARY}&x=1 (refused): what? a=1"
    assert mask(said) == said.replace(CANARY, "***")


def test_an_endpoint_without_its_scheme_hides_its_user_too() -> None:
    assert mask_url(f"user:{CANARY}@host:9000") == "***@host:9000"


def test_messages_of_errors_are_masked_and_clean_wherever_they_come_from() -> None:
    said = f"GET https://u:{CANARY}@h/\n\x1b]0;owned\x07 \u202e\udc80 é 模型"
    want = "GET https://***@h/ \\x1b]0;owned\\x07 \\u202e\\udc80 é 模型"
    assert str(StoreError(said)) == want
    assert str(from_wire(*to_wire(ValueError(said)))) == f"ValueError: {want}"
    assert clean(want) == want


def test_a_log_record_is_one_line_and_its_traceback_clean() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("strange")
    log.addHandler(handler)
    log.warning("etag %s at %s", 'a\x1b[2J\nERROR forged\r"', f"https://{CANARY}@h/")
    try:
        raise ValueError(f"\x1b[1m https://u:{CANARY}@h/ \x9b")
    except ValueError:
        log.exception("it failed")
    lines = stream.getvalue().splitlines()
    assert lines[0] == 'WARNING etag a\\x1b[2J\\nERROR forged\\r" at https://***@h/'
    assert lines[1] == "ERROR it failed"
    assert lines[-1] == "ValueError: \\x1b[1m https://***@h/ \\x9b"
    assert CANARY not in stream.getvalue()


@pytest.mark.parametrize("userinfo", [CANARY, f"u:{CANARY}", f":{CANARY}", f"u:p@{CANARY}"])
@pytest.mark.parametrize("url", ["s3://bucket/a", "hf://org/name", "hf://org/name@rev", "http://{}@host:1/a/"])
def test_what_names_an_origin_to_readers_and_caches_holds_no_password(url: str, userinfo: str) -> None:
    source = open_source(url.format(userinfo), SourceOptions(endpoint_url=f"http://{userinfo}@host:1/p"))
    assert CANARY not in source.identity
    assert "@http://host:1/p" in source.identity or url.startswith("http:")
    source.close()
