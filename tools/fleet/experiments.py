"""What is asked of the simulation: systems side by side, a map of traffic, and growth. Each answer is figures by seed.

Within a seed every system sees the same requests, so differences are taken seed by seed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tools.fleet import setups
from tools.fleet.scenario import Scenario
from tools.fleet.setups import ELASTIC, LAZY, SHARED, SINGLE, Setup
from tools.fleet.simulate import simulate
from tools.fleet.stats import Estimate, estimate, saving
from tools.fleet.traffic import Requests

Say = Callable[[str], None]
_FLEET_MAX_FACTOR = 4
"""Single-model services may have so many cards each to keep the SLO; more is called out of reach."""


@dataclass
class Series:
    """One system over all seeds: each figure a list, in the order of seeds."""

    name: str
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self.figures.setdefault(key, []).append(value)

    def of(self, key: str) -> Estimate:
        return estimate(self.figures[key])

    def saves(self, baseline: Series) -> Estimate:
        """GPU-hours, against another system of the same seeds."""
        return saving(self.figures["gpu_hours"], baseline.figures["gpu_hours"])


def compare(scenario: Scenario, say: Say, names: Sequence[str] = setups.NAMES) -> list[Series]:
    """The standard systems on the scenario's traffic."""
    systems = setups.standard(
        scenario.services_count, scenario.shared_gpus, scenario.ways, placement=scenario.placement,
        eviction=scenario.eviction, keep_alive_s=scenario.keep_alive_s, replicas_max=scenario.replicas_max, names=names,
    )  # fmt: skip
    all_series = [Series(system.name) for system in systems]
    for seed in scenario.seeds:
        requests = scenario.requests(seed)
        for system, series in zip(systems, all_series, strict=True):
            began_s = time.monotonic()
            series.add(_run(scenario, system, requests))
            say(f"seed {seed}: {system.name}, {len(requests):,} requests in {time.monotonic() - began_s:.1f} s")
    return all_series


@dataclass(frozen=True)
class Cell:
    """One kind of traffic. Fleets are, seed by seed, the fewest cards with enough requests in time."""

    utilisation: float
    burstiness: float
    dedicated_gpus: Estimate | None
    """None: for some seed not with the most cards that were tried."""
    shared_gpus: Estimate | None
    fixed_saving: Estimate | None
    """Of fleets that are always on."""
    elastic_saving: Estimate
    """Of GPU-hours, shared and elastic against single-model servers that go to zero on mfs: same keep-alive."""
    always_on_saving: Estimate
    """The same against one card for each service, always on."""
    in_time: dict[str, float]
    """Share, by system."""
    target: float


def traffic_map(
    scenario: Scenario, utilisations: Sequence[float], burstinesses: Sequence[float], say: Say
) -> list[Cell]:
    """How much sharing saves, over utilisation and burstiness."""
    cells = []
    for burstiness in burstinesses:
        for utilisation in utilisations:
            kind = "poisson" if burstiness == 1 else "bursty"
            traffic = replace(scenario.traffic, kind=kind, burstiness=burstiness)
            cells.append(_cell(replace(scenario, utilisation=utilisation, traffic=traffic)))
            say(_told(cells[-1]))
    return cells


def _cell(scenario: Scenario) -> Cell:
    drawn = [scenario.requests(seed) for seed in scenario.seeds]
    count = scenario.services_count
    largest = _FLEET_MAX_FACTOR * count
    dedicated = fewest_gpus(scenario, drawn, SINGLE, range(count, largest + 1, count))
    shared = fewest_gpus(scenario, drawn, SHARED, range(1, largest + 1))
    most = max(dedicated) if dedicated else largest
    elastic, lazy = Series(ELASTIC), Series(LAZY)
    for requests in drawn:
        for series in (elastic, lazy):
            series.add(_run(scenario, _sized(scenario, series.name, most), requests))
    always_on = Series(SINGLE, {"gpu_hours": [requests.duration_s / 3600 * count for requests in drawn]})
    return Cell(
        utilisation=scenario.utilisation,
        burstiness=scenario.traffic.burstiness if scenario.traffic.kind == "bursty" else 1.0,
        dedicated_gpus=estimate(dedicated) if dedicated else None,
        shared_gpus=estimate(shared) if shared else None,
        fixed_saving=saving(shared, dedicated) if shared and dedicated else None,
        elastic_saving=elastic.saves(lazy),
        always_on_saving=elastic.saves(always_on),
        in_time={ELASTIC: elastic.of("in_time").mean, LAZY: lazy.of("in_time").mean},
        target=scenario.in_time_target,
    )


def fewest_gpus(scenario: Scenario, drawn: Sequence[Requests], name: str, sizes: range) -> list[int] | None:
    """For each seed, by bisection: more cards are taken to serve no fewer requests in time.

    None if the most are not enough for one of them.
    """
    found = []
    for requests in drawn:
        low, high = 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            if _run(scenario, _sized(scenario, name, sizes[middle]), requests)["in_time"] >= scenario.in_time_target:
                high = middle
            else:
                low = middle + 1
        if low == len(sizes):
            return None
        found.append(sizes[low])
    return found


def _sized(scenario: Scenario, name: str, gpus: int) -> Setup:
    """The standard system of that name, with so many cards at most."""
    made = setups.standard(
        scenario.services_count, gpus, scenario.ways, placement=scenario.placement, eviction=scenario.eviction,
        keep_alive_s=scenario.keep_alive_s, replicas_max=max(1, gpus // scenario.services_count), names=(name,),
    )[0]  # fmt: skip
    return dataclasses.replace(made, gpus_max=gpus, gpus_min=gpus) if name == SINGLE else made


@dataclass(frozen=True)
class Step:
    """One size of service. fewest: cards that keep the SLO, of so many as there are services."""

    services: int
    gpus: int
    shared: Series
    fewest: Estimate | None
    seconds: float
    """That one run of it took, on average."""


def growth(scenario: Scenario, steps: Sequence[tuple[int, int]], say: Say, *, has_fewest: bool) -> list[Step]:
    """Services and shared cards that grow together."""
    grown = []
    for services, gpus in steps:
        sized = replace(scenario, services_count=services, shared_gpus=gpus)
        drawn = [sized.requests(seed) for seed in sized.seeds]
        shared, began_s = Series(SHARED), time.monotonic()
        for requests in drawn:
            shared.add(_run(sized, _sized(sized, SHARED, gpus), requests))
        seconds = (time.monotonic() - began_s) / len(drawn)
        fewest = fewest_gpus(sized, drawn, SHARED, range(1, services + 1)) if has_fewest else None
        grown.append(Step(services, gpus, shared, estimate(fewest) if fewest else None, seconds))
        say(f"{services} services on {gpus} GPUs: {len(drawn[0]):,} requests in {seconds:.1f} s; fewest {fewest}")
    return grown


def _run(scenario: Scenario, setup: Setup, requests: Requests) -> dict[str, float]:
    settled_s = requests.duration_s * scenario.settled_share
    outcome = simulate(scenario.services(), scenario.card, setup, requests, scenario.slo, settled_s)
    figures = outcome.figures()
    return figures | {"cost": figures["gpu_hours"] * scenario.price}


def _told(cell: Cell) -> str:
    return (
        f"utilisation {cell.utilisation:g}, burstiness {cell.burstiness:g}: "
        f"fixed saves {cell.fixed_saving.mean if cell.fixed_saving else float('nan'):.0%}, "
        f"elastic {cell.elastic_saving.mean:.0%}"
    )


def as_json(value: Any) -> Any:
    """Dataclasses as dictionaries, all the way down; what is not a number is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for it
    return [as_json(each) for each in value] if isinstance(value, list | tuple) else value
