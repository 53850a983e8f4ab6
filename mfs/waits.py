"""What readers had to wait for: said once for each wait, to whoever counts, traces or draws it. Pure; keeps nothing."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple


class Cause(StrEnum):
    """What a reader waited for."""

    ORIGIN = "origin"
    """The network, and the queue before it."""
    SSD = "ssd"
    """The disk of the SSD tier, or to hear from it what it has."""
    DECODE = "decode"
    """Bytes that had arrived, to be unpacked and verified."""
    SLOT = "slot"
    """Room in the RAM tier."""
    SHARE = "share"
    """His model's part of the slots on their way from an origin, used up by the model itself."""


class Waited(NamedTuple):
    """One wait of one reader. A read that waits for several things makes several, one after the other in time."""

    at_s: float
    """time.monotonic() when it began."""
    waited_s: float
    cause: Cause
    source: int
    """The source's number."""
    path: str
    """Inside the source: its top-level directory is the model."""
    start: int
    """First byte of the blocks that were waited for, in the file."""
    stop: int


class Waits:
    """Tells of waits. Belongs to the trio thread."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Waited], None]] = []
        """Called for each wait when it has ended, also one that ended in an error; must be quick, and not raise."""

    def note(self, waited: Waited) -> None:
        """A reader's wait has ended."""
        for listener in self.listeners:
            listener(waited)
