"""Eight mounts on eight nodes with addresses of their own, beside one cache of each kind: one download for all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mfs.config import SourceConfig
from mfs.testing.mounting import TestMount
from mfs.types import CHUNK_BYTES
from tests.scale.network import Network, reason_why_not
from tests.servers.dfdaemon import DfdaemonServer
from tests.servers.nginx import NginxServer
from tests.servers.node_cache import NginxCache, VarnishCache

NODES = 8
MODEL_BYTES = 6 * CHUNK_BYTES - 12_345
KINDS = ("nginx", "varnish", "dragonfly")

_why_not = reason_why_not()
pytestmark = pytest.mark.skipif(bool(_why_not), reason=_why_not)


class Site(NamedTuple):
    """The origin has a folder for each cache, mounted as a source of that name on every node."""

    network: Network
    origin: NginxServer
    nginx: NginxCache
    dragonfly: DfdaemonServer
    nodes: list[TestMount]

    def put(self, path: str, nbytes: int = MODEL_BYTES) -> str:
        """A new file at the origin; its sha256."""
        content = os.urandom(nbytes)
        target = self.origin.files / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def refresh(self) -> None:
        self.on_all(lambda node: node.client.refresh())

    def on_all(self, what: Callable[[TestMount], Any]) -> list[Any]:
        with ThreadPoolExecutor(NODES) as pool:
            return list(pool.map(what, self.nodes))

    def egress(self, path: str) -> int:
        """Bytes of a file that the origin sent."""
        return sum(request.sent_bytes for request in self.origin.requests(f"/{path}") if request.method == "GET")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(NODES))
        folder = tmp_path_factory.mktemp("scale")
        origin = stack.enter_context(NginxServer(folder / "origin", host=network.address))
        nginx = NginxCache(folder / "nginx", host=network.address)
        nginx.start()
        stack.callback(nginx.stop)
        varnish = stack.enter_context(VarnishCache(folder / "varnish", origin.url, host=network.address))
        dragonfly = stack.enter_context(DfdaemonServer(folder / "dfdaemon", host=network.address))
        for kind in KINDS:
            (origin.files / kind / "model").mkdir(parents=True)
        sources = (
            SourceConfig(f"{origin.url}nginx/", "nginx", via=nginx.url),
            SourceConfig(f"{origin.url}varnish/", "varnish", via=varnish.url),
            SourceConfig(f"{origin.url}dragonfly/", "dragonfly", dragonfly=dragonfly.url),
        )
        nodes = [TestMount(folder / f"node{number}", sources=sources, workers_count=2) for number in range(NODES)]

        def start(number: int) -> None:
            with network.inside(number):
                nodes[number].start()
            nodes[number].call(os.getpid)  # its reader: a test would count one that it starts as left behind

        for node in nodes:
            stack.callback(node.clean_up)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(start, range(NODES)))
        yield Site(network, origin, nginx, dragonfly, nodes)
        for node in nodes:
            node.stop()


def sha256_of(path: Path) -> str:
    """In a process outside."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_the_origin_sends_a_model_once(site: Site, kind: str) -> None:
    path = f"{kind}/model/w.bin"
    digest = site.put(path)
    site.refresh()
    assert site.on_all(lambda node: node.call(sha256_of, node.path / path)) == [digest] * NODES
    assert MODEL_BYTES <= site.egress(path) <= 1.1 * MODEL_BYTES
    for node in site.nodes:
        status = node.client.status()
        said = next(source for source in status["sources"] if source["name"] == kind)
        assert (said["via"] is not None, said["is_dragonfly"]) == (True, kind == "dragonfly")
        assert status["origin"]["cache_bytes"] >= MODEL_BYTES - status["origin"]["direct_bytes"]
    if kind == "nginx":
        asked_by = {line.split()[0] for line in site.nginx.lines()}
        assert asked_by == {site.network.address_of(node) for node in range(NODES)}


class Reading:
    """A file read piece by piece, in a process outside."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb", buffering=0)
        self.found = hashlib.sha256()

    def read(self, nbytes: int) -> str:
        while nbytes > 0 and (piece := self.file.read(min(nbytes, 1 << 20))):
            self.found.update(piece)
            nbytes -= len(piece)
        return self.found.hexdigest()


_readings: dict[str, Reading] = {}


def read_on(path: Path, nbytes: int) -> str:
    """The next bytes; the digest of all until then."""
    return _readings.setdefault(str(path), Reading(path)).read(nbytes)


def test_a_cache_that_dies_in_the_middle_is_no_error_and_is_used_again(site: Site) -> None:
    path = "nginx/dying/w.bin"
    digest = site.put(path, 4 * MODEL_BYTES)
    site.refresh()
    site.on_all(lambda node: node.call(read_on, node.path / path, CHUNK_BYTES))
    site.nginx.stop()
    assert site.egress(path) < 4 * MODEL_BYTES, "the rest can only come from the origin"
    assert site.on_all(lambda node: node.call(read_on, node.path / path, 4 * MODEL_BYTES)) == [digest] * NODES
    site.nginx.start()
    before = len(site.nginx.lines())
    later = {f"nginx/later{number}/w.bin": site.put(f"nginx/later{number}/w.bin", 100_000) for number in range(40)}
    site.refresh()
    for later_path, expected in later.items():
        assert site.on_all(lambda node: node.call(sha256_of, node.path / later_path)) == [expected] * NODES  # noqa: B023
        asked_by = {line.split()[0] for line in site.nginx.lines()[before:]}
        if asked_by == {site.network.address_of(node) for node in range(NODES)}:
            return
        TestMount.wait_for(lambda: False, timeout_s=0.5)  # until the pauses are over, of some seconds
    raise AssertionError(f"only {asked_by} came back")
