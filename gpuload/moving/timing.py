"""What the time of one load went to, for who asks why it took so long: `gpuload load --explain`. Else none is made.

    open, turn     files and tables; other loads of the same devices
    read           threads wait for the source's bytes; where the CPU reaches the device, that brings them there
    hash, copy     they look at the bytes; nobody does either, and copies to the device are waited for
    other          planning, publishing

An instant goes to what most threads were at (`mfs.phases`), so the phases add up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gpuload.moving.source import Loan, Source
from mfs.phases import Ledger

ORDER = ("turn", "open", "read", "hash", "copy")
IDLE = "other"


class Timing:
    """Thread-safe."""

    def __init__(self) -> None:
        self._ledger = Ledger(time.monotonic(), order=ORDER, idle=IDLE)
        self._lock = threading.Lock()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A thread, or a task, is at it in here. phase: one of ORDER."""
        since_s = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._ledger.add(since_s, time.monotonic(), phase)

    def describe(self) -> dict[str, Any]:
        """{began_s: on the machine's monotonic clock, seconds, phases, strip: {step_s, phases}} up to now."""
        with self._lock:
            now_s = time.monotonic()
            phases, step_s, steps = self._ledger.look(now_s)
            began_s = self._ledger.began_s
        return {"began_s": began_s, "seconds": now_s - began_s, "phases": phases,
                "strip": {"step_s": step_s, "phases": steps}}  # fmt: skip


class TimedSource:
    """A source whose calls count as reading."""

    def __init__(self, source: Source, timing: Timing) -> None:
        self._source = source
        self._timing = timing

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        """See `Source.borrow`."""
        with self._timing.within("read"):
            return self._source.borrow(shard, start, stop)

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        """See `Source.read_into`."""
        with self._timing.within("read"):
            self._source.read_into(shard, start, views)

    def interrupt(self) -> None:
        """See `Source.interrupt`."""
        self._source.interrupt()

    def close(self) -> None:
        """See `Source.close`."""
        self._source.close()
