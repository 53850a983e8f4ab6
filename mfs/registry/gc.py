"""Collection: what no tag and no history of one leads to is deleted, once it is older than the grace. Mark and sweep.

Marked are the revisions of tags and of their last moves, all of a model where a move of it cannot be read, manifests
younger than the grace, and what live pushes name (`work` has the order of steps, and why it is safe beside them). Swept
are, in this order, so that no manifest is ever there without its chunks: moves beyond a tag's last ones, manifests with
their signatures, chunks, dead work records.

A chunk is marked with all that it stands on. Manifests name that (`requires`) as it was when they were made; a chunk
stored otherwise since is known by its size, and its own table is asked. A push stores alone what a manifest known to it
names: so none is to be expected that became a difference, and is as long as before to the byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from mfs.errors import IntegrityError, NotFoundError, TransientStoreError
from mfs.registry import layout, work
from mfs.registry.chunk import walk
from mfs.registry.chunk_io import read_table
from mfs.registry.parallel import for_each
from mfs.registry.reach import HISTORY_COUNT, LISTING_S, Revision, manifests, reach, read_manifest, shown
from mfs.registry.store import Store, Stored

GRACE_S = 24 * 3600.0
"""Younger than this nothing is deleted: a push that died is resumed by running it again."""
MANIFEST_GRACE_S = 3600.0
"""Nor a manifest that is younger than this, whatever the grace: its push may be about to move the tag."""
DELETES_PER_BATCH = 1000
BATCH_S = 300.0
"""Until a batch of deletions has failed: with `lapse_s` less than `stale_s` (`work.COLLECTION`), so that none is under
way when we count as dead."""
READS_PARALLEL = 16

Told = Callable[[str, int], object]
"""(what is done: 'manifests', 'chunks', 'deleted'; how many so far)."""


@dataclass
class Collected:
    """What a collection deleted, or would."""

    is_dry: bool
    moves: list[str] = field(default_factory=list)
    """Keys of moves beyond a tag's last ones."""
    revisions: list[Revision] = field(default_factory=list)
    chunks: list[Stored] = field(default_factory=list)
    signatures: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    kept_revisions_count: int = 0
    kept_chunks_count: int = 0
    kept_bytes: int = 0
    """Of chunks that are marked."""
    young_chunks_count: int = 0
    young_bytes: int = 0
    """Of chunks that nothing names, and that are younger than the grace."""
    missing: list[str] = field(default_factory=list)
    """Revisions that a tag names and that are not there: 'mfs fsck' says more."""
    damaged: list[str] = field(default_factory=list)
    """Moves that cannot be used, a line each: of their models all manifests stay."""
    pushes: list[str] = field(default_factory=list)
    """Who is pushing meanwhile."""

    @property
    def bytes(self) -> int:
        """Of the chunks that go."""
        return sum(found.size for found in self.chunks)


class _Marks:
    """Chunks that stay, and how long they were when that was said."""

    def __init__(self) -> None:
        self._stored: dict[bytes, int] = {}
        """Id -> bytes of its object, -1 where nobody said, or two differ: about 130 bytes of memory each."""

    def add(self, chunk_id: str, stored_bytes: int = -1) -> bool:
        """Whether it is new."""
        key = bytes.fromhex(chunk_id)
        known = self._stored.get(key)
        if known is None:
            self._stored[key] = stored_bytes
        elif known != stored_bytes and stored_bytes != -1:
            self._stored[key] = stored_bytes if known == -1 else -2
        return known is None

    def says(self, chunk_id: str) -> int | None:
        """Bytes of its object as they were; negative where it is not known, None for a chunk that may go."""
        return self._stored.get(bytes.fromhex(chunk_id))


def collect(
    store: Store,
    *,
    is_dry: bool = True,
    grace_s: float = GRACE_S,
    history_count: int = HISTORY_COUNT,
    told: Told = lambda what, count: None,
) -> Collected:
    """Find what nobody needs any more, and delete it unless `is_dry`.

    Raises: IntegrityError if a manifest that is needed cannot be read: what it needs is not known then, and nothing is
        deleted; StoreError if another collection is under way; AccessError, StoreError.
    """
    if is_dry:
        pushes, _, dead, now_ns = work.peek(store, deadline_s=_deadline(LISTING_S))
        return _found(store, pushes, dead, now_ns, grace_s, history_count, True, told)
    with work.collecting(store, history_count=history_count, deadline_s=_deadline(LISTING_S)) as lease:
        lapses_count = lease.lapses_count
        pushes, _, dead, now_ns = lease.look(deadline_s=_deadline(LISTING_S))
        found = _found(store, pushes, dead, now_ns, grace_s, history_count, False, told)
        sweep(store, lease, lapses_count, _keys(found), told)
        return found


def sweep(store: Store, lease: work.Lease, lapses_count: int, wanted: Iterable[str], told: Told) -> None:
    """Delete these, in their order. lapses_count: of the lease, when it was first seen that they may go.

    Raises: TransientStoreError once the lease has lapsed since; AccessError, StoreError.
    """
    count, left = 0, iter(wanted)
    while keys := list(islice(left, DELETES_PER_BATCH)):
        if lease.has_lapsed(since=lapses_count):
            raise TransientStoreError(
                f"{store.identity}: this collection was asleep for too long, or its record could not be written: "
                "run it again"
            )
        store.delete(keys, deadline_s=_deadline(BATCH_S))
        told("deleted", count := count + len(keys))


def _found(
    store: Store,
    pushes: Sequence[work.Record],
    dead: Sequence[Stored],
    now_ns: int,
    grace_s: float,
    history_count: int,
    is_dry: bool,
    told: Told,
) -> Collected:
    found = Collected(is_dry, pushes=[f"{push.who} since {push.since}" for push in pushes])
    old_ns = now_ns - int(grace_s * 1e9)
    old_manifests_ns = min(old_ns, now_ns - int(MANIFEST_GRACE_S * 1e9))
    marks = _Marks()
    for push in pushes:
        for chunk_id in work.named_chunks(store, push, deadline_s=_deadline(LISTING_S)):
            marks.add(chunk_id)
    named_by_pushes = {text for push in pushes for text in push.manifests}
    reached = reach(store, history_count=history_count, removed_before_ns=old_ns)
    found.damaged = [what for _, what in reached.faults]
    unknown = {key.split("/")[1] for key, _ in reached.faults}
    found.moves = reached.trimmed
    there: set[Revision] = set()
    for revision, stored in manifests(store):
        there.add(revision)
        is_named = revision[0] in unknown or revision in reached.named or "/".join(revision) in named_by_pushes
        if not is_named and stored.modified_ns < old_manifests_ns:
            found.revisions.append(revision)
            continue
        manifest = read_manifest(store, revision)
        if manifest is None:
            continue  # gone meanwhile
        found.kept_revisions_count += 1
        for chunk in manifest.chunks:
            marks.add(chunk.id, chunk.stored_bytes)
        for chunk_id in manifest.requires:
            marks.add(chunk_id)
        told("manifests", found.kept_revisions_count)
    found.missing = [f"{shown(revision)} ({', '.join(names)})" for revision, names in reached.named.items()
                     if revision not in there]  # fmt: skip
    _sort_chunks(store, found, marks, old_ns, told)
    gone = set(found.revisions)
    for stored in store.list("signatures/", deadline_s=_deadline(LISTING_S)):
        parts = stored.key.split("/")
        if len(parts) == 4 and ((parts[1], parts[2]) in gone or _is_orphan(parts, there, stored, old_ns)):
            found.signatures.append(stored.key)
    found.records = [record.key for record in dead]
    return found


def _is_orphan(parts: Sequence[str], there: set[Revision], stored: Stored, old_ns: int) -> bool:
    """Whether a signature vouches for nothing."""
    return (parts[1], parts[2]) not in there and stored.modified_ns < old_ns


def _sort_chunks(store: Store, found: Collected, marks: _Marks, old_ns: int, told: Told) -> None:
    """Which chunks stay and which go."""
    unmarked: list[Stored] = []
    changed: list[str] = []
    for count, (chunk_id, stored) in enumerate(_chunks(store)):
        says = marks.says(chunk_id)
        if says is None:
            unmarked.append(stored)
        else:
            found.kept_chunks_count += 1
            found.kept_bytes += stored.size
            if says != stored.size:
                changed.append(chunk_id)
        if count % 1000 == 0:
            told("chunks", count)

    def mark_bases(chunk_id: str) -> None:
        for base in _bases(store, chunk_id):
            marks.add(base)

    for_each(changed, mark_bases, at_once=READS_PARALLEL)
    for stored in unmarked:
        if marks.says(stored.key.rpartition("/")[2]) is not None:
            found.kept_chunks_count += 1
            found.kept_bytes += stored.size
        elif stored.modified_ns < old_ns:
            found.chunks.append(stored)
        else:
            found.young_chunks_count += 1
            found.young_bytes += stored.size


def _chunks(store: Store) -> Iterator[tuple[str, Stored]]:
    for stored in store.list("chunks/", deadline_s=_deadline(LISTING_S)):
        parts = stored.key.split("/")
        if len(parts) == 3 and layout.is_id(parts[2]) and layout.chunk_key(parts[2]) == stored.key:
            yield parts[2], stored


def _bases(store: Store, chunk_id: str) -> Iterator[str]:
    """What a chunk stands on, by its own table and by theirs. One that cannot be read stands on nothing we know."""

    def look(wanted_id: str) -> tuple[str, str | None]:
        table = read_table(store, wanted_id)
        return wanted_id, table.base if table else None

    with suppress(NotFoundError, IntegrityError):
        yield from walk(chunk_id, look)


def _keys(found: Collected) -> Iterable[str]:
    """In the order in which they go."""
    yield from found.moves
    for revision in found.revisions:
        yield layout.manifest_key(*revision)
    yield from found.signatures
    yield from (stored.key for stored in found.chunks)
    yield from found.records


def _deadline(timeout_s: float) -> float:
    return time.monotonic() + timeout_s
