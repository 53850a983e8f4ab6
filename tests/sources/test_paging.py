"""Listings in pages: all of them, or an error; never a part shown as the whole, never a loop."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from mfs.errors import StoreError
from mfs.sources import SourceOptions, open_source, paging
from mfs.sources.base import Source
from mfs.testing.suite import deadline, list_tree, object_of, read
from tests.servers.hub import HubServer
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_bucket, s3_listing

KEYS = [f"{n:02}.bin" for n in range(10)]
FILES = dict.fromkeys(KEYS, b"1")
COMMIT = "c" * 40

Script = Callable[[Request], Answer]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@contextmanager
def opened(url: str, answer: Script) -> Iterator[tuple[Source, ScriptedServer]]:
    with ScriptedServer(answer) as server:
        source = open_source(url, SourceOptions(endpoint_url=server.url))
        try:
            yield source, server
        finally:
            source.close()


def pages_of_three(more: str, last: str = "<IsTruncated>false</IsTruncated>") -> Script:
    """A bucket of KEYS, three to a page; `more` says with {next} and {last} how the next page is asked for."""

    def answer(request: Request) -> Answer:
        token, marker = request.query.get("continuation-token"), request.query.get("marker")
        first = int(token) if token else KEYS.index(marker) + 1 if marker else 0
        part = dict.fromkeys(KEYS[first : first + 3], b"1")
        if first + 3 >= len(KEYS):
            return s3_listing(part, last)
        return s3_listing(part, more.format(next=first + 3, last=KEYS[first + 2]))

    return answer


TOKEN = "<NextContinuationToken>{next}</NextContinuationToken>"


@pytest.mark.parametrize(
    ("more", "last"),
    [
        *((f"<IsTruncated>{said}</IsTruncated>{TOKEN}", "<IsTruncated>false</IsTruncated>")
          for said in ("true", "True", "TRUE", "1", " true ", "\n  true\n", "false", "0", "")),
        (TOKEN, ""),
        (f"<IsTruncated>true</IsTruncated>{TOKEN}", "<IsTruncated>False</IsTruncated><NextContinuationToken/>"),
        ("<Marker/><IsTruncated>true</IsTruncated><NextMarker>{last}</NextMarker>", ""),
        ("<Marker/><NextMarker>{last}</NextMarker>", ""),
        ("<Marker/><IsTruncated>true</IsTruncated>", "<IsTruncated>false</IsTruncated>"),
        ("<IsTruncated>1</IsTruncated>", "<IsTruncated>0</IsTruncated>"),
    ],
)  # fmt: skip
def test_every_way_to_say_that_an_s3_listing_goes_on(more: str, last: str) -> None:
    with opened("s3://b", pages_of_three(more, last)) as (source, _):
        assert sorted(list_tree(source)) == KEYS


@pytest.mark.parametrize("said", ["yes", "maybe", "truefalse", "2"])
def test_what_is_neither_true_nor_false_is_an_error(said: str) -> None:
    script = pages_of_three(f"<IsTruncated>{said}</IsTruncated>")
    with opened("s3://b", script) as (source, _), pytest.raises(StoreError, match="expected IsTruncated to be"):
        list_tree(source)


def endless(request: Request) -> Answer:
    """A new token every time, and other keys."""
    at = int(request.query.get("continuation-token", "0"))
    return s3_listing({f"{at}.bin": b"1"}, f"<IsTruncated>true</IsTruncated>{TOKEN}".format(next=at + 1))


def deaf(request: Request) -> Answer:
    """The first page, whatever is asked; a new token every time."""
    at = int(request.query.get("continuation-token", "0"))
    return s3_listing({"a": b"1"}, f"<IsTruncated>true</IsTruncated>{TOKEN}".format(next=at + 1))


def deaf_at_last(request: Request) -> Answer:
    """The first page again, called the last."""
    if "continuation-token" in request.query:
        return s3_listing(FILES)
    return s3_listing(FILES, "<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>")


def pointing_back(request: Request) -> Answer:
    """Empty pages that name each other."""
    at = request.query.get("continuation-token", "0")
    return s3_listing({}, f"<IsTruncated>true</IsTruncated>{TOKEN}".format(next="1" if at == "0" else "0"))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda _: s3_listing(FILES, "<KeyCount>10</KeyCount><IsTruncated>true</IsTruncated>"), "but not where"),
        (lambda _: s3_listing({}, "<IsTruncated>true</IsTruncated>"), "but not where"),
        (lambda _: s3_listing(FILES, "<Marker/><IsTruncated>true</IsTruncated>"), "came twice"),
        (deaf, "came twice"),
        (deaf_at_last, "came twice"),
        (pointing_back, "goes in circles"),
        (endless, "does not end"),
    ],
)
def test_an_s3_listing_that_does_not_end_well_is_an_error(
    answer: Script, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "PAGES_MAX", 50)
    with opened("s3://b", answer) as (source, server):
        with pytest.raises(StoreError, match=why):
            list_tree(source)
        assert len(server.requests) <= 52


def test_boto3_gives_the_same_where_it_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the scripted bucket is one."""
    boto3 = pytest.importorskip("boto3")
    with ScriptedServer(pages_of_three(f"<IsTruncated>true</IsTruncated>{TOKEN}")) as server:
        client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="b")
        assert [item["Key"] for page in pages for item in page["Contents"]] == KEYS
        client.close()


# -- the Hub


def hub_page(request: Request, link: str | None, *, size: int = 3) -> Answer:
    """The Hub's answers about KEYS, `size` to a page; link: the Link header's value with {path} and {query}."""
    if "/tree/" not in request.path:
        return Answer(200, json.dumps({"sha": COMMIT}).encode())
    at = int(request.query.get("cursor", "0"))
    items = [{"type": "file", "path": key, "oid": f"{n:040}", "size": 1} for n, key in enumerate(KEYS)][at : at + size]
    if link is None or at + size >= len(KEYS):
        return Answer(200, json.dumps(items).encode())
    value = link.format(path=request.path, query=f"recursive=true&cursor={at + size}")
    return Answer(200, json.dumps(items).encode(), (("Link", value),))


@pytest.mark.parametrize(
    "link",
    [
        "<https://huggingface.co{path}?{query}>; rel=next",  # what a mirror passes on
        "<http://127.0.0.2:1{path}?{query}>; rel=next",
        "<{path}?{query}>; rel=next",
        "<?{query}>; rel=next",
        "<{path}?cursor=0>; rel=first, <{path}?{query}>; title=next; rel=next",
    ],
)
def test_a_hub_listing_is_asked_for_at_our_endpoint(link: str) -> None:
    with opened("hf://org/name", lambda request: hub_page(request, link)) as (source, server):
        assert sorted(list_tree(source)) == KEYS
        assert len(server.requests) == 5


def test_an_endpoint_below_a_path_keeps_it() -> None:
    def answer(request: Request) -> Answer:
        if not request.path.startswith("/mirror/api/"):
            return Answer(404)
        link = "<https://huggingface.co{path}?{query}>; rel=next"
        return hub_page(request._replace(path=request.path.removeprefix("/mirror")), link)

    with ScriptedServer(answer) as server:
        source = open_source("hf://org/name", SourceOptions(endpoint_url=f"{server.url}/mirror/"))
        assert sorted(list_tree(source)) == KEYS
        source.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("link", ["<{path}?{query}>; rel=next", "<http://HOST{path}?{query}>; rel=next"])
def test_an_endpoint_that_leads_to_another_host_is_followed_without_the_token(status: int, link: str) -> None:
    with ScriptedServer(lambda request: hub_page(request, link.replace("HOST", request.headers["host"]))) as there:

        def moved(request: Request) -> Answer:
            query = "&".join(f"{name}={value}" for name, value in request.query.items())
            return Answer(status, headers=(("Location", f"{there.url}{request.path}?{query}"),))

        with ScriptedServer(moved) as here:
            source = open_source("hf://org/name", SourceOptions(endpoint_url=here.url, token="hf_x"))
            assert sorted(list_tree(source)) == KEYS
            source.close()
            assert {request.authorization for request in here.requests} == {"Bearer hf_x"}
        assert {request.authorization for request in there.requests} == {""}


def test_links_of_a_stranger_to_a_stranger_come_home_with_the_token() -> None:
    link = "<https://huggingface.co{path}?{query}>; rel=next"
    with ScriptedServer(lambda request: hub_page(request, link)) as server:
        source = open_source("hf://org/name", SourceOptions(endpoint_url=server.url, token="hf_x"))
        assert sorted(list_tree(source)) == KEYS
        source.close()
        assert {request.authorization for request in server.requests} == {"Bearer hf_x"}


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("<ftp://x{path}?{query}>; rel=next", "cannot be asked for"),
        ("{path}?{query}; rel=next", "expected a Link header"),
        ("<{path}?recursive=true>; rel=next", "goes in circles"),
        ("<{path}/gone?{query}>; rel=next", "404"),
    ],
)
def test_a_next_page_that_cannot_be_had_is_an_error(link: str, why: str) -> None:
    def answer(request: Request) -> Answer:
        return Answer(404) if request.path.endswith("gone") else hub_page(request, link)

    with opened("hf://org/name", answer) as (source, _), pytest.raises(Exception, match=why):
        list_tree(source)


@pytest.mark.parametrize(("body", "why"), [(b"[]", "does not end"), (b'[{"type": "file"}]', "expected a page")])
def test_a_hub_listing_without_end_is_an_error(body: bytes, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "PAGES_MAX", 50)
    count = itertools.count()

    def answer(request: Request) -> Answer:
        if "/tree/" not in request.path:
            return Answer(200, json.dumps({"sha": COMMIT}).encode())
        return Answer(200, body, (("Link", f"<{request.path}?cursor={next(count)}>; rel=next"),))

    with opened("hf://org/name", answer) as (source, _), pytest.raises(StoreError, match=why):
        list_tree(source)


def test_the_same_hub_page_under_other_cursors_is_an_error() -> None:
    count = itertools.count(1)

    def answer(request: Request) -> Answer:
        return hub_page(request._replace(query={}), f"<{{path}}?x={next(count)}&{{query}}>; rel=next")

    with opened("hf://org/name", answer) as (source, _), pytest.raises(StoreError, match="came twice"):
        list_tree(source)


def test_an_endless_listing_ends_by_its_deadline() -> None:
    with opened("s3://b", endless) as (source, _), pytest.raises(StoreError, match=r"deadline|does not end"):
        list(source.list("", deadline_s=deadline(0.5)))


@pytest.mark.parametrize("form", ["<{}>; rel=next", '<{}>; title="a, b; c"; rel="last next"'])
def test_the_stand_in_through_a_mirror(hub: HubServer, form: str) -> None:
    """The Hub's stand-in behind a mirror that passes everything on, Links included, as hf-mirror does."""
    import urllib.request

    hub.commit("mirrored/model", {**FILES, "w.safetensors": b"w" * 1000})
    hub.set(page_entries=4)

    def mirror(request: Request) -> Answer:
        query = "&".join(f"{name}={value}" for name, value in request.query.items())
        try:
            with urllib.request.urlopen(f"{hub.endpoint}{request.path}?{query}", timeout=20) as answered:
                link = answered.headers["Link"]
                body = answered.read()
        except urllib.error.HTTPError as error:
            return Answer(error.code)
        if request.method == "HEAD" or "/resolve/" in request.path:
            return Answer(307, headers=(("Location", f"{hub.endpoint}{request.path}"),))
        if link is None:
            return Answer(200, body)
        return Answer(200, body, (("Link", form.format(link[1 : link.index(">")])),))

    try:
        with opened("hf://mirrored/model", mirror) as (source, _):
            found = list_tree(source)
            assert sorted(found) == [*KEYS, "w.safetensors"]
            assert read(source, object_of(source, "w.safetensors", found["w.safetensors"])) == b"w" * 1000
    finally:
        hub.set(page_entries=1000)


def test_a_whole_bucket_takes_one_request() -> None:
    with opened("s3://b", lambda request: s3_bucket(request, FILES)) as (source, server):
        assert sorted(list_tree(source)) == KEYS
        assert len(server.requests) == 1
