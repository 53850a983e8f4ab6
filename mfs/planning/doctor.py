"""`mfs doctor`: everything that was found on this machine for a mount, in the order in which it is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from mfs.findings import Finding, ok, warning
from mfs.planning import disk, kernel, machine, mounts, origin
from mfs.planning.wanted import Wanted
from mfs.tracing import settings


def examine(wanted: Wanted, *, measure: bool = True) -> Iterator[Finding]:
    """Look at everything, slowest last; never raises for what it finds.

    measure: also how fast the cache's disk is, which writes to it, and how fast the origins are, which reads of them.
    """
    yield from kernel.examine(wanted)
    yield from machine.examine(wanted)
    yield from mounts.examine()
    yield from _traces(os.environ)
    yield from disk.examine(wanted, measure=measure)
    for source in wanted.sources:
        yield from origin.examine(source, wanted)


def _traces(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether OpenTelemetry's variables, where they ask for traces, get them."""
    if settings.is_wanted(environment):
        found, _, what_to_do = settings.fault(environment).partition(": no traces; ")
        if found:
            yield warning("traces", found, what_to_do or "or unset the OTEL_ variables: a mount serves without")
        else:
            yield ok("traces", "wanted by the OTEL_ variables, and OpenTelemetry is installed")
