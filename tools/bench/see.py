"""What it costs to be seen: cold loads that nobody looks at beside some that all looks at, and a scrape of many models.

Off: `mfs mount`, and nobody asks. On: it answers Prometheus every 15 s, which was there before, sends traces to a
collector that takes them, and logs in JSON. A load is shorter than 15 s: what a scrape costs is measured by itself. The
counting itself goes on in both; what it costs shows against another checkout (--before).
"""

from __future__ import annotations

import http.client
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.servers.process import free_port
from tools.bench.machine import drop_page_cache
from tools.bench.mounts import BEFORE, Ours
from tools.bench.origin import NginxOrigin
from tools.bench.processes import run
from tools.bench.results import Goal, Results, Row
from tools.bench.workload import MODEL, Model, read

NOTE = """\
Every pass cold: fresh process, fresh mount, page cache dropped. CPU: of the daemon and its workers until they are at \
rest. Off and on alternate; the ratio is taken within a round. The scrape: over TCP, warm, the median of many."""
TEXT = """Overhead of metrics, traces and logs on a cold load, off and on in turn, and a scrape of a mount with 10,000
models. Some two minutes on two calm cores; it needs them calm."""
MODELS_COUNT = 10_000
_SCRAPE_EVERY_S = 15.0  # as in Prometheus' own example of a configuration
_SCRAPES = 30
_READ_MODELS = 150
"""More than have names of their own in metrics."""


def run_see(
    folder: Path, model: Model, rounds: int, before: Path | None, results: Results, say: Callable[[str], None]
) -> None:
    """Add CPU seconds and GB/s of each pass, then a scrape's time and size."""
    with NginxOrigin(folder / "nginx") as origin, _collector() as collector:
        origin.put_tree(model.folder.parent)
        for number in range(rounds):
            ways = ["off", "on", *(["before"] if before else [])]
            for way in ways if number % 2 == 0 else reversed(ways):
                _load(folder, origin, model, way, number, before, collector, results, say)
    _scrape_many(folder, results, say)


def _load(
    folder: Path, origin: NginxOrigin, model: Model, way: str, number: int, before: Path | None, collector: str,
    results: Results, say: Callable[[str], None],
) -> None:  # fmt: skip
    address = f"127.0.0.1:{free_port()}"
    options: tuple[str, ...] = ("--metrics-addr", address, "--log-format", "json") if way == "on" else ()
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector} if way == "on" else {}
    system = Ours(
        folder / f"see-{way}", f"{origin.url}{MODEL}/", {**origin.environ, **env}, options=options,
        checkout=before if way == BEFORE else None,
    )  # fmt: skip
    system.forget()
    with system, _scraped(address if way == "on" else None):
        if way == "on":
            _scrape(address)  # the first one imports what makes the text
        drop_page_cache()
        began_s = system.cpu_s()
        reading = read("shuffled", system.mountpoint, model, seed=number)
        system.wait_quiet()
        cpu = (system.cpu_s() - began_s) / reading.bytes * 1e9
    results.add(f"cpu/{way}", cpu)
    results.add(f"rate/{way}", reading.gb_s)
    say(f"{way:<7} {reading.gb_s:6.3f} GB/s, {cpu:.3f} CPU s/GB")


@contextmanager
def _scraped(address: str | None) -> Iterator[None]:
    """Somebody asks as often as Prometheus does."""
    if address is None:
        yield
        return
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(_SCRAPE_EVERY_S):
            _scrape(address)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _scrape(address: str) -> bytes:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
        return connection.getresponse().read()
    finally:
        connection.close()


@contextmanager
def _collector() -> Iterator[str]:
    """An OpenTelemetry collector that takes everything and keeps nothing."""

    class Site(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not a word."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _scrape_many(folder: Path, results: Results, say: Callable[[str], None]) -> None:
    registry, address = folder / "many", f"127.0.0.1:{free_port()}"
    try:
        for number in range(MODELS_COUNT):
            model = registry / f"model-{number:05d}"
            model.mkdir(parents=True)
            with open(model / "model.safetensors", "wb") as file:
                file.truncate(64 << 20)  # sparse
        with Ours(
            folder / "see-many", str(registry), {}, ram_bytes=1 << 30, options=("--metrics-addr", address)
        ) as ours:
            run(["find", ours.mountpoint, "-type", "f"], timeout_s=300)
            for number in range(_READ_MODELS):
                path = ours.mountpoint / f"model-{number:05d}" / "model.safetensors"
                run(["dd", f"if={path}", "of=/dev/null", "bs=64k", "count=1", "status=none"], timeout_s=30)
            ours.wait_quiet()
            size, took_s, began_s = len(_scrape(address)), [], ours.cpu_s()
            for _ in range(_SCRAPES):
                since_s = time.perf_counter()
                _scrape(address)
                took_s.append(time.perf_counter() - since_s)
                time.sleep(0.05)
            cpu_s = (ours.cpu_s() - began_s) / _SCRAPES
        results.add("scrape/cpu", cpu_s / _SCRAPE_EVERY_S * 100)
        results.add("scrape/ms", statistics.median(took_s) * 1e3)
        results.add("scrape/slowest_ms", max(took_s) * 1e3)
        results.add("scrape/bytes", size)
        say(f"a scrape: {statistics.median(took_s) * 1e3:.1f} ms, {size:,} bytes")
    finally:
        shutil.rmtree(registry, ignore_errors=True)


def goal_rows(results: Results) -> list[Row]:
    """The figures that have goals (issue 11, "Bars")."""
    rows = results.ratio("cpu/on", ["cpu/off"], "cold load, CPU: seen / not seen", Goal(at_most=1.02))
    rows += results.ratio(
        "cpu/off", ["cpu/before"], "cold load, CPU: not seen / the other checkout", Goal(at_most=1.02)
    )
    rows += results.row("scrape/ms", f"a scrape, {MODELS_COUNT:,} models", "ms", Goal(at_most=50))
    return rows + results.row("scrape/bytes", "its size", "bytes", Goal(at_most=1e6))


def rows(results: Results) -> list[Row]:
    """Plain figures."""
    found: list[Row] = []
    for way, title in (("off", "not seen"), ("on", "seen"), ("before", "the other checkout")):
        found += results.row(f"rate/{way}", f"cold: {title}", "GB/s")
        found += results.row(f"cpu/{way}", f"cold, CPU: {title}", "s/GB")
    found += results.row("scrape/cpu", "CPU of a scrape every 15 s", "%", note="of one core, daemon and workers")
    return found + results.row("scrape/slowest_ms", "slowest scrape", "ms")
