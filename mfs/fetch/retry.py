"""Trying again: only what may pass, only inside the deadline, never in step with everybody else."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from http.client import HTTPMessage
from typing import TypeVar

from mfs.errors import StoreError, TransientStoreError
from mfs.fetch.dates import epoch_s
from mfs.fetch.told import arriving, tell_retry, watcher
from mfs.types import ByteRange

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
"""Upper bound of the first pause; each further one doubles it."""

PAUSE_S_MAX = 5.0
"""Upper bound of any pause the server did not ask for: a recovered origin is noticed within seconds."""

TRANSIENT_STATUSES = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505, 511}
"""HTTP statuses that say 'not now': whatever of a server's own faults is none of what it cannot do at all. Proxies and
networks before an origin have their own (509, 520 to 530), and RFC 9110 §15 takes an unknown one for a 500."""

HOLD_S_MAX = 300.0
"""Longest pause that one answer imposes on all threads; the Hub counts in windows of this length."""

SPREAD = 0.1
"""Of a pause that a server asks for, what may be added: all whom it put off at once do not come back at once."""

_RATE_LIMIT_RESET = re.compile(r";\s*t=(\d+)")
_RATE_LIMIT_REMAINING = re.compile(r";\s*r=(\d+)")


class Hold:
    """What an origin asks of one thread, asked of all: nobody asks it before the time is over. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._until_s = 0.0

    def check(self) -> None:
        """Raises: TransientStoreError with what is left of the time."""
        left_s = self._until_s - time.monotonic()
        if left_s > 0:
            raise TransientStoreError(f"{self._name} asks to wait", retry_after_s=left_s)

    def note(self, wish_s: float | None) -> None:
        """The origin asks for a pause, or for none."""
        if wish_s:
            self._until_s = max(self._until_s, time.monotonic() + min(wish_s, HOLD_S_MAX))


class Rest:
    """What of a range is still to come, over attempts that break off in the middle of it: a server or proxy that ends
    every answer early (a limit of time or bytes, a line that drops) is read on where it did so, not from the start.
    """

    def __init__(self, span: ByteRange, out: memoryview, *, is_exact: bool = False) -> None:
        """out: for all of `span`. is_exact: what comes of it counts by itself, before all of it is there; so who
        watches is told (`told.watching`).
        """
        self._span = span
        self._out = out
        self._came_bytes = 0
        self._watcher = watcher() if is_exact else None

    def take(self, read: Callable[[ByteRange, memoryview], T]) -> T:
        """`read` what is left. What it brings before a TransientStoreError is not asked for again."""
        try:
            with arriving(self._arrived if self._watcher else None):
                return read(self._span, self._out)
        except TransientStoreError as e:
            self._span = ByteRange(self._span.start + e.received_bytes, self._span.stop)
            self._out = self._out[e.received_bytes :]
            self._came_bytes += e.received_bytes
            if self._watcher and self._came_bytes:
                self._watcher(self._came_bytes)
            raise

    def _arrived(self, nbytes: int) -> None:
        assert self._watcher is not None
        self._watcher(self._came_bytes + nbytes)


def with_retries(
    attempt: Callable[[], T], *, what: str, deadline_s: float, stopped: threading.Event | None = None
) -> T:
    """Call `attempt` until it returns, fails for good, or the deadline comes too near for another try.

    Pauses are drawn evenly from 0 to a bound that doubles (full jitter), after what the server asked for; who sent some
    of what he was asked for is asked again as if he had not failed yet.
    what: opens the final message, as in 's3://b/k: bytes 0-9'.
    stopped: set from elsewhere, ends a pause with StoreError.
    Raises: TransientStoreError naming attempts, time and last cause; any other error of `attempt` unchanged.
    """
    started_s = time.monotonic()
    attempts_count = 0
    bound_s = FIRST_PAUSE_S
    while True:
        attempts_count += 1
        try:
            return attempt()
        except TransientStoreError as e:
            last = e
        if last.received_bytes:
            bound_s = FIRST_PAUSE_S
        pause_s = random.uniform(0, bound_s)
        bound_s = min(PAUSE_S_MAX, 2 * bound_s)
        if last.retry_after_s is not None:
            pause_s += last.retry_after_s + random.uniform(0, SPREAD * last.retry_after_s)
        now_s = time.monotonic()
        if now_s + pause_s >= deadline_s:
            raise _given_up(last, what, attempts_count, now_s - started_s) from last
        tell_retry(last)
        if stopped is None:
            time.sleep(pause_s)
        elif stopped.wait(pause_s):
            raise StoreError(f"{what}: the source was closed while waiting to try again") from last


def _given_up(last: TransientStoreError, what: str, attempts_count: int, took_s: float) -> TransientStoreError:
    attempts = "1 attempt" if attempts_count == 1 else f"{attempts_count} attempts"
    wish = f"; the server asks to wait {last.retry_after_s:.0f} s" if last.retry_after_s else ""
    return TransientStoreError(
        f"{what}: given up after {attempts} in {took_s:.1f} s: {last}{wish}", retry_after_s=last.retry_after_s
    )


def wished_pause_s(headers: HTTPMessage) -> float | None:
    """How long the server asks us to wait, or None.

    Source: RFC 9110 §10.2.3 Retry-After (seconds or a date); the Hub's `RateLimit: "api";r=0;t=55`.
    """
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    if value:
        until_s = epoch_s(value)
        return None if until_s is None else max(0.0, until_s - time.time())
    limit = headers.get("RateLimit", "")
    remaining = _RATE_LIMIT_REMAINING.search(limit)
    reset = _RATE_LIMIT_RESET.search(limit)
    if remaining and reset and int(remaining[1]) == 0:
        return float(reset[1])
    return None
