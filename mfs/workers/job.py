"""One operation asked of the workers: what the pool queues and a worker answers. Data, and what may be waited for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from mfs.errors import MfsError, TransientStoreError
from mfs.tracing.spans import Span
from mfs.workers.frames import Frame
from mfs.workers.shares import NOBODY, Group

Lane = Literal["origin", "ssd", "disk", "control"]
"""See `pool`."""

DISK_TIMEOUT_S = 60.0


class WorkerEndedError(TransientStoreError):
    """The worker process ended before it answered; the operation may be given to another."""


ATTEMPTS_OVER_DEAD_WORKERS = 4
"""All workers may die at once, for want of memory say; an operation that kills them must not do so for ever."""


class Priority(IntEnum):
    """Lower goes first."""

    DEMAND = 0
    BACKGROUND = 1


@dataclass(eq=False)
class Job:
    """One operation asked for. `on_done(result, error)` is called exactly once, on the trio thread, without
    awaiting.
    """

    operation: str
    arguments: Frame
    on_done: Callable[[Frame | None, MfsError | None], None]
    priority: Priority = Priority.DEMAND
    timeout_s: float = DISK_TIMEOUT_S
    """Counted from `submit` for what a reader waits for, else from the start: then waiting in the queue is no fault."""
    on_part: Callable[[Frame], None] | None = None
    serial: int = 0
    started: bool = False
    lane: Lane = "disk"
    group: Group = NOBODY
    """Who asks: for whom it counts. Set by the pool."""
    followed_by: Job | None = None
    """What its worker goes on with by itself, in the same thread, once this has ended well; never queued."""
    span: Span | None = None
    """Where it is traced; the pool ends it."""
    deadline_s: float = math.inf
    """time.monotonic() after which the worker is taken for hung. Set by the pool."""

    @property
    def is_bulk(self) -> bool:
        """More than one block, or ahead of need: nobody waits for just that. Stays as it is once begun. What the kernel
        reads ahead is more than one, and it asks for the page that is wanted by itself when that fails.
        """
        return self.priority is not Priority.DEMAND or self.arguments.get("mask", 0).bit_count() > 1

    @property
    def begun_s(self) -> float:
        """time.monotonic() from which its time is counted."""
        return self.deadline_s - self.timeout_s

    def finish(self, result: Frame | None, error: MfsError | None) -> None:
        self.on_done(result, error)
