"""What a registry's tags lead to: revisions that hold now, and those that a rollback may want."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from mfs.errors import IntegrityError, NotFoundError
from mfs.registry import layout, tags
from mfs.registry.manifest import Manifest, parse_manifest
from mfs.registry.store import Store, Stored

LISTING_S = 3600.0
"""Until a listing of everything gives up: some ten million keys at a thousand a request."""
IO_S = 300.0
"""Until one object does: a manifest may have 64 MiB."""
HISTORY_COUNT = 20
"""Moves of a tag that stay, and can be gone back to. Whoever follows a model lists them all."""

Revision = tuple[str, str]
"""(model, manifest id)."""


@dataclass
class Reached:
    """What tags and their histories name."""

    named: dict[Revision, list[str]] = field(default_factory=dict)
    """Revision -> 'llama:v7', or 'history of llama:v7'."""
    trimmed: list[str] = field(default_factory=list)
    """Keys of moves that are more than a tag keeps."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(key, what is wrong) of moves that cannot be read."""


def reach(store: Store, *, history_count: int = HISTORY_COUNT, removed_before_ns: int = 0) -> Reached:
    """Read all tags with the last `history_count` moves of each.

    removed_before_ns: a tag whose removal is older, by the store's clock, keeps only that one move.
    """
    reached = Reached()
    kept, reached.trimmed = tags.trimmable(store, count_max=history_count, deadline_s=_deadline(LISTING_S))
    keys = [place.key for places in kept.values() for place in places]
    moves, faults = tags.read_entries(store, keys, deadline_s=_deadline(LISTING_S))
    reached.faults += faults
    for (model, tag), places in kept.items():
        last = moves.get(places[0].key)
        if last is not None and last.manifest is None and places[0].modified_ns < removed_before_ns:
            reached.trimmed += [place.key for place in places[1:]]
            continue
        for place in places:
            if (move := moves.get(place.key)) and move.manifest:
                name = f"{model}:{tag}" if place is places[0] else f"history of {model}:{tag}"
                names = reached.named.setdefault((model, move.manifest), [])
                if name not in names:
                    names.append(name)
    return reached


def manifests(store: Store) -> Iterator[tuple[Revision, Stored]]:
    """Every manifest that is there."""
    for found in store.list("manifests/", deadline_s=_deadline(LISTING_S)):
        parts = found.key.split("/")
        if len(parts) == 3 and layout.is_id(parts[2]):
            yield (parts[1], parts[2]), found


def read_manifest(store: Store, revision: Revision) -> Manifest | None:
    """None if it is not there. Raises: IntegrityError if it is damaged; AccessError, StoreError."""
    key = layout.manifest_key(*revision)
    try:
        body = store.read(key, deadline_s=_deadline(IO_S))
    except NotFoundError:
        return None
    try:
        return parse_manifest(body, revision[1])
    except IntegrityError as e:
        raise IntegrityError(f"{key}: {e}") from None


def shown(revision: Revision) -> str:
    """'llama@sha256:0123456789ab'."""
    return f"{revision[0]}@sha256:{revision[1][:12]}"


def _deadline(timeout_s: float) -> float:
    return time.monotonic() + timeout_s
