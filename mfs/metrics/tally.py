"""What is counted for metrics alone: waits, errors, what each model cost. Told by the mount's parts, trio thread only.

The first MODELS_MAX models that anything happens to are counted under their own names for as long as the daemon runs,
all further ones together as OTHER: so no counter ever goes back, however many models there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mfs.durations import Durations
from mfs.errors import MfsError
from mfs.waits import Cause, Waited
from mfs.workers.shares import Group, group_of_file

MODELS_MAX = 100
OTHER = ("other", "other")
"""In the place of (source, model)."""
ROOT = "."
"""What stands in no directory of its source counts as this model."""

WAIT_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

KINDS = {
    "NotFoundError": "not_found", "AccessError": "access", "ChangedError": "changed", "IntegrityError": "integrity",
    "RoomError": "room", "TransientStoreError": "transient", "WorkerEndedError": "worker_ended",
}  # fmt: skip
"""By the class of an error; all others are 'failed'."""


@dataclass
class OfModel:
    """What one model cost; only ever grows."""

    origin_bytes: int = 0
    ssd_bytes: int = 0
    shared_bytes: int = 0
    waits: int = 0
    waited_s: float = 0.0
    errors: int = 0


class Tally:
    """Counts of one daemon."""

    def __init__(self, sources: Sequence[str]) -> None:
        """sources: their names by number, '' for one that is the mount's root."""
        self._sources = sources
        self._by_group: dict[Group, OfModel] = {}
        self.models: dict[tuple[str, str], OfModel] = {}
        """By (source, model)."""
        self.waits = {cause: Durations(WAIT_BOUNDS_S) for cause in Cause}
        self.fetch_errors = Counter[str](dict.fromkeys((*KINDS.values(), "failed"), 0))
        """Fills that failed for good, by kind."""
        self.list_errors = Counter[str](self.fetch_errors)

    def waited(self, waited: Waited) -> None:
        """A reader has waited."""
        self.waits[waited.cause].note(waited.waited_s)
        model = self._model(group_of_file(waited.source, waited.path))
        model.waits += 1
        model.waited_s += waited.waited_s

    def filled(self, group: Group, *, origin_bytes: int, ssd_bytes: int, shared_bytes: int) -> None:
        """A chunk of a model was brought."""
        model = self._model(group)
        model.origin_bytes += origin_bytes
        model.ssd_bytes += ssd_bytes
        model.shared_bytes += shared_bytes

    def failed(self, group: Group, error: MfsError) -> None:
        """A chunk of a model could not be brought."""
        self.fetch_errors[kind_of(error)] += 1
        self._model(group).errors += 1

    def list_failed(self, error: MfsError) -> None:
        """A directory could not be listed."""
        self.list_errors[kind_of(error)] += 1

    def _model(self, group: Group) -> OfModel:
        model = self._by_group.get(group)
        if model is not None:
            return model
        source, name = group
        label = self._sources[source], name or ROOT
        if len(self.models) >= MODELS_MAX:  # not remembered by group: there may be a million
            return self.models.setdefault(OTHER, OfModel())
        model = self._by_group[group] = self.models[label] = OfModel()
        return model


def kind_of(error: MfsError) -> str:
    """The label of an error."""
    return KINDS.get(type(error).__name__, "failed")
