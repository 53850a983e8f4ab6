"""Which ranges of foreign memory a device may copy from. Pure; thread-safe."""

from __future__ import annotations

import bisect
import threading


class Ranges:
    """Address ranges, each added once or more, that never overlap in part."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._held: dict[int, tuple[int, int]] = {}  # start -> (stop, how often)

    def add(self, start: int, nbytes: int) -> bool:
        """Whether the range is new."""
        with self._lock:
            stop, count = self._held.get(start, (start + nbytes, 0))
            self._held[start] = (stop, count + 1)
            if not count:
                bisect.insort(self._starts, start)
            return not count

    def remove(self, start: int) -> bool:
        """Whether that was the last hold on it."""
        with self._lock:
            stop, count = self._held.pop(start)
            if count > 1:
                self._held[start] = (stop, count - 1)
                return False
            self._starts.remove(start)
            return True

    def holds(self, start: int, nbytes: int) -> bool:
        """Whether one range has all of it."""
        with self._lock:
            at = bisect.bisect_right(self._starts, start) - 1
            return at >= 0 and start + nbytes <= self._held[self._starts[at]][0]
