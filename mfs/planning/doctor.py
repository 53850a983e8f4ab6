"""`mfs doctor`: everything that was found on this machine for a mount, in the order in which it is needed."""

from __future__ import annotations

from collections.abc import Iterator

from mfs.findings import Finding
from mfs.planning import disk, kernel, machine, mounts, origin
from mfs.planning.wanted import Wanted


def examine(wanted: Wanted, *, measure: bool = True) -> Iterator[Finding]:
    """Look at everything, slowest last; never raises for what it finds.

    measure: also how fast the cache's disk is, which writes to it, and how fast the origins are, which reads of them.
    """
    yield from kernel.examine(wanted)
    yield from machine.examine(wanted)
    yield from mounts.examine()
    yield from disk.examine(wanted, measure=measure)
    for source in wanted.sources:
        yield from origin.examine(source, wanted)
