"""The conductor: requests to replicas, models to cards, and what has to go. Everything happens in SimPy's one thread.

A request starts at once where a ready replica of its service has room: where least runs or, if cards may go off, where
most runs, so that others can. Else it waits in its service's line, first come first served. A card with room takes the
request that has waited longest for one of its models. A service of which no card holds a copy *wants* one; wanting
services are served in order, and one that cannot be placed holds up those behind it, so that a large model is not
starved by small ones. More copies come only where many wait and room is free or idle.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import simpy

from tools.fleet import policies
from tools.fleet.choice import Choice, Line
from tools.fleet.gpu import IDLE, Gpu, Node, Replica
from tools.fleet.loads import Loads
from tools.fleet.policies import Candidate
from tools.fleet.services import Card, Service
from tools.fleet.setups import Setup
from tools.fleet.traffic import Requests

_RETRY_S = 1.0
"""A wanting service that only time can help (quantum_s), or a line that wants another copy, looks again so often."""


class Cluster:
    """All cards and lines of one run. `done` happens when the last request has ended."""

    def __init__(
        self, env: simpy.Environment, services: Sequence[Service], card: Card, setup: Setup, requests: Requests
    ) -> None:
        self._env, self._setup, self._card = env, setup, card
        self.loads = Loads(setup)
        self._packs = setup.gpus_min < setup.gpus_max
        nodes = [Node(setup.ssd_bytes, setup.ram_bytes) for _ in range(-(-setup.gpus_max // setup.gpus_per_node))]
        self.gpus = [
            Gpu(env, index, nodes[index // setup.gpus_per_node], card.weights_bytes, self._first, self._end)
            for index in range(setup.gpus_max)
        ]
        self.lines = [Line(index, service, self._homes(index, services)) for index, service in enumerate(services)]
        self._choice = Choice(env, card, setup, self.lines, self.loads)
        self._wanting: dict[int, Line] = {}
        self._is_retrying = False
        self._service_of = requests.service.tolist()
        self._generated = requests.generated_tokens.tolist()
        self._context = requests.context_tokens.tolist()
        self.at_s: list[float] = requests.at_s.tolist()
        count = len(requests)
        self.first_s = [math.nan] * count
        self.ended_s = [math.nan] * count
        self.was_cold = bytearray(count)
        """The request found no ready copy of its model."""
        self.in_system = 0
        self.in_system_area = 0.0
        """Integral of `in_system` over time: what Little's law is held against."""
        self._area_at_s = 0.0
        self._left = count
        self.done = env.event()
        self.cold_starts = self.swaps = self.drains = 0
        for gpu in self.gpus[: setup.gpus_min]:
            gpu.is_on = True
            gpu.settle()
        if setup.is_warm:
            self.loads.warm(nodes, services)
        if setup.is_preloaded:
            self._preload()
        if not count:
            self.done.succeed()

    def _homes(self, index: int, services: Sequence[Service]) -> Sequence[Gpu]:
        if self._setup.placement != "static":
            return self.gpus
        return [self.gpus[i] for i in policies.home_gpus(index, len(services), len(self.gpus))]

    def _preload(self) -> None:
        """Every home of a service where that is its own; else one copy each, spread over cards, while there is room."""
        is_static = self._setup.placement == "static"
        for line in self.lines:
            able = [gpu for gpu in line.homes if gpu.is_on and gpu.missing_bytes(line.service) <= gpu.free_bytes]
            able = [gpu for gpu in able if not (self._setup.is_exclusive and gpu.residents)]
            able.sort(key=lambda gpu: -gpu.free_bytes)
            for gpu in able if is_static else able[:1]:
                self._hold(line, gpu).is_ready = True

    # --- requests ---

    def arrivals(self) -> Generator[simpy.Event, None, None]:
        """The process that brings them, in the order of time."""
        env, arrive = self._env, self._arrive
        for request, at_s in enumerate(self.at_s):
            if at_s > env.now:
                yield env.timeout(at_s - env.now)
            arrive(request)

    def _arrive(self, request: int) -> None:
        line = self.lines[self._service_of[request]]
        now_s = self._env.now
        line.note(now_s)
        self._count(now_s, 1)
        room, is_ready, best = None, False, math.inf
        for replica in line.replicas:
            if replica.is_ready and not replica.is_draining:
                is_ready = True
                running = replica.gpu.batch.running
                rank = -running if self._packs else running
                if running < self._card.sequences_max and rank < best:
                    room, best = replica, rank
        self.was_cold[request] = not is_ready
        if room is not None and not line.waiting:
            self._start(request, room)
        else:
            line.waiting.append(request)
            self._grow(line)

    def _start(self, request: int, replica: Replica) -> None:
        replica.last_used_s = self._env.now
        replica.uses_count += 1
        generated = self._generated[request]
        first = min(1.0, generated)
        replica.gpu.batch.start(
            request, replica, replica.service.prompt_rounds(self._context[request]) + first, generated - first
        )

    def _first(self, request: int) -> None:
        self.first_s[request] = self._env.now

    def _end(self, request: int, replica: Replica) -> None:
        now_s = self._env.now
        self.ended_s[request] = now_s
        self._count(now_s, -1)
        gpu = replica.gpu
        replica.last_used_s = now_s
        if not replica.running and replica.is_draining:
            self._evict(replica)
            self._load_if_drained(gpu)
        self._admit(gpu)
        if not replica.running and not replica.is_draining:
            self._offer(gpu)
        self._left -= 1
        if not self._left:
            self.done.succeed()

    def _count(self, now_s: float, by: int) -> None:
        self.in_system_area += self.in_system * (now_s - self._area_at_s)
        self._area_at_s = now_s
        self.in_system += by

    def _admit(self, gpu: Gpu) -> None:
        """Start who has waited longest for a model that is here, while there is room."""
        while gpu.batch.running < self._card.sequences_max:
            oldest: Line | None = None
            for index, replica in gpu.residents.items():
                line = self.lines[index]
                is_able = line.waiting and replica.is_ready and not replica.is_draining
                if is_able and (oldest is None or line.waiting[0] < oldest.waiting[0]):
                    oldest = line
            if oldest is None:
                return
            self._start(oldest.waiting.popleft(), gpu.residents[oldest.index])

    # --- models ---

    def _grow(self, line: Line) -> None:
        """It waits: bring the model, or one more copy of it."""
        staying = line.staying()
        if not staying:
            if line.index not in self._wanting:
                self._wanting[line.index] = line
                self._place_wanting()
            return
        now_s = self._env.now
        loads_count = 1 + sum(not replica.is_ready for replica in staying)
        if len(staying) >= self._setup.replicas_max or now_s < line.grown_at_s + _RETRY_S:
            return
        if len(line.waiting) >= self._setup.scale_out_waiting * loads_count:
            line.grown_at_s = now_s
            self._load(line, line.homes, policies.OFF)

    def _place_wanting(self) -> None:
        while self._wanting:
            line = next(iter(self._wanting.values()))
            if not line.waiting:  # served meanwhile
                del self._wanting[line.index]
            elif self._load(line, line.homes, policies.DRAINS):
                self._wanting.pop(line.index, None)
            else:
                self._retry_later()
                return

    def _retry_later(self) -> None:
        if not self._is_retrying:
            self._is_retrying = True
            _after(self._env, _RETRY_S, self._retry)

    def _retry(self, _event: simpy.Event) -> None:
        self._is_retrying = False
        self._place_wanting()

    def _offer(self, gpu: Gpu) -> None:
        """A model here became idle: its room may be what the first wanting service waits for."""
        line = next(iter(self._wanting.values()), None)
        if line is not None and gpu in line.homes and self._load(line, (gpu,), policies.CROWDED):
            self._wanting.pop(line.index, None)
            self._place_wanting()
        self._watch_idle(gpu)

    def _load(self, line: Line, gpus: Iterable[Gpu], step_max: int) -> bool:
        """Bring a copy to the best of these cards, by no worse a step than this. False: none can take it."""
        found = self._choice.best(line, gpus, step_max)
        if found is not None:
            self._bring(line, found)
        return found is not None

    def _bring(self, line: Line, found: Candidate) -> None:
        gpu, going = self.gpus[found.gpu], found.plan
        seconds = self.loads.seconds(line.index, line.service, gpu)
        if self._setup.is_exclusive or not gpu.is_on:
            self.cold_starts += 1
        else:
            self.swaps += 1
        if not gpu.is_on:
            gpu.is_on = True
            seconds += self._setup.boot_s
        self.loads.book(line.index, line.service, gpu)
        replica = self._hold(line, gpu)
        draining = [victim for victim in going if victim.running]
        for victim in draining:
            victim.is_draining = True
            self.drains += 1
        for victim in going:
            if not victim.running:
                self._evict(victim)
        if draining:
            gpu.waits_for_drains = replica, seconds
            gpu.settle()
            for victim in draining:
                self._want_again(self.lines[victim.index])
        else:
            self._begin_load(replica, seconds)

    def _want_again(self, line: Line) -> None:
        if line.waiting and not line.staying():
            self._wanting.setdefault(line.index, line)
            self._retry_later()

    def _load_if_drained(self, gpu: Gpu) -> None:
        if gpu.waits_for_drains is not None and not any(other.is_draining for other in gpu.residents.values()):
            replica, seconds = gpu.waits_for_drains
            gpu.waits_for_drains = None
            self._begin_load(replica, seconds)

    def _begin_load(self, replica: Replica, seconds: float) -> None:
        gpu = replica.gpu
        gpu.loading_count += 1
        gpu.settle()
        gpu.link_free_s = max(self._env.now, gpu.link_free_s) + seconds
        _after(self._env, gpu.link_free_s - self._env.now, lambda _event: self._loaded(replica))

    def _loaded(self, replica: Replica) -> None:
        gpu = replica.gpu
        replica.is_ready = True
        replica.ready_at_s = replica.last_used_s = self._env.now
        gpu.loading_count -= 1
        gpu.settle()
        self._admit(gpu)
        if not replica.running:
            self._offer(gpu)

    def _hold(self, line: Line, gpu: Gpu) -> Replica:
        replica = Replica(line.index, line.service, gpu)
        gpu.hold(replica)
        line.replicas.append(replica)
        return replica

    def _evict(self, replica: Replica) -> None:
        replica.gpu.drop(replica)
        line = self.lines[replica.index]
        line.replicas.remove(replica)
        self._want_again(line)

    # --- cards that nobody uses ---

    def _watch_idle(self, gpu: Gpu) -> None:
        if gpu.state == IDLE and not gpu.has_keep_alive_timer and gpu.index >= self._setup.gpus_min:
            gpu.has_keep_alive_timer = True
            left_s = gpu.since_s + self._setup.keep_alive_s - self._env.now
            _after(self._env, max(0.0, left_s), lambda _event: self._turn_off(gpu))

    def _turn_off(self, gpu: Gpu) -> None:
        gpu.has_keep_alive_timer = False
        if gpu.state != IDLE or self._env.now < gpu.since_s + self._setup.keep_alive_s - 1e-6:
            self._watch_idle(gpu)  # it was used meanwhile; where it is in use now, its end watches again
            return
        for replica in list(gpu.residents.values()):
            self._evict(replica)
        gpu.is_on = False
        gpu.settle()


def _after(env: simpy.Environment, seconds: float, then: Any) -> None:
    callbacks = env.timeout(seconds).callbacks
    assert callbacks is not None
    callbacks.append(then)
