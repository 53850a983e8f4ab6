"""For tests only: recognisable content, sources in memory, faults on demand, and the suite every source passes."""

from __future__ import annotations

from mfs.testing.faulty import Fault, FaultySource
from mfs.testing.memory import MemorySource
from mfs.testing.ramp import ramp

__all__ = ["Fault", "FaultySource", "MemorySource", "ramp"]
