"""What the hooks of this process did: tests prove by it that bytes came through gpuload; anybody may look.

from gpuload.hooks.counts import counts
"""

from __future__ import annotations

import threading


class Counts:
    """Tensors and slices handed to the program, and where they came from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.served = 0
        """On memory the resident server holds."""
        self.streamed = 0
        """By this process's own pipeline (vLLM's and SGLang's plugins, where no server answers)."""
        self.left = 0
        """By the library itself."""
        self.read_bytes = 0
        """Of what was streamed, the bytes that this process read itself; the others' came from the ranks beside it."""

    def add(self, *, served: int = 0, streamed: int = 0, left: int = 0, read_bytes: int = 0) -> None:
        with self._lock:
            self.served += served
            self.streamed += streamed
            self.left += left
            self.read_bytes += read_bytes

    def renew_lock(self) -> None:
        """For a forked child, whose copy of the lock may be held by a thread that it does not have."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"served {self.served}, streamed {self.streamed}, left to the library {self.left}"


counts = Counts()
