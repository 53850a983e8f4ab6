"""Which card takes a model, and who has to go there: policies asked about things as they stand. Changes nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import simpy

from tools.fleet import policies
from tools.fleet.gpu import Gpu, Replica
from tools.fleet.loads import Loads
from tools.fleet.policies import Candidate, Resident
from tools.fleet.services import Card, Service
from tools.fleet.setups import Setup

_RATE_WINDOW_S = 600.0
"""Over which a service's request rate is averaged, exponentially, for policies."""


class Line:
    """A service as it stands now: who waits, where it is, how often it was asked for of late."""

    def __init__(self, index: int, service: Service, homes: Sequence[Gpu]) -> None:
        self.index, self.service, self.homes = index, service, homes
        self.waiting: deque[int] = deque()
        self.replicas: list[Replica] = []
        self.grown_at_s = -math.inf
        self._rate_per_s = 0.0
        self._rated_at_s = 0.0

    def rate_per_s(self, now_s: float) -> float:
        return self._rate_per_s * math.exp((self._rated_at_s - now_s) / _RATE_WINDOW_S)

    def note(self, now_s: float) -> None:
        self._rate_per_s = self.rate_per_s(now_s) + 1 / _RATE_WINDOW_S
        self._rated_at_s = now_s

    def staying(self) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.is_draining]


class Choice:
    """Of one run."""

    def __init__(self, env: simpy.Environment, card: Card, setup: Setup, lines: Sequence[Line], loads: Loads) -> None:
        self._env, self._card, self._setup, self._lines, self._loads = env, card, setup, lines, loads
        self._placement = policies.PLACEMENTS[setup.placement]
        self._eviction = policies.EVICTIONS[setup.eviction]

    def best(self, line: Line, gpus: Iterable[Gpu], step_max: int) -> Candidate | None:
        """The best of these cards for one more copy, by no worse a step than this. None: none can take it.

        Who would have to go is asked only of cards that would beat the best so far if nobody had to.
        """
        best: tuple[tuple[float, ...], Candidate] | None = None
        loads_s: dict[tuple[int, bool, bool], float] = {}
        for gpu in gpus:
            if line.index in gpu.residents or gpu.waits_for_drains is not None:
                continue
            alike = id(gpu.node), gpu.is_on, line.service.family in gpu.families
            if alike not in loads_s:
                loads_s[alike] = self._loads.seconds(line.index, line.service, gpu)
            has_room = gpu.missing_bytes(line.service) <= gpu.free_bytes
            step = policies.FREE if has_room else policies.EVICTS
            hoped = Candidate(step, gpu.index, gpu.batch.running, loads_s[alike], 0.0, 0.0, None)
            if best is None or self._placement(hoped) < best[0]:
                found = self._candidate(line, gpu, step_max, loads_s[alike])
                if found is not None:
                    key = self._placement(found)
                    if best is None or key < best[0]:
                        best = key, found
        return best[1] if best is not None else None

    def _candidate(self, line: Line, gpu: Gpu, step_max: int, load_s: float) -> Candidate | None:
        going = self._victims(line, gpu, may_drain=step_max >= policies.DRAINS)
        if going is None:
            return None
        if any(replica.running or not replica.is_ready for replica in going):
            step = policies.DRAINS
        elif not gpu.is_on:
            step = policies.OFF
        elif gpu.batch.running >= self._card.sequences_max:
            step = policies.CROWDED
        elif going:
            step = policies.CROWDED if self._setup.is_exclusive else policies.EVICTS
        else:
            step = policies.FREE
        if step > step_max:
            return None
        rates = {index: self._lines[index].rate_per_s(self._env.now) for index in gpu.residents}
        lost = sum(rates[replica.index] for replica in going)
        return Candidate(step, gpu.index, gpu.batch.running, load_s, lost, sum(rates.values()), going)

    def _victims(self, line: Line, gpu: Gpu, *, may_drain: bool) -> list[Replica] | None:
        """Who has to go for this model to fit; None if that is not to be had."""
        if self._setup.is_exclusive:
            going = list(gpu.residents.values())
            return going if all(self._may_go(replica, may_drain) for replica in going) else None
        if gpu.missing_bytes(line.service) <= gpu.free_bytes:
            return []
        able = [replica for replica in gpu.residents.values() if self._may_go(replica, may_drain)]
        able.sort(key=lambda replica: (replica.running > 0, self._eviction(self._as_resident(replica))))
        going = []
        for replica in able:
            going.append(replica)
            if gpu.freed_bytes(going, line.service) >= 0:
                return going
        return None

    def _may_go(self, replica: Replica, may_drain: bool) -> bool:
        if not replica.is_ready or replica.is_draining:
            return False
        if not replica.running and not self._lines[replica.index].waiting:
            return True
        return may_drain and self._env.now >= replica.ready_at_s + self._setup.quantum_s

    def _as_resident(self, replica: Replica) -> Resident:
        line, service = self._lines[replica.index], replica.service
        is_last = replica.gpu.families[service.family] == 1
        freed_bytes = service.weights_bytes if is_last else service.own_bytes
        reload_s = self._loads.reload_s(freed_bytes)
        rate = line.rate_per_s(self._env.now)
        return Resident(replica.last_used_s, replica.uses_count, rate, reload_s, freed_bytes)
