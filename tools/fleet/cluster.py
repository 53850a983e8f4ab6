"""The conductor: requests to replicas, models to cards, and what has to go. Everything happens in SimPy's one thread.

A request starts at once where a ready replica of its service has room: where least runs or, if cards may go off, where
most runs, so that others can. Else it waits in its service's line, first come first served. A card with room takes the
request that has waited longest for one of its models. A service of which no card holds a copy *wants* one; wanting
services are served in order, and one that cannot be placed holds up those behind it, so that a large model is not
starved by small ones. More copies come only where many wait and room is free or idle.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import simpy

from tools.fleet import policies
from tools.fleet.gpu import IDLE, Gpu, Node, Replica
from tools.fleet.policies import Candidate, Resident
from tools.fleet.services import Card, Service
from tools.fleet.setups import Setup
from tools.fleet.tiers import Piece
from tools.fleet.traffic import Requests

_RETRY_S = 1.0
"""A wanting service that only time can help (quantum_s), or a line that wants another copy, looks again so often."""

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


class Cluster:
    """All cards and lines of one run. `done` happens when the last request has ended."""

    def __init__(
        self, env: simpy.Environment, services: Sequence[Service], card: Card, setup: Setup, requests: Requests
    ) -> None:
        self._env, self._setup, self._card = env, setup, card
        self._placement = policies.PLACEMENTS[setup.placement]
        self._eviction = policies.EVICTIONS[setup.eviction]
        self._packs = setup.gpus_min < setup.gpus_max
        nodes = [Node(setup.ssd_bytes, setup.ram_bytes) for _ in range(-(-setup.gpus_max // setup.gpus_per_node))]
        self.gpus = [
            Gpu(env, index, nodes[index // setup.gpus_per_node], card.weights_bytes, self._first, self._end)
            for index in range(setup.gpus_max)
        ]
        self.lines = [Line(index, service, self._homes(index, services)) for index, service in enumerate(services)]
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
        self.moved_bytes = {"origin": 0, "ssd": 0, "ram": 0}
        for gpu in self.gpus[: setup.gpus_min]:
            gpu.is_on = True
            gpu.settle()
        if setup.is_warm:
            self._warm(nodes, services)
        if setup.is_preloaded:
            self._preload()
        if not count:
            self.done.succeed()

    def _homes(self, index: int, services: Sequence[Service]) -> Sequence[Gpu]:
        if self._setup.placement != "static":
            return self.gpus
        return [self.gpus[i] for i in policies.home_gpus(index, len(services), len(self.gpus))]

    def _warm(self, nodes: Sequence[Node], services: Sequence[Service]) -> None:
        for node in nodes:
            for service, index in zip(reversed(services), reversed(range(len(services))), strict=True):
                self._keep(node, _pieces(index, service))

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
        """Bring a copy to the best of these cards, by no worse a step than this. False: none can take it.

        Who would have to go is asked only of cards that would beat the best so far if nobody had to.
        """
        best: tuple[tuple[float, ...], Candidate] | None = None
        loads_s: dict[tuple[int, bool, bool], float] = {}
        for gpu in gpus:
            if line.index in gpu.residents or gpu.waits_for_drains is not None:
                continue
            alike = id(gpu.node), gpu.is_on, line.service.family in gpu.families
            if alike not in loads_s:
                loads_s[alike] = self._load_s(line, gpu)
            has_room = gpu.missing_bytes(line.service) <= gpu.free_bytes
            step = policies.FREE if has_room else policies.EVICTS
            hoped = Candidate(step, gpu.index, gpu.batch.running, loads_s[alike], 0.0, 0.0, None)
            if best is None or self._placement(hoped) < best[0]:
                found = self._candidate(line, gpu, step_max, loads_s[alike])
                if found is not None:
                    key = self._placement(found)
                    if best is None or key < best[0]:
                        best = key, found
        if best is None:
            return False
        self._bring(line, best[1])
        return True

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
        rates = {index: self.lines[index].rate_per_s(self._env.now) for index in gpu.residents}
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
        if not replica.running and not self.lines[replica.index].waiting:
            return True
        return may_drain and self._env.now >= replica.ready_at_s + self._setup.quantum_s

    def _as_resident(self, replica: Replica) -> Resident:
        line, service = self.lines[replica.index], replica.service
        is_last = replica.gpu.families[service.family] == 1
        freed_bytes = service.weights_bytes if is_last else service.own_bytes
        way = self._setup.way
        reload_s = way.swap_s.value + freed_bytes / (way.ram or way.ssd or way.origin).value
        rate = line.rate_per_s(self._env.now)
        return Resident(replica.last_used_s, replica.uses_count, rate, reload_s, freed_bytes)

    def _bring(self, line: Line, found: Candidate) -> None:
        gpu, going = self.gpus[found.gpu], found.plan
        seconds = self._load_s(line, gpu)
        if self._setup.is_exclusive or not gpu.is_on:
            self.cold_starts += 1
        else:
            self.swaps += 1
        if not gpu.is_on:
            gpu.is_on = True
            seconds += self._setup.boot_s
        missing = self._missing_pieces(line, gpu)
        for piece, size_bytes in missing:
            self.moved_bytes[self._tier(gpu.node, piece)] += size_bytes
        self._keep(gpu.node, missing)
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

    # --- where bytes are ---

    def _load_s(self, line: Line, gpu: Gpu) -> float:
        way = self._setup.way
        rates = {"origin": way.origin, "ssd": way.ssd, "ram": way.ram}
        fixed_s = way.swap_s if gpu.is_on and not self._setup.is_exclusive else way.start_s
        seconds = fixed_s.value
        for piece, size_bytes in self._missing_pieces(line, gpu):
            rate = rates[self._tier(gpu.node, piece)]
            assert rate is not None  # a tier that has the piece has a rate
            seconds += size_bytes / rate.value
        return seconds

    def _missing_pieces(self, line: Line, gpu: Gpu) -> list[tuple[Piece, int]]:
        """A server of one model is a new process, which finds nothing on its card."""
        is_there = line.service.family in gpu.families and not self._setup.is_exclusive
        return [each for each in _pieces(line.index, line.service) if each[0][0] == "own" or not is_there]

    def _tier(self, node: Node, piece: Piece) -> str:
        if piece in node.ram:
            return "ram"
        return "ssd" if piece in node.ssd else "origin"

    def _keep(self, node: Node, pieces: Iterable[tuple[Piece, int]]) -> None:
        for piece, size_bytes in pieces:
            if self._setup.way.ssd is not None:
                node.ssd.use(piece, size_bytes)
            if self._setup.way.ram is not None:
                node.ram.use(piece, size_bytes)


def _pieces(index: int, service: Service) -> list[tuple[Piece, int]]:
    both = [(("own", index), service.own_bytes), (("common", service.family), service.common_bytes)]
    return [(piece, size_bytes) for piece, size_bytes in both if size_bytes]


def _after(env: simpy.Environment, seconds: float, then: Any) -> None:
    callbacks = env.timeout(seconds).callbacks
    assert callbacks is not None
    callbacks.append(then)
