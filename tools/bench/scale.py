"""One model, read at once by 1, 2, 4 and 8 nodes: from the origin, and through nginx as RECIPES.md has it.

Nodes are network namespaces with a mount each, all on this machine's cores. The origin's link is capped, what the
cache sends is not: that is what a cache in the rack is for. Every round: new mounts, new caches; starting them is not
measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mfs.testing.mounting import TestMount
from mfs.units import parse_size
from tests.scale.network import Network
from tests.servers.nginx import NginxServer
from tests.servers.node_cache import NginxCache
from tools.bench import link
from tools.bench.processes import BenchError
from tools.bench.results import Goal, Results, Row

COUNTS = (1, 2, 4, 8)
WAYS = ("origin", "cache")
GBIT_S = 1.0
EGRESS_GOAL = 1.1
_FILE = "model/w.bin"

TEXT = "one model read by 1, 2, 4 and 8 nodes at once, from an origin of 1 Gbit/s and through a cache: four minutes"
NOTE = """\
Seconds from the first node's open to the last byte of the last one, each checked by its sha256. The origin's link is \
capped at 1 Gbit/s, the cache's is not. Nodes, cache and origin share this machine's cores: what eight nodes cost in \
CPU stands in their time."""


def run(
    folder: Path, size_bytes: int, rounds: int, results: Results, say: Callable[[str], None]
) -> dict[str, list[Row]]:
    """All rounds; the tables."""
    link.bring_up_loopback()
    with Network(max(COUNTS)) as network, NginxServer(folder / "origin", host=network.address) as origin:
        digest = _put(origin, size_bytes)
        for number in range(rounds):
            say(f"[bold]round {number + 1} of {rounds}[/]")
            for count in COUNTS:
                for way in WAYS:
                    place = folder / f"{number}-{count}-{way}"
                    seconds, sent = _measure(place, network, origin, count, way, digest)
                    results.add(f"{way}-{count}-seconds", seconds)
                    results.add(f"{way}-{count}-egress", sent / size_bytes)
                    say(f"{count} nodes, {way}: {seconds:.2f} s, egress {sent / size_bytes:.2f}")
    return {"Figures": _rows(results), "Goals": _goal_rows(results)}


def _put(origin: NginxServer, size_bytes: int) -> str:
    found = hashlib.sha256()
    target = origin.files / _FILE
    target.parent.mkdir(parents=True)
    with target.open("wb") as file:
        for start in range(0, size_bytes, parse_size("8M")):
            piece = os.urandom(min(parse_size("8M"), size_bytes - start))
            found.update(piece)
            file.write(piece)
    return found.hexdigest()


def _measure(
    place: Path, network: Network, origin: NginxServer, count: int, way: str, digest: str
) -> tuple[float, int]:
    """(seconds, bytes that the origin sent of the model)."""
    with contextlib.ExitStack() as stack:
        via = None
        if way == "cache":
            via = stack.enter_context(NginxCache(place / "nginx", host=network.address)).url
        nodes = [TestMount(place / str(n), origin.url, source={"via": via}, workers_count=2) for n in range(count)]
        for number, node in enumerate(nodes):
            with network.inside(number):
                stack.enter_context(node)
            node.call(os.listdir, node.path)  # the reader is there
        origin.forget_requests()
        with _capped(origin.port, network), ThreadPoolExecutor(count) as pool:
            begun_s = time.monotonic()
            found = list(pool.map(lambda node: node.call(sha256_of, node.path / _FILE, timeout_s=300), nodes))
            seconds = time.monotonic() - begun_s
        if found != [digest] * count:
            raise BenchError(f"{count} nodes, {way}: other bytes than the origin's")
        sent = sum(request.sent_bytes for request in origin.requests(f"/{_FILE}") if request.method == "GET")
        return seconds, sent


@contextlib.contextmanager
def _capped(port: int, network: Network) -> Iterator[None]:
    """The cache reaches the origin over loopback, the nodes over the bridge."""
    with link.capped(port, GBIT_S), link.capped(port, GBIT_S, device=network.bridge):
        yield


def sha256_of(path: Path) -> str:
    """In a process of its own."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(results: Results) -> list[Row]:
    rows = []
    for count in COUNTS:
        for way in WAYS:
            for figure, unit in (("seconds", "s"), ("egress", "×")):
                title = f"{count} node{'s' * (count > 1)}: {'time' if figure == 'seconds' else 'sent by the origin'}"
                rows += results.row(f"{way}-{count}-{figure}", title, unit, column=way)
    return rows


def _goal_rows(results: Results) -> list[Row]:
    most = COUNTS[-1]
    return results.row(
        f"cache-{most}-egress", f"{most} nodes: sent by the origin", "×", Goal(at_most=EGRESS_GOAL), "of the model"
    )
