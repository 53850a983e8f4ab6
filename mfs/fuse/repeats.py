"""Reads that waited long and failed, kept for the moment in which the kernel asks again.

When a read ahead fails, the kernel asks once more for the one page that is wanted (mm/filemap.c). It gets the same
answer at once, or a reader would wait for a dead origin twice. Where the origin sends, and
is slow, that page may be had.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from mfs.errors import StoreError
from mfs.types import ByteRange

_WINDOW_S, _BYTES_MAX, _REMEMBERED_MAX = 0.25, 1 << 16, 16
"""What the kernel asks again, it asks within this time and for no more bytes than that; so many failed reads are
remembered per handle."""
_WAITED_S_MIN = 1.0  # a failure that came quicker is worth asking about again


class _Failure(NamedTuple):
    span: ByteRange
    error: StoreError
    until_s: float


class FailedReads:
    """Failed reads by handle."""

    def __init__(self) -> None:
        self._by_handle: dict[int, deque[_Failure]] = {}

    def note(self, fh: int, span: ByteRange, error: BaseException, since_s: float) -> None:
        """A read has failed that began at `since_s`, a value of time.monotonic()."""
        now_s = time.monotonic()
        if isinstance(error, StoreError) and not error.is_slow and now_s - since_s > _WAITED_S_MIN:
            failed = self._by_handle.setdefault(fh, deque(maxlen=_REMEMBERED_MAX))
            failed.append(_Failure(span, error, now_s + _WINDOW_S))

    def raise_if_repeated(self, fh: int, span: ByteRange) -> None:
        """Raise what a read of these bytes has just failed with, once."""
        failures = self._by_handle.get(fh)
        if failures is None:
            return
        while failures and failures[0].until_s < time.monotonic():
            failures.popleft()
        if not failures:
            del self._by_handle[fh]
        for failure in failures:
            if failure.span.start <= span.start and span.stop <= failure.span.stop and len(span) <= _BYTES_MAX:
                failures.remove(failure)
                raise failure.error

    def forget(self, fh: int) -> None:
        """The handle is closed."""
        self._by_handle.pop(fh, None)
