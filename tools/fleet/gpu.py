"""One card: which models it holds, what is left of its memory, and what it did with its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import simpy

from tools.fleet.batch import Batch
from tools.fleet.services import Service
from tools.fleet.tiers import Tier

OFF, IDLE, LOADING, BUSY = "off", "idle", "loading", "busy"
STATES = (OFF, IDLE, LOADING, BUSY)
"""busy: a sequence runs, whatever is loaded beside it; loading: none runs. All but off are paid for."""


class Node:
    """What stands on one machine for all its cards."""

    def __init__(self, ssd_bytes: int, ram_bytes: int) -> None:
        self.ssd = Tier(ssd_bytes)
        self.ram = Tier(ram_bytes)


class Replica:
    """A model on a card: on its way, ready, or draining, that is, to go as soon as its last sequence has ended."""

    __slots__ = (
        "alone_s", "each_s", "gpu", "index", "is_draining", "is_ready", "last_used_s", "ready_at_s", "running",
        "service", "uses_count",
    )  # fmt: skip

    def __init__(self, index: int, service: Service, gpu: Gpu) -> None:
        self.index, self.service, self.gpu = index, service, gpu
        self.alone_s, self.each_s = service.alone_s, service.each_s
        self.running = 0
        self.is_ready = self.is_draining = False
        self.ready_at_s = self.last_used_s = 0.0
        self.uses_count = 0


class Gpu:
    """Memory counts what a family shares once, as gpuload does with tensors of equal content."""

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        node: Node,
        weights_bytes: int,
        on_first: Callable[[int], None],
        on_end: Callable[[int, Any], None],
    ) -> None:
        self._env, self.index, self.node = env, index, node
        self.free_bytes = weights_bytes
        self.residents: dict[int, Replica] = {}
        self.families: dict[int, int] = {}
        """How many members of a family are here."""
        self.batch = Batch(env, on_first, on_end, self.settle)
        self.waits_for_drains: tuple[Replica, float] | None = None
        """It is loaded, for so many seconds, when those that drain have gone."""
        self.loading_count = 0
        self.link_free_s = 0.0
        """Loads of one card come one after another."""
        self.is_on = False
        self.has_keep_alive_timer = False
        self.state = OFF
        self.since_s = env.now
        self.seconds = dict.fromkeys(STATES, 0.0)

    def settle(self) -> None:
        """Book the time until now to the state that was, and see what the state is now."""
        now_s = self._env.now
        self.seconds[self.state] += now_s - self.since_s
        self.since_s = now_s
        if self.batch.running:
            self.state = BUSY
        elif self.loading_count or self.waits_for_drains is not None:
            self.state = LOADING
        else:
            self.state = IDLE if self.is_on else OFF

    def missing_bytes(self, service: Service) -> int:
        """What would have to be copied here for it, and would take memory."""
        return service.own_bytes + (0 if service.family in self.families else service.common_bytes)

    def hold(self, replica: Replica) -> None:
        """Free memory may be negative until those that drain for it have gone."""
        self.free_bytes -= self.missing_bytes(replica.service)
        family = replica.service.family
        self.families[family] = self.families.get(family, 0) + 1
        self.residents[replica.index] = replica

    def drop(self, replica: Replica) -> None:
        del self.residents[replica.index]
        family = replica.service.family
        self.families[family] -= 1
        if not self.families[family]:
            del self.families[family]
        self.free_bytes += self.missing_bytes(replica.service)

    def freed_bytes(self, gone: list[Replica], newcomer: Service) -> int:
        """What is free when these have gone and `newcomer`, which keeps its family's share, has come."""
        left = dict(self.families)
        left[newcomer.family] = left.get(newcomer.family, 0) + 1
        free_bytes = self.free_bytes - self.missing_bytes(newcomer)
        for replica in gone:
            service = replica.service
            left[service.family] -= 1
            free_bytes += service.own_bytes + (0 if left[service.family] else service.common_bytes)
        return free_bytes
