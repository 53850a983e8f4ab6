"""Where a model goes, and who makes room for it. Pure: every policy is an order over what could be done.

The steps are the same for all: room that is free, then idle models pushed out, then a card that is off, then models
that are still at work (they finish what they have first). Policies choose within a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

FREE, EVICTS, OFF, CROWDED, DRAINS = range(5)
"""Steps, the best first. CROWDED: it fits, but the card runs as many sequences as it may."""


class Candidate(NamedTuple):
    """A card that could take a model."""

    step: int
    gpu: int
    running: int
    """Sequences at work there."""
    load_s: float
    """What the load would take there: less where the node, or the card, has the bytes."""
    victims_rate: float
    """Requests per second of the models that would go."""
    residents_rate: float
    """Of all models that are there."""
    plan: Any
    """What the cluster needs to carry it out; no policy looks at it."""


class Resident(NamedTuple):
    """A model that could go."""

    last_used_s: float
    uses_count: int
    """Since it came."""
    rate_per_s: float
    """Of its service, of late."""
    reload_s: float
    freed_bytes: int


Placement = Callable[[Candidate], tuple[float, ...]]
Eviction = Callable[[Resident], tuple[float, ...]]

PLACEMENTS: dict[str, Placement] = {
    "static": lambda found: (found.step, found.gpu),
    "first-fit": lambda found: (found.step, found.gpu),
    "least-loaded": lambda found: (found.step, found.running, found.load_s, found.gpu),
    "popularity": lambda found: (found.step, found.victims_rate, found.residents_rate, found.load_s, found.gpu),
}
"""The smallest is taken. static: as first-fit, but a service has cards of its own (`home_gpus`). popularity: whoever is
least missed goes, and what is asked for much is spread."""

EVICTIONS: dict[str, Eviction] = {
    "lru": lambda model: (model.last_used_s,),
    "lfu": lambda model: (model.uses_count, model.last_used_s),
    "cost": lambda model: (model.rate_per_s * model.reload_s / max(1, model.freed_bytes), model.last_used_s),
}
"""The smallest goes first. cost: seconds of waiting that its absence is expected to cause, for each byte it gives back;
of a fine-tune whose base stays, both sides are of the bytes that differ."""


def home_gpus(service: int, services_count: int, gpus_count: int) -> range:
    """Cards of one service under static placement: its own, if there are enough, else one shared in turn."""
    if gpus_count < services_count:
        return range(service % gpus_count, service % gpus_count + 1)
    return range(service, gpus_count, services_count)
