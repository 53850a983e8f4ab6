"""A source around a source that fails, corrupts or waits when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mfs.errors import MfsError, TransientStoreError
from mfs.sources.base import Page, Source
from mfs.types import ByteRange, ObjectId


@dataclass
class Fault:
    """What befalls the next `count` range reads that `matches` accepts; -1 means all of them."""

    count: int = 1
    matches: Callable[[ObjectId, ByteRange], bool] = lambda obj, span: True
    error: MfsError | None = None
    """Raised instead of an answer."""
    flips_byte: bool = False
    """Answer with the middle byte inverted: corruption that no length check sees."""
    gate: threading.Event | None = field(default=None)
    """Wait for this, up to the deadline, before answering."""


class FaultySource:
    """Passes everything on to `inner`, save for what its faults say. Thread-safe."""

    def __init__(self, inner: Source) -> None:
        self.inner = inner
        self.identity = inner.identity
        self.address = inner.address
        self.faults: list[Fault] = []
        """Looked at in order; the first that matches and has a count left is used."""
        self.list_error: MfsError | None = None
        """Raised by `list` while set."""
        self.reads: list[tuple[str, ByteRange]] = []
        """Every range asked for, in order of arrival."""
        self._lock = threading.Lock()

    def list(self, path: str, *, deadline_s: float) -> Iterator[Page]:
        """Pass on, or fail with `list_error`."""
        if self.list_error:
            raise self.list_error
        yield from self.inner.list(path, deadline_s=deadline_s)

    def get_range(self, obj: ObjectId, span: ByteRange, *, out: memoryview, deadline_s: float) -> None:
        """Pass on with the fault that is due, if any."""
        fault = self._next_fault(obj, span)
        if fault and fault.gate and not fault.gate.wait(max(0.0, deadline_s - time.monotonic())):
            raise TransientStoreError(f"{obj}: stalled until the deadline")
        if fault and fault.error:
            raise fault.error
        self.inner.get_range(obj, span, out=out, deadline_s=deadline_s)
        if fault and fault.flips_byte and len(out):
            out[len(out) // 2] ^= 0xFF

    def close(self) -> None:
        """Close `inner`."""
        self.inner.close()

    def _next_fault(self, obj: ObjectId, span: ByteRange) -> Fault | None:
        with self._lock:
            self.reads.append((obj.path, span))
            for fault in self.faults:
                if fault.count and fault.matches(obj, span):
                    fault.count -= 1
                    return fault
        return None
