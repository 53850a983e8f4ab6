"""How long the kernel waited for answers, by operation, and which it was refused by errno. Only counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mfs.durations import Durations
from mfs.fuse.protocol import Opcode

BOUNDS_S = (10e-6, 25e-6, 100e-6, 250e-6, 1e-3, 2.5e-3, 10e-3, 25e-3, 0.1, 0.25, 1.0, 5.0, 30.0)
"""From an answer out of memory to a reader's whole patience."""


class OperationTimes:
    """From when a request was read to when its answer was written."""

    def __init__(self, opcodes: Iterable[int]) -> None:
        """opcodes: of the operations that there are."""
        self.by_opcode = {int(opcode): Durations(BOUNDS_S) for opcode in opcodes}
        self.errors: Counter[tuple[int, int]] = Counter()
        """Answers that are an errno, by (opcode, errno)."""

    def named(self) -> dict[str, Durations]:
        """By the name of the operation."""
        return {Opcode(opcode).name.lower(): durations for opcode, durations in self.by_opcode.items()}
