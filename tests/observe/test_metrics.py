"""What a mount says to Prometheus: exact, complete, small, in both formats, and without a file's name."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mfs.durations import Durations
from mfs.errors import AccessError, StoreError
from mfs.metrics import door
from mfs.metrics.exposition import OPENMETRICS, PROMETHEUS, accepts_openmetrics, exposed, parsed
from mfs.metrics.families import Families, Text
from mfs.metrics.tally import MODELS_MAX, OTHER, Tally
from mfs.testing import ramp
from mfs.testing.mounting import MountFailedError
from mfs.types import CHUNK_BYTES
from mfs.waits import Cause, Waited
from mfs.workers.job import WorkerEndedError
from tests.mount.conftest import Mounted
from tests.mount.origins import FolderOrigin
from tests.observe.readers import error_of, read_chunks, read_first
from tests.servers.hub import HubServer
from tests.servers.process import free_port

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

# -- pure


@given(st.lists(st.floats(0, 100), max_size=50))
def test_durations_count_at_the_first_bound_that_they_do_not_exceed(seconds: list[float]) -> None:
    durations = Durations((0.0, 0.5, 1.0, 64.0))
    for each in seconds:
        durations.note(each)
    lower = [-1.0, *durations.bounds_s]
    upper = [*durations.bounds_s, float("inf")]
    assert durations.counts == [sum(low < s <= up for s in seconds) for low, up in zip(lower, upper, strict=True)]
    assert durations.count == len(seconds)
    assert durations.sum_s == pytest.approx(sum(seconds))


@pytest.mark.parametrize(("accept", "wanted"), [
    ("", False), ("*/*", False), ("text/plain", False), ("application/json", False),
    ("application/openmetrics-text; version=1.0.0", True),
    ("application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
     "text/plain;version=0.0.4;q=0.3,*/*;q=0.2", True),  # Prometheus 2.42
    ("application/openmetrics-text;q=0.1, text/plain;q=0.9", False),
    ("application/openmetrics-text;q=0", False), ("application/openmetrics-text;q=what", False),
])  # fmt: skip
def test_openmetrics_is_for_who_prefers_it(accept: str, wanted: bool) -> None:
    assert accepts_openmetrics(accept) == wanted
    assert exposed([], accept).content_type == (OPENMETRICS if wanted else PROMETHEUS)


@pytest.mark.parametrize("openmetrics", [False, True])
def test_what_families_say_comes_out_as_they_say_it(openmetrics: bool) -> None:
    families, durations = Families(), Durations((0.1, 1.0))
    for each in (0.05, 0.1, 0.5, 7.0):
        durations.note(each)
    strange = 'a"b\\c\nd\x1b\u202e模'
    families.counter("mfs_x_bytes", "Bytes.", {(strange,): 5}, ["model"])
    families.gauge("mfs_y", "Now.", 0.5)
    families.histogram("mfs_z_seconds", "Took.", {("read",): durations}, ["operation"])
    families.info("mfs_build", "What.", {"version": "1"})
    text = exposed(families.found, "application/openmetrics-text" if openmetrics else "").body.decode()
    samples = samples_of(text, openmetrics=openmetrics)
    assert samples["mfs_x_bytes_total", frozenset({("model", 'a"b\\c\\nd\\x1b\\u202e模')})] == 5
    assert samples["mfs_y", frozenset()] == 0.5
    buckets = {dict(labels)["le"]: value for (name, labels), value in samples.items() if name == "mfs_z_seconds_bucket"}
    assert buckets == {"0.1": 2, "1.0": 3, "+Inf": 4}
    assert samples["mfs_z_seconds_sum", frozenset({("operation", "read")})] == pytest.approx(7.65)
    assert samples["mfs_build_info", frozenset({("version", "1")})] == 1
    assert text.endswith("# EOF\n") == openmetrics
    assert ("# UNIT mfs_x_bytes bytes" in text) == openmetrics


def test_models_are_counted_by_name_up_to_a_bound_and_together_beyond_it() -> None:
    tally = Tally(["", "prod"])
    for number in range(10_000):
        for source in (0, 1):
            tally.filled((source, f"m{number}"), origin_bytes=3, ssd_bytes=2, shared_bytes=1)
    tally.waited(Waited(0.0, 0.5, Cause.SSD, 1, "m9999/model.bin", 0, 1))
    tally.waited(Waited(0.0, 0.25, Cause.SSD, 0, "m0/model.bin", 0, 1))
    tally.failed((1, "m9999"), WorkerEndedError("gone"))
    assert len(tally.models) == MODELS_MAX + 1
    assert sum(model.origin_bytes for model in tally.models.values()) == 60_000
    other, first = tally.models[OTHER], tally.models["", "m0"]
    assert (other.waits, other.waited_s, other.errors) == (1, 0.5, 1)
    assert (first.waits, first.waited_s, first.origin_bytes) == (1, 0.25, 3)
    assert tally.fetch_errors["worker_ended"] == 1
    tally.list_failed(AccessError("no"))
    tally.list_failed(StoreError("no"))
    assert (tally.list_errors["access"], tally.list_errors["failed"]) == (1, 1)


async def test_what_strangers_do_at_the_door_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    scrapes = 0

    async def scrape(accept: str) -> Text:
        nonlocal scrapes
        await trio.lowlevel.checkpoint()
        scrapes += 1
        raise RuntimeError("a defect")

    async def ask(sent: bytes, *, reset: bool = False) -> bytes:
        async with await trio.open_tcp_stream("127.0.0.1", door.port_of(listeners)) as stream:
            await stream.send_all(sent)
            if reset:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return b""
            await stream.send_eof()
            return b"".join([part async for part in stream])

    whole = b"GET /metrics HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n"
    listeners = await door.listen("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.serve, listeners, scrape)
        for sent in (b"", b"GET /met", b"POST /metrics HTTP/1.1\r\nHost: m\r\nContent-Length: 9\r\n\r\nhalf"):
            await ask(sent, reset=True)
            await ask(sent)
        assert b"404" in await ask(b"GET / HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n")
        assert not caplog.records
        for _ in range(3):
            assert b"internal error, see the log: RuntimeError" in await ask(whole)
        nursery.cancel_scope.cancel()
    assert scrapes == 3
    assert [record.getMessage() for record in caplog.records] == ["a scrape failed"]


# -- of a mount


def samples_of(text: str, *, openmetrics: bool = False) -> Samples:
    """Every sample by name and labels; each must be there once."""
    found: Samples = {}
    families: list[Any] = parsed(text, openmetrics=openmetrics)
    for family in families:
        for sample in family["samples"]:
            key = sample["name"], frozenset(sample["labels"].items())
            assert key not in found, key
            found[key] = sample["value"]
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def scrape(address: str, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """(status, content type, body)"""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read().decode()
    finally:
        connection.close()


def test_what_happens_is_counted_where_it_happens(folder: FolderOrigin, mounted: Mounted) -> None:
    folder.put("llama/model.bin", ramp(3 * CHUNK_BYTES))
    mount = mounted(folder, metrics_addr="127.0.0.1:0")
    before = samples_of(mount.client.metrics())
    assert value(before, "mfs_tier_misses_total", tier="ram") == 0
    path = str(mount.path / "llama" / "model.bin")
    assert mount.call(error_of, path) == ""
    mount.wait_quiet()
    mount.wait_saved("llama/model.bin")
    samples, status = samples_of(mount.client.metrics()), mount.client.status()
    for name, part, key in (
        ("mfs_origin_received_bytes_total", "origin", "fetched_bytes"), ("mfs_read_bytes_total", "reads", "bytes"),
        ("mfs_origin_requests_total", "origin", "requests_count"),
    ):  # fmt: skip
        assert value(samples, name) == status[part][key] > 0, name
    assert value(samples, "mfs_tier_bytes", tier="ssd") == status["ssd"]["used_bytes"] > 0
    assert value(samples, "mfs_tier_bytes", tier="ram") == status["ram"]["used_bytes"]
    assert value(samples, "mfs_tier_budget_bytes", tier="ram") == 64 << 20
    assert value(samples, "mfs_tier_misses_total", tier="ram") > 0
    assert value(samples, "mfs_tier_misses_total", tier="ssd") > 0
    assert value(samples, "mfs_brought_bytes_total") == value(samples, "mfs_origin_received_bytes_total")
    waits = value(samples, "mfs_demand_wait_seconds_count", cause="origin")
    waited_s = value(samples, "mfs_demand_wait_seconds_sum", cause="origin")
    assert waits > 0
    assert (
        value(samples, "mfs_model_received_bytes_total", source="", model="llama") == status["origin"]["fetched_bytes"]
    )
    assert value(samples, "mfs_model_wait_seconds_total", source="", model="llama") >= waited_s > 0
    assert value(samples, "mfs_fuse_operation_seconds_count", operation="read") >= waits
    assert value(samples, "mfs_fuse_operation_seconds_count", operation="open") > 0
    assert value(samples, "mfs_mount_generation") == 1
    assert value(samples, "mfs_process_cpu_seconds_total", process="daemon") > 0
    assert value(samples, "mfs_process_resident_memory_bytes", process="worker-0") > 0
    assert value(samples, "mfs_ssd_state", state="ok") == 1
    through_door = samples_of(scrape(status["metrics_addr"])[2])
    assert through_door.keys() == samples.keys()
    status_code, kind, text = scrape(status["metrics_addr"], Accept="application/openmetrics-text;version=1.0.0")
    assert (status_code, kind) == (200, OPENMETRICS)
    assert samples_of(text, openmetrics=True).keys() == samples.keys()
    assert "model.bin" not in text


def test_waste_evictions_and_hits_are_counted(folder: FolderOrigin, mounted: Mounted) -> None:
    folder.put("a/model.bin", ramp(6 * CHUNK_BYTES))
    mount = mounted(folder, cache_bytes=2 * CHUNK_BYTES)
    list(mount.client.prefetch(["a"], "ssd", wait=True))
    mount.client.evict(["a"], "ram")

    def has_evicted() -> bool:
        return value(samples_of(mount.client.metrics()), "mfs_tier_evictions_total", tier="ssd") > 0

    assert mount.wait_for(has_evicted)
    samples = samples_of(mount.client.metrics())
    assert value(samples, "mfs_tier_evicted_bytes_total", tier="ssd") >= CHUNK_BYTES
    assert value(samples, "mfs_tier_evictions_total", tier="ram") > 0
    assert value(samples, "mfs_ssd_written_bytes_total") > 0


def test_what_compression_and_sharing_save_can_be_told(tmp_path: Path, mounted: Mounted) -> None:
    registry, model = f"mfs+file://{tmp_path}/registry", tmp_path / "model"
    model.mkdir()
    save_file({"w": np.zeros(4 << 20, np.float32)}, model / "model.safetensors")
    for tag in ("first", "second"):
        (model / "card.json").write_text(tag)
        argv = [sys.executable, "-m", "mfs", "push", str(model), f"{registry}/llama:{tag}"]
        subprocess.run(argv, check=True, capture_output=True)
    mount = mounted(registry)
    assert mount.call(error_of, str(mount.path / "llama" / "first" / "model.safetensors")) == ""
    mount.wait_quiet()
    samples = samples_of(mount.client.metrics())
    received = value(samples, "mfs_origin_received_bytes_total")
    assert value(samples, "mfs_brought_bytes_total") > 10 * received > 0
    assert value(samples, "mfs_demand_wait_seconds_count", cause="decode") > 0
    assert value(samples, "mfs_model_received_bytes_total", source="", model="llama") == received


def test_being_asked_to_wait_is_counted_apart_from_failing(hub: HubServer, mounted: Mounted) -> None:
    repo = "org/throttled-metrics"
    hub.commit(repo, {"model.bin": ramp(CHUNK_BYTES)})
    mount = mounted(f"hf://{repo}", env=hub.environ(hub.token))
    hub.limit_rate(1, wait_s=1, host="cdn")
    assert mount.call(read_chunks, str(mount.path / "model.bin"), [0]) == 0
    samples = samples_of(mount.client.metrics())
    assert value(samples, "mfs_origin_retries_total", reason="throttled") >= 1
    assert value(samples, "mfs_origin_retries_total", reason="failed") == 0


def test_generations_are_counted_and_the_address_goes_from_daemon_to_daemon(
    folder: FolderOrigin, mounted: Mounted
) -> None:
    folder.put("w.bin", ramp(10))
    address = f"127.0.0.1:{free_port()}"
    mount = mounted(folder, metrics_addr=address, log_format="json")

    def counts() -> tuple[float, float, float]:
        samples = samples_of(scrape(address)[2])
        names = "mfs_mount_generation", "mfs_mount_handovers_total", "mfs_mount_crashes_total"
        generation, handovers, crashes = (value(samples, name) for name in names)
        return generation, handovers, crashes

    def counts_are(*wanted: float) -> bool:
        try:
            return counts() == wanted
        except OSError:
            return False

    assert counts() == (1, 0, 0)
    mount.hand_over()
    assert mount.wait_for(lambda: counts_are(2, 1, 0))
    mount.wait_successor(mount.crash())
    assert mount.wait_for(lambda: counts_are(3, 1, 1))
    said = [json.loads(line) for line in mount.log.splitlines()]
    assert {line["logger"] for line in said} >= {"__main__", "mfs.handover", "mfs.holder"}
    assert any("starting the next one" in line["message"] for line in said)
    refused = pytest.raises(MountFailedError, match=r"metrics address .* cannot be listened on")
    with socket.create_server(("127.0.0.1", 0)) as taken, refused:
        mounted(folder, name="n", metrics_addr=f"127.0.0.1:{taken.getsockname()[1]}")


def test_ten_thousand_models_are_one_small_scrape(tmp_path: Path, mounted: Mounted) -> None:
    root = tmp_path / "registry"
    for number in range(10_000):
        (root / f"model-{number:05d}").mkdir(parents=True)
    read = [f"model-{number:05d}" for number in range(MODELS_MAX + 50)]
    for name in read:
        (root / name / "secret-name.bin").write_bytes(ramp(2 << 20))
    mount = mounted(str(root), metrics_addr="127.0.0.1:0")
    mount.call(read_first, [str(mount.path / name / "secret-name.bin") for name in read])
    mount.wait_quiet()
    address = mount.client.status()["metrics_addr"]
    for accept in ("text/plain", "application/openmetrics-text"):
        text = scrape(address, Accept=accept)[2]
        assert len(text) <= 1_000_000
        assert "secret-name" not in text
    samples = samples_of(scrape(address)[2])
    models = {dict(labels)["model"] for name, labels in samples if name == "mfs_model_received_bytes_total"}
    assert len(models) == MODELS_MAX + 1
    assert "other" in models
    assert value(samples, "mfs_listed_files") >= 10_000


def test_the_door_answers_nothing_else_and_outlives_bad_clients(folder: FolderOrigin, mounted: Mounted) -> None:
    mount = mounted(folder, metrics_addr="127.0.0.1:0")
    address = mount.client.status()["metrics_addr"]
    assert scrape(address, "/")[0] == 404
    assert scrape(address, "/v1/config")[0] == 404
    assert scrape(address, method="POST")[0] == 400
    host, _, port = address.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(40)]
    idle[0].sendall(b"\x00nonsense\r\n\r\n")
    answers = {sock.recv(1 << 16).split(b"\r\n")[0] for sock in (idle[0], idle[-1])}
    assert answers == {b"HTTP/1.1 400 ", b"HTTP/1.1 503 "}
    for sock in idle:
        sock.close()
    assert mount.wait_for(lambda: scrape(address)[0] == 200)
    status, kind, body = scrape(address, method="HEAD")
    assert (status, kind, body) == (200, PROMETHEUS, "")


def test_the_command_prints_what_a_scrape_says(folder: FolderOrigin, mounted: Mounted) -> None:
    mount = mounted(folder)

    def run(*options: str) -> str:
        return mount.run(sys.executable, "-m", "mfs", "metrics", *options, mount.path, env=dict(mount._env))

    names = samples_of(run()).keys()
    assert names == samples_of(run("--openmetrics"), openmetrics=True).keys()
    assert '"mfs_tier_bytes"' in run("--json")


@pytest.mark.parametrize("address", ["9400", "host", "host:", "host:99999", "::1:9400", "host:-1"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "mfs", "mount", str(tmp_path), str(tmp_path / "m"), "--metrics-addr", address]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert "not an address" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
