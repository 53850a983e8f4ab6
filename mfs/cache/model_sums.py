"""What the SSD tier holds of each model: the tables' rows, added up by the names that the sidecars carry."""

from __future__ import annotations

from mfs.cache.residency import ResidencyTables
from mfs.cache.ssd import SsdTier

ModelRow = list[str | int]
"""[source, model, bytes, files, pinned files, last use in seconds since the epoch]; model '' for files beside them."""


class ModelSums:
    """Knows the names it has read: a sidecar is opened once. Thread-safe under the GIL."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[str, str]] = {}
        """(source, model) by cache_id, of what was resident when somebody looked last."""

    def rows(self, tables: ResidencyTables, tier: SsdTier) -> list[ModelRow]:
        """One row for each model with anything resident. Bytes that several models share count for one of them."""
        found, names = dict[tuple[str, str], ModelRow](), dict[str, tuple[str, str]]()
        for cache_id, nbytes, last_used_at, pinned in tables.resident():
            name = self._names.get(cache_id)
            if name is None:
                source, path = tables.name_of(tier, cache_id)
                name = source, path.partition("/")[0] if "/" in path else ""
            names[cache_id] = name
            row = found.setdefault(name, [*name, 0, 0, 0, 0])
            row[2:] = [row[2] + nbytes, row[3] + 1, row[4] + pinned, max(row[5], last_used_at)]  # type: ignore[operator]
        self._names = names
        return list(found.values())
