"""The case `reads`: every pattern in every state by every system, all of them in turn, round by round.

A *pass* is one pattern read by one fresh process in one state, its bytes checked. Passes that compare with each other
follow each other, in an order that is another one in every round; ratios are taken within a round.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mfs.errors import MfsError
from tests.servers.process import ServerError
from tools.bench.machine import drop_page_cache
from tools.bench.mounts import BEFORE, RAM_BYTES, Local, MountedSystem, Ours
from tools.bench.origin import AnyOrigin, NginxOrigin
from tools.bench.peers import MOUNT_PEERS
from tools.bench.processes import BenchError, run
from tools.bench.reader import FIGURES, PATTERNS, STORM, WHOLE
from tools.bench.results import Goal, Results, Row
from tools.bench.workload import MODEL, Model, place_of, read


@dataclass(frozen=True)
class Setting:
    """One mount of a system, and the states in which it is read there, one after the other.

    The page cache is emptied before the first; the next finds what the one before it left.
    """

    states: tuple[str, ...]
    is_cold: bool = False
    """Its cache is empty; else it holds the whole model, from an earlier mount."""
    in_ram: bool = False
    """Our RAM tier has room for the model and holds it. No peer has this."""


SETTINGS = (
    Setting(("cold",), is_cold=True),
    Setting(("ssd", "warm")),
    Setting(("ram",), in_ram=True),
)
STATES = tuple(state for setting in SETTINGS for state in setting.states)
_KEPT = tuple(state for setting in SETTINGS for state in setting.states if not setting.is_cold)
_RAM_SPARE_BYTES = 256 << 20
_OF_BYTES = [
    label
    for name, pattern in PATTERNS.items()
    if name != STORM
    for label, unit in pattern.figures.items()
    if unit != "ms"
]


@dataclass
class Reads:
    """The passes of all rounds on one origin. `prepare` first."""

    folder: Path
    origin: AnyOrigin
    model: Model
    peers: tuple[str, ...]
    patterns: tuple[str, ...]
    states: tuple[str, ...]
    before: Path | None
    """A checkout of another mfs, compared with as a peer is."""
    results: Results
    say: Callable[[str], None]
    _systems: list[MountedSystem] = field(default_factory=list)
    _left_out: set[str] = field(default_factory=set)
    """What failed once is not tried again."""

    def prepare(self) -> None:
        """Fill the origin, and the caches that are kept. A system that fails at it is left out."""
        tree = self.model.folder.parent
        self.say(f"{self.origin.name}: putting {self.model.size_bytes / 1e9:.2f} GB there and into the systems' caches")
        self.origin.put_tree(tree)
        here = self.folder / f"on-{self.origin.name}"
        self._systems = [Local(tree), Ours(here / "mfs", self.origin.url, self.origin.environ)]
        if self.before:
            self._systems.append(Ours(here / BEFORE, self.origin.url, self.origin.environ, checkout=self.before))
        for name in self.peers:
            with self._attempt(name):
                peer = MOUNT_PEERS[name](here / name, self.origin)
                peer.prepare(tree)
                self._systems.append(peer)
        for system in self._systems if set(self.states) & set(_KEPT) else ():
            with self._attempt(system.name), self._mounted(system, is_cold=False):
                read("sequential", system.mountpoint / MODEL, self.model)
                system.wait_quiet(self.model.size_bytes)

    def round(self, number: int) -> None:
        """Every chosen pass once."""
        self._ceiling()
        for place, pattern in enumerate(self.patterns):
            turn = (number + place) % len(self._systems)
            for setting in SETTINGS:
                if set(setting.states) & set(self.states):
                    for system in (*self._systems[turn:], *self._systems[:turn]):
                        if not setting.in_ram or isinstance(system, Ours):
                            self._passes(system, pattern, setting, number)

    def _passes(self, system: MountedSystem, pattern: str, setting: Setting, seed: int) -> None:
        what = f"{setting.states[0]} {pattern}, {system.name}"
        if {system.name, what} & self._left_out:
            return
        with self._attempt(what), self._mounted(system, is_cold=setting.is_cold, in_ram=setting.in_ram):
            if pattern == STORM and not setting.is_cold:  # names are not kept on SSD: the daemon has to have met them
                read(pattern, system.mountpoint / STORM, self.model, seed=seed)
            if pattern == STORM or setting.in_ram:  # what we touch ahead in a mount's first seconds is another figure
                MountedSystem.wait_quiet(system)
            drop_page_cache()
            last = max(setting.states.index(state) for state in set(setting.states) & set(self.states))
            for place, state in enumerate(setting.states[: last + 1]):
                self._pass(system, pattern, state, seed, is_cold=setting.is_cold, is_warm=place > 0)

    def _pass(
        self, system: MountedSystem, pattern: str, state: str, seed: int, *, is_cold: bool, is_warm: bool
    ) -> None:  # fmt: skip
        before_s = system.cpu_s()
        folder = system.mountpoint / place_of(pattern)
        reading = read(pattern, folder, self.model, seed=seed, warm=is_warm)
        if is_cold:
            system.wait_quiet(self.model.size_bytes if pattern in WHOLE else 0)
        else:  # asks nobody: an answer takes the daemon 3 ms, as much as a pass of kept bytes
            MountedSystem.wait_quiet(system)
        served_s = system.cpu_s() - before_s
        if state not in self.states:
            return  # it was there to warm what comes next
        key = f"{self.origin.name}/{state}"
        for label, value in reading.figures:
            self.results.add(f"{key}/{label}/{system.name}", value)
            self.say(f"{key + '/' + label:<36} {system.name:<8} {value:9.3f} {FIGURES[label]}")
        if reading.bytes:
            gb = reading.bytes / 1e9
            self.results.add(f"{key}/{pattern}/{system.name}/served-cpu", served_s / gb)
            self.results.add(f"{key}/{pattern}/{system.name}/all-cpu", (served_s + reading.reader_cpu_s) / gb)

    @contextmanager
    def _mounted(self, system: MountedSystem, *, is_cold: bool, in_ram: bool = False) -> Iterator[None]:
        system.cache = system.folder / ("cache" if is_cold else "kept-cache")
        if is_cold:
            system.forget()
        if isinstance(system, Ours):
            # Brought ahead and not yet read, one model may fill half of it.
            system.ram_bytes = max(RAM_BYTES, 2 * self.model.size_bytes + _RAM_SPARE_BYTES) if in_ram else RAM_BYTES
        with system:
            if isinstance(system, Ours) and in_ram:
                system.command("prefetch", "--tier", "ram", system.mountpoint / MODEL)
                if (held := system.status()["ram"]["used_bytes"]) < self.model.size_bytes:
                    raise BenchError(f"the RAM tier holds {held} bytes, expected {self.model.size_bytes}")
            yield

    @contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        try:
            yield
        except (BenchError, ServerError, MfsError, OSError) as error:
            self._left_out.add(what)
            self.results.missing.append(f"{self.origin.name}, {what}: {' '.join(str(error).split())[:500]}")
            self.say(f"{what} is left out: {error}")

    def _ceiling(self) -> None:
        """What the origin gives to plain parallel ranged GETs."""
        found = json.loads(run([sys.executable, "-m", "tools.bench.ranges", *self.origin.shard_urls()], timeout_s=300))
        self.results.add(f"{self.origin.name}/ceiling", found["bytes"] / found["seconds"] / 1e9)


def goal_rows(results: Results, origins: tuple[str, ...]) -> list[Row]:
    """The figures that have goals (issue 9, "Bars"), those of each origin after those of the other."""
    return [row for origin in origins for row in (*_cold_goals(results, origin), *_kept_goals(results, origin))]


def _cold_goals(results: Results, origin: str) -> list[Row]:
    rows: list[Row] = []
    goal = Goal(at_least=1.3 if origin == NginxOrigin.name else 1.0)
    for label in (*_OF_BYTES, *PATTERNS[STORM].figures):
        peers = [f"{origin}/cold/{label}/{peer}" for peer in MOUNT_PEERS]
        rows += _ratio(results, f"{origin}/cold/{label}/mfs", peers, f"{origin}, cold, {label}: mfs / best peer", goal)
    name, note = f"{origin}/cold/shuffled/mfs/served-cpu", "daemon and workers, with writing to SSD"
    return rows + results.row(name, f"{origin}, cold, shuffled: CPU of mfs", "s/GB", Goal(at_most=0.65), note)


def _kept_goals(results: Results, origin: str) -> list[Row]:
    rows: list[Row] = []
    for state, least in (("warm", 0.95), ("ssd", 0.9)):
        for label in _OF_BYTES:
            local, title = [f"{origin}/{state}/{label}/local"], f"{state}, {label}: mfs / local file"
            rows += _ratio(results, f"{origin}/{state}/{label}/mfs", local, title, Goal(at_least=least))
    for pattern in WHOLE:
        name, title = f"{origin}/warm/{pattern}/mfs/served-cpu", f"warm, {pattern}: CPU of mfs"
        rows += results.row(name, title, "s/GB", Goal(at_most=0.005), "0, but for what ticks")
    name, note = f"{origin}/ram/sequential/mfs/all-cpu", "daemon, workers and reader"
    rows += results.row(name, "ram, sequential: CPU", "s/GB", Goal(at_most=0.25), note)
    for state in STATES:
        few, crowd = (f"{origin}/{state}/{label}/mfs" for label in ("readers: 4", "readers: 64"))
        rows += results.ratio(crowd, [few], f"{origin}, {state}: 64 readers / 4", Goal(at_least=1.0))
        name, title = f"{origin}/{state}/stat p99, readers: 64/mfs", f"{origin}, {state}: p99 of stat beside 64 readers"
        rows += results.row(name, title, "ms", Goal(at_most=20))
        for label in PATTERNS[STORM].figures:
            if (state, label) == ("warm", "stat"):
                continue  # the kernel answers it
            mine, before = f"{origin}/{state}/{label}/mfs", [f"{origin}/{state}/{label}/{BEFORE}"]
            rows += _ratio(results, mine, before, f"{origin}, {state}, {label}: before / mfs", Goal(at_least=2.0))
    return rows


def _ratio(results: Results, mine: str, others: list[str], title: str, goal: Goal) -> list[Row]:
    """How many times as good as the best of the others."""
    is_rate = FIGURES[mine.split("/")[2]] == "GB/s"
    return results.ratio(mine, others, title, goal, "" if is_rate else "times as quick", less_is_better=not is_rate)


def rate_rows(results: Results, origins: tuple[str, ...]) -> list[Row]:
    """Every figure and what it cost in CPU, a column for each system."""
    rows: list[Row] = []
    for origin in origins:
        rows += results.row(f"{origin}/ceiling", f"{origin}: parallel GETs", "GB/s", note="no mount, no file system")
        for state in STATES:
            for pattern, (_, figures) in PATTERNS.items():
                start = f"{origin}, {state},"
                lines = [(f"{start} {label}", label, unit, "") for label, unit in figures.items()]
                if pattern != STORM:
                    lines.append((f"{start} {pattern}: CPU", pattern, "s/GB", "/served-cpu"))
                    lines.append((f"{start} {pattern}: CPU with reader", pattern, "s/GB", "/all-cpu"))
                for title, label, unit, suffix in lines:
                    for column in ("mfs", BEFORE, *MOUNT_PEERS, "local"):
                        name = f"{origin}/{state}/{label}/{column}{suffix}"
                        rows += results.row(name, title, unit, column=column)
    return rows
