"""What waits in one lane of one source, by model, and what runs. Pure counting and queues; `pool` decides."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from mfs.workers.job import Job, Lane, Priority
from mfs.workers.pace import Pace
from mfs.workers.shares import NOBODY, Group, Shares, group_of_directory, group_of_file

LANES: dict[str, Lane] = {
    "fill": "origin", "load": "ssd", "masks": "ssd", "list_directory": "control", "stat_path": "control",
}  # fmt: skip
"""By operation; all others: disk."""


class Line:
    """One lane of one source: what waits, by model, and what runs."""

    def __init__(self, lane: Lane, limit: int, pace: Pace | None = None) -> None:
        """pace: that of orders for more than one block."""
        self.lane = lane
        self.shares = Shares(2 * limit)
        self._bulk = Counter[Group]()
        """Of what runs, how much keeps the pace."""
        self._pace = pace
        self.queues: dict[Group, list[tuple[int, int, Job]]] = {}

    def begin(self, job: Job) -> None:
        """A job runs from now on."""
        job.started = True
        self.shares.take(job.group)
        self._bulk[job.group] += job.is_bulk

    def end(self, job: Job) -> None:
        """One that ran does so no more."""
        self.shares.give(job.group)
        self._bulk[job.group] -= job.is_bulk
        if not self._bulk[job.group]:
            del self._bulk[job.group]

    def push(self, job: Job) -> None:
        heapq.heappush(self.queues.setdefault(job.group, []), (job.priority, job.serial, job))

    def waiting(self) -> Iterator[Job]:
        """What has not begun; a hurried job comes twice until its old place is skipped."""
        return (job for queue in self.queues.values() for _, _, job in queue if not job.started)

    def has_any(self) -> bool:
        """Whether anything waits."""
        return next(self.waiting(), None) is not None

    def pop(self, background_leaving: int) -> Job | None:
        """The most urgent job whose group may have one more."""
        best: tuple[int, int, Job] | None = None
        queue_of_best = None
        bulk_max = self._pace.orders_max if self._pace is not None else None
        holds_bulk = bulk_max is not None and self._bulk.total() >= bulk_max
        for group, queue in list(self.queues.items()):
            while queue and (queue[0][2].started or queue[0][0] != queue[0][2].priority):
                heapq.heappop(queue)  # the stale half of a hurried job
            if not queue:
                del self.queues[group]
                continue
            first: tuple[int, int, Job] | None = queue[0]
            if holds_bulk and self._bulk[group] and queue[0][2].is_bulk:  # who has none gets one, as of `shares`
                small = (item for item in queue if not item[2].is_bulk and not item[2].started)
                first = min(small, default=None)  # stays there, and is skipped
            if first is None:
                continue
            leaving = background_leaving if first[0] == Priority.BACKGROUND else 0
            if (best is None or first < best) and self.shares.may_take(group, leaving=leaving):
                best, queue_of_best = first, queue
        if best is None or queue_of_best is None:
            return None
        if best is queue_of_best[0]:
            heapq.heappop(queue_of_best)
        return best[2]


def group_of(job: Job) -> Group:
    arguments = job.arguments
    if job.operation in ("fill", "load"):
        return group_of_file(arguments["source"], arguments["obj"][1])
    if job.operation == "list_directory":
        return group_of_directory(arguments["source"], arguments["path"])
    return NOBODY
