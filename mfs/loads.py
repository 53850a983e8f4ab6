"""Loads explain themselves: what was read of one model from its first open on, and where the time went.

A *load* is what is read of a model (a top-level directory of its source) from the first open until all handles are
closed, or nothing is read for a while. Its phases add up to its time:

    open, header               an open was answered late: for a whole file, or for the file's header
    slot, share                readers waited for room in RAM, or for the model's own share of it
    origin, ssd, decode        for bytes that came from there, or were unpacked and verified
    page_cache                 nobody waited for us: the kernel had the bytes, or the reader was at something else
    other                      a wait of another kind

Many wait at once: `phases.divide` has the rule, by the majority of those who wait.

Belongs to the trio thread. A read that RAM answers costs two fields of its load; one that waits, a few microseconds.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import trio

from mfs.phases import Ledger
from mfs.tracing.spans import Context, Span
from mfs.types import CHUNK_BYTES
from mfs.waits import Waited
from mfs.workers.shares import Group, group_of_file

IDLE = "page_cache"
PHASES = ("open", "header", "origin", "ssd", "decode", "slot", "share", IDLE, "other")
_ORDER = ("header", "open", "slot", "share", "decode", "ssd", "origin", "other")
"""Of causes with as many who wait: an open waits for a header, not for the origin that has it."""

LOADS_MAX = 32
"""That ended and are kept: the latest, but those that moved little go first."""
_SMALL_BYTES = 16 << 20
ACTIVE_MAX = 256
"""Models under way at once; one more ends the one that was quiet longest."""
READS_MAX = 64
"""Waits kept of one load, the longest."""
_CLOSED_S = 2.0
"""After the last close: loaders close a shard before they open the next."""
_QUIET_S = 10.0
"""Without a read, where handles stay open: a server keeps its files mapped for as long as it lives."""
_LOOK_S = 1.0
_NOTED_S = 1e-4
"""An open that was answered sooner waited for nothing."""

BeginTrace = Callable[[str, dict[str, Any], Context | None], Span | None]
"""(name, attributes, parent) -> the root of a trace, None where none is wanted."""


class _Read(NamedTuple):
    """Waits of one read, as far as they have ended."""

    since_s: float
    until_s: float
    phase: str
    path: str
    start: int
    stop: int


class Load:
    """One load of one model."""

    __slots__ = (
        "_ledger", "_read", "began_at", "began_s", "files_count", "group", "handles", "is_over", "last_s", "longest",
        "model", "origin_bytes", "ram_bytes", "span", "ssd_bytes", "waiting", "waits_count",
    )  # fmt: skip

    def __init__(self, group: Group, model: str) -> None:
        self.group = group
        self.model = model
        """Its path from the mount's root."""
        self.began_at, self.began_s = time.time(), time.monotonic()
        self.last_s = self.began_s
        """When something was opened, answered or closed last."""
        self.handles = 0
        self.files_count = 0
        """Opens, in all."""
        self.waiting = 0
        """Reads and opens that are not answered yet."""
        self.is_over = False
        self.waits_count = 0
        self.longest: list[tuple[float, int, float, str, str, int, int]] = []
        """A heap of (waited_s, number, at_s, phase, path in the source, start, stop)."""
        self.ram_bytes = self.ssd_bytes = self.origin_bytes = 0
        self.span: Span | None = None
        self._read: _Read | None = None
        """What is traced next: more of it may follow."""
        self._ledger = Ledger(self.began_s, order=_ORDER, idle=IDLE)

    def note(self, at_s: float, waited_s: float, cause: str, path: str, start: int, stop: int) -> None:
        """A reader, or an opener, has waited."""
        phase = cause if cause in PHASES else "other"
        self._ledger.add(at_s, at_s + waited_s, phase)
        self.waits_count += 1
        row = (waited_s, self.waits_count, at_s, phase, path, start, stop)
        if len(self.longest) < READS_MAX:
            heapq.heappush(self.longest, row)
        elif waited_s > self.longest[0][0]:
            heapq.heapreplace(self.longest, row)
        if self.span is not None:
            self._trace(at_s, at_s + waited_s, phase, path, start, stop)

    def _trace(self, since_s: float, until_s: float, phase: str, path: str, start: int, stop: int) -> None:
        """Waits at once for what goes on in one chunk are one span: the kernel has cut a read or fault into those."""
        last = self._read
        if (
            last is not None
            and (last.phase, last.path, last.stop) == (phase, path, start)
            and start % CHUNK_BYTES
            and since_s < last.until_s
        ):
            self._read = last._replace(
                since_s=min(last.since_s, since_s), until_s=max(last.until_s, until_s), stop=stop
            )  # fmt: skip
        else:
            self._end_read()
            self._read = _Read(since_s, until_s, phase, path, start, stop)

    def _end_read(self) -> None:
        read, self._read = self._read, None
        if read is not None and self.span is not None:
            name = "open" if read.phase in ("open", "header") else "read"
            self.span.child(name, read.since_s).end(read.until_s, attributes={
                "mfs.waited_for": read.phase, "mfs.file": read.path, "mfs.start": read.start, "mfs.stop": read.stop,
            })  # fmt: skip

    @property
    def moved_bytes(self) -> int:
        """From wherever."""
        return self.origin_bytes + self.ssd_bytes + self.ram_bytes

    def is_quiet(self, now_s: float) -> bool:
        """Whether nothing of it has been seen for so long that it is over."""
        return not self.waiting and now_s - self.last_s > (_QUIET_S if self.handles else _CLOSED_S)

    def end(self) -> None:
        """It is over since it was seen last."""
        self.is_over = True
        self._ledger.close(self.last_s)
        self._end_read()
        if self.span is not None:
            self.span.end(self._ledger.until_s, attributes=self._traced())
            self.span = None

    def adopt(self, span: Span) -> None:
        """Go on in another's trace: what comes from now on hangs from there."""
        self._end_read()
        if self.span is not None:
            self.span.end(attributes=self._traced())
        self.span = span

    def _traced(self) -> dict[str, Any]:
        phases = {f"mfs.{phase}_s": round(seconds, 6) for phase, seconds in self._ledger.phases.items() if seconds}
        return {"mfs.waits": self.waits_count, "mfs.files": self.files_count,
                "mfs.origin_bytes": self.origin_bytes, "mfs.ssd_bytes": self.ssd_bytes, **phases}  # fmt: skip

    def describe(self, shown: Callable[[int, str], str]) -> dict[str, Any]:
        """See `control.api.DaemonApi.loads`. shown(source, path): a path from the mount's root."""
        stop_s = self._ledger.until_s
        if not self.is_over:
            stop_s = max(time.monotonic() if self.waiting else self.last_s, stop_s)
        phases, step_s, steps = self._ledger.look(stop_s)
        reads = [
            {"at": at_s - self.began_s, "waited_s": waited_s, "on": phase, "path": shown(self.group[0], path),
             "start": start, "stop": stop}
            for waited_s, _, at_s, phase, path, start, stop in sorted(self.longest, key=lambda row: row[2])
        ]  # fmt: skip
        return {
            "model": self.model, "began_at": self.began_at, "began_s": self.began_s, "seconds": stop_s - self.began_s,
            "is_over": self.is_over, "files_count": self.files_count, "reads": reads,
            "phases": {phase: phases[phase] for phase in PHASES},
            "waits_count": self.waits_count, "left_out": self.waits_count - len(reads),
            "strip": {"step_s": step_s, "phases": steps},
            "bytes": {"origin": self.origin_bytes, "ssd": self.ssd_bytes, "ram": self.ram_bytes},
        }  # fmt: skip


class Loads:
    """The loads of a mount: those under way, and the last of those that ended."""

    def __init__(self, names: Sequence[str], begin_trace: BeginTrace = lambda name, attributes, parent: None) -> None:
        """names: of the sources by number, '' for one that is the root."""
        self._names = names
        self._begin_trace = begin_trace
        self._active: dict[Group, Load] = {}
        self._ended: list[Load] = []
        self._some = trio.Event()
        """Set while there is one under way."""

    # -- what readers do

    def opened(self, group: Group) -> Load:
        """A handle on a file of a model was opened: the load that it belongs to, until `closed`."""
        load = self._current(group)
        load.handles += 1
        load.files_count += 1
        load.last_s = time.monotonic()
        return load

    def resumed(self, load: Load) -> Load:
        """A handle is read whose load is over: the one it belongs to from now on."""
        load.handles -= 1
        again = self._current(load.group)
        again.handles += 1
        return again

    def closed(self, load: Load) -> None:
        load.handles -= 1
        if not load.is_over:
            load.last_s = time.monotonic()

    def note(self, waited: Waited) -> None:
        """A reader has waited: a listener of `Waits`."""
        at_s, waited_s, cause, source, path, start, stop = waited
        load = self._active.get(group_of_file(source, path))
        if load is not None:
            load.note(at_s, waited_s, cause, path, start, stop)

    @contextmanager
    def opening(self, load: Load, phase: str, path: str) -> Iterator[None]:
        """An open waits in here, for the file's header or for a whole file."""
        since_s = time.monotonic()
        load.waiting += 1
        try:
            yield
        finally:
            load.waiting -= 1
            load.last_s = now_s = time.monotonic()
            if now_s - since_s > _NOTED_S:
                load.note(since_s, now_s - since_s, phase, path, 0, 0)

    def filled(self, group: Group, *, origin_bytes: int, ssd_bytes: int) -> None:
        """Bytes of a model have come, whether a reader waited or not."""
        load = self._active.get(group)
        if load is not None:
            load.origin_bytes += origin_bytes
            load.ssd_bytes += ssd_bytes

    def span_of(self, group: Group) -> Span | None:
        """What is done for a model's load now hangs from there in its trace; None where it has none."""
        load = self._active.get(group)
        return load.span if load is not None else None

    def adopt(self, load: Load, parent: Context) -> None:
        """A borrower says in which trace it loads the model."""
        if load.span is None or load.span.context.trace_id != parent.trace_id:
            span = self._begin_trace("load", {"mfs.model": load.model}, parent)
            if span is not None:
                load.adopt(span)

    def _current(self, group: Group) -> Load:
        load = self._active.get(group)
        if load is not None and load.is_quiet(time.monotonic()):
            self._end(load)
            load = None
        if load is None:
            while len(self._active) >= ACTIVE_MAX:
                self._end(min(self._active.values(), key=lambda other: (other.waiting > 0, other.last_s)))
            load = self._active[group] = Load(group, self._shown(*group))
            load.span = self._begin_trace("load", {"mfs.model": load.model}, None)
            self._some.set()
        return load

    def _end(self, load: Load) -> None:
        del self._active[load.group]
        if load.last_s == load.began_s and not load.waits_count:  # what another daemon had open, and nobody reads
            load.is_over, load.span = True, None
            return
        load.end()
        self._ended.append(load)
        if len(self._ended) > LOADS_MAX:  # a look at the headers of all models must not push out what took minutes
            self._ended.remove(next((old for old in self._ended if old.moved_bytes < _SMALL_BYTES), self._ended[0]))

    # -- what others ask

    def describe(self, path: str) -> Iterator[dict[str, Any]]:
        """The loads of the models at, below or around a path from the mount's root, in the order in which they
        began. Each takes its time: readers may be given way to in between.
        """
        return (load.describe(self._shown) for load in self._about(path))

    def describe_latest(self, path: str, number: int) -> tuple[int, dict[str, Any] | None]:
        """How many loads `describe` would tell of, and one of them: the last to begin, or that many before it."""
        found = self._about(path)
        return len(found), found[-1 - number].describe(self._shown) if number < len(found) else None

    def _about(self, path: str) -> list[Load]:
        self._end_quiet()
        found = (load for load in (*self._ended, *self._active.values()) if self._concerns(load, path))
        return sorted(found, key=lambda load: load.began_s)

    def _concerns(self, load: Load, path: str) -> bool:
        source, top = load.group
        if not path or path == load.model or load.model.startswith(f"{path}/"):
            return True
        name = self._names[source]
        if top or not path.startswith(f"{name}/" if name else ""):
            return path.startswith(f"{load.model}/")
        return "/" not in (path.removeprefix(f"{name}/") if name else path)  # files beside the models

    def _shown(self, source: int, path: str) -> str:
        return "/".join(filter(None, (self._names[source], path)))

    async def run(self) -> None:
        """End loads that have become quiet, so that their traces are told of soon. Until cancelled; ends all then."""
        try:
            while True:
                await self._some.wait()
                await trio.sleep(_LOOK_S)
                self._end_quiet()
        finally:
            for load in list(self._active.values()):
                self._end(load)

    def _end_quiet(self) -> None:
        now_s = time.monotonic()
        for load in list(self._active.values()):
            if load.is_quiet(now_s):
                self._end(load)
        if not self._active and self._some.is_set():
            self._some = trio.Event()
