"""The sequences that run on one card, on a clock of rounds (see services): exact, however they change.

A sequence of n rounds that begins at round r ends at r + n, however the clock's speed changes in between, so one heap
by rounds orders them all, and only a card's next moment stands in SimPy's queue. A request is no process of its own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, Protocol

import simpy

_DUE_ROUNDS = 1e-6
"""Moments nearer than this are one: a day's clock has no finer resolution (a round is milliseconds)."""


class Member(Protocol):
    """A model on the card, as far as its sequences are concerned."""

    alone_s: float
    each_s: float
    running: int


class Batch:
    """Starts sequences, and tells of their first tokens and ends."""

    def __init__(
        self,
        env: simpy.Environment,
        on_first: Callable[[int], None],
        on_end: Callable[[int, Any], None],
        on_busy: Callable[[], None],
    ) -> None:
        """on_end: of a request and its member, which has left by then; may start others. on_busy: 0 run, or 1."""
        self._env, self._on_first, self._on_end, self._on_busy = env, on_first, on_end, on_busy
        self._heap: list[tuple[float, int, float, Any]] = []
        self._rounds = 0.0
        self._round_s = 0.0
        self._at_s = env.now
        self._tick_s = math.inf
        self._is_ticking = False
        self.running = 0

    def start(self, request: int, member: Member, first_rounds: float, more_rounds: float) -> None:
        """A sequence joins: its first token comes after `first_rounds`, its last `more_rounds` later."""
        self._advance()
        if not member.running:
            self._round_s += member.alone_s
        member.running += 1
        self._round_s += member.each_s
        self.running += 1
        if self.running == 1:
            self._on_busy()
        heapq.heappush(self._heap, (self._rounds + first_rounds, request, more_rounds, member))
        if not self._is_ticking:
            self._arm()

    def _advance(self) -> None:
        now_s = self._env.now
        if self.running:
            self._rounds += (now_s - self._at_s) / self._round_s
        self._at_s = now_s

    def _arm(self) -> None:
        """A timeout for the next moment, unless one comes sooner, which will look again."""
        if self._heap:
            delay_s = max(0.0, self._heap[0][0] - self._rounds) * self._round_s
            if self._env.now + delay_s < self._tick_s:
                self._tick_s = self._env.now + delay_s
                callbacks = self._env.timeout(delay_s).callbacks
                assert callbacks is not None
                callbacks.append(self._tick)

    def _tick(self, _event: simpy.Event) -> None:
        if self._env.now != self._tick_s:
            return  # a sooner one was armed after this
        self._tick_s = math.inf
        self._is_ticking = True
        self._advance()
        due = self._rounds + _DUE_ROUNDS
        heap = self._heap
        while heap and heap[0][0] <= due:
            rounds, request, more_rounds, member = heapq.heappop(heap)
            if more_rounds >= 0:
                self._on_first(request)
                heapq.heappush(heap, (rounds + more_rounds, request, -1.0, member))
            else:
                self._leave(member)
                self._on_end(request, member)
        self._is_ticking = False
        self._arm()

    def _leave(self, member: Member) -> None:
        member.running -= 1
        self.running -= 1
        self._round_s -= member.each_s
        if not member.running:
            self._round_s -= member.alone_s
        if not self.running:
            self._round_s = 0.0  # no rest of roundings
            self._on_busy()
