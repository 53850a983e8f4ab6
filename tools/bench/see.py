"""What it costs to be seen: cold loads that nobody looks at beside some that all looks at, and a scrape of many models.

Off: `mfs mount`, and nobody asks. Metrics: it answers Prometheus every 15 s, which has asked once before. Traces: it
sends them to a collector that takes them. On: both, and logs in JSON. A pass is a fresh mount, which is let come to
rest and reads one copy of the model, and then the others: the first load of a mount by itself, and what goes on. A load
is shorter than 15 s: what a scrape costs is measured by itself. The counting itself goes on in all ways; what it costs
shows against another checkout (--before).

In a virtual machine memory that the host has to find makes most of the kernel's time, and its changes hide what is
looked for, which is all our own code. So that is also told by the user's clock alone, as a share of the whole.
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
from typing import NamedTuple

from tests.servers.process import free_port
from tools.bench.machine import drop_page_cache
from tools.bench.mounts import BEFORE, MountedSystem, Ours
from tools.bench.origin import NginxOrigin
from tools.bench.processes import cpu_seconds, run, tree, user_seconds
from tools.bench.results import Goal, Results, Row
from tools.bench.workload import MODEL, Model, read

NOTE = """\
Every load cold, by a fresh process, page cache dropped. CPU: of the daemon and its children by the kernel's clock of \
each process, from rest to rest, and until the traces are sent. The ways alternate; ratios are taken within a round. \
The scrape: over TCP, warm, the median of many."""
TEXT = """Overhead of metrics, traces and logs on cold loads, apart and together, in turn; and a scrape of a mount with
10,000 models. Some five minutes on two calm cores; it needs them calm."""
MODELS_COUNT = 10_000
_COPIES = 5
"""Of the model, each new to the mount; the first is its first load."""
_PATTERN = "pread"
"""What loaders do that do not map. Of all that read whole models it makes the most waits, so also the most spans."""
_TRACED_S = 5.5
"""A load is over two seconds after its last close, and what ended is sent when for a second no more came."""
_WAYS = ("off", "metrics", "traces", "on")
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
        for number in range(_COPIES):
            origin.show_again(MODEL, _copy(number))
        for number in range(rounds):
            ways = [*_WAYS, *([BEFORE] if before else [])]
            for way in ways if number % 2 == 0 else reversed(ways):
                _pass(folder, origin, model, way, before, collector, results, say)
    _scrape_many(folder, results, say)


def _copy(number: int) -> str:
    return f"{MODEL}-{number}"


def _pass(
    folder: Path, origin: NginxOrigin, model: Model, way: str, before: Path | None, collector: str, results: Results,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    address = f"127.0.0.1:{free_port()}" if way in ("metrics", "on") else None
    options = ("--metrics-addr", address) if address else ()
    options += ("--log-format", "json") if way == "on" else ()
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector} if way in ("traces", "on") else {}
    system = Ours(
        folder / f"see-{way}", origin.url, {**origin.environ, **env}, options=options,
        checkout=before if way == BEFORE else None,
    )  # fmt: skip
    system.forget()
    with system, _scraped(address):
        if address:
            _scrape(address)  # the first one imports what makes the text
        start = _used(system)
        first, _ = _loads(system, model, range(1))
        then, gb_s = _loads(system, model, range(1, _COPIES))
    results.add(f"start/{way}", start.cpu_s)
    results.add(f"first/{way}", first.cpu_s)
    results.add(f"cpu/{way}", then.cpu_s)
    results.add(f"user/{way}", then.user_s)
    results.add(f"rate/{way}", gb_s)
    if way == "traces":
        results.add("exporting", then.exporting_s)
    say(f"{way:<7} start {start.cpu_s:.2f} CPU s; first {first.cpu_s:.3f} CPU s/GB; then {then.cpu_s:.3f}, of which"
        f" user {then.user_s:.3f}, exporting {then.exporting_s:.4f}; {gb_s:.3f} GB/s")  # fmt: skip


class _Used(NamedTuple):
    """CPU seconds, or those a GB."""

    cpu_s: float
    user_s: float
    exporting_s: float
    """Of the process that exports traces."""


def _loads(system: Ours, model: Model, numbers: range) -> tuple[_Used, float]:
    """What cold loads one after the other take a GB, and GB/s by the readers' clocks."""
    drop_page_cache()
    before, size, seconds = _used(system), 0, 0.0
    for number in numbers:
        reading = read(_PATTERN, system.mountpoint / _copy(number), model)
        size += reading.bytes
        seconds += reading.bytes / reading.gb_s / 1e9
    time.sleep(_TRACED_S)
    used = (now - then for now, then in zip(_used(system), before, strict=True))
    return _Used(*(one / size * 1e9 for one in used)), size / seconds / 1e9


def _used(system: Ours) -> _Used:
    """So far, once nothing is going on."""
    system.wait_quiet()
    MountedSystem.wait_quiet(system)
    pids = tree(system.pid)
    exporting = [pid for pid in pids if b"mfs.tracing.process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return _Used(cpu_seconds(pids), user_seconds(pids), cpu_seconds(exporting))


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
    """The figures that have goals."""
    rows: list[Row] = []
    for way, title in (("on", "seen"), ("metrics", "metrics alone"), ("traces", "traces alone")):
        rows += results.ratio(f"cpu/{way}", ["cpu/off"], f"cold loads, CPU: {title} / not seen", Goal(at_most=1.02))
    for way, title in (("on", "seen"), ("metrics", "metrics alone"), ("traces", "traces alone")):
        rows += _by_the_users_clock(results, way, f"the same by the user's clock: {title}")
    rows += results.ratio(
        "cpu/off", ["cpu/before"], "cold loads, CPU: not seen / the other checkout", Goal(at_most=1.02)
    )
    rows += results.row("scrape/ms", f"a scrape, {MODELS_COUNT:,} models", "ms", Goal(at_most=50))
    return rows + results.row("scrape/bytes", "its size", "bytes", Goal(at_most=1e6))


def _by_the_users_clock(results: Results, way: str, title: str) -> list[Row]:
    found = [results.samples.get(name, []) for name in (f"user/{way}", "user/off", "cpu/off")]
    values = tuple(1 + (seen - unseen) / whole for seen, unseen, whole in zip(*found, strict=False))
    return [Row(title, values, "×", Goal(at_most=1.02))] if values else []


def rows(results: Results) -> list[Row]:
    """Plain figures."""
    found: list[Row] = []
    titles = {"off": "not seen", "on": "seen", BEFORE: "the other checkout"}
    for way in (*_WAYS, BEFORE):
        title = titles.get(way, way)
        found += results.row(f"rate/{way}", f"cold: {title}", "GB/s")
        found += results.row(f"cpu/{way}", f"cold, CPU: {title}", "s/GB")
        found += results.row(f"user/{way}", f"of that, the user's clock: {title}", "s/GB")
        found += results.row(f"first/{way}", f"first load of a mount, CPU: {title}", "s/GB")
        found += results.row(f"start/{way}", f"a mount until it rests, CPU: {title}", "s")
    found += results.row("exporting", "of traces, the process that exports", "s/GB")
    found += results.row("scrape/cpu", "CPU of a scrape every 15 s", "%", note="of one core, daemon and workers")
    return found + results.row("scrape/slowest_ms", "slowest scrape", "ms")
