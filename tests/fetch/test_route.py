"""Which way a byte comes: what is taken of a cache, what is not, and when it is asked again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPMessage

import pytest

from mfs.errors import TransientStoreError
from mfs.fetch import route
from mfs.fetch.retry import Rest
from mfs.fetch.route import Cache, Route, Shared, cache_at, proves_itself
from mfs.fetch.told import taken_ways
from mfs.fetch.transport import Reply, Transport, parse_target
from mfs.fetch.validators import opaque_of
from mfs.testing import ramp
from mfs.types import ByteRange
from tests.servers.liar import LiarServer, Lie
from tests.servers.scripted import Answer, Request, ScriptedServer, s3_object

CONTENT = ramp(100_000)
OTHER = bytes(255 - b for b in CONTENT)


def truth(request: Request) -> Answer:
    return s3_object(request, CONTENT)


def is_listed(headers: HTTPMessage) -> bool:
    return opaque_of(headers.get("ETag", "")) == str(len(CONTENT))


class Nodes:
    """An origin, a cache and a node: `say` is what the cache answers."""

    def __init__(self, *, is_dragonfly: bool = False) -> None:
        self.say: Callable[[Request], Answer] = truth
        self.origin_says: Callable[[Request], Answer] = truth
        self.origin = ScriptedServer(lambda request: self.origin_says(request))
        self.cache = ScriptedServer(lambda request: self.say(request))
        self.transport = Transport()
        self.route = Route(self.transport, Cache(parse_target(self.cache.url).origin, is_dragonfly))

    def read(
        self, start: int = 10, stop: int = 5000, *, shared: Shared | None = None, time_s: float = 20.0
    ) -> tuple[Reply, bytes]:
        out = bytearray(stop - start)
        url = f"{self.origin.url}/w.bin"
        reply = self.route.read_range(
            url, ByteRange(start, stop), out=memoryview(out), size=len(CONTENT),
            headers={"Authorization": "Bearer canary"},
            shared=shared or Shared("name", f"{url}?sig=abc&exp=1", {}, is_listed),
            deadline_s=time.monotonic() + time_s,
        )  # fmt: skip
        return reply, bytes(out)

    @property
    def counts(self) -> tuple[int, int]:
        """(requests to the cache, to the origin) since they were looked at last."""
        found = len(self.cache.requests), len(self.origin.requests)
        self.cache.requests.clear()
        self.origin.requests.clear()
        return found


@pytest.fixture(autouse=True)
def _nothing_came_before() -> None:
    taken_ways()


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    nodes = Nodes(is_dragonfly=getattr(request, "param", False))
    with nodes.origin, nodes.cache:
        yield nodes
        nodes.route.close()
        nodes.transport.close()


def test_bytes_come_from_the_cache_without_the_credentials(nodes: Nodes) -> None:
    reply, got = nodes.read()
    assert (reply.status, got) == (206, CONTENT[10:5000])
    (asked,) = nodes.cache.requests
    assert asked.headers["host"] == nodes.origin.url.removeprefix("http://")
    assert asked.query == {"sig": "abc", "exp": "1"}
    assert asked.headers["mfs-object"] == "name"
    assert "authorization" not in asked.headers
    assert nodes.counts == (1, 0)
    assert (taken_ways(), taken_ways()) == ({"cache_bytes": 4990}, {})


def test_what_comes_past_the_cache_is_told_and_why(nodes: Nodes) -> None:
    nodes.say = lambda request: Answer(502)
    nodes.read()
    nodes.read()  # the cache is left alone for a while
    assert taken_ways() == {"direct_bytes": 2 * 4990, "cache_faults": 1}
    nodes.origin_says = lambda request: Answer(404)
    nodes.read()
    assert taken_ways() == {}


def test_of_what_breaks_off_and_is_read_on_all_is_told(nodes: Nodes, liar: LiarServer) -> None:
    (liar.files / "w.bin").write_bytes(CONTENT)
    out = bytearray(1000)
    rest = Rest(ByteRange(10, 1010), memoryview(out))

    def read(part: ByteRange, view: memoryview) -> None:
        nodes.route.read_range(
            f"{liar.url}w.bin", part, out=view, size=len(CONTENT), deadline_s=time.monotonic() + 20
        )  # fmt: skip

    liar.lie(Lie.TRUNCATED, after_bytes=700)
    with pytest.raises(TransientStoreError):
        rest.take(read)
    liar.tell_truth()
    rest.take(read)
    assert (bytes(out), taken_ways()) == (CONTENT[10:1010], {"direct_bytes": 1000})


def test_what_may_not_be_shared_is_asked_of_the_origin(nodes: Nodes) -> None:
    out = bytearray(100)
    nodes.route.read_range(
        f"{nodes.origin.url}/w.bin", ByteRange(0, 100), out=memoryview(out), size=len(CONTENT),
        deadline_s=time.monotonic() + 20,
    )  # fmt: skip
    assert (bytes(out), nodes.counts) == (CONTENT[:100], (0, 1))


@pytest.mark.parametrize("nodes", [True], indirect=True)
def test_dragonfly_is_told_what_makes_a_task(nodes: Nodes) -> None:
    assert nodes.read()[1] == CONTENT[10:5000]
    (asked,) = nodes.cache.requests
    told = {name: value for name, value in asked.headers.items() if name.startswith("x-dragonfly-")}
    assert told == {
        "x-dragonfly-use-p2p": "true",
        "x-dragonfly-content-for-calculating-task-id": "name",
        "x-dragonfly-tag": "name",
        "x-dragonfly-filtered-query-params": "sig&exp",
    }


def with_etag(content: bytes, etag: str) -> Callable[[Request], Answer]:
    def say(request: Request) -> Answer:
        status, body, headers = s3_object(request, content)
        said = tuple(header for header in headers if header[0] != "ETag")
        return Answer(status, body, (*said, ("ETag", etag)) if etag else said)

    return say


def of_size(size: int) -> Callable[[Request], Answer]:
    def say(request: Request) -> Answer:
        status, body, headers = s3_object(request, OTHER)
        return Answer(status, body, tuple((n, re.sub(r"/\d+$", f"/{size}", v)) for n, v in headers))

    return say


@pytest.mark.parametrize(
    "say",
    [
        with_etag(OTHER, '"stale"'),
        with_etag(OTHER, 'W/"stale"'),
        with_etag(OTHER, ""),
        of_size(99_999),
        lambda request: Answer(206, OTHER[:4990], (("ETag", '"100000"'), ("Content-Range", "bytes 0-4989/100000"))),
        lambda request: Answer(200, OTHER[:50], (("ETag", '"100000"'),)),
        lambda request: Answer(404, b"not here"),
        lambda request: Answer(403, b"not you"),
        lambda request: Answer(407),
        lambda request: Answer(412),
        lambda request: Answer(416),
        lambda request: Answer(302, b"", (("Location", "http://127.0.0.1:1/"),)),
    ],
    ids=["stale", "weak", "no-etag", "other-size", "other-range", "short", "404", "403", "407", "412", "416", "302"],
)
def test_whatever_else_the_cache_says_the_origin_is_asked_and_remembered(
    nodes: Nodes, say: Callable[[Request], Answer]
) -> None:
    nodes.say = say
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 1)
    assert nodes.read(0, 7)[1] == CONTENT[:7]
    assert nodes.counts == (0, 1), "that it has something else is remembered"
    other = Shared("name", f"{nodes.origin.url}/other.bin", {}, is_listed)
    nodes.say = truth
    assert nodes.read(shared=other)[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 0), "of this object alone"


def broken(request: Request) -> Answer:
    raise ConnectionAbortedError


def cut_short(request: Request) -> Answer:
    status, body, headers = s3_object(request, CONTENT)
    return Answer(status, body, (*headers, ("Transfer-Encoding", "chunked")))


@pytest.mark.parametrize(
    "say",
    [
        lambda request: Answer(500),
        lambda request: Answer(502),
        lambda request: Answer(504),
        lambda request: Answer(503),
        lambda request: Answer(503, b"", (("Retry-After", "5"),)),  # as varnish says by itself
        broken,
        cut_short,
        lambda request: Answer(500, b"", (("X-Dragonfly-Error-Type", "proxy"),)),
    ],
    ids=["500", "502", "504", "503", "503-retry-after", "reset", "cut", "dfdaemon"],
)
def test_a_cache_that_fails_is_left_alone_and_tried_again(
    nodes: Nodes, say: Callable[[Request], Answer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(route, "FIRST_PAUSE_S", 3600.0)
    monkeypatch.setattr(route, "PAUSE_S_MAX", 3600.0)
    nodes.say = say
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 1)
    for _ in range(3):
        assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (0, 3)
    assert len([r for r in caplog.records if "reading from the origin" in r.message]) == 1
    assert "canary" not in caplog.text
    assert "abc" not in caplog.text
    nodes.route._health._closed_until_s = 0.0  # the pause is over
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 1), "one tries, and fails again"
    nodes.say = truth
    nodes.route._health._closed_until_s = 0.0
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (2, 0), "it is used again"


def test_a_cache_that_is_silent_costs_one_reader_a_part_of_his_time(nodes: Nodes) -> None:
    def silent(request: Request) -> Answer:
        time.sleep(4)
        return truth(request)

    nodes.say = silent
    assert nodes.read(time_s=6)[1] == CONTENT[10:5000]
    assert nodes.read(time_s=6)[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 2)


def test_nobody_is_let_through_while_one_tries(nodes: Nodes) -> None:
    health = nodes.route._health
    assert health.enter() == 0
    health.fail(0, "gone")
    health.fail(0, "gone, as another reader found at the same time")
    assert health._failures == 1
    assert health.enter() is None
    health._closed_until_s = 0.0
    assert health.enter() == 1
    assert health.enter() is None


def test_an_origin_that_fails_behind_the_cache_is_not_the_cache_s_fault(nodes: Nodes) -> None:
    nodes.say = nodes.origin_says = lambda request: Answer(502)
    assert nodes.read()[0].status == 502
    nodes.say = truth
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (2, 1)


def wait(request: Request) -> Answer:
    return Answer(429, b"", (("Retry-After", "7"),))


def test_who_is_asked_to_wait_does_not_go_past_the_cache(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.say = wait
    reply, _ = nodes.read()
    assert (reply.status, reply.headers["Retry-After"]) == (429, "7")
    assert nodes.counts == (1, 0)
    # A cache that says so for ever is no reason to read nothing.
    monkeypatch.setattr(route, "WAITING_GRACE_S", -10.0)
    nodes.route._health.succeed()
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 1)


def test_an_origin_that_asks_to_wait_with_503_says_so_itself(nodes: Nodes) -> None:
    nodes.say = nodes.origin_says = lambda request: Answer(503, b"", (("Retry-After", "9"),))
    reply, _ = nodes.read()
    assert (reply.status, reply.headers["Retry-After"]) == (503, "9")
    assert nodes.counts == (1, 1)
    nodes.say = truth
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 0), "the cache did nothing wrong"


def test_a_wait_of_a_day_is_not_believed_of_the_cache_alone(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "WAITING_GRACE_S", 5.0 - route.WAIT_S_MAX - 10.0)  # what is believed is over
    nodes.say = lambda request: Answer(429, b"", (("Retry-After", "86400"),))
    assert nodes.read()[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 1)


def test_a_limit_of_the_cache_s_own_is_passed_by(nodes: Nodes) -> None:
    nodes.say = lambda request: Answer(429)
    assert nodes.read()[1] == CONTENT[10:5000]


def unlisted(nodes: Nodes) -> Shared:
    return Shared("name", f"{nodes.origin.url}/w.bin?sig=abc", {})


def test_what_no_listing_binds_is_bound_by_what_the_origin_says(nodes: Nodes) -> None:
    assert nodes.read(shared=unlisted(nodes))[1] == CONTENT[10:5000]
    assert [r.headers["range"] for r in nodes.origin.requests] == ["bytes=10-10"]
    assert nodes.counts == (1, 1)
    assert nodes.read(shared=unlisted(nodes))[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 0)
    nodes.say = with_etag(OTHER, '"stale"')
    assert nodes.read(shared=unlisted(nodes))[1] == CONTENT[10:5000]
    assert nodes.counts == (1, 1)


def test_an_origin_that_says_nothing_of_versions_is_read_directly(nodes: Nodes) -> None:
    nodes.origin_says = nodes.say = with_etag(CONTENT, "")
    for _ in range(2):
        assert nodes.read(shared=unlisted(nodes))[1] == CONTENT[10:5000]
    assert len(nodes.cache.requests) <= 1


def test_a_refusal_of_the_origin_is_its_own(nodes: Nodes) -> None:
    nodes.origin_says = lambda request: Answer(401)
    assert nodes.read(shared=unlisted(nodes))[0].status == 401
    assert nodes.counts == (0, 1)


def test_bytes_that_prove_wrong_are_asked_of_the_origin(nodes: Nodes) -> None:
    nodes.say = with_etag(OTHER, '"x"')
    shared = Shared("name", f"{nodes.origin.url}/w.bin?sig=1", {}, proves_itself)
    assert nodes.read(shared=shared)[1] == OTHER[10:5000]
    nodes.route.doubt(f"{nodes.origin.url}/w.bin")
    assert nodes.read(shared=shared)[1] == CONTENT[10:5000]


def test_a_proxy_of_the_environment_is_not_asked_for_the_cache(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert nodes.read()[1] == CONTENT[10:5000]


@pytest.mark.parametrize(
    ("via", "dragonfly", "private"),
    [
        ("http://127.0.0.1:8080", None, True),
        (None, "http://localhost:4001", True),
        ("https://cache:8443", None, True),
        ("http://10.0.0.1:8080", None, False),
        ("http://cache:8080/", None, False),
    ],
)
def test_who_may_see_a_token(via: str | None, dragonfly: str | None, private: bool) -> None:
    cache = cache_at(via, dragonfly)
    assert cache is not None
    assert (cache.is_private, cache.is_dragonfly) == (private, dragonfly is not None)
    assert cache_at(None, None) is None


def test_headers_have_no_query(nodes: Nodes) -> None:
    headers: Mapping[str, str] = Cache(parse_target("http://c").origin, True).headers(
        Shared("n", "http://o/x?t=canary", {})
    )
    assert "canary" not in str(headers)
