"""What a server counts for metrics, and all families it has. Read out when somebody asks; trio thread only."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gpuload.server.catalog import Model
from gpuload.server.generations import Generations
from gpuload.server.site import Site
from gpuload.server.work import Report
from mfs.durations import Durations
from mfs.errors import MfsError
from mfs.metrics.families import Families

MODELS_MAX = 100
"""Resident models that are told of by name; all further ones together as OTHER."""
OTHER = "other"
CONTENT = "content:*"
"""All models that were opened without a name: they are called by what they hold, which is another name each time."""

BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
KINDS = {
    "FitError": "fit", "BusyError": "busy", "UsageError": "usage", "NotFoundError": "not_found",
    "AccessError": "access", "ChangedError": "changed", "IntegrityError": "integrity", "DeviceError": "device",
}  # fmt: skip
"""By the class of an error; all others are 'failed'."""
_VERBS = ("load", "swap", "open", "commit", "attach")
_WAYS = {
    "copied": "bytes_copied", "from_ram": "bytes_from_ram", "kept": "bytes_kept",
    "moved_inside": "bytes_moved_inside", "hashed": "bytes_hashed",
}  # fmt: skip
"""What became of bytes, by the report's field."""


class LoadTally:
    """Loads so far."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self.durations = {verb: Durations(BOUNDS_S) for verb in _VERBS}
        self.bytes = Counter[str](dict.fromkeys(_WAYS, 0))
        self.evictions = self.gaps = 0
        self.errors = Counter[tuple[str, str]](
            {(verb, kind): 0 for verb in _VERBS for kind in (*KINDS.values(), "failed")}
        )
        """By (verb, kind); all are there from the start, else the first of a kind would be no increase."""

    @contextmanager
    def timed(self, verb: str) -> Iterator[None]:
        """A load, a swap, an open, a commit, or an attach that brings one back, goes on in here. What fails is counted
        by its kind, not by its time."""
        since_s = time.monotonic()
        try:
            yield
        except MfsError as error:
            self.errors[verb, KINDS.get(type(error).__name__, "failed")] += 1
            raise
        self.durations[verb].note(time.monotonic() - since_s)

    def note(self, report: Report) -> None:
        """What a load did."""
        for way, field in _WAYS.items():
            self.bytes[way] += getattr(report, field)
        self.evictions += len(report.evicted)
        self.gaps += report.had_gap


def gathered(
    sites: Mapping[str, Site], tally: LoadTally, version: str, generations: Generations, *, servers_before: int
) -> Families:
    """What a scrape says now. No checkpoint. servers_before: see `estate`."""
    families = Families()
    families.info("gpuload_build", "What serves.", {"version": version, "python": platform.python_version()})
    families.gauge("gpuload_start_time_seconds", "When the server began, since the epoch.", tally.started_at)
    families.gauge("gpuload_uptime_seconds", "Since the server began.", time.time() - tally.started_at)
    families.gauge("gpuload_servers_before", "Servers that had these weights before this one.", servers_before)
    _add_devices(families, sites)
    _add_models(families, sites)
    families.gauge("gpuload_waiting", "Programs that wait for a generation.", generations.waiting_count)
    _add_ram_tiers(families, sites)
    families.histogram(
        "gpuload_load_seconds", "How long loads took that went well, waiting for their turn included.",
        {(verb,): durations for verb, durations in tally.durations.items()}, ["operation"],
    )  # fmt: skip
    families.counter(
        "gpuload_load_bytes",
        "Bytes of tensors by what became of them: copied over the bus, from files or from the RAM tier, kept in place,"
        " moved inside the device; hashed:"
        " read to know what differs.",
        {(way,): count for way, count in tally.bytes.items()},
        ["way"],
    )
    families.counter("gpuload_load_errors", "Loads refused or failed.", tally.errors, ["operation", "kind"])
    families.counter("gpuload_evictions", "Models evicted to make room.", tally.evictions)
    families.counter("gpuload_gaps", "Swaps that gave the old model up first.", tally.gaps)
    return families


def processes() -> dict[str, int]:
    """The pids of a server's processes."""
    return {"server": os.getpid()}


def _add_devices(families: Families, sites: Mapping[str, Site]) -> None:
    memory = {name: site.device.memory() for name, site in sites.items()}
    for name, site in sites.items():
        site.catalog.obtainable_count = memory[name].free_bytes // site.arena.granule_bytes
    columns: tuple[tuple[str, str, dict[tuple[str, ...], float]], ...] = (
        ("gpuload_arena_bytes", "Memory that the server may take: its budget.",
         {(n,): s.catalog.budget_count * s.arena.granule_bytes for n, s in sites.items()}),
        ("gpuload_arena_committed_bytes", "Memory that it has taken.",
         {(n,): s.catalog.granules.present_count * s.arena.granule_bytes for n, s in sites.items()}),
        ("gpuload_arena_used_bytes", "Of that, what models hold.",
         {(n,): s.catalog.granules.taken_count * s.arena.granule_bytes for n, s in sites.items()}),
        ("gpuload_arena_free_bytes", "Of the budget, what no model holds.",
         {(n,): (s.catalog.budget_count - s.catalog.granules.taken_count) * s.arena.granule_bytes
          for n, s in sites.items()}),
        ("gpuload_arena_room_bytes", "What could be had by evicting all that may go.",
         {(n,): s.catalog.room_count * s.arena.granule_bytes for n, s in sites.items()}),
        ("gpuload_device_bytes", "Memory of the device.", {(n,): m.total_bytes for n, m in memory.items()}),
        ("gpuload_device_free_bytes", "Of it, what nobody holds.", {(n,): m.free_bytes for n, m in memory.items()}),
        ("gpuload_loads_waiting", "Loads at work or waiting for the device.",
         {(n,): s.loads_count for n, s in sites.items()}),
        ("gpuload_loads_aside", "Of these, those that have let others go before, since their bytes do not come.",
         {(n,): s.aside_count for n, s in sites.items()}),
        ("gpuload_models", "Models served from it.", {(n,): len(s.catalog.models) for n, s in sites.items()}),
        ("gpuload_retired_models", "Models swapped out or unloaded whose programs still hold them.",
         {(n,): len(s.catalog.retired) for n, s in sites.items()}),
        ("gpuload_retired_bytes", "What these alone keep of the arena.",
         {(n,): s.catalog.bytes_alone(*s.catalog.retired) for n, s in sites.items()}),
    )  # fmt: skip
    for name, help, samples in columns:
        families.gauge(name, help, samples, ["device"])


def _add_ram_tiers(families: Families, sites: Mapping[str, Site]) -> None:
    tiers = list({id(site.tier): site.tier for site in sites.values() if site.tier is not None}.values())
    states = {
        "budget": sum(t.nbytes for t in tiers),
        "locked": sum(t.locked_bytes for t in tiers),
        "used": sum(t.used_bytes for t in tiers),
    }
    families.gauge(
        "gpuload_ram_tier_bytes", "Page-locked RAM behind cards: its budget, what is locked, what holds something.",
        {(state,): count for state, count in states.items()}, ["state"],
    )  # fmt: skip
    moved = {
        "saved": sum(t.totals.saved for t in tiers),
        "returned": sum(t.totals.returned for t in tiers),
        "dropped": sum(t.totals.dropped for t in tiers),
    }
    families.counter(
        "gpuload_ram_tier_moved_bytes", "What left a card for RAM, what came back, what left and was not kept.",
        {(way,): count for way, count in moved.items()}, ["way"],
    )  # fmt: skip


def _add_models(families: Families, sites: Mapping[str, Site]) -> None:
    served: dict[int, Model] = {id(m): m for site in sites.values() for m in site.catalog.models.values()}
    retired: dict[int, Model] = {id(m): m for site in sites.values() for m in site.catalog.retired}
    bytes_here: Counter[tuple[str, ...]] = Counter()
    leases: Counter[tuple[str, ...]] = Counter()
    generations: dict[tuple[str, ...], float] = {}
    contents: dict[tuple[str, ...], float] = {}
    for model in served.values():
        label = _label(model, generations)
        for part in model.parts:
            bytes_here[label, part.catalog.device] += part.nbytes
        leases[label,] += model.leases_count
        generations[label,] = max(generations.get((label,), 0), model.generation)
        if label == model.name:
            contents[label, model.digest] = 1
    families.gauge("gpuload_model_bytes", "What stands of a served model on a device.", bytes_here, ["model", "device"])
    families.gauge("gpuload_model_leases", "Programs that hold a served model.", leases, ["model"])
    families.gauge("gpuload_model_generation", "Which model of that name it is; grows.", generations, ["model"])
    families.gauge("gpuload_model_info", "What is served under a name: 1.", contents, ["model", "digest"])
    total = sum(model.leases_count for model in (*served.values(), *retired.values()))
    families.gauge("gpuload_leases", "Programs that hold a model, a retired one too.", total)


def _label(model: Model, known: Mapping[tuple[str, ...], float]) -> str:
    name = model.name or OTHER
    if name.startswith("content:"):
        return CONTENT
    return name if (name,) in known or len(known) < MODELS_MAX else OTHER
