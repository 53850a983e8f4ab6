"""A real tritonserver over three places of one repository: local disk, our mount, and its own s3:// on the same store.

Measured is the time from the load request to the first inference whose numbers were checked, and what the store sent
meanwhile. Two versions a model, of which Triton serves the newest; its s3:// copies all of a model, the mount moves
what is read. Triton's auto-complete is off: the second it sleeps would hide everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from tests.servers.triton import TritonServer, missing
from tools.bench import link
from tools.bench.machine import drop_page_cache
from tools.bench.mounts import Ours
from tools.bench.origin import BUCKET, Origin
from tools.bench.processes import BenchError, wait_for
from tools.bench.results import Goal, Results, Row

GBIT_S = 1.0
PREFIX = "triton"
SYSTEMS = ("local", "mfs", "s3")
_WARM_PASSES = 5
_SAMPLE = 4096
"""Every so many bytes one is summed up in a timed inference; an untimed one afterwards sums them all."""

_MODEL_PY = """\
import json, numpy, safetensors, safetensors.numpy
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        reads = json.loads(args["model_config"])["parameters"]["reads"]["string_value"]
        path = f"{args['model_repository']}/{args['model_version']}/model.safetensors"
        if reads == "all":
            self.weights = safetensors.numpy.load_file(path)
        else:
            with safetensors.safe_open(path, "np") as file:
                self.weights = {name: file.get_tensor(name) for name in ("scale", "bias")}

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            step = pb_utils.get_input_tensor_by_name(request, "step").as_numpy()[0]
            filler = self.weights.get("filler", numpy.zeros(1, numpy.uint8))
            total = numpy.array([filler[::step].sum(dtype=numpy.int64)], numpy.int64)
            y = x * self.weights["scale"] + self.weights["bias"]
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y), pb_utils.Tensor("sum", total)]))
        return answers
"""
_CONFIG = """\
backend: "python"
input {{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] }}
input {{ name: "step" data_type: TYPE_INT64 dims: [ 1 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 4 ] }}
output {{ name: "sum" data_type: TYPE_INT64 dims: [ 1 ] }}
parameters {{ key: "reads" value {{ string_value: "{reads}" }} }}
"""

NOTE = """\
Seconds from the load request (for a swap: from the unload) to the first inference, whose numbers are checked. Local
disk and mount take turns, pass by pass; their ratios are of neighbours. Cold: new mount and cache, page cache dropped.
Where every tensor is used the link itself allows a factor of two: s3:// moves two versions, the mount one."""


@dataclass(frozen=True)
class Model:
    """One model of the repository; its newest version is known by `scale` and the sums of its filler."""

    name: str
    reads: str
    """'all': every tensor, when it is loaded; 'two': two small ones of three."""
    scale: int
    sums: dict[int, int]
    """Step -> sum of every step-th byte of the filler."""


class Bench:
    """The repository, in all three places, and what is measured on it."""

    def __init__(
        self, folder: Path, origin: Origin, size_bytes: int, results: Results, say: Callable[[str], None]
    ) -> None:
        """size_bytes: of one version's weights. Raises: BenchError without Triton."""
        if reason := missing():
            raise BenchError(reason)
        self.folder, self.origin, self.results, self.say = folder / "triton", origin, results, say
        self.local = self.folder / "repository"
        say(f"making and uploading three models of two versions, {size_bytes / 1e6:.0f} MB each")
        files = {number: self._make_weights(number, size_bytes) for number in (1, 2, 3)}
        self.first = self._make_model("first", "all", files[1], files[2], 2)
        self.second = self._make_model("second", "all", files[1], files[3], 3)
        self.part = self._make_model("part", "two", files[1], files[2], 2)
        self._ours = Ours(self.folder / "ours", f"s3://{BUCKET}/{PREFIX}", origin.environ)
        self._servers_count = 0

    # -- the repository

    def _make_weights(self, number: int, size_bytes: int) -> tuple[Path, dict[int, int]]:
        filler = numpy.random.default_rng(number).integers(0, 256, size_bytes, dtype=numpy.uint8)
        tensors = {
            "scale": numpy.full(4, number, numpy.float32), "bias": numpy.full(4, number / 2, numpy.float32),
            "filler": filler,
        }  # fmt: skip
        path = self.folder / f"weights-{number}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(path))
        return path, {step: int(filler[::step].sum(dtype=numpy.int64)) for step in (1, _SAMPLE)}

    def _make_model(
        self, name: str, reads: str, old: tuple[Path, dict[int, int]], new: tuple[Path, dict[int, int]], scale: int
    ) -> Model:
        folder = self.local / name
        for version, (weights, _) in (("1", old), ("2", new)):
            (folder / version).mkdir(parents=True)
            (folder / version / "model.py").write_text(_MODEL_PY)
            (folder / version / "model.safetensors").hardlink_to(weights)
        (folder / "config.pbtxt").write_text(_CONFIG.format(reads=reads))
        for path in sorted(folder.rglob("*.*")):
            self.origin.put_file(path, f"{PREFIX}/{path.relative_to(self.local)}")
        return Model(name, reads, scale, new[1] if reads == "all" else {1: 0, _SAMPLE: 0})

    # -- a server over one of the places

    def _server(self, system: str) -> TritonServer:
        where = {
            "local": str(self.local),
            "mfs": str(self._ours.mountpoint),
            "s3": f"s3://http://127.0.0.1:{self.origin.port}/{BUCKET}/{PREFIX}",
        }[system]
        self._servers_count += 1
        env = {**self.origin.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        folder = self.folder / f"server-{self._servers_count}"
        return TritonServer(folder, where, "--model-control-mode=explicit", env=env)

    def _infer(self, server: TritonServer, model: Model, step: int) -> None:
        """Raises: BenchError if a number is wrong: correct before fast."""
        inputs = {"x": ("FP32", [4], [0, 1, 2, 3]), "step": ("INT64", [1], [step])}
        got = server.infer(model.name, inputs)
        expected = {"y": [x * model.scale + model.scale / 2 for x in range(4)], "sum": [model.sums[step]]}
        if got != expected:
            raise BenchError(f"{model.name} answers {got}, expected {expected}: wrong weights, so no figures")

    def _first_inference_s(self, server: TritonServer, model: Model) -> float:
        start_s = time.monotonic()
        server.load(model.name, timeout_s=120)
        self._infer(server, model, _SAMPLE)
        took_s = time.monotonic() - start_s
        self._infer(server, model, 1)
        return took_s

    def _unload(self, server: TritonServer, model: Model) -> None:
        """And wait until it is gone, with its process."""
        before = server.unloads(model.name)
        server.unload(model.name)
        wait_for(lambda: server.unloads(model.name) > before, f"Triton has unloaded {model.name}")

    def _swap_s(self, server: TritonServer, old: Model, new: Model) -> float:
        start_s = time.monotonic()
        server.unload(old.name)
        server.load(new.name, timeout_s=120)
        self._infer(server, new, _SAMPLE)
        took_s = time.monotonic() - start_s
        self._infer(server, new, 1)
        return took_s

    # -- what is measured

    def round(self) -> None:
        """Warm beside local disk; cold at full speed; everything over the link."""
        self._fresh_mount()
        with self._ours, self._server("local") as local, self._server("mfs") as mount:
            servers = {"local": local, "mfs": mount}
            for system, server in servers.items():
                drop_page_cache()
                self._add(f"cold/{system}", self._first_inference_s(server, self.first))
                self._unload(server, self.first)
            for number in range(_WARM_PASSES):
                for system in sorted(servers, reverse=bool(number % 2)):
                    self._add(f"warm/{system}", self._first_inference_s(servers[system], self.first))
                    self._unload(servers[system], self.first)
        with self._server("s3") as server:
            self._add("cold/s3", self._first_inference_s(server, self.first))
        for system in ("mfs", "s3"):
            self._over_link(system)

    def _over_link(self, system: str) -> None:
        with ExitStack() as stack:
            stack.enter_context(link.capped(self.origin.port, GBIT_S))
            if system == "mfs":
                self._fresh_mount()
                stack.enter_context(self._ours)
            server = stack.enter_context(self._server(system))
            drop_page_cache()
            self._measure(f"link-part/{system}", lambda: self._first_inference_s(server, self.part))
            self._unload(server, self.part)
            self._measure(f"link-whole/{system}", lambda: self._first_inference_s(server, self.first))
            self._measure(f"link-swap/{system}", lambda: self._swap_s(server, self.first, self.second))
            self._measure(f"link-swap-back/{system}", lambda: self._swap_s(server, self.second, self.first))

    def _measure(self, name: str, work: Callable[[], float]) -> None:
        before = link.sent_bytes()
        took_s = work()
        moved = link.sent_bytes() - before
        self.results.add(f"moved/{name}", moved / 1e6)
        self._add(name, took_s)
        if name.endswith("/mfs"):
            self._settle()

    def _settle(self) -> None:
        """What is fetched ahead is not the next measurement's."""

        def is_quiet() -> bool:
            status = self._ours.status()
            return not status["origin"]["inflight"] and not status["prefetch"]["queued_bytes"]

        wait_for(is_quiet, "nothing is fetched any more")

    def _fresh_mount(self) -> None:
        self._ours.stop()
        self._ours.forget()
        drop_page_cache()

    def _add(self, name: str, seconds: float) -> None:
        self.results.add(name, seconds)
        self.say(f"{name:<20} {seconds:7.3f} s")


def goal_rows(results: Results) -> list[Row]:
    """The figures that have goals (issue 4)."""
    rows = results.ratio("warm/mfs", ["warm/local"], "warm load: mount / local disk", Goal(at_most=1.1), "pass by pass")
    for case, what, note in (
        ("part", "two tensors used", ""),
        ("whole", "every tensor used", "two versions against one: the link allows 2"),
    ):
        title = f"cold, {GBIT_S:g} Gbit/s, {what}: s3:// / mount"
        rows += results.ratio(f"link-{case}/s3", [f"link-{case}/mfs"], title, Goal(at_least=5.0), note)
    return rows


def rows(results: Results) -> list[Row]:
    """Seconds and megabytes of every case, in every place."""
    made: list[Row] = []
    for case, title in (
        ("cold", "cold load, loopback"),
        ("warm", "warm load"),
        ("link-part", f"{GBIT_S:g} Gbit/s: cold load, two tensors used"),
        ("link-whole", f"{GBIT_S:g} Gbit/s: cold load, all used"),
        ("link-swap", f"{GBIT_S:g} Gbit/s: swap to another model"),
        ("link-swap-back", f"{GBIT_S:g} Gbit/s: swap back"),
    ):
        for system in SYSTEMS:
            made += results.row(f"{case}/{system}", f"{title}: {system}", "s")
        for system in SYSTEMS:
            made += results.row(f"moved/{case}/{system}", f"{title}: {system}", "MB", note="sent by the store")
    return made
