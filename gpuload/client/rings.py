"""What this process keeps page-locked from load to load: one ring of buffers and one stream for each device.

A program loads a model shard by shard, or tensor by tensor: page-locking a buffer for each costs more than the bytes.
A ring is page-locked while the first load that needs it is at work, and stays until `let_go` or the process's end. Two
loads at once: the second makes its own and gives it back. A forked child has none, and calls no driver.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gpuload.device import open_device
from gpuload.device.base import Device, Stream
from gpuload.moving.pipeline import Limits
from gpuload.moving.staging import FIRST_BYTES, Ring

_idle: dict[str, Kept] = {}
_lock = threading.Lock()


class Kept:
    """A device of its own, so that its context lives as long as what is page-locked; a ring, a stream."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.device: Device = open_device(name)
        self.ring = Ring(
            self.device, buffer_bytes=limits.buffer_bytes, count=limits.buffers_count, first_bytes=FIRST_BYTES
        )
        self._stream: Stream | None = None

    def stream(self) -> Stream:
        """For one tensor at a time; opened when first asked for."""
        if self._stream is None:
            self._stream = self.device.open_stream()
        return self._stream

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self.ring.close()
        self.device.close()


@contextmanager
def lent(name: str, limits: Limits) -> Iterator[Kept]:
    """What is kept for this device, the caller's alone meanwhile. No copy may be under way at the end.

    After an error it is not kept: a stream that failed once fails for ever. Raises: DeviceError.
    """
    with _lock:
        kept = _idle.pop(name, None)
    if kept is not None and kept.ring.buffer_bytes < limits.buffer_bytes:
        kept.close()
        kept = None
    kept = kept or Kept(name, limits)
    try:
        yield kept
    except BaseException:
        kept.close()
        raise
    with _lock:
        surplus = kept if name in _idle else None
        _idle.setdefault(name, kept)
    if surplus is not None:
        surplus.close()


def let_go() -> None:
    """Give back all that no load is using."""
    with _lock:
        idle = list(_idle.values())
        _idle.clear()
    for kept in idle:
        kept.close()


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _idle.clear()


os.register_at_fork(after_in_child=_forget)
