"""Each shipped alert is made to fire by a real fault and to resolve by its end, in a real Prometheus that scrapes real
mounts and a real gpuload server; the dashboards ask for nothing that is not there.

All faults go on beside each other: they begin, one Prometheus sees them all, they end. Rules are as shipped but for
their times: seconds instead of minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpuload.client import asking
from gpuload.errors import FitError
from mfs.errors import MfsError
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from mfs.types import CHUNK_BYTES
from tests.observe.readers import read_chunks, read_run
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.process import ServerError, ServerProcess, free_port
from tests.servers.prometheus import INTERVAL_S, PROMTOOL, PrometheusServer, promtool

OBSERVE = Path(__file__).parents[2] / "tools" / "deploy" / "observe"
RULES, RUNBOOK = OBSERVE / "mfs.rules.yml", OBSERVE / "RUNBOOK.md"
DASHBOARDS = ("mfs.json", "gpuload.json")
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())

pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="no prometheus: run tools/setup test")

_WINDOW_S = 5 * INTERVAL_S
"""Of rates. A daemon's successor may take a scrape or two to come."""


def hastened(rules: str) -> str:
    """The rules with seconds in the place of minutes."""
    rules = re.sub(r"^ +for: \S+\n", "", rules, flags=re.MULTILINE)
    return re.sub(r"\[\d+[smh]\]", f"[{_WINDOW_S}s]", rules)


# -- without anything running


def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(ALERTS)} rules found" in done.stdout


def test_each_alert_has_its_passage_in_the_runbook_and_names_it() -> None:
    passages = re.findall(r"^## (\w+)\n(.+)", RUNBOOK.read_text(), flags=re.MULTILINE)
    assert [name for name, _ in passages] == ALERTS
    links = re.findall(r"- alert: (\w+)(?:(?!- alert).)*?runbook_url: (\S+)", RULES.read_text(), flags=re.DOTALL)
    assert links == [(name, f"RUNBOOK.md#{name.lower()}") for name in ALERTS]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_laid_out_and_knows_no_data_source_of_ours(name: str) -> None:
    panels = json.loads((OBSERVE / name).read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels if panel["type"] != "row")


# -- with all of it


@dataclass
class Fault:
    """Something that goes wrong, the alerts it must raise, and its end."""

    alerts: dict[str, str]
    """By name, the address at which each must fire."""
    begin: Callable[[], object]
    end: Callable[[], object] = lambda: None
    after: str = ""
    """The alert that must have fired before this begins, '' for none."""


@dataclass
class Scene:
    """All that is watched."""

    folder: Path
    stack: contextlib.ExitStack
    mounts: dict[str, TestMount] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)

    def mount(self, name: str, url: str, **settings: Any) -> TestMount:
        """A mount that answers Prometheus; it is not asked in the end whether it logged errors, for it must."""
        self.addresses[name] = f"127.0.0.1:{free_port()}"
        settings = {"timeout_s": 2.0, "metrics_addr": self.addresses[name]} | settings
        mount = self.mounts[name] = TestMount(self.folder / name, url, **settings)
        self.stack.callback(mount.clean_up)
        return mount.start()


def origin_dies(scene: Scene, nginx: NginxServer) -> list[Fault]:
    (nginx.files / "llama").mkdir()
    (nginx.files / "llama" / "model.bin").write_bytes(bytes(40 * CHUNK_BYTES))
    mount, at = scene.mount("origin", nginx.url, refresh_s=1.0), scene.addresses["origin"]
    path = str(mount.path / "llama" / "model.bin")
    assert mount.call(read_chunks, path, [0]) == 0  # the tree is known
    reader = mount.outside()

    def begin() -> None:
        nginx.stop()
        # More than a model's share of the slots: some wait for the origin, and some for those.
        reader.start(read_chunks, path, list(range(1, 40, 2)))

    def end() -> None:
        nginx.start()
        assert reader.finish() == 20

    names = ("MfsReadsFail", "MfsFetchesFail", "MfsSourceUnlisted", "MfsReadersWaitLong", "MfsRamTooSmall")
    return [Fault(dict.fromkeys(names, at), begin, end)]


def hub_throttles(scene: Scene, hub: HubServer) -> list[Fault]:
    hub.commit("org/model", {"model.bin": ramp(2 * CHUNK_BYTES)})
    mount = scene.mount("hub", "hf://org/model", env=hub.environ(hub.token), timeout_s=20.0)

    def begin() -> None:
        hub.limit_rate(2, wait_s=1, host="cdn")
        assert mount.call(read_chunks, str(mount.path / "model.bin"), [0, 1]) == 0

    return [Fault({"MfsOriginThrottles": scene.addresses["hub"]}, begin)]


def disk_fills_then_goes(scene: Scene, models: Path) -> list[Fault]:
    place = small_disk(scene)
    cache = place / "cache"
    mount, at = scene.mount("disk", str(models), cache_dir=cache, workers_count=4), scene.addresses["disk"]

    def fill() -> None:
        with (place / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            for nbytes in (1 << 20, 1 << 12):  # to the last page
                while ballast.write(bytes(nbytes)) == nbytes:
                    pass
        list(mount.client.prefetch(["a"], "ram", wait=True))

    def go() -> None:
        (place / "ballast").unlink()
        cache.rename(place / "aside")
        for pid in mount.worker_pids:
            os.kill(pid, signal.SIGKILL)

    return [
        Fault({"MfsCacheNotWritten": at}, fill),
        Fault(
            {"MfsCacheAway": at, "MfsWorkersRestart": at}, go, lambda: (place / "aside").rename(cache),
            after="MfsCacheNotWritten",
        ),
    ]  # fmt: skip


def small_disk(scene: Scene) -> Path:
    """A file system that is full when it is full."""
    place, image = scene.folder / "disk-of-its-own", scene.folder / "disk.img"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, check=False)
    if done.returncode:  # this container has no loop devices
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m,mode=755", "none", place], check=True)
    scene.stack.callback(subprocess.run, ["umount", "-l", place], check=True)
    return place


def cache_is_small(scene: Scene, models: Path) -> list[Fault]:
    mount, at = scene.mount("small", str(models), cache_bytes=4 * CHUNK_BYTES), scene.addresses["small"]

    def push_out() -> None:
        list(mount.client.prefetch(["a", "b"], "ssd", wait=True))

    def waste() -> None:
        """A program begins to read and is killed; somebody makes room."""
        path = str(mount.path / "c" / "model.bin")
        assert mount.call(read_run, path, 3 * CHUNK_BYTES) == 3 * CHUNK_BYTES
        mount.wait_quiet(prefetch=False)
        mount.client.evict(["c"], "ram")

    return [Fault({"MfsCacheTooSmall": at}, push_out), Fault({"MfsPrefetchWasted": at}, waste)]


def daemons_die(scene: Scene, models: Path) -> list[Fault]:
    crashing, unheld, down = (scene.mount(name, str(models)) for name in ("crashing", "unheld", "down"))

    def crash() -> None:
        crashing.wait_successor(crashing.crash())

    return [
        Fault({"MfsDaemonCrashed": scene.addresses["crashing"]}, crash),
        Fault(
            {"MfsMountNotHeld": scene.addresses["unheld"]}, lambda: os.kill(unheld.holder_pid, signal.SIGKILL),
            lambda: unheld.hand_over(old_status=-signal.SIGKILL),
        ),
        Fault({"MfsMountDown": scene.addresses["down"]}, down.stop, down.start),
    ]  # fmt: skip


SIMULATE = Path(__file__).parents[2] / "tools" / "gpu" / "simulate"


class Gpuload:
    """`gpuload serve` with an arena of 16 MiB; of a modelled card, and with a RAM tier behind it, if one is given."""

    def __init__(self, folder: Path, ram_tier: str = "") -> None:
        self._ram_tier = ram_tier
        self.socket, self.address = str(folder / "g.sock"), f"127.0.0.1:{free_port()}"
        self._folder = folder
        self.start()

    def start(self) -> None:
        arena = ["--arena", "cuda:0=16M", "--ram-tier", self._ram_tier] if self._ram_tier else ["--arena", "cpu=16M"]
        simulated = [sys.executable, str(SIMULATE), "--"] if self._ram_tier else []
        argv = [*simulated, sys.executable, "-m", "gpuload", "serve", *arena, "--socket", self.socket,
                "--digests", str(self._folder / "digests"), "--metrics-addr", self.address]  # fmt: skip
        self._process = ServerProcess("gpuload", argv, log=self._folder / "gpuload.log")
        self._process.wait_until(lambda: os.path.exists(self.socket) and self._answers())

    def stop(self) -> None:
        self._process.stop()

    def load(self, path: Path, name: str, *, is_swap: bool = False, pinned: bool = False) -> None:
        options = {"pinned": pinned}
        asking.load_resident(path, name, None, is_swap=is_swap, options=options, socket_path=self.socket)

    def unload(self, name: str) -> None:
        asking.ask({"op": "unload", "model": name}, socket_path=self.socket)

    def crash(self) -> None:
        os.kill(asking.ask({"op": "ping"}, socket_path=self.socket)["pid"], signal.SIGKILL)

    def lease(self, name: str) -> socket.socket:
        """A connection that holds a model until it is closed."""
        sock = asking.connect(self.socket, 30)
        _, fds = asking.exchange(sock, {"op": "attach", "model": name}, ())
        for fd in fds:
            os.close(fd)
        return sock

    def _answers(self) -> bool:
        try:
            return bool(asking.ask({"op": "ping"}, socket_path=self.socket))
        except MfsError:
            return False


def gpuload_has_trouble(scene: Scene, models: Path) -> list[Fault]:
    folder = scene.folder / "gpuload"
    folder.mkdir()
    servers = {name: Gpuload(make(folder / name)) for name in ("served", "queued", "doomed", "killed")}
    servers["carded"] = Gpuload(make(folder / "carded"), ram_tier="1M")
    served, queued, doomed, killed, carded = servers.values()
    for name, server in servers.items():
        scene.stack.callback(server.stop)
        assert name not in scene.addresses
        scene.addresses[name] = server.address
    # In granules of 2 MiB: `full` fills what the one that is held leaves of eight.
    small, other, full, large, nearly = (
        save(folder / f"{mib}.safetensors", mib << 20, seed) for seed, mib in enumerate((1, 2, 13, 32, 12))
    )
    held: list[socket.socket] = []
    served.load(small, "chat")
    killed.load(small, "chat")  # without weights there is nothing to go on with

    def hold_the_old() -> None:
        held.append(served.lease("chat"))
        served.load(other, "chat", is_swap=True)

    def refuse() -> None:
        with pytest.raises(FitError):
            served.load(large, "large")

    def evict() -> None:
        for _ in range(2):
            carded.load(full, "full")
            carded.load(nearly, "nearly")

    return [
        Fault({"GpuloadServerFollowed": killed.address}, killed.crash),
        Fault({"GpuloadRamTierTooSmall": carded.address}, evict),
        Fault({"GpuloadOldModelHeld": served.address}, hold_the_old, lambda: held[0].close()),
        Fault({"GpuloadLoadsFail": served.address}, refuse),
        Fault(
            {"GpuloadArenaFull": served.address}, lambda: served.load(full, "full", pinned=True),
            lambda: served.unload("full"),
        ),
        Fault({"GpuloadDown": doomed.address}, doomed.stop, doomed.start),
        *loads_queue(scene, queued, folder),
    ]  # fmt: skip


def loads_queue(scene: Scene, server: Gpuload, folder: Path) -> list[Fault]:
    """A model whose bytes do not come, and others behind it."""
    site = NginxServer(make(folder / "site"))
    scene.stack.enter_context(site)
    for number in range(6):
        save(site.files / f"{number}.safetensors", 2 << 20, number)
    mount = scene.mount("behind", site.url, timeout_s=8.0)
    commands: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        for number in range(6):
            mount.call(read_chunks, str(mount.path / f"{number}.safetensors"), [0])  # the table, not the tensors
        site.stop()
        for number in range(6):
            argv = [
                sys.executable,
                "-m",
                "gpuload",
                "load",
                str(mount.path / f"{number}.safetensors"),
                "--socket",
                server.socket,
            ]
            commands.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def end() -> None:
        site.start()
        for command in commands:
            command.wait(60)

    names = ("GpuloadLoadsQueue", "GpuloadBytesDoNotCome")
    return [Fault(dict.fromkeys(names, server.address), begin, end)]


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def save(path: Path, nbytes: int, seed: int) -> Path:
    """A safetensors file of random bytes."""
    save_file({"weights": np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)}, path)
    return path


@dataclass
class Observed:
    """What a Prometheus has seen."""

    quiet: set[tuple[str, str]]
    """What fired before anything went wrong."""
    expected: dict[str, str]
    fired: set[tuple[str, str]] = field(default_factory=set)
    stuck: set[tuple[str, str]] = field(default_factory=set)
    """What still fires though all is well again."""
    absent: dict[str, list[str]] = field(default_factory=dict)
    """By file: names that its expressions use and no target has."""
    refused: list[str] = field(default_factory=list)
    """Expressions that Prometheus does not take, with its words."""


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """All faults, begun and ended; half a minute."""
    folder = tmp_path_factory.mktemp("o")
    models = folder / "models"
    for name in "abc":
        make(models / name)
        (models / name / "model.bin").write_bytes(ramp(12 * CHUNK_BYTES))
    with contextlib.ExitStack() as stack:
        nginx = stack.enter_context(NginxServer(make(folder / "nginx")))
        hub = stack.enter_context(HubServer(make(folder / "hub")))
        scene = Scene(folder, stack)
        faults = [
            *origin_dies(scene, nginx), *hub_throttles(scene, hub), *disk_fills_then_goes(scene, models),
            *cache_is_small(scene, models), *daemons_die(scene, models), *gpuload_has_trouble(scene, models),
        ]  # fmt: skip
        rules = folder / "rules.yml"
        rules.write_text(hastened(RULES.read_text()))
        of_gpuload = [scene.addresses[name] for name in ("served", "queued", "doomed", "killed", "carded")]
        targets = {
            "mfs": [scene.addresses[name] for name in scene.mounts], "gpuload": of_gpuload,
        }  # fmt: skip
        prometheus = stack.enter_context(PrometheusServer(folder / "prometheus", targets, rules=rules))
        prometheus.wait_until(
            lambda: all(len(prometheus.query(f"count_over_time(up{{job='{job}'}}[1m]) > 2")) == len(of)
                        for job, of in targets.items()),
            "some scrapes of all",
        )  # fmt: skip
        found = Observed(prometheus.firing(), {name: at for fault in faults for name, at in fault.alerts.items()})
        watch(prometheus, faults, found)
        look_into_files(prometheus, found)
        yield found


def watch(prometheus: PrometheusServer, faults: list[Fault], found: Observed) -> None:
    """Let all faults happen, and end."""
    expected, stopped = set(found.expected.items()), threading.Event()

    def look() -> None:
        """All the time: an alert may have resolved before the next fault has begun."""
        while not stopped.wait(0.25):
            found.fired |= prometheus.firing()

    def have_resolved() -> bool:
        found.stuck = prometheus.firing()
        return not found.stuck

    watching = threading.Thread(target=look)
    watching.start()
    try:
        with contextlib.suppress(ServerError):  # the tests say which
            for fault in sorted(faults, key=lambda fault: bool(fault.after)):
                if fault.after:
                    at = fault.after, found.expected[fault.after]
                    prometheus.wait_until(lambda at=at: at in found.fired, fault.after)  # type: ignore[misc]
                fault.begin()
            prometheus.wait_until(lambda: expected <= found.fired, "all alerts", timeout_s=60)
    finally:
        stopped.set()
        watching.join()
    for fault in faults:
        fault.end()
    with contextlib.suppress(ServerError):
        prometheus.wait_until(have_resolved, "rest", timeout_s=60)


def look_into_files(prometheus: PrometheusServer, found: Observed) -> None:
    """Whether all that rules and dashboards ask for is there."""
    for name in (RULES.name, *DASHBOARDS):
        asked = expressions(OBSERVE / name)
        names = sorted({metric for text in asked for metric in re.findall(r"\b(?:mfs|gpuload)_\w+", text)})
        found.absent[name] = [metric for metric in names if not prometheus.query(f"present_over_time({metric}[10m])")]
        for text in asked:
            try:
                prometheus.query(text)
            except ServerError as error:
                found.refused.append(str(error))


def expressions(file: Path) -> list[str]:
    """All that a file of rules, or a dashboard, asks Prometheus for."""
    text = file.read_text()
    if file.suffix == ".yml":
        return [" ".join(e.split()) for e in re.findall(r"expr: (?:>-\n)?(.+?)\n +(?:for|labels):", text, re.DOTALL)]
    panels = json.loads(text)["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [e.replace("$instance", ".*").replace("$__rate_interval", "1m") for e in asked]


def test_nothing_fires_while_all_is_well(observed: Observed) -> None:
    assert observed.quiet == set()


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_where_its_fault_is_and_resolves_with_it(observed: Observed, alert: str) -> None:
    assert (alert, observed.expected[alert]) in observed.fired
    assert alert not in {name for name, _ in observed.stuck}


@pytest.mark.parametrize("name", [RULES.name, *DASHBOARDS])
def test_every_series_that_is_asked_for_exists(observed: Observed, name: str) -> None:
    assert len(expressions(OBSERVE / name)) > 4
    assert observed.absent[name] == []


def test_prometheus_takes_every_expression(observed: Observed) -> None:
    assert observed.refused == []
