"""The systems that are compared: how cards are held, who may use them, and how weights come. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mfs.errors import UsageError
from tools.fleet.measured import Way
from tools.fleet.policies import EVICTIONS, PLACEMENTS


@dataclass(frozen=True)
class Setup:
    """One system under test."""

    name: str
    way: Way
    gpus_max: int
    """All cards there are; those that are off cost nothing."""
    gpus_min: int = 0
    """Cards that stay on however idle."""
    is_exclusive: bool = False
    """A card holds one model at a time: single-model servers."""
    is_preloaded: bool = False
    """Cards that are on hold models from the beginning: by static placement their own, else what fits."""
    placement: str = "least-loaded"
    eviction: str = "lru"
    keep_alive_s: float = 300.0
    """A card that nobody used so long is turned off, down to gpus_min."""
    boot_s: float = 0.0
    """What turning a card on takes before anything can be loaded. 0: nodes run, cards are lent out by a scheduler."""
    quantum_s: float = 30.0
    """A model at work is asked to finish for another's sake only after so long."""
    replicas_max: int = 1
    """Cards that one model may stand on at once."""
    scale_out_waiting: int = 8
    """So many requests of a model must wait for each load under way before it gets another card."""
    gpus_per_node: int = 8
    ssd_bytes: int = 8 * 10**12
    """Of a node, for models."""
    ram_bytes: int = 10**12
    is_warm: bool = True
    """Nodes have what fits into their SSD and RAM at the beginning, as after `mfs prefetch`."""

    def __post_init__(self) -> None:
        for given, is_right, expected in (
            (self.gpus_max, 1 <= self.gpus_max <= 10_000, "1 to 10000 GPUs"),
            (self.gpus_min, 0 <= self.gpus_min <= self.gpus_max, f"0 to {self.gpus_max} GPUs that stay on"),
            (self.placement, self.placement in PLACEMENTS, f"one of {', '.join(PLACEMENTS)} as placement"),
            (self.eviction, self.eviction in EVICTIONS, f"one of {', '.join(EVICTIONS)} as eviction"),
            (self.keep_alive_s, self.keep_alive_s >= 0, "no less than 0 s of keep-alive"),
            (self.boot_s, self.boot_s >= 0, "no less than 0 s of boot time"),
            (self.quantum_s, self.quantum_s >= 0, "no less than 0 s as quantum"),
            (self.replicas_max, self.replicas_max >= 1, "1 replica or more"),
            (self.scale_out_waiting, self.scale_out_waiting >= 1, "1 waiting request or more"),
            (self.gpus_per_node, self.gpus_per_node >= 1, "1 GPU a node or more"),
            (self.ssd_bytes, self.ssd_bytes >= 0, "no less than 0 bytes of SSD"),
            (self.ram_bytes, self.ram_bytes >= 0, "no less than 0 bytes of RAM"),
        ):
            if not is_right:
                raise UsageError(f"{self.name}: expected {expected}, got {given!r}")


SINGLE, COLD, LAZY, SHARED, ELASTIC = "dedicated", "zero-download", "zero-mfs", "shared", "elastic"
NAMES = (SINGLE, COLD, LAZY, SHARED, ELASTIC)
DESCRIPTIONS = {
    SINGLE: "a server and a GPU for each service, always on: no cold starts",
    COLD: "a server and a GPU for each service while it is used, else off; weights are downloaded at each start",
    LAZY: "as zero-download, but from an mfs mount over the node's SSD and RAM, loaded by gpuload",
    SHARED: "GPUs that are always on and hold several models each; others are swapped in by gpuload",
    ELASTIC: "as shared, and a GPU that nobody used for the keep-alive is off",
}


def standard(
    services_count: int,
    shared_gpus: int,
    ways: Mapping[str, Way],
    *,
    placement: str = "least-loaded",
    eviction: str = "lru",
    keep_alive_s: float = 300.0,
    replicas_max: int = 1,
    names: Sequence[str] = NAMES,
) -> list[Setup]:
    """The five systems, for services that each have a card of their own or share `shared_gpus`.

    Single-model servers may have replicas_max cards for each service (always on: one); shared ones all.
    Raises: UsageError.
    """
    if unknown := set(names) - set(NAMES):
        raise UsageError(f"expected systems of {', '.join(NAMES)}, got {', '.join(sorted(map(str, unknown)))}")
    own = services_count * replicas_max
    made = {
        SINGLE: Setup(
            SINGLE, ways["gpuload"], services_count, services_count,
            is_exclusive=True, is_preloaded=True, placement="static",
        ),
        COLD: Setup(
            COLD, ways["download"], own, is_exclusive=True, placement="first-fit", keep_alive_s=keep_alive_s,
            replicas_max=replicas_max,
        ),
        LAZY: Setup(
            LAZY, ways["mfs"], own, is_exclusive=True, placement="first-fit", keep_alive_s=keep_alive_s,
            replicas_max=replicas_max,
        ),
        SHARED: Setup(
            SHARED, ways["gpuload"], shared_gpus, shared_gpus, is_preloaded=True, placement=placement,
            eviction=eviction, replicas_max=shared_gpus,
        ),
        ELASTIC: Setup(
            ELASTIC, ways["gpuload"], shared_gpus, placement=placement, eviction=eviction, keep_alive_s=keep_alive_s,
            replicas_max=shared_gpus,
        ),
    }  # fmt: skip
    return [made[name] for name in names]
