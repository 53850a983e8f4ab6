"""All inputs of a run in one value, which stands in its output, so that the run can be repeated from there."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mfs.errors import UsageError
from tools.fleet import traces
from tools.fleet.measured import WAYS, Figure, Way
from tools.fleet.services import GB, Card, Service, make_services
from tools.fleet.simulate import Slo
from tools.fleet.traffic import Requests, Traffic, draw, popularity

TRACES = ("llm", "functions")
FORMAT = 1


@dataclass(frozen=True)
class Trace:
    """A recorded file, bound by its digest: one that changed is not the same input."""

    kind: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Scenario:
    """Services, their traffic, what serves them, and what is asked of it."""

    services_count: int = 5
    sizes_bytes: tuple[int, ...] = (16 * GB,)
    per_family: int = 1
    different_share: float = 1.0
    exponent: float = 0.0
    """Of popularity, Zipf's; 0: all services are asked alike."""
    utilisation: float = 0.1
    """Work asked for, over what one card for each service could do at most. Means nothing with a trace."""
    duration_s: float = 3600.0
    settled_share: float = 0.1
    """Of the duration, at whose end latencies begin to count."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    traffic: Traffic = field(default_factory=Traffic)
    trace: Trace | None = None
    card: Card = field(default_factory=Card)
    slo: Slo = field(default_factory=Slo)
    in_time_target: float = 0.99
    shared_gpus: int = 3
    placement: str = "least-loaded"
    eviction: str = "lru"
    keep_alive_s: float = 300.0
    replicas_max: int = 1
    price: float = 2.5
    """Of a GPU-hour, in any currency."""
    rates: str = "measured"
    ways: Mapping[str, Way] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for given, is_right, expected in (
            (self.services_count, 1 <= self.services_count <= 100_000, "1 to 100000 services"),
            (self.sizes_bytes, self.sizes_bytes and min(self.sizes_bytes) > 0, "sizes above 0 bytes"),
            (self.per_family, self.per_family >= 1, "1 member a family or more"),
            (self.exponent, 0 <= self.exponent <= 10, "an exponent of popularity from 0 to 10"),
            (self.utilisation, 0 < self.utilisation <= 10, "a utilisation above 0 and up to 10"),
            (self.duration_s, 0 < self.duration_s <= 366 * 86_400, "a duration above 0 s, of a year at most"),
            (self.settled_share, 0 <= self.settled_share < 1, "a settled share from 0 to below 1"),
            (self.seeds, 0 < len(set(self.seeds)) == len(self.seeds), "one seed or more, none twice"),
            (self.slo, self.slo.first_token_s > 0 and self.slo.whole_s > 0, "an SLO above 0 s"),
            (self.in_time_target, 0 < self.in_time_target < 1, "a target between 0 and 1"),
            (self.price, self.price >= 0, "a price no less than 0"),
        ):
            if not is_right:
                raise UsageError(f"expected {expected}, got {given!r}")

    def services(self) -> list[Service]:
        return make_services(
            self.services_count, self.sizes_bytes, self.card,
            per_family=self.per_family, different_share=self.different_share,
        )  # fmt: skip

    def rates_per_s(self) -> list[float]:
        """Mean request rates of the services that together make the utilisation."""
        shares = popularity(self.services_count, self.exponent)
        load = sum(
            share
            / service.requests_per_s(
                self.traffic.context_tokens, self.traffic.generated_tokens, self.card.sequences_max
            )
            for share, service in zip(shares, self.services(), strict=True)
        )
        return [self.utilisation * self.services_count * share / load for share in shares]

    def requests(self, seed: int) -> Requests:
        """Raises: UsageError, also where a trace is not what it was."""
        if self.trace is None:
            return draw(self.traffic, self.rates_per_s(), self.duration_s, seed)
        path = Path(self.trace.path)
        if digest(path) != self.trace.sha256:
            raise UsageError(f"{path}: expected the file whose SHA-256 is {self.trace.sha256}, got another")
        if self.trace.kind == "llm":
            return traces.read_llm(path, popularity(self.services_count, self.exponent), seed)
        return traces.read_functions(path, self.services_count, self.traffic, seed)


def with_ways(scenario: Scenario) -> Scenario:
    """The figures of its `rates`, read now."""
    return replace(scenario, ways=WAYS[scenario.rates]())


def digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def to_json(scenario: Scenario) -> dict[str, Any]:
    return dataclasses.asdict(scenario)


def from_json(said: dict[str, Any]) -> Scenario:
    """Raises: UsageError if it is not what `to_json` makes."""
    try:
        ways = {name: _way(way) for name, way in said["ways"].items()}
        made: dict[str, Any] = {
            "ways": ways,
            "sizes_bytes": tuple(said["sizes_bytes"]),
            "seeds": tuple(said["seeds"]),
            "traffic": Traffic(**said["traffic"]),
            "trace": Trace(**said["trace"]) if said["trace"] else None,
            "card": Card(**said["card"]),
            "slo": Slo(**said["slo"]),
        }
        return Scenario(**{**said, **made})
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"expected the inputs of a run of this version: {type(error).__name__}: {error}") from None


def _way(said: dict[str, Any]) -> Way:
    figures: dict[str, Any] = {key: Figure(**value) for key, value in said.items() if isinstance(value, dict)}
    return Way(**{**said, **figures})
