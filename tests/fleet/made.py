"""Small systems of known behaviour, for the tests of this folder."""

from __future__ import annotations

import numpy as np

from tools.fleet.measured import Figure, Way
from tools.fleet.services import Card, Service
from tools.fleet.setups import Setup
from tools.fleet.traffic import Requests

WAY = Way(
    "test",
    *(Figure(rate, "B/s", "made up") for rate in (1e9, 2e9, 10e9)),
    *(Figure(s, "s", "made up") for s in (4.0, 0.5)),
)


def service(
    name: str = "a",
    size_bytes: int = 10,
    *,
    family: int = 0,
    different: float = 1.0,
    alone_s: float = 1.0,
    each_s: float = 0.0,
) -> Service:
    """A round lasts a second, whoever runs; prompts take nothing."""
    return Service(name, size_bytes, family, different, alone_s, each_s, prompt_token_s=0.0)


def card(memory_bytes: int = 100, sequences: int = 1) -> Card:
    """All of its memory is for weights."""
    return Card(memory_bytes=memory_bytes, weights_share=1.0, sequences_max=sequences)


def requests(at_s: list[float], of: list[int] | None = None, tokens: list[float] | None = None) -> Requests:
    count = len(at_s)
    return Requests(
        np.array(at_s, dtype=np.float64),
        np.array(of if of is not None else [0] * count, dtype=np.int64),
        np.zeros(count),
        np.array(tokens if tokens is not None else [1.0] * count),
        duration_s=float(max(at_s, default=0.0)),
    )


def dedicated(gpus: int = 1) -> Setup:
    return Setup("dedicated", WAY, gpus, gpus, is_exclusive=True, is_preloaded=True, placement="static")


def shared(gpus: int = 1, **other: object) -> Setup:
    return Setup("shared", WAY, gpus, gpus, **{"is_warm": False, **other})  # type: ignore[arg-type]


def single(gpus: int = 4, **other: object) -> Setup:
    return Setup("to zero", WAY, gpus, is_exclusive=True, placement="first-fit", **{"is_warm": False, **other})  # type: ignore[arg-type]
