"""`mfs estimate` against what a cold mount then costs its origin, counted there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mfs.cache.directory import LAYERS, open_directory, root_of
from mfs.cli import estimate as estimating
from mfs.cli.app import cli
from mfs.cli.estimate import parse_rate
from mfs.errors import UsageError
from mfs.oci.unpacked import UnpackedLayers
from mfs.planning import prices
from mfs.testing.mounting import TestMount
from mfs.types import BLOCK_BYTES, CHUNK_BYTES
from tests.cli.conftest import DEADLINE_S, Mfs
from tests.mount import origins
from tests.oci import artifacts
from tests.servers.chaos import ChaosProxy
from tests.servers.docker_registry import DockerRegistry
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.process import free_port
from tests.servers.relay import Relay
from tests.servers.swift import SwiftServer

GIVEN = ("--link", "1Gbit/s", "--latency", "1ms")


def weights(seed: int, *rows: int) -> dict[str, np.ndarray]:
    """bf16 as trained: some 8 MB a tensor, which compress by a third."""
    rng = np.random.default_rng(seed)
    return {
        f"layer.{number}": (rng.standard_normal((count, 1024), np.float32) * 0.05).astype(ml_dtypes.bfloat16)
        for number, count in enumerate(rows)
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 27 and 7 MB that cross chunks and slots at odd places, and small files."""
    folder = tmp_path_factory.mktemp("model")
    save_file(weights(1, 4001, 4100, 5003), folder / "model-00001-of-00002.safetensors")
    save_file(weights(2, 3333), folder / "model-00002-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({"a": "b" * 2000}))
    (folder / "tokenizer.json").write_text("t" * 300_000)
    (folder / "empty").touch()
    return folder


def total_of(model: Path) -> int:
    return sum(path.stat().st_size for path in model.iterdir())


@dataclass
class Place:
    """A model at an origin, and what the origin has sent so far."""

    url: str
    sent: Callable[[], tuple[int, int]]
    """(ranges, bytes of them) since the last `forget`."""
    forget: Callable[[], None]
    source: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    model: str = ""
    """Path of the model inside the source."""

    @property
    def options(self) -> list[str]:
        return [f"--{name.replace('_', '-')}={value}" for name, value in self.source.items()]


def of_nginx(nginx: NginxServer, url: str, model: str, below: str) -> Place:
    def sent() -> tuple[int, int]:
        ranges = [r for r in nginx.requests() if r.range and r.path.startswith(below)]
        return len(ranges), sum(r.sent_bytes for r in ranges)

    return Place(url, sent, nginx.forget_requests, model=model)


@pytest.fixture
def web(nginx: NginxServer, model: Path) -> Place:
    name = uuid.uuid4().hex[:12]
    shutil.copytree(model, nginx.files / name / "llama")
    return of_nginx(nginx, f"{nginx.url}{name}/", "llama", f"/{name}/")


@pytest.fixture
def s3(swift: SwiftServer, s3_bucket: str, model: Path) -> Iterator[Place]:
    client = swift.client()
    for path in model.iterdir():
        client.put_object(Bucket=s3_bucket, Key=f"prod/llama/{path.name}", Body=path.read_bytes())
    with Relay(swift.endpoint) as relay:

        def sent() -> tuple[int, int]:
            ranges = [one for one in relay.passed if one.status == 206]
            return len(ranges), sum(one.sent_bytes for one in ranges)

        env = {name: value for name, value in swift.environ().items() if name != "AWS_ENDPOINT_URL"}
        yield Place(f"s3://{s3_bucket}/prod", sent, relay.passed.clear, {"endpoint_url": relay.url}, env, "llama")


@pytest.fixture(scope="module")
def pushed(nginx: NginxServer, model: Path) -> Place:
    """In a folder; a web server stands before it and counts."""
    name = uuid.uuid4().hex[:12]
    Mfs()("push", model, f"mfs+file://{nginx.files}/{name}/reg/llama:prod")
    return of_nginx(nginx, f"mfs+{nginx.url}{name}/reg/llama:prod", "", f"/{name}/reg/chunks/")


@pytest.fixture(params=["web", "s3", "pushed"])
def place(request: pytest.FixtureRequest, nginx: NginxServer, swift: SwiftServer) -> Place:
    # The servers are asked for by name: one started within a test would count as left behind by it.
    found: Place = request.getfixturevalue(request.param)
    return found


def estimate(place: Place, *args: str | Path) -> dict[str, Any]:
    """In this process: what is counted is the same, and each start costs a second."""
    command = ["estimate", place.url, *map(str, args), *place.options, "--json"]
    done = CliRunner().invoke(cli, command, env=place.env)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[Place], TestMount]]:
    started: list[TestMount] = []

    def make(place: Place) -> TestMount:
        started.append(
            TestMount(tmp_path / "m", place.url, source=place.source, env=place.env, workers_count=2).start()
        )
        return started[-1]

    yield make
    for mount in started:
        try:
            if mount.is_running:
                mount.stop()
        finally:
            mount.clean_up()


def test_a_whole_load_costs_what_was_said(
    place: Place, model: Path, mounted: Callable[[Place], TestMount], tmp_path: Path
) -> None:
    """Bytes within 1 %, ranges between what is expected less a tenth and the most that was said."""
    cache = tmp_path / "m" / "cache"
    found = estimate(place, "--cache-dir", cache, *GIVEN)
    assert (found["files_count"], found["total_bytes"]) == (4, total_of(model))
    assert (found["cached_bytes"], found["is_measured"]) == (0, False)
    place.forget()
    mount = mounted(place)
    for _ in mount.client.prefetch([place.model], "ssd", wait=True):
        pass
    requests, nbytes = place.sent()
    assert nbytes == pytest.approx(found["origin_bytes"], rel=0.01)
    assert 0.9 * found["requests"] <= requests <= found["requests_most"], found
    if not place.url.startswith("mfs+"):
        assert (requests, nbytes) == (found["requests"], found["origin_bytes"]), "no more and no less"
    else:
        assert found["origin_bytes"] < 0.75 * found["total_bytes"], "compressed"
    mount.stop()
    again = estimate(place, "--cache-dir", cache, *GIVEN)
    assert again["origin_bytes"] == again["requests"] == 0
    assert again["cached_bytes"] == again["total_bytes"] == found["total_bytes"]


def test_looking_at_headers_costs_what_was_said(
    web: Place, mounted: Callable[[Place], TestMount], tmp_path: Path
) -> None:
    found = estimate(web, "--read", "headers", "--cache-dir", tmp_path / "m" / "cache", *GIVEN)
    small = 302_000 + len(json.dumps({"a": ""}))
    assert found["origin_bytes"] == 2 * BLOCK_BYTES + small
    web.forget()
    mount = mounted(web)
    program = (
        "import sys, glob; from safetensors import safe_open\n"
        "for path in glob.glob(sys.argv[1] + '/*.safetensors'): safe_open(path, 'np').keys()\n"
        "for name in ('config.json', 'tokenizer.json'): open(f'{sys.argv[1]}/{name}').read()"
    )
    subprocess.run([sys.executable, "-c", program, mount.path / web.model], check=True, timeout=DEADLINE_S)
    requests, nbytes = web.sent()
    assert nbytes == pytest.approx(found["origin_bytes"], rel=0.01)
    assert found["requests"] <= requests <= found["requests_most"]


def test_a_load_by_a_framework_stays_within_the_bound(
    web: Place, mounted: Callable[[Place], TestMount], tmp_path: Path
) -> None:
    found = estimate(web, "--cache-dir", tmp_path / "m" / "cache", *GIVEN)
    web.forget()
    mount = mounted(web)
    program = (
        "import sys, glob, ml_dtypes; from safetensors.numpy import load_file\n"
        "for path in sorted(glob.glob(sys.argv[1] + '/*.safetensors')): load_file(path)\n"
        "for name in ('config.json', 'tokenizer.json'): open(f'{sys.argv[1]}/{name}').read()"
    )
    subprocess.run([sys.executable, "-c", program, mount.path / web.model], check=True, timeout=DEADLINE_S)
    mount.wait_quiet()
    requests, nbytes = web.sent()
    assert nbytes == pytest.approx(found["origin_bytes"], rel=0.01)
    assert requests <= found["requests_most"]


def test_what_comes_before_a_load_can_begin(web: Place, model: Path) -> None:
    found = estimate(web, "--read", "first", *GIVEN)
    first = (model / "model-00001-of-00002.safetensors").stat().st_size
    small = (model / "config.json").stat().st_size + (model / "tokenizer.json").stat().st_size
    assert found["origin_bytes"] == first + BLOCK_BYTES + small
    assert found["requests"] == -(-first // CHUNK_BYTES) + 3


def test_paths_inside_a_source(mfs: Mfs, web: Place, nginx: NginxServer, model: Path) -> None:
    one = f"llama/{next(iter(sorted(p.name for p in model.iterdir() if p.suffix == '.safetensors')))}"
    other = nginx.files / web.url.removeprefix(nginx.url).strip("/") / "other"
    other.mkdir()
    (other / "w.bin").write_bytes(b"x")
    nginx.forget_requests()
    found = estimate(web, one, *GIVEN)
    assert found["total_bytes"] == found["origin_bytes"] == (model / one.removeprefix("llama/")).stat().st_size
    listed = {r.path for r in nginx.requests() if not r.range}
    assert listed == {f"/{other.parent.name}/", f"/{other.parent.name}/llama/"}, "nothing beside the way"
    assert found["listing_requests"] == 2
    assert "no file at or below 'llama/none'" in mfs.error("estimate", web.url, "llama/none", *GIVEN)


def test_what_other_models_brought_is_taken_off(
    mfs: Mfs, pushed: Place, nginx: NginxServer, model: Path, mounted: Callable[[Place], TestMount], tmp_path: Path
) -> None:
    """Half of a model is on SSD; then comes another one that shares a tensor with it, and has it in two files."""
    cache = tmp_path / "m" / "cache"
    mount = mounted(pushed)
    for _ in mount.client.prefetch(["model-00001-of-00002.safetensors"], "ssd", wait=True):
        pass
    mount.stop()
    found = estimate(pushed, "--cache-dir", cache, *GIVEN)
    missing = (model / "model-00002-of-00002.safetensors").stat().st_size
    assert found["cached_bytes"] == total_of(model) - missing, "small files came by themselves"
    assert found["origin_bytes"] < 5_500_000
    name = pushed.url.split("/")[-3]
    tied = tmp_path / "tied"
    tied.mkdir()
    shared = weights(1, 4001)["layer.0"]
    save_file({"tied": shared, **weights(3, 3000)}, tied / "model.safetensors")
    save_file({"tied": shared}, tied / "twin.safetensors")
    mfs("push", tied, f"mfs+file://{nginx.files}/{name}/reg/tied:prod")
    other = of_nginx(nginx, pushed.url.replace("llama:", "tied:"), "", f"/{name}/reg/chunks/")
    assert estimate(other, *GIVEN)["shared_bytes"] == 0
    fresh = estimate(other, "--cache-dir", tmp_path / "none", *GIVEN)
    assert fresh["shared_bytes"] == shared.nbytes
    assert "counted once" in fresh["notes"][0]
    found = estimate(other, "--cache-dir", cache, *GIVEN)
    assert found["shared_bytes"] == 2 * shared.nbytes
    other.forget()
    with TestMount(tmp_path / "m", other.url, workers_count=2) as mount:
        for _ in mount.client.prefetch([""], "ssd", wait=True):
            pass
    assert other.sent()[1] == pytest.approx(found["origin_bytes"], rel=0.01)


def test_differences_to_a_base(mfs: Mfs, nginx: NginxServer, pushed: Place, tmp_path: Path) -> None:
    """A fine-tune comes with what it stands on, unless the node has that already."""
    name = pushed.url.split("/")[-3]
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    moved = {key: (value.view(np.uint16) + np.uint16(1)).view(value.dtype) for key, value in weights(2, 3333).items()}
    save_file(moved, tuned / "model-00002-of-00002.safetensors")
    mfs("push", tuned, f"mfs+file://{nginx.files}/{name}/reg/tuned:v1", "--base", "llama:prod")
    place = of_nginx(nginx, f"mfs+{nginx.url}{name}/reg/tuned:v1", "", f"/{name}/reg/chunks/")
    path = "model-00002-of-00002.safetensors"
    found = estimate(place, path, "--cache-dir", tmp_path / "m" / "cache", *GIVEN)
    nginx.forget_requests()
    with TestMount(tmp_path / "m", place.url, workers_count=2) as mount:
        for _ in mount.client.prefetch([path], "ssd", wait=True):
            pass
    requests, nbytes = place.sent()
    assert nbytes == pytest.approx(found["origin_bytes"], rel=0.01)
    assert requests <= found["requests_most"]
    assert nbytes > 4_521_776, "more than the base alone"


@pytest.mark.parametrize("kind", ["oci", "hub"])
def test_other_origins(hub: HubServer, registry: DockerRegistry, tmp_path: Path, kind: str) -> None:
    """As the daemon counts it: ranges of raw layers, and of files behind a Hub's redirects."""
    there = origins.OciOrigin(registry) if kind == "oci" else origins.HubOrigin(hub)
    there.put_all({"w.bin": os.urandom(9 << 20), "config.json": b"{}" * 500})
    place = Place(there.url, lambda: (0, 0), lambda: None, env=there.env)
    found = estimate(place, "--cache-dir", tmp_path / "m" / "cache", *GIVEN)
    assert (found["files_count"], found["total_bytes"]) == (2, (9 << 20) + 1000)
    with TestMount(tmp_path / "m", there.url, env=there.env) as mount:
        for _ in mount.client.prefetch([""], "ssd", wait=True):
            pass
        origin = mount.client.status()["origin"]
    assert origin["fetched_bytes"] == found["origin_bytes"]
    assert found["requests"] <= origin["requests_count"] <= found["requests_most"]


def test_time_and_egress(web: Place, model: Path) -> None:
    found = estimate(web, "--link", "100Mbit/s", "--latency", "50ms", "--egress", "0.5")
    total = total_of(model)
    assert found["egress_dollars"] == pytest.approx(total / 2**30 * 0.5)
    assert found["seconds"] == pytest.approx(total * 8 / 100e6 + 0.05 + found["listing_s"])
    far = estimate(web, "--link", "100Gbit/s", "--latency", "10s", "--connections", "1")
    assert far["seconds"] == pytest.approx(10 * far["requests"], rel=0.1)
    assert estimate(web, "--egress", "aws", *GIVEN)["price"]["source"].startswith("AWS")


def test_a_link_that_is_measured_is_measured_within_its_bounds(web: Place, nginx: NginxServer) -> None:
    nginx.forget_requests()
    found = estimate(web)
    assert found["is_measured"]
    assert found["link_bytes_s"] > 0
    assert found["latency_s"] > 0
    assert web.sent()[1] <= (64 << 20) + 100


def test_a_slow_and_far_link_is_found_to_be_so(
    web: Place, nginx: NginxServer, chaos: Callable[[str], ChaosProxy]
) -> None:
    """A machine that is busy measures less than there is, never more."""
    proxy = chaos(nginx.url)
    proxy.set(rate_mb_s=15.0, rtt_ms=20.0)
    found = estimate(Place(web.url.replace(nginx.url, proxy.url), web.sent, web.forget))
    assert found["latency_s"] >= 0.02
    assert found["link_bytes_s"] <= 1.1 * 15e6
    moving_s = found["origin_bytes"] / found["link_bytes_s"]
    assert found["seconds"] == pytest.approx(found["listing_s"] + moving_s + found["latency_s"])


def test_for_people(mfs: Mfs, web: Place) -> None:
    text = mfs("estimate", web.url, *GIVEN, "--egress", "gcs").stdout
    assert "4 files, " in text
    lines = {line.split("  ")[0]: line for line in text.splitlines() if line}
    assert "requests, at most" in lines["from the origin"]
    assert "1 Gbit/s and 1.0 ms (given)" in lines["time"]
    assert "$0.00 at $0.12/GB (Google" in lines["egress"]


def test_an_empty_source(mfs: Mfs, nginx: NginxServer) -> None:
    name = uuid.uuid4().hex[:12]
    (nginx.files / name).mkdir()
    found = json.loads(mfs("estimate", f"{nginx.url}{name}/", "--json").stdout)
    assert (found["files_count"], found["origin_bytes"], found["seconds"]) == (0, 0, found["listing_s"])


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_an_origin_that_refuses_is_told_of_and_given_up(
    monkeypatch: pytest.MonkeyPatch, scheme: str, tmp_path: Path
) -> None:
    """Long before --timeout, which is for origins that answer."""
    monkeypatch.setattr(estimating, "TROUBLE_S", 0.5)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    at = f"http://127.0.0.1:{free_port()}"
    args = [f"{at}/models/"] if scheme == "http" else ["s3://models", "--endpoint-url", at]
    done = CliRunner().invoke(cli, ["estimate", *args, "--timeout", "1h"])
    assert done.exit_code != 0
    said = [done.stderr.strip(), str(done.exception)]
    assert "trying again for" in said[0]
    assert said[0].count("trying again") == 1
    assert "has not answered for" in "".join(said)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("s3://x", "--link", "fast"), "'--link': not a rate: 'fast'"),
        (("s3://x", "--link", "0Gbit/s"), "not a rate"),
        (("s3://x", "--egress", "moon"), "expected aws, gcs, azure or dollars"),
        (("s3://x", "--latency", "soon"), "not a duration"),
        ((), "Missing argument 'SOURCE'"),
        (("tpu://x",), "not a source"),
    ],
)
def test_wrong_usage(mfs: Mfs, args: tuple[str, ...], said: str) -> None:
    assert said in mfs.error("estimate", *args, status=2)


@pytest.mark.parametrize(
    ("text", "bytes_s"),
    [
        ("1Gbit/s", 125e6),
        ("100Mbit", 12.5e6),
        ("500MB/s", 500e6),
        ("2.5Gbps", 312.5e6),
        ("8kbit/s", 1e3),
        ("10B/s", 10),
    ],
)
def test_rates(text: str, bytes_s: float) -> None:
    assert parse_rate(text) == bytes_s


def test_prices() -> None:
    assert prices.parse("0").of(1 << 40) == 0
    assert prices.parse("aws").of(10 << 30) == pytest.approx(0.9)
    with pytest.raises(UsageError):
        prices.parse("-1")


def test_a_cache_is_only_looked_at(registry: DockerRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed layers are unpacked elsewhere, and what the cache has unpacked is not fetched again."""
    there = artifacts.RegistryOrigin(registry, packing="gzip")
    there.put_all({"w.bin": os.urandom(3 << 20), "config.json": b"{}" * 500})
    place = Place(there.url, lambda: (0, 0), lambda: None)
    cache, room = tmp_path / "cache", tmp_path / "room"
    room.mkdir()
    open_directory(cache)
    monkeypatch.setattr("tempfile.tempdir", str(room))
    before = sorted(cache.rglob("*"))
    assert estimate(place, "--cache-dir", cache, *GIVEN)["files_count"] == 2
    assert sorted(cache.rglob("*")) == before
    assert list(room.iterdir()) == []
    layers = root_of(cache) / LAYERS
    source = there.source(cache_directory=str(cache))
    list(source.list("", deadline_s=time.monotonic() + DEADLINE_S))
    source.close()
    (layer,) = layers.glob("*.tar")
    os.utime(layer, ns=(0, 0))
    monkeypatch.setattr(UnpackedLayers, "_run", lambda *args: pytest.fail("unpacked again"))
    assert estimate(place, "--cache-dir", cache, *GIVEN)["files_count"] == 2
    assert layer.stat().st_mtime_ns == 0, "nor is it said to have been used"
    there.close()
