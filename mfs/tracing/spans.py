"""What a span is to us: plain values that cost a microsecond, until somebody else makes OTLP of them. Imports no SDK.

A *row* is a span that has ended, as it goes to who exports it:

    [trace id, span id, parent's span id or '', name, kind, start_ns, end_ns, error, attributes]

ids are lower-case hex; kind as OTLP counts (1 internal, 3 client); times in nanoseconds since 1970; error '' for none.
"""

from __future__ import annotations

import random
import re
import time
from collections import deque
from typing import Any, NamedTuple

from mfs.shown import mask

Row = list[Any]

INTERNAL, CLIENT = 1, 3
ROWS_MAX = 8192
"""That wait to be sent, some 5 MB; those after them are counted and dropped."""

_ERROR_MAX = 500
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_ids = random.SystemRandom()


class Context(NamedTuple):
    """Where in which trace one stands."""

    trace_id: str
    span_id: str
    is_sampled: bool = True

    @property
    def traceparent(self) -> str:
        """As W3C Trace Context writes it."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


def parse_traceparent(text: str) -> Context | None:
    """A context from another's `traceparent`, None for what is none. Source: W3C Trace Context §3.2.2."""
    match = _TRACEPARENT.fullmatch(text.strip())
    if match is None or text.startswith("ff") or not int(match[1], 16) or not int(match[2], 16):
        return None
    if text.startswith("00") and len(text.strip()) != 55:
        return None
    return Context(match[1], match[2], bool(int(match[3], 16) & 1))


def new_trace_id() -> str:
    return f"{_ids.getrandbits(128) or 1:032x}"


def new_span_id() -> str:
    return f"{random.getrandbits(64) or 1:016x}"


def wall_ns(at_s: float) -> int:
    """Nanoseconds since 1970 of a time of the monotonic clock."""
    return time.time_ns() - round((time.monotonic() - at_s) * 1e9)


class Outbox:
    """Rows that wait to be sent; bounded. Belongs to one thread."""

    def __init__(self) -> None:
        self._rows: deque[Row] = deque()
        self.dropped_count = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row) -> None:
        if len(self._rows) < ROWS_MAX:
            self._rows.append(row)
        else:
            self.dropped_count += 1

    def take(self, count_max: int) -> list[Row]:
        """The oldest, at most so many."""
        return [self._rows.popleft() for _ in range(min(count_max, len(self._rows)))]


class Span:
    """One that is under way. Not to be used where nobody wants traces: who has none makes none."""

    __slots__ = ("_outbox", "_parent_id", "attributes", "context", "name", "since_s")

    def __init__(
        self, outbox: Outbox, name: str, context: Context, parent_id: str, since_s: float | None = None
    ) -> None:
        """since_s: when it began, on the monotonic clock; now if it is not said."""
        self._outbox = outbox
        self._parent_id = parent_id
        self.name = name
        self.context = context
        self.since_s = time.monotonic() if since_s is None else since_s
        self.attributes: dict[str, Any] = {}

    def child(self, name: str, since_s: float | None = None) -> Span:
        context = Context(self.context.trace_id, new_span_id())
        return Span(self._outbox, name, context, self.context.span_id, since_s)

    def end(self, until_s: float | None = None, *, error: str = "", attributes: dict[str, Any] | None = None) -> None:
        """It is over; once."""
        end_s = time.monotonic() if until_s is None else until_s
        start_ns = wall_ns(self.since_s)
        self._outbox.add([
            self.context.trace_id, self.context.span_id, self._parent_id, self.name, INTERNAL, start_ns,
            start_ns + round((end_s - self.since_s) * 1e9), mask(error)[:_ERROR_MAX],
            self.attributes | (attributes or {}),
        ])  # fmt: skip

    def take_in(self, rows: list[Row]) -> None:
        """Spans of another process, below this one."""
        for row in rows:
            self._outbox.add(row)
