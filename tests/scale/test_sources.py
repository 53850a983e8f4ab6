"""Every kind of source through every kind of cache: read once from the origin, exact, and without its secrets."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest

from mfs.errors import TransientStoreError
from mfs.registry.folder_store import FolderStore
from mfs.sources import SourceOptions, open_source
from mfs.sources.base import Source
from mfs.testing.suite import deadline, list_tree, object_of
from mfs.types import CHUNK_BYTES, ByteRange, ObjectId
from tests.oci import artifacts
from tests.registry import made
from tests.registry.places import S3Place
from tests.servers.chaos import ChaosProxy
from tests.servers.dfdaemon import DfdaemonServer
from tests.servers.docker_registry import DockerRegistry
from tests.servers.hub import HubServer
from tests.servers.hub_site import CDN_HOST
from tests.servers.nginx import NginxServer
from tests.servers.node_cache import NginxCache, VarnishCache
from tests.servers.swift import SwiftServer

NODES = 4
CONTENT = os.urandom(2 * CHUNK_BYTES - 1000)
OLD = os.urandom(len(CONTENT))
PATH = "model/w.bin"


class Origin(Protocol):
    canaries: tuple[str, ...]
    """What no cache may write down."""

    def source(self, **options: Any) -> Source: ...

    def put(self, content: bytes) -> None:
        """Make this the content of PATH, in a new version."""
        ...

    def close(self) -> None: ...


class Plain:
    def close(self) -> None:
        """Nothing is open."""


class Web(Plain):
    canaries: tuple[str, ...] = ()

    def __init__(self, nginx: NginxServer) -> None:
        self.nginx = nginx
        self.name = uuid.uuid4().hex[:12]
        self.seconds = 1_767_225_600

    def source(self, **options: Any) -> Source:
        return open_source(f"{self.nginx.url}{self.name}/", SourceOptions(**options))

    def put(self, content: bytes) -> None:
        target = self.nginx.files / self.name / PATH
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        self.seconds += 1
        os.utime(target, (self.seconds, self.seconds))


class S3(Plain):
    def __init__(self, swift: SwiftServer, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.swift, self.bucket = swift, bucket
        for name, value in swift.environ().items():
            monkeypatch.setenv(name, value)
        self.canaries = (swift.access_key, swift.secret_key, "X-Amz-", "Signature")

    def source(self, **options: Any) -> Source:
        return open_source(f"s3://{self.bucket}/prod", SourceOptions(endpoint_url=self.swift.endpoint, **options))

    def put(self, content: bytes) -> None:
        self.swift.client().put_object(Bucket=self.bucket, Key=f"prod/{PATH}", Body=content)


class Hub(Plain):
    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.repo = f"org/{uuid.uuid4().hex[:12]}"
        self.canaries = (hub.token, "X-Amz-", "Signature")

    def source(self, **options: Any) -> Source:
        options = {"endpoint_url": self.hub.endpoint, "token": self.hub.token, **options}
        return open_source(f"hf://{self.repo}", SourceOptions(**options))

    def put(self, content: bytes) -> None:
        self.hub.commit(self.repo, {PATH: content}, private=True)


class RegistryOnS3:
    """Ours."""

    def __init__(self, place: S3Place) -> None:
        self.place = place
        self.registry = made.Registry(place.store(), chunk_bytes=CHUNK_BYTES)
        keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        self.canaries = (*keys, "X-Amz-", "Signature")

    def source(self, **options: Any) -> Source:
        return open_source(
            f"{self.place.url}/llama:prod",
            SourceOptions(endpoint_url=self.place.options.endpoint_url, region=self.place.options.region, **options),
        )

    def put(self, content: bytes) -> None:
        self.registry.push("llama", "prod", {PATH: content})

    def close(self) -> None:
        self.registry.store.close()
        self.place.close()


class Oci:
    canaries: tuple[str, ...] = ()

    def __init__(self, registry: DockerRegistry) -> None:
        self.pushed = artifacts.RegistryOrigin(registry)

    def source(self, **options: Any) -> Source:
        return self.pushed.source(**options)

    def put(self, content: bytes) -> None:
        self.pushed.put_all({PATH: content})

    def close(self) -> None:
        self.pushed.close()


@pytest.fixture(params=["web", "s3", "hub", "registry", "oci"])
def origin(
    request: pytest.FixtureRequest, nginx: NginxServer, swift: SwiftServer, hub: HubServer, registry: DockerRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Origin]:  # fmt: skip
    """Each kind of origin in turn."""
    found: Origin
    match request.param:
        case "web":
            found = Web(nginx)
        case "s3":
            found = S3(swift, request.getfixturevalue("s3_bucket"), monkeypatch)
        case "hub":
            found = Hub(hub)
        case "registry":
            found = RegistryOnS3(S3Place(swift, request.getfixturevalue("s3_bucket"), monkeypatch))
        case _:
            found = Oci(registry)
    yield found
    found.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., tuple[Source, ObjectId]]]:
    """`opened(origin, **options)` is a source of a node's own and PATH as it lists it."""
    sources: list[Source] = []

    def open_one(origin: Origin, **options: Any) -> tuple[Source, ObjectId]:
        source = origin.source(**options)
        sources.append(source)
        return source, object_of(source, PATH, list_tree(source)[PATH])

    yield open_one
    for source in sources:
        source.close()


def read_whole(source: Source, obj: ObjectId) -> bytes:
    """Chunk by chunk, as a mount does."""
    out = bytearray(obj.size)
    for start in range(0, obj.size, CHUNK_BYTES):
        span = ByteRange(start, min(obj.size, start + CHUNK_BYTES))
        source.get_range(obj, span, out=memoryview(out)[span.start : span.stop], deadline_s=deadline())
    return bytes(out)


def read_by_all(nodes: list[tuple[Source, ObjectId]]) -> None:
    with ThreadPoolExecutor(len(nodes)) as pool:
        for got in pool.map(lambda node: read_whole(*node), nodes):
            assert got == CONTENT


def has_none(traces: bytes, canaries: tuple[str, ...]) -> None:
    assert traces
    for canary in canaries:
        assert canary.encode() not in traces, canary


def test_nodes_share_one_download_through_nginx(origin: Origin, nginx_cache: NginxCache, opened: Any) -> None:
    origin.put(OLD)
    assert read_whole(*opened(origin, via=nginx_cache.url)) == OLD
    origin.put(CONTENT)
    read_by_all([opened(origin, via=nginx_cache.url) for _ in range(NODES)])
    answers = nginx_cache.answers(at_least=2 * (NODES + 1))  # each node asked it
    assert answers.count("MISS") <= len(keys_of(nginx_cache)), "which asked once for each slice of each version"
    has_none(nginx_cache.traces(), origin.canaries)


def keys_of(cache: NginxCache) -> list[bytes]:
    found = [file.read_bytes()[:4096] for file in (cache.root / "cache").rglob("*") if file.is_file()]
    return [part.partition(b"\nKEY: ")[2].partition(b"\n")[0] for part in found]


def test_nodes_share_one_download_through_dragonfly(origin: Origin, dfdaemon: DfdaemonServer, opened: Any) -> None:
    origin.put(OLD)
    assert read_whole(*opened(origin, dragonfly=dfdaemon.url)) == OLD
    before = dfdaemon.stats()
    origin.put(CONTENT)
    read_by_all([opened(origin, dragonfly=dfdaemon.url) for _ in range(NODES)])
    stats = dfdaemon.stats()
    assert stats["requests"] >= before["requests"] + 2 * NODES
    assert stats["tasks"] == 2 * before["tasks"], "each version is a task, or has its chunks' own"
    assert stats["pieces"] == 2 * before["pieces"]
    assert stats.get("passed", 0) == 0
    has_none(dfdaemon.traces(), origin.canaries)


@pytest.mark.parametrize("kind", ["web", "hub"])
def test_nodes_share_one_download_through_varnish(
    kind: str, nginx: NginxServer, hub: HubServer, tmp_path: Path, opened: Any
) -> None:
    origin: Web | Hub = Web(nginx) if kind == "web" else Hub(hub)
    asked = nginx.url if kind == "web" else f"http://{CDN_HOST}:{hub.port}"
    with VarnishCache(tmp_path / "varnish", asked) as cache:
        origin.put(OLD)
        assert read_whole(*opened(origin, via=cache.url)) == OLD
        origin.put(CONTENT)
        nodes = [opened(origin, via=cache.url) for _ in range(NODES)]
        nginx.forget_requests()
        hub.forget_stats()
        read_by_all(nodes)
        sent = sum(r.sent_bytes for r in nginx.requests()) + hub.stats().get("cdn_bytes", 0)
        assert len(CONTENT) <= sent <= 1.1 * len(CONTENT)
        has_none(cache.traces(), origin.canaries)


@pytest.mark.parametrize("kind", ["web", "s3"])
def test_a_cache_of_another_version_is_not_believed(
    kind: str, nginx: NginxServer, swift: SwiftServer, s3_bucket: str, monkeypatch: pytest.MonkeyPatch,
    stale_cache: NginxCache, opened: Any,
) -> None:  # fmt: skip
    """Its keys lack the version, so it gives the old bytes for the new object, which has the same address."""
    origin: Web | S3 = Web(nginx) if kind == "web" else S3(swift, s3_bucket, monkeypatch)
    origin.put(OLD)
    assert read_whole(*opened(origin, via=stale_cache.url)) == OLD
    origin.put(CONTENT)
    assert read_whole(*opened(origin, via=stale_cache.url)) == CONTENT
    assert stale_cache.answers(at_least=3)[2:] == ["HIT"], "asked once, and not for the rest"


def test_a_registry_finds_a_cache_out_that_lies(
    swift: SwiftServer, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, dfdaemon: DfdaemonServer, opened: Any
) -> None:
    origin = RegistryOnS3(S3Place(swift, s3_bucket, monkeypatch))
    origin.put(CONTENT)
    dfdaemon.fail("lie")
    assert read_whole(*opened(origin, dragonfly=dfdaemon.url)) == CONTENT
    assert dfdaemon.stats()["requests"] > 0
    origin.close()


@pytest.mark.parametrize("how", ["proxy", "dfdaemon", "limit"])
def test_dragonfly_that_fails_is_passed_by(how: str, nginx: NginxServer, dfdaemon: DfdaemonServer, opened: Any) -> None:
    origin = Web(nginx)
    origin.put(CONTENT)
    dfdaemon.fail(how)
    source, obj = opened(origin, dragonfly=dfdaemon.url)
    assert read_whole(source, obj) == CONTENT
    assert dfdaemon.stats()["requests"] == 1


@pytest.mark.parametrize(
    "weather",
    [
        {"reset_after_bytes": 100_000},
        {"truncate_after_bytes": 100_000},
        {"stall_after_bytes": 100_000},
        {"rate_mb_s": 0.2},
    ],
    ids=["reset", "end", "stall", "slow"],
)
def test_whatever_happens_on_the_way_to_the_cache(
    weather: dict[str, Any], nginx: NginxServer, nginx_cache: NginxCache, chaos: Callable[[str], ChaosProxy],
    opened: Any,
) -> None:  # fmt: skip
    origin = Web(nginx)
    origin.put(CONTENT)
    proxy = chaos(nginx_cache.url)
    source, obj = opened(origin, via=proxy.url.rstrip("/"))
    out = bytearray(9)
    source.get_range(obj, ByteRange(0, 9), out=memoryview(out), deadline_s=deadline())
    assert out == CONTENT[:9]
    before = proxy.stats().down_bytes
    assert before > 0
    proxy.set(**weather)
    whole = bytearray(CHUNK_BYTES)
    source.get_range(obj, ByteRange(0, CHUNK_BYTES), out=memoryview(whole), deadline_s=deadline(5.0))
    assert whole == CONTENT[:CHUNK_BYTES]
    assert proxy.stats().down_bytes > before, "it was asked, and gave too little in time"


def test_a_password_reaches_no_cache(nginx: NginxServer, nginx_cache: NginxCache, opened: Any) -> None:
    origin = Web(nginx)
    origin.put(CONTENT)
    secret = nginx.url.replace("http://", f"http://{nginx.user}:{nginx.password}@")
    source = open_source(f"{secret}~private/{origin.name}/", SourceOptions(via=nginx_cache.url))
    assert read_whole(source, object_of(source, PATH, list_tree(source)[PATH])) == CONTENT
    assert nginx_cache.answers() == []
    source.close()


def test_a_registry_on_the_web_is_shared_as_well(nginx: NginxServer, nginx_cache: NginxCache) -> None:
    name = uuid.uuid4().hex[:12]
    made.Registry(FolderStore(str(nginx.files / name))).push("llama", "prod", {PATH: CONTENT})
    for _ in range(2):
        source = open_source(f"mfs+{nginx.url}{name}/llama:prod", SourceOptions(via=nginx_cache.url))
        assert read_whole(source, object_of(source, PATH, list_tree(source)[PATH])) == CONTENT
        source.close()
    assert set(nginx_cache.answers(at_least=4)) == {"HIT", "MISS"}


def test_the_cdn_is_asked_again_once_for_all_nodes(hub: HubServer, nginx_cache: NginxCache, opened: Any) -> None:
    """It asks to wait: the cache says so to the others by itself, and one of them asks it next."""
    origin = Hub(hub)
    origin.put(CONTENT)
    nodes = [opened(origin, via=nginx_cache.url) for _ in range(2 * NODES)]
    for source, obj in nodes:
        source.get_range(obj, ByteRange(0, 1), out=memoryview(bytearray(1)), deadline_s=deadline())
    hub.forget_stats()
    hub.reject(10_000, 429, host="cdn", headers={"Retry-After": "1"})
    log = nginx_cache.root / "access.log"
    with ThreadPoolExecutor(len(nodes)) as pool:
        readers = [pool.submit(read_whole, *node) for node in nodes]
        while (put_off := log.read_text().count(" 429 ")) < 2 * len(nodes):
            assert not any(reader.done() for reader in readers)
        rejected = hub.stats()["rejected"]
        hub.reject(0, 429, host="cdn")
        assert all(reader.result() == CONTENT for reader in readers)
    assert 1 <= rejected < put_off


def test_what_the_hub_asks_of_one_thread_holds_for_all(hub: HubServer) -> None:
    """Its own limit counts requests for addresses, which each node makes for itself, with its token."""
    repo = f"org/{uuid.uuid4().hex[:12]}"
    hub.commit(repo, {f"{number}.bin": os.urandom(200_000) for number in range(2)})
    source = open_source(f"hf://{repo}", SourceOptions(endpoint_url=hub.endpoint))
    first, second = (object_of(source, name, entry) for name, entry in list_tree(source).items())
    hub.limit_rate(1, wait_s=200)
    for obj in (first, second):
        asked = hub.stats()["hub"]
        with pytest.raises(TransientStoreError, match=r"the server asks to wait \d+ s"):
            source.get_range(obj, ByteRange(0, 9), out=memoryview(bytearray(9)), deadline_s=deadline())
        assert hub.stats()["hub"] == asked + (obj is first)
    source.close()
