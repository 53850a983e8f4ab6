"""Where redirects may lead: not from https to http."""

from __future__ import annotations

import http.client
import ssl
import time
from pathlib import Path

import pytest

from mfs.errors import StoreError
from mfs.fetch.redirects import HOPS_MAX, Hop, follow, next_hop
from mfs.fetch.transport import Reply
from mfs.sources import SourceOptions, open_source
from tests.servers.scripted import Answer, Request, ScriptedServer
from tests.servers.tls import make_certificate


def to(location: str) -> Reply:
    headers = http.client.HTTPMessage()
    headers["Location"] = location
    return Reply(302, headers, b"")


@pytest.mark.parametrize(
    ("way", "is_taken"),
    [
        (["http://a/", "http://b/"], True),
        (["http://a/", "https://b/"], True),
        (["http://a/", "https://b/", "http://c/"], True),
        (["https://a/", "https://b/"], True),
        (["https://a/", "http://a/"], False),
        (["https://a/", "http://b/"], False),
        (["https://a/", "https://b/", "http://c/"], False),
    ],
)
def test_a_way_that_began_at_https_stays_there(way: list[str], is_taken: bool) -> None:
    hop = Hop(way[0])
    for address in way[1:-1]:
        following = next_hop(hop, to(address))
        assert following is not None
        hop = following
    if is_taken:
        assert next_hop(hop, to(way[-1])) is not None
        return
    with pytest.raises(StoreError, match=r"redirects from https to http://[abc]: nothing is sent there"):
        next_hop(hop, to(way[-1]))


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/a b/\u6a21.bin".encode().decode("latin-1"), "http://a/a%20b/%E6%A8%A1.bin"),
        (" //b/x?name=a b&sig=%2B+/=~ ", "http://b/x?name=a%20b&sig=%2B+/=~"),
        ('w"<>^`{|}\\.bin', "http://a/d/w%22%3C%3E%5E%60%7B%7C%7D%5C.bin"),
        ("http://[::1]:80/w#part", "http://[::1]:80/w#part"),
    ],
)
def test_an_address_that_is_not_encoded_is_followed_as_it_is_meant(written: str, asked: str) -> None:
    assert next_hop(Hop("http://a/d/f"), to(written)) == Hop(asked, "//a" in asked, True)


def test_redirects_have_an_end() -> None:
    sent: list[str] = []

    def send(hop: Hop) -> Reply:
        sent.append(hop.url)
        return Reply(200, http.client.HTTPMessage(), b"") if len(sent) > last else to(f"http://a/{len(sent)}")

    last = HOPS_MAX
    assert follow(Hop("http://a/0"), send)[1].url == f"http://a/{HOPS_MAX}"
    sent.clear()
    last += 1
    with pytest.raises(StoreError, match=f"more than {HOPS_MAX} redirects"):
        follow(Hop("http://a/0"), send)


def test_nothing_is_sent_to_the_plain_address() -> None:
    sent: list[str] = []

    def send(hop: Hop) -> Reply:
        sent.append(hop.url)
        return to("http://b/w.bin?sig=canary")

    with pytest.raises(StoreError) as caught:
        follow(Hop("https://a/w.bin"), send)
    assert sent == ["https://a/w.bin"]
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("kind", ["http", "hub"])
def test_sources_refuse_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path / "tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.ca_file))
    with ScriptedServer(lambda request: Answer(200, b"[]")) as plain:

        def redirect(request: Request) -> Answer:
            return Answer(302, b"", (("Location", f"{plain.url}{request.path}"),))

        secure = ScriptedServer(redirect)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.cert_file, certificate.key_file)
        secure.wrap(context)
        with secure:
            url = f"{secure.url}/m/" if kind == "http" else "hf://org/name"
            source = open_source(url, SourceOptions(endpoint_url=secure.url, token="canary"))
            with pytest.raises(StoreError, match="redirects from https to http"):
                list(source.list("", deadline_s=time.monotonic() + 20))
            source.close()
        assert plain.requests == []
