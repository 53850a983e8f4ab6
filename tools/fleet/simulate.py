"""One run: requests through one system, and what came of it. Every run is held against what must be true of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simpy

from mfs.errors import MfsError
from tools.fleet.cluster import Cluster
from tools.fleet.gpu import BUSY, OFF, STATES, Gpu
from tools.fleet.services import Card, Service
from tools.fleet.setups import Setup
from tools.fleet.traffic import Floats, Requests

_TOLERANCE = 1e-6


class SimulationError(MfsError):
    """A run contradicts itself: a fault of ours, never of its input."""


@dataclass(frozen=True)
class Slo:
    """What a request has to keep to count as served in time."""

    first_token_s: float = 5.0
    whole_s: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """Of one run. Latencies leave out requests that came before `settled_s`; everything else is of the whole run."""

    requests_count: int
    ended_s: float
    """The last request's end, or the end of the arrivals, whichever is later: cards are paid for until then."""
    gpu_s: dict[str, float]
    """Seconds of all cards together, by state."""
    first_token_s: Floats
    whole_s: Floats
    in_time: float
    """Share of requests that kept both parts of the SLO."""
    cold_requests: int
    """They found no ready copy of their model."""
    cold_starts: int
    swaps: int
    drains: int
    moved_bytes: dict[str, int]

    @property
    def gpu_hours(self) -> float:
        return sum(seconds for state, seconds in self.gpu_s.items() if state != OFF) / 3600

    def figures(self) -> dict[str, float]:
        """What is averaged over seeds. Latencies are nan where no request came."""
        return {
            "gpu_hours": self.gpu_hours,
            "gpus_on": self.gpu_hours * 3600 / self.ended_s if self.ended_s else math.nan,
            "busy": self.gpu_s[BUSY] / 3600 / self.gpu_hours if self.gpu_hours else 0.0,
            "first_token_p50_s": _percentile(self.first_token_s, 50),
            "first_token_p99_s": _percentile(self.first_token_s, 99),
            "whole_p50_s": _percentile(self.whole_s, 50),
            "whole_p99_s": _percentile(self.whole_s, 99),
            "in_time": self.in_time,
            "cold_requests": self.cold_requests / self.requests_count if self.requests_count else 0.0,
            "cold_starts": self.cold_starts,
            "swaps": self.swaps,
            "moved_gb": sum(self.moved_bytes.values()) / 1e9,
            "requests": self.requests_count,
        }


def simulate(
    services: Sequence[Service],
    card: Card,
    setup: Setup,
    requests: Requests,
    slo: Slo | None = None,
    settled_s: float = 0,
) -> Outcome:
    """Run to the last request's end. Raises: SimulationError if a request is lost or a sum does not add up."""
    env = simpy.Environment()
    cluster = Cluster(env, services, card, setup, requests)
    env.process(cluster.arrivals())
    try:
        env.run(until=cluster.done)
    except RuntimeError as error:  # simpy: nothing left to happen
        waiting = {line.service.name: len(line.waiting) for line in cluster.lines if line.waiting}
        raise SimulationError(f"{setup.name}: requests that nobody will serve: {waiting} ({error})") from None
    if env.now < requests.duration_s:
        env.run(until=requests.duration_s)  # cards that turn themselves off do so
    for gpu in cluster.gpus:
        gpu.settle()
    _check(cluster, setup, card.weights_bytes, env.now)
    slo = slo or Slo()
    at_s, first_s, ended_s = requests.at_s, np.array(cluster.first_s), np.array(cluster.ended_s)
    counted = at_s >= settled_s
    first_token_s, whole_s = (first_s - at_s)[counted], (ended_s - at_s)[counted]
    kept = (first_token_s <= slo.first_token_s) & (whole_s <= slo.whole_s)
    return Outcome(
        requests_count=len(requests),
        ended_s=env.now,
        gpu_s={state: sum(gpu.seconds[state] for gpu in cluster.gpus) for state in STATES},
        first_token_s=first_token_s,
        whole_s=whole_s,
        in_time=float(kept.mean()) if len(kept) else 1.0,
        cold_requests=sum(cluster.was_cold),
        cold_starts=cluster.cold_starts,
        swaps=cluster.swaps,
        drains=cluster.drains,
        moved_bytes=cluster.loads.moved_bytes,
    )


def _check(cluster: Cluster, setup: Setup, weights_bytes: int, now_s: float) -> None:
    """No request lost; each begins and ends in order; Little's law; every card's hours; its memory."""
    at_s, first_s, ended_s = np.array(cluster.at_s), np.array(cluster.first_s), np.array(cluster.ended_s)
    sojourns_s = float((ended_s - at_s).sum())
    claims = [
        ("every request ends", bool(np.isfinite(ended_s).all()) and cluster.in_system == 0),
        ("no line is left", not any(line.waiting for line in cluster.lines)),
        ("arrival, first token, end", bool(((at_s <= first_s) & (first_s <= ended_s)).all())),
        ("Little's law", _is_near(cluster.in_system_area, sojourns_s, max(1.0, sojourns_s))),
    ]
    for gpu in cluster.gpus:
        claims += [
            (f"hours of GPU {gpu.index}", _is_near(sum(gpu.seconds.values()), now_s, max(1.0, now_s))),
            (f"nothing runs on GPU {gpu.index}", gpu.batch.running == 0),
            (f"memory of GPU {gpu.index}", gpu.waits_for_drains is not None or gpu.free_bytes >= 0),
            (f"bytes on GPU {gpu.index}", gpu.free_bytes + _held_bytes(gpu) == weights_bytes),
        ]
    broken = [what for what, holds in claims if not holds]
    if broken:
        raise SimulationError(f"{setup.name}: does not hold: {', '.join(broken)}")


def _held_bytes(gpu: Gpu) -> int:
    """Counted anew: what each model has alone, and what a family shares, once."""
    services = [replica.service for replica in gpu.residents.values()]
    return sum(each.own_bytes for each in services) + sum(
        {each.family: each.common_bytes for each in services}.values()
    )


def _is_near(one: float, other: float, scale: float) -> bool:
    return abs(one - other) <= _TOLERANCE * scale


def _percentile(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan
