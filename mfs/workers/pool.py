"""The daemon's side of the workers: who does which operation when, and what happens when a worker dies or hangs.

Operations queue here, not in the workers, so that what a reader waits for overtakes what was fetched ahead. Four lanes
have their own bounds: `origin` (fills) and `control` (listings), each source by itself and shared among its models (see
`shares`); `ssd` (what is read from SSD alone) and `disk` (SSD writes, tables), which no origin can hold up. Everything
here belongs to the trio thread; nothing blocks.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from mfs.errors import ConfigError, MfsError, StoreError, from_wire
from mfs.workers.frames import Frame
from mfs.workers.job import ATTEMPTS_OVER_DEAD_WORKERS, DISK_TIMEOUT_S, Job, Lane, Priority, WorkerEndedError
from mfs.workers.line import LANES, Line, group_of
from mfs.workers.pace import Pace
from mfs.workers.worker import Worker

logger = logging.getLogger(__name__)

_WITH_DEADLINE = ("fill", "list_directory")  # what asks an origin must know when to give up
_GRACE_S = 5.0  # a worker that has not answered this long after an operation's deadline is killed
_WATCH_S = 0.5
_START_TIMEOUT_S = 20.0
_TIER_PAUSE_S, _TIER_PAUSE_MAX_S = 30.0, 600.0
"""Without the SSD tier, for a worker whose predecessors died while they opened it; doubled each time."""
_RESPAWN_PAUSE_S, _RESPAWN_PAUSE_MAX_S = 0.5, 30.0
"""Doubled each time a worker ends before it was ready: a fault that stays must not keep a core busy starting Python."""


@dataclass(frozen=True)
class PoolConfig:
    """Bounds of the worker pool."""

    setup: Frame
    """What each worker is told first: sources, cache_dir, cache_fsync, cache_shared, log_level, log_format."""
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

    silence_s: float = 10.0
    """A worker that has something to do and says nothing so long, not even that it is there, is killed: its work goes
    to another, in what is left of the readers' time."""
    identities: tuple[str, ...] = ()
    """Of the sources, for a mount that serves already: its workers refuse nothing, and are not waited for longer than
    a start may take."""

    def limit(self, lane: Lane) -> int:
        return {
            "origin": self.origin_limit, "ssd": self.origin_limit, "disk": self.disk_limit,
            "control": self.control_limit,
        }[lane]  # fmt: skip

    @property
    def connections_max(self) -> int:
        """The most a source may need in one worker."""
        return 4 * (self.origin_limit + self.control_limit)

    @property
    def saves_max(self) -> int:
        """Saves that one worker goes on with by itself: those of all leave the disk's lane to what waits in it."""
        return self.disk_limit // self.workers_count


def _nobody(result: Frame | None, error: MfsError | None) -> None:
    """Nobody waits for the answer."""


class WorkerPool:
    """Worker processes behind queues."""

    def __init__(self, config: PoolConfig) -> None:
        self._config = config
        self._serials = itertools.count(1)
        self._lines: dict[tuple[Lane, int], Line] = {}
        """By lane and source."""
        self._paces: defaultdict[int, Pace] = defaultdict(Pace)
        self._workers: list[Worker] = []
        self._failed_start: MfsError | None = None
        self._changed = trio.Event()
        self._some = trio.Event()
        """Set while there are jobs, as far as was looked."""
        self.identities = list(config.identities)
        """Of each source, known once a worker runs."""
        self._restarts = [0] * config.workers_count
        """How often each worker was started anew."""
        self.retries = Counter[str]({"failed": 0, "throttled": 0})
        """How often workers have asked an origin again, by why; see `fetch.told.taken_retries`."""
        self.ways = Counter[str]({"cache_bytes": 0, "direct_bytes": 0, "cache_faults": 0})
        """Which way ranges came where a cache is set that nodes share; see `fetch.told.taken_ways`."""
        self.closing = False
        self.tier_fault: str | None = None
        """Why workers serve without the SSD tier, None while they have it or none is wanted."""
        self.device: int | None = None
        """Where replies go that workers write by themselves; ours until `take_device_back`. Each worker is given
        it with the first of them."""
        self.on_tier_back: Callable[[], None] = lambda: None
        """Told when all workers have the SSD tier again."""

    # -- asking

    def submit(self, job: Job) -> None:
        """Queue a job; it starts as soon as its lane and a worker have room."""
        job.serial = next(self._serials)
        job.lane = LANES.get(job.operation, "disk")
        job.group = group_of(job)
        job.deadline_s = time.monotonic() + job.timeout_s
        if self.closing:
            job.finish(None, StoreError("the mount is shutting down"))
            return
        self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        self._some.set()
        line = self._line(job)
        line.push(job)
        self._dispatch(line)

    def _line(self, job: Job) -> Line:
        key = job.lane, job.group[0]
        line = self._lines.get(key)
        if line is None:
            pace = self.pace(job.group[0]) if job.lane == "origin" else None
            line = self._lines[key] = Line(job.lane, self._config.limit(job.lane), pace)
        return line

    def pace(self, source: int) -> Pace:
        """How much is asked of a source at once."""
        return self._paces[source]

    def hurry(self, job: Job) -> None:
        """A reader waits for this job now: move it ahead of everything fetched ahead of need."""
        if not job.started and job.priority is not Priority.DEMAND:
            job.priority = Priority.DEMAND
            job.deadline_s = time.monotonic() + job.timeout_s
            self._enqueue(job)  # the old place is skipped

    def take_device_back(self) -> None:
        """No worker keeps the device open longer than it takes to read its orders."""
        self.device = None
        for worker in self._workers:
            worker.take_device_back()

    async def call(
        self, operation: str, *, timeout_s: float = DISK_TIMEOUT_S, on_part: Callable[[Frame], None] | None = None,
        priority: Priority = Priority.DEMAND, **arguments: Any,
    ) -> Frame:  # fmt: skip
        """Do one operation and wait for it; again if its worker dies, since all of them may be repeated.

        on_part: intermediate frames; those of a dead worker come again from the start, after a frame {again: true}.
        Raises: what the worker raised. Cancellation: the answer is then ignored.
        """
        attempt, deadline_s = 1, time.monotonic() + timeout_s
        while True:
            try:
                return await self._call_once(Job(operation, arguments, _nobody, priority, timeout_s, on_part))
            except WorkerEndedError:
                if attempt == ATTEMPTS_OVER_DEAD_WORKERS or self.closing:
                    raise
                attempt += 1
                if priority is Priority.DEMAND:  # all attempts together take as long as one may
                    timeout_s = deadline_s - time.monotonic()
                    if timeout_s <= 0:
                        raise
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
        try:
            await done.wait()
        finally:
            job.started = True  # else it was cancelled: what it was to work on may be gone by its turn
        if outcome[1] is not None:
            raise outcome[1]
        result: Frame = outcome[0]
        return result

    # -- gauges

    def inflight(self, lane: Lane) -> int:
        return sum(line.shares.count for line in self._lines.values() if line.lane == lane)

    def queued(self, lane: Lane) -> int:
        return sum(1 for line in self._lines.values() if line.lane == lane for _ in line.waiting())

    def under_way(self) -> list[Job]:
        """What the workers are bringing at this moment, from the origin or from SSD; the oldest first."""
        jobs = [job for worker in self._workers for job in worker.jobs.values() if job.operation in ("fill", "load")]
        return sorted(jobs, key=lambda job: job.begun_s)

    @property
    def restarts_count(self) -> int:
        """Workers started anew since the start."""
        return sum(self._restarts)

    @property
    def pids(self) -> dict[int, int]:
        """The process that is each worker now, by its number."""
        return {worker.number: worker.pid for worker in self._workers}

    def describe(self) -> list[Frame]:
        """[{pid, inflight, restarts}] for status."""
        return [{"pid": w.pid, "inflight": len(w.jobs), "restarts": self._restarts[w.number]} for w in self._workers]

    # -- dispatch

    def _dispatch(self, line: Line) -> None:
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

    def _start(self, line: Line, job: Job, worker: Worker) -> None:
        line.begin(job)
        worker.jobs[job.serial] = job
        if job.priority is Priority.BACKGROUND:
            job.deadline_s = time.monotonic() + job.timeout_s
        arguments = job.arguments
        if job.operation in _WITH_DEADLINE:
            arguments = {**arguments, "deadline_s": job.deadline_s}
        if job.followed_by is not None:
            job.followed_by.serial = next(self._serials)
            arguments = {**arguments, "then": job.followed_by.serial}
        if job.span is not None:
            arguments = {**arguments, "trace": job.span.context.traceparent}
            job.span.attributes["mfs.queued_s"] = time.monotonic() - job.span.since_s
        if arguments.get("replies") and self.device is not None:
            worker.give_device(self.device)
        worker.send({"id": job.serial, "op": job.operation, **arguments})

    def _go_on(self, worker: Worker, job: Job) -> None:
        """A worker has begun a job by itself."""
        job.deadline_s = time.monotonic() + job.timeout_s
        self._line(job).begin(job)
        worker.jobs[job.serial] = job

    def _finished(self, worker: Worker, job: Job, result: Frame | None, error: MfsError | None) -> None:
        del worker.jobs[job.serial]
        line = self._line(job)
        line.end(job)
        if job.span is not None:
            job.span.end(error=str(error) if error is not None else "")
        if job.followed_by is not None and error is None:
            self._go_on(worker, job.followed_by)
        job.finish(result, error)
        self._dispatch(line)

    # -- processes

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Workers run while this is open. Raises ConfigError if they cannot start, unless the mount serves already; on
        exit none is left.
        """
        async with trio.open_nursery() as nursery:
            for number in range(self._config.workers_count):
                nursery.start_soon(self._keep_worker, number)
            nursery.start_soon(self._watch_deadlines)
            try:
                with trio.move_on_after(_START_TIMEOUT_S) as scope:
                    await self._wait_ready()
                if scope.cancelled_caught and not self._config.identities:
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
        while not self._all_ready:
            if self._failed_start is not None and not self._config.identities:
                raise self._failed_start
            await self._changed.wait()

    @property
    def _all_ready(self) -> bool:
        return len(self._workers) == self._config.workers_count and all(worker.ready for worker in self._workers)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _keep_worker(self, number: int) -> None:
        """Start the worker, and again whenever it dies."""
        pause_s, tier_after_s = _RESPAWN_PAUSE_S, 0.0
        while True:
            try:
                setup = self._setup() | {"tier_after_s": tier_after_s}
                worker = await trio.to_thread.run_sync(Worker, number, setup)
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
                if self._restarts[number]:  # reading damaged tables may be what it dies of
                    tier_after_s = min(max(_TIER_PAUSE_S, 2 * tier_after_s), _TIER_PAUSE_MAX_S)
            self._restarts[number] += 1
            logger.warning("worker %d ended (status %s); starting another", worker.pid, worker.status)
            pause_s = _RESPAWN_PAUSE_S if worker.ready else min(2 * pause_s, _RESPAWN_PAUSE_MAX_S)
            await trio.sleep(pause_s)

    def _take(self, worker: Worker, frame: Frame) -> None:
        worker.silent_since_s = None
        if "retries" in frame:
            self.retries.update(frame["retries"])
        if "ways" in frame:
            self.ways.update(frame["ways"])
        if frame["id"] == 0:
            if "pong" in frame:
                return
            if "tier" in frame:
                worker.tier_fault = frame["tier"]
                self._note_tier()
                return
            if "error" in frame:
                self._failed_start = from_wire(*frame["error"])
            else:
                worker.ready = True
                self.identities = frame["result"]["identities"]
                self._note_tier()
                for line in list(self._lines.values()):
                    self._dispatch(line)
            self._notify()
            return
        job = worker.jobs[frame["id"]]
        if "spans" in frame and job.span is not None:
            job.span.take_in(frame["spans"])
        if "part" in frame:
            if job.on_part is not None:
                job.on_part(frame["part"])
        elif "error" in frame:
            self._finished(worker, job, None, from_wire(*frame["error"]))
        else:
            self._finished(worker, job, frame["result"], None)

    def _setup(self) -> Frame:
        """What a worker is told. The first refuse what a person must mend, those after them serve as they can."""
        config = self._config
        bounds = {"connections_max": config.connections_max, "saves_max": config.saves_max}
        return {**config.setup, **bounds, "restarted": bool(self.identities), "identities": self.identities}

    def _note_tier(self) -> None:
        """Say it once when a worker has no SSD tier, and once when all have it again."""
        faults = [worker.tier_fault for worker in self._workers if worker.tier_fault is not None]
        if faults and self.tier_fault is None:
            logger.warning("serving without the SSD tier, which is tried again and again: %s", faults[0])
            self.tier_fault = faults[0]
        elif self.tier_fault is not None and not faults and self._all_ready:
            logger.warning("the SSD tier is there again")
            self.tier_fault = None
            self.on_tier_back()

    async def _watch_deadlines(self) -> None:
        """A hung worker still owns what it fills: only its death makes that safe to use again."""
        while True:
            await self._some.wait()
            await trio.sleep(_WATCH_S)
            now = time.monotonic()
            self._expire_queued(now)
            for worker in self._workers:
                if worker.is_silent(now, self._config.silence_s):
                    logger.error(
                        "worker %d has said nothing for %.1f s; killing it", worker.pid, self._config.silence_s
                    )
                    worker.kill()
                    continue
                late = [job for job in worker.jobs.values() if now > job.deadline_s + _GRACE_S]
                if late:
                    logger.error(
                        "worker %d has not answered %s %.0f s after its deadline; killing it",
                        worker.pid, late[0].operation, _GRACE_S,
                    )  # fmt: skip
                    worker.kill()
            if not any(worker.jobs for worker in self._workers) and not any(map(Line.has_any, self._lines.values())):
                self._some = trio.Event()

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
