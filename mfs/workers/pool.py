"""The daemon's side of the workers: who does which operation when, and what happens when a worker dies or hangs.

Operations queue here, not in the workers, so that what a reader waits for overtakes what was fetched ahead. Four lanes
have their own bounds: `origin` (fills) and `control` (listings), each source by itself and shared among its models (see
`shares`); `ssd` (what is read from SSD alone) and `disk` (SSD writes, tables), which no origin can hold up. Everything
here belongs to the trio thread; nothing blocks.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Literal

import trio

from mfs.errors import ConfigError, MfsError, StoreError, TransientStoreError, from_wire
from mfs.workers.frames import Frame
from mfs.workers.shares import NOBODY, Group, Shares, group_of_directory, group_of_file
from mfs.workers.worker import Worker

logger = logging.getLogger(__name__)

Lane = Literal["origin", "ssd", "disk", "control"]
_LANES: dict[str, Lane] = {
    "fill": "origin", "load": "ssd", "masks": "ssd", "list_directory": "control", "stat_path": "control",
}  # fmt: skip # all others: disk
_WITH_DEADLINE = ("fill", "list_directory")  # what asks an origin must know when to give up
_GRACE_S = 5.0  # a worker that has not answered this long after an operation's deadline is killed
_DISK_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 20.0
_RESPAWN_PAUSE_S, _RESPAWN_PAUSE_MAX_S = 0.5, 30.0
"""Doubled each time a worker ends before it was ready: a fault that stays must not keep a core busy starting Python."""


class WorkerEndedError(TransientStoreError):
    """The worker process ended before it answered; the operation may be given to another."""


ATTEMPTS_OVER_DEAD_WORKERS = 4
"""All workers may die at once, for want of memory say; an operation that kills them must not do so for ever."""


class Priority(IntEnum):
    """Lower goes first."""

    DEMAND = 0
    BACKGROUND = 1


@dataclass(frozen=True)
class PoolConfig:
    """Bounds of the worker pool."""

    setup: Frame
    """What each worker is told first: sources, cache_dir, cache_fsync, log_level."""
    workers_count: int = 2
    """Processes. Two keep two cores busy with TLS; the socket copies dominate, not Python."""
    origin_limit: int = 16
    """Fills under way at once for one model, so also connections. All models of a source together: at most four times
    that, and twice that unless many hang."""
    background_limit: int = 14
    """Of those, how many may be fetched ahead: a reader always finds a connection."""
    disk_limit: int = 6
    control_limit: int = 4
    """Listings under way at once below one directory of a source's root; a source as with fills."""

    def limit(self, lane: Lane) -> int:
        return {
            "origin": self.origin_limit, "ssd": self.origin_limit, "disk": self.disk_limit,
            "control": self.control_limit,
        }[lane]  # fmt: skip

    @property
    def connections_max(self) -> int:
        """The most a source may need in one worker."""
        return 4 * (self.origin_limit + self.control_limit)


@dataclass(eq=False)
class Job:
    """One operation asked for. `on_done(result, error)` is called exactly once, on the trio thread, without
    awaiting.
    """

    operation: str
    arguments: Frame
    on_done: Callable[[Frame | None, MfsError | None], None]
    priority: Priority = Priority.DEMAND
    timeout_s: float = _DISK_TIMEOUT_S
    """Counted from `submit` for what a reader waits for, else from the start: then waiting in the queue is no fault."""
    on_part: Callable[[Frame], None] | None = None
    serial: int = 0
    started: bool = False
    lane: Lane = "disk"
    group: Group = NOBODY
    """Who asks: for whom it counts. Set by the pool."""
    deadline_s: float = math.inf
    """time.monotonic() after which the worker is taken for hung. Set by the pool."""

    def finish(self, result: Frame | None, error: MfsError | None) -> None:
        self.on_done(result, error)


class _Line:
    """One lane of one source: what waits, by model, and what runs."""

    def __init__(self, lane: Lane, limit: int) -> None:
        self.lane = lane
        self.shares = Shares(2 * limit)
        self.queues: dict[Group, list[tuple[int, int, Job]]] = {}

    def push(self, job: Job) -> None:
        heapq.heappush(self.queues.setdefault(job.group, []), (job.priority, job.serial, job))

    def waiting(self) -> Iterator[Job]:
        """What has not begun; a hurried job comes twice until its old place is skipped."""
        return (job for queue in self.queues.values() for _, _, job in queue if not job.started)

    def pop(self, background_leaving: int) -> Job | None:
        """The most urgent job whose group may have one more."""
        best: list[tuple[int, int, Job]] | None = None
        for group, queue in list(self.queues.items()):
            while queue and (queue[0][2].started or queue[0][0] != queue[0][2].priority):
                heapq.heappop(queue)  # the stale half of a hurried job
            if not queue:
                del self.queues[group]
                continue
            leaving = background_leaving if queue[0][0] == Priority.BACKGROUND else 0
            if (best is None or queue[0] < best[0]) and self.shares.may_take(group, leaving=leaving):
                best = queue
        return heapq.heappop(best)[2] if best else None


def _group_of(job: Job) -> Group:
    arguments = job.arguments
    if job.operation in ("fill", "load"):
        return group_of_file(arguments["source"], arguments["obj"][1])
    if job.operation == "list_directory":
        return group_of_directory(arguments["source"], arguments["path"])
    return NOBODY


def _nobody(result: Frame | None, error: MfsError | None) -> None:
    """Nobody waits for the answer."""


class WorkerPool:
    """Worker processes behind queues."""

    def __init__(self, config: PoolConfig, slots_fd: int) -> None:
        self._config = config
        self._slots_fd = slots_fd
        self._serials = itertools.count(1)
        self._lines: dict[tuple[Lane, int], _Line] = {}
        """By lane and source."""
        self._workers: list[Worker] = []
        self._failed_start: MfsError | None = None
        self._changed = trio.Event()
        self.identities: list[str] = []
        """Of each source, known once a worker runs."""
        self._restarts = [0] * config.workers_count
        """How often each worker was started anew."""
        self.closing = False

    # -- asking

    def submit(self, job: Job) -> None:
        """Queue a job; it starts as soon as its lane and a worker have room."""
        job.serial = next(self._serials)
        job.lane = _LANES.get(job.operation, "disk")
        job.group = _group_of(job)
        job.deadline_s = time.monotonic() + job.timeout_s
        if self.closing:
            job.finish(None, StoreError("the mount is shutting down"))
            return
        self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        line = self._line(job)
        line.push(job)
        self._dispatch(line)

    def _line(self, job: Job) -> _Line:
        key = job.lane, job.group[0]
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(job.lane, self._config.limit(job.lane))
        return line

    def hurry(self, job: Job) -> None:
        """A reader waits for this job now: move it ahead of everything fetched ahead of need."""
        if not job.started and job.priority is not Priority.DEMAND:
            job.priority = Priority.DEMAND
            job.deadline_s = time.monotonic() + job.timeout_s
            self._enqueue(job)  # the old place is skipped

    async def call(
        self, operation: str, *, timeout_s: float = _DISK_TIMEOUT_S, on_part: Callable[[Frame], None] | None = None,
        priority: Priority = Priority.DEMAND, **arguments: Any,
    ) -> Frame:  # fmt: skip
        """Do one operation and wait for it; again if its worker dies, since all of them may be repeated.

        on_part: intermediate frames; those of a dead worker come again from the start, after a frame {again: true}.
        Raises: what the worker raised. Cancellation: the answer is then ignored.
        """
        attempt = 1
        while True:
            try:
                return await self._call_once(Job(operation, arguments, _nobody, priority, timeout_s, on_part))
            except WorkerEndedError:
                if attempt == ATTEMPTS_OVER_DEAD_WORKERS or self.closing:
                    raise
                attempt += 1
                if on_part is not None:
                    on_part({"again": True})

    async def _call_once(self, job: Job) -> Frame:
        done = trio.Event()
        outcome: list[Any] = [None, None]

        def on_done(result: Frame | None, error: MfsError | None) -> None:
            outcome[:] = result, error
            done.set()

        job.on_done = on_done
        self.submit(job)
        await done.wait()
        if outcome[1] is not None:
            raise outcome[1]
        result: Frame = outcome[0]
        return result

    # -- gauges

    def inflight(self, lane: Lane) -> int:
        return sum(line.shares.count for line in self._lines.values() if line.lane == lane)

    def queued(self, lane: Lane) -> int:
        return sum(1 for line in self._lines.values() if line.lane == lane for _ in line.waiting())

    @property
    def restarts_count(self) -> int:
        """Workers started anew since the start."""
        return sum(self._restarts)

    def describe(self) -> list[Frame]:
        """[{pid, inflight, restarts}] for status."""
        return [{"pid": w.pid, "inflight": len(w.jobs), "restarts": self._restarts[w.number]} for w in self._workers]

    # -- dispatch

    def _dispatch(self, line: _Line) -> None:
        config = self._config
        leaving = 2 * (config.origin_limit - config.background_limit) if line.lane in ("origin", "ssd") else 0
        while workers := [w for w in self._workers if w.ready]:
            job = line.pop(leaving)
            if job is None:
                return
            if job.priority is Priority.DEMAND and time.monotonic() > job.deadline_s:
                self._give_up(job)
            else:
                self._start(line, job, min(workers, key=lambda w: len(w.jobs)))

    def _start(self, line: _Line, job: Job, worker: Worker) -> None:
        job.started = True
        line.shares.take(job.group)
        worker.jobs[job.serial] = job
        if job.priority is Priority.BACKGROUND:
            job.deadline_s = time.monotonic() + job.timeout_s
        arguments = job.arguments
        if job.operation in _WITH_DEADLINE:
            arguments = {**arguments, "deadline_s": job.deadline_s}
        worker.send({"id": job.serial, "op": job.operation, **arguments})

    def _finished(self, worker: Worker, job: Job, result: Frame | None, error: MfsError | None) -> None:
        del worker.jobs[job.serial]
        line = self._line(job)
        line.shares.give(job.group)
        job.finish(result, error)
        self._dispatch(line)

    # -- processes

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Workers run while this is open. Raises ConfigError if they cannot start; on exit none is left."""
        async with trio.open_nursery() as nursery:
            for number in range(self._config.workers_count):
                nursery.start_soon(self._keep_worker, number)
            nursery.start_soon(self._watch_deadlines)
            try:
                with trio.move_on_after(_START_TIMEOUT_S) as scope:
                    await self._wait_ready()
                if scope.cancelled_caught:
                    raise ConfigError(
                        f"worker processes did not start within {_START_TIMEOUT_S:.0f} s; see the log file"
                    )
                yield
            finally:
                self.closing = True
                for line in self._lines.values():
                    for job in list(line.waiting()):
                        if not job.started:
                            job.started = True
                            job.finish(None, StoreError("the mount is shutting down"))
                    line.queues.clear()
                nursery.cancel_scope.cancel()

    async def _wait_ready(self) -> None:
        while not (self._workers and all(w.ready for w in self._workers)
                   and len(self._workers) == self._config.workers_count):  # fmt: skip
            if self._failed_start is not None:
                raise self._failed_start
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _keep_worker(self, number: int) -> None:
        """Start the worker, and again whenever it dies."""
        setup = {**self._config.setup, "connections_max": self._config.connections_max}
        pause_s = _RESPAWN_PAUSE_S
        while True:
            try:
                worker = await trio.to_thread.run_sync(Worker, number, self._slots_fd, setup)
            except OSError as error:  # no memory, no processes or descriptors left: that may pass
                self._failed_start = self._failed_start or ConfigError(f"a worker process cannot be started: {error}")
                self._notify()
                logger.error("a worker process cannot be started: %s", error)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RESPAWN_PAUSE_MAX_S)
                continue
            self._workers.append(worker)
            try:
                await worker.run(partial(self._take, worker))
            finally:
                self._workers.remove(worker)
                await worker.end()
                for job in list(worker.jobs.values()):
                    self._finished(worker, job, None, WorkerEndedError(
                        f"worker process {worker.pid} ended during {job.operation}"))  # fmt: skip
            if not worker.ready:
                self._failed_start = self._failed_start or ConfigError(
                    "a worker process did not start; see the log file"
                )
                self._notify()
            self._restarts[number] += 1
            logger.warning("worker %d ended (status %s); starting another", worker.pid, worker.status)
            pause_s = _RESPAWN_PAUSE_S if worker.ready else min(2 * pause_s, _RESPAWN_PAUSE_MAX_S)
            await trio.sleep(pause_s)

    def _take(self, worker: Worker, frame: Frame) -> None:
        if frame["id"] == 0:
            if "error" in frame:
                self._failed_start = from_wire(*frame["error"])
            else:
                worker.ready = True
                self.identities = frame["result"]["identities"]
                for line in list(self._lines.values()):
                    self._dispatch(line)
            self._notify()
            return
        job = worker.jobs[frame["id"]]
        if "part" in frame:
            if job.on_part is not None:
                job.on_part(frame["part"])
        elif "error" in frame:
            self._finished(worker, job, None, from_wire(*frame["error"]))
        else:
            self._finished(worker, job, frame["result"], None)

    async def _watch_deadlines(self) -> None:
        """A hung worker still owns the slots it fills: only its death makes them safe to use again."""
        while True:
            await trio.sleep(1)
            now = time.monotonic()
            self._expire_queued(now)
            for worker in self._workers:
                late = [job for job in worker.jobs.values() if now > job.deadline_s + _GRACE_S]
                if late:
                    logger.error(
                        "worker %d has not answered %s %.0f s after its deadline; killing it",
                        worker.pid, late[0].operation, _GRACE_S,
                    )  # fmt: skip
                    worker.kill()

    def _expire_queued(self, now: float) -> None:
        """What a reader waits for fails in time, also when no worker is there to take it."""
        for line in list(self._lines.values()):
            for job in [job for job in line.waiting() if job.priority is Priority.DEMAND]:
                if not job.started and now > job.deadline_s:
                    self._give_up(job)

    @staticmethod
    def _give_up(job: Job) -> None:
        job.started = True  # its place in the queue is skipped
        job.finish(None, StoreError(f"no answer within {job.timeout_s:g} s: the workers or the origin do not keep up"))
