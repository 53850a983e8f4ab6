"""Times of the registry, each system in turn, round by round: pushing, cold reading, following a tag, `oci://`.

Everything that is served lies in one tmpfs below one nginx: the registry in its folder (mfs+http://), the plain files
(http://) and the same files as an OCI registry serves them. So what differs is what we do with the bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mfs.registry import opening, tags
from mfs.registry.layout import parse_address
from mfs.sources.options import SourceOptions
from tests.servers.docker_registry import DockerRegistry
from tests.servers.nginx import NginxServer
from tools.bench import link, oci_site, registries
from tools.bench.machine import drop_page_cache
from tools.bench.mounts import Ours
from tools.bench.processes import BenchError, run
from tools.bench.reader import digest, tensor_bytes
from tools.bench.results import Goal, Results, Row
from tools.bench.workload import Model, read

CASES = ("push", "cold", "link", "base", "tags", "oci")
_LINK_GBIT_S = 1.0
_STORED = {"raw": ("--compress", "none"), "fast": ("--compress", "fast")}
_REFRESH_S, _SEEN_S = 1.0, 30.0
_MOVES = 5


@dataclass
class Times:
    """Rounds of the chosen cases over `base` and `full`, two members of a family, and `small`, a little one."""

    folder: Path
    base: Path
    full: Path
    small: Path
    """What `--compress small` is timed on, and fast beside it: it takes ten times as long."""
    cases: tuple[str, ...]
    results: Results
    say: Callable[[str], None]
    is_quick: bool = False
    """Leave `small` out."""
    _registry: DockerRegistry | None = None
    _stored: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Times:
        self._memory = self.folder / "memory"
        self._memory.mkdir(parents=True)
        run(["mount", "-t", "tmpfs", "-o", "size=75%", "bench", self._memory])  # in a namespace of ours: see there
        self._nginx = NginxServer(self.folder / "nginx", files=self._memory / "files")
        self._nginx.start()
        self._files = self._nginx.files
        self.prepare()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._registry:
            self._registry.stop()
        self._nginx.stop()
        run(["umount", self._memory])

    def prepare(self) -> None:
        """Fill what is read from."""
        truth = self.folder / "truth" / "model"  # where readers look for it
        shutil.copytree(self.base, truth)
        self._model = _model(truth)
        if {"cold", "link"} & set(self.cases):
            for name, options in _STORED.items():
                self._stored[name] = self._push(self.base, name, options).said["stored_bytes"]
        if {"base", "tags"} & set(self.cases):
            self._push(self.base, "family", (), "base")
            done = self._push(self.full, "family", ("--base", f"base:{registries.TAG}"), "full")
            self._stored["difference"] = done.said["stored_bytes"]
        if "oci" in self.cases:
            shutil.copytree(self.base, self._files / "plain" / "model")
            self._registry = DockerRegistry(self._memory / "docker")
            self._registry.start()
            oci_site.push(self.base, self._registry)
            self._blobs = oci_site.lay_out(self._registry, self._files)

    def round(self, number: int) -> None:
        """Every chosen case once; odd rounds the other way round."""
        steps: list[Callable[[int], None]] = []
        if "push" in self.cases:
            steps += [lambda n: self._timed_push("raw", self.base, n), lambda n: self._timed_push("fast", self.base, n)]
            for effort in () if self.is_quick else ("fast", "small"):
                steps.append(lambda n, e=effort: self._timed_push(e, self.small, n, "-of-small"))  # type: ignore[misc]
        if "cold" in self.cases:
            steps += [lambda n, s=s: self._cold(f"cold/{s}", self._of(s), n) for s in _STORED]  # type: ignore[misc]
        if "link" in self.cases:
            steps += [lambda n, s=s: self._over_link(s, n) for s in _STORED]  # type: ignore[misc]
        if "base" in self.cases:
            steps.append(self._second)
        if "oci" in self.cases:
            steps += [self._over_http, self._over_oci, self._from_docker, self._ceilings]
        for step in reversed(steps) if number % 2 else steps:
            step(number)

    def follow_tags(self, count: int = _MOVES) -> None:
        """How long after a move of a tag a mount that refreshes every second shows what it means now."""
        address = f"mfs+file://{self._files}/family/base"
        place = opening.open_address(parse_address(address), SourceOptions(), deadline_s=time.monotonic() + 60)
        self._push(self.small, "family", ("--no-base",), "base", tag="v2")
        ids = {tag: _meant(place.store, tag) for tag in ("v1", "v2")}
        sizes = {tag: _size_of_weights(folder) for tag, folder in (("v1", self.base), ("v2", self.small))}
        tags.move(place.store, "base", "prod", ids["v1"], how="tag", deadline_s=time.monotonic() + 60)
        try:
            with Ours(self.folder / "ours", address, {}, options=("--refresh", f"{_REFRESH_S:g}s")) as system:
                shown = system.mountpoint / "prod"
                for number in range(count):
                    tag = ("v2", "v1")[number % 2]
                    time.sleep(random.Random(number).uniform(1.0, 2.0))  # anywhere between two refreshes
                    tags.move(place.store, "base", "prod", ids[tag], how="tag", deadline_s=time.monotonic() + 60)
                    start = time.perf_counter()
                    while _size_of_weights(shown) != sizes[tag]:
                        if time.perf_counter() - start > _SEEN_S:
                            raise BenchError(f"a tag that moved was not seen within {_SEEN_S:g} s")
                        time.sleep(0.01)
                    self._add("tag/seen", (time.perf_counter() - start), "s")
        finally:
            place.store.close()
        self.results.add("tag/worst", max(self.results.samples["tag/seen"]))

    # -- one pass each

    def _push(
        self, directory: Path, root: str, options: tuple[str, ...], model: str = "model", *, tag: str = registries.TAG
    ) -> registries.Push:
        self.say(f"pushing {directory.name} to {root}/{model}:{tag}")
        return registries.push(directory, f"mfs+file://{self._files}/{root}", model, *options, tag=tag)

    def _timed_push(self, effort: str, directory: Path, number: int, suffix: str = "") -> None:
        root = self._memory / "pushed"
        options = ("--no-base", "--compress", "none" if effort == "raw" else effort)
        done = registries.push(directory, f"mfs+file://{root}", "model", *options)
        shutil.rmtree(root)
        nbytes = done.said["total_bytes"]
        self._add(f"push/{effort}{suffix}", nbytes / done.seconds / 1e6, "MB/s")
        self.results.add(f"push-cpu/{effort}{suffix}", done.cpu_s / nbytes * 1e9)

    def _of(self, name: str) -> str:
        return f"mfs+{self._nginx.url}{name}/model:{registries.TAG}"

    def _cold(self, name: str, url: str, number: int, inside: str = "") -> None:
        ours = Ours(self.folder / "ours", url, {})
        ours.forget()
        with ours as system:
            drop_page_cache()
            before_s = system.cpu_s()
            self._add(name, read("shuffled", system.mountpoint / inside, self._model, seed=number).gb_s, "GB/s")
            system.wait_quiet()
            self.results.add(f"cpu/{name}", (system.cpu_s() - before_s) / self._model.size_bytes * 1e9)

    def _over_link(self, stored: str, number: int) -> None:
        with link.capped(self._nginx.port, _LINK_GBIT_S):
            self._cold(f"link/{stored}", self._of(stored), number)

    def _second(self, number: int) -> None:
        """A fine-tune where its base is: what the origin sent for it, of what was stored for it."""
        ours = Ours(self.folder / "ours", f"mfs+{self._nginx.url}family", {})
        ours.forget()
        with ours as system:
            read("sequential", system.mountpoint / "base" / registries.TAG, self._model, seed=number)
            system.wait_quiet(self._model.size_bytes)
            drop_page_cache()
            self._nginx.forget_requests()
            full = system.mountpoint / "full" / registries.TAG
            if _digest(full) != _digest(self.full):
                raise BenchError(f"{full} does not hold the bytes of {self.full}")
            system.wait_quiet()
            sent = sum(request.sent_bytes for request in self._nginx.requests() if "/chunks/" in request.path)
        self._add("base/sent", sent / self._stored["difference"], "× of the stored differences")
        self.results.add("base/of-files", sent / self._model.size_bytes)

    def _over_http(self, number: int) -> None:
        self._cold("oci/http", f"{self._nginx.url}plain/model/", number)

    def _over_oci(self, number: int) -> None:
        self._cold("oci/oci", oci_site.address(self._nginx.port), number)

    def _from_docker(self, number: int) -> None:
        assert self._registry is not None
        self._cold("oci/docker", oci_site.address(self._registry.port), number)

    def _ceilings(self, number: int) -> None:
        assert self._registry is not None
        for name, site in (("nginx", f"{self._nginx.url}"), ("docker", f"{self._registry.url}/")):
            urls = [f"{site}v2/{oci_site.REPOSITORY}/blobs/{blob}" for blob in self._blobs[-2:]]
            found = json.loads(run([sys.executable, "-m", "tools.bench.ranges", *urls], timeout_s=300))
            self._add(f"oci/ceiling-{name}", found["bytes"] / found["seconds"] / 1e9, "GB/s")

    def _add(self, name: str, value: float, unit: str) -> None:
        self.results.add(name, value)
        self.say(f"{name:<22} {value:9.3f} {unit}")

    def compressed_share(self) -> float | None:
        """Bytes of the compressed revision, of the raw one."""
        return self._stored["fast"] / self._stored["raw"] if "fast" in self._stored else None


def _meant(store: object, tag: str) -> str:
    move = tags.current(store, "base", tag, deadline_s=time.monotonic() + 60)  # type: ignore[arg-type]
    if move is None or move.manifest is None:
        raise BenchError(f"base:{tag} is not in the registry it was pushed to")
    return move.manifest


def _model(folder: Path) -> Model:
    return Model(folder, _size_of_weights(folder), _digest(folder))


def _size_of_weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _digest(folder: Path) -> str:
    fds = [os.open(path, os.O_RDONLY) for path in sorted(folder.glob("*.safetensors"))]
    try:
        return digest(tensor_bytes(fds))
    finally:
        for fd in fds:
            os.close(fd)


def goal_rows(results: Results) -> list[Row]:
    """The figures that have goals (issue 10, "Progress and proof")."""
    found = results.ratio(
        "cold/fast", ["cold/raw"], "cold on loopback: compressed / raw", Goal(at_least=0.9), "decoding has to keep up"
    )
    gain = results.samples.get("share")
    over = results.ratio("link/fast", ["link/raw"], "", Goal())
    if gain and over:
        values = tuple(value * gain[0] for value in over[0].values)
        note = f"1 is by the compression ratio, {1 / gain[0]:.2f}"
        found.append(Row("cold over 1 Gbit/s: compressed / raw, of that ratio", values, "×", Goal(at_least=0.95), note))
    title = "second fine-tune: sent by the origin / stored differences"
    found += results.row("base/sent", title, "×", Goal(at_most=1.02), "the base is in the SSD tier")
    note = f"refresh {_REFRESH_S:g} s, the longest of {len(results.samples.get('tag/seen', ()))}"
    found += results.row("tag/worst", "tag move to visible", "s", Goal(at_most=_REFRESH_S + 0.1), note)
    title = "cold, oci:// / http://"
    found += results.ratio("oci/oci", ["oci/http"], title, Goal(at_least=0.95), "both from the same nginx")
    return found


def rate_rows(results: Results) -> list[Row]:
    """All times and rates. They are the machine's, too: busy, they say less."""
    found: list[Row] = []
    for effort, text in (
        ("raw", "raw"), ("fast", "fast"), ("fast-of-small", "fast, MiniLM"), ("small-of-small", "small, MiniLM"),
    ):  # fmt: skip
        found += results.row(f"push/{effort}", f"push: {text}", "MB/s", note="to a folder in memory")
        found += results.row(f"push-cpu/{effort}", f"push: {text}: CPU", "s/GB")
    for stored in _STORED:
        found += results.row(f"cold/{stored}", f"cold, loopback: {stored}", "GB/s")
        found += results.row(f"cpu/cold/{stored}", f"cold, loopback: {stored}: CPU", "s/GB", note="daemon and workers")
        found += results.row(f"link/{stored}", f"cold, 1 Gbit/s: {stored}", "GB/s")
    found += results.row("base/of-files", "second fine-tune: sent / its weights", "×")
    found += results.row("tag/seen", "tag move to visible", "s", note="each move")
    for name, text in (("http", "http://"), ("oci", "oci://"), ("docker", "oci:// from docker-registry")):
        found += results.row(f"oci/{name}", f"cold: {text}", "GB/s")
        found += results.row(f"cpu/oci/{name}", f"cold: {text}: CPU", "s/GB")
    for name in ("nginx", "docker"):
        found += results.row(f"oci/ceiling-{name}", f"parallel GETs of blobs: {name}", "GB/s", note="no mount")
    return found
