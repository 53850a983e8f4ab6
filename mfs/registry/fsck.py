"""Looking a registry through: every missing or damaged object is named, with the revisions and files that need it.

    quick     every entry of tags, every manifest, that each chunk is there and as long as its table says
    data      each chunk read, decoded and verified, with what it stands on
    drop      delete chunks that are proven damaged, so that the next push, which reads no frames, stores them anew

Only `drop` changes something, and needs a right to. Beside pushes and collections: what looks damaged is forgotten if
no manifest that is there at the end needs it any more.
Memory: some 200 bytes a chunk, one manifest, and READS_PARALLEL chunks with what they stand on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from mfs.errors import IntegrityError, NotFoundError
from mfs.registry import layout, work
from mfs.registry.chunk import Table, walk
from mfs.registry.chunk_io import read_chunk, read_table
from mfs.registry.gc import sweep
from mfs.registry.manifest import Manifest
from mfs.registry.parallel import for_each
from mfs.registry.reach import LISTING_S, Reached, Revision, manifests, reach, read_manifest, shown
from mfs.registry.store import Store

READS_PARALLEL = 4
FILES_MAX = 1000
"""Files named for one damage; the rest is counted."""

Told = Callable[[str, int, int], object]
"""(what is looked at: 'manifests', 'chunks', 'bytes'; how many so far; of how many, 0 where that is not known)."""


@dataclass
class Damage:
    """One object that is missing or damaged."""

    key: str
    what: str
    """'missing', or what is wrong with it."""
    revisions: list[str] = field(default_factory=list)
    """What needs it: 'llama@sha256:0123456789ab (llama:v7, llama:prod)'."""
    files: list[str] = field(default_factory=list)
    """'llama@sha256:0123456789ab/model.safetensors'; FILES_MAX of them at most."""
    more_files_count: int = 0


@dataclass
class Checked:
    """What was looked at, and what is wrong."""

    damages: list[Damage] = field(default_factory=list)
    revisions_count: int = 0
    chunks_count: int = 0
    """Chunks that revisions need."""
    stored_bytes: int = 0
    """Of those."""
    unneeded_count: int = 0
    """Chunks that no revision needs; 'mfs gc' deletes them."""
    unneeded_bytes: int = 0


class _Seen(NamedTuple):
    """What a manifest says of a chunk."""

    plain_bytes: int = 0
    """0 where no manifest says it: those that have it in `requires` only."""
    stored_bytes: int = -1


def check(store: Store, *, data: bool = False, told: Told = lambda what, count, total: None) -> Checked:
    """Look at everything. data: read and verify every chunk as well. Raises: AccessError, StoreError."""
    checked = Checked()
    reached = reach(store)
    damages = {key: Damage(key, what) for key, what in reached.faults}
    there = [revision for revision, _ in manifests(store)]
    for revision in reached.named.keys() - set(there):
        key = layout.manifest_key(*revision)
        if read_or_none(store, revision) is None:  # not one that was pushed since
            damages[key] = Damage(key, "missing", [_name(revision, reached)])
    sizes = _sizes(store)
    wanted: dict[bytes, _Seen] = {}
    for count, (revision, manifest) in enumerate(_each(store, there)):
        if isinstance(manifest, IntegrityError):
            key = layout.manifest_key(*revision)
            damages[key] = Damage(key, str(manifest), [_name(revision, reached)])
            continue
        checked.revisions_count += 1
        for chunk in manifest.chunks:
            digest = bytes.fromhex(chunk.id)
            if not wanted.get(digest, _Seen()).plain_bytes:
                wanted[digest] = _Seen(chunk.plain_bytes, chunk.stored_bytes)
        for chunk_id in manifest.requires:
            wanted.setdefault(bytes.fromhex(chunk_id), _Seen())
        told("manifests", count + 1, len(there))
    checked.chunks_count = len(wanted)
    checked.stored_bytes = sum(sizes.get(key, 0) for key in wanted)
    checked.unneeded_count = sum(key not in wanted for key in sizes)
    checked.unneeded_bytes = sum(size for key, size in sizes.items() if key not in wanted)
    bad = _bad_chunks(store, wanted, sizes, data, told)
    if bad:
        _blame(store, there, reached, bad, damages)
    checked.damages = sorted(damages.values(), key=lambda damage: damage.key)
    return checked


def _each(store: Store, there: list[Revision]) -> Iterator[tuple[Revision, Manifest | IntegrityError]]:
    """Manifests one by one, or what is wrong with them. One that is gone meanwhile is passed over."""
    for revision in there:
        found = read_or_none(store, revision)
        if found is not None:
            yield revision, found


def read_or_none(store: Store, revision: Revision) -> Manifest | IntegrityError | None:
    """A manifest, what is wrong with it, or None where there is none."""
    try:
        return read_manifest(store, revision)
    except IntegrityError as e:
        return e


def _sizes(store: Store) -> dict[bytes, int]:
    """Every chunk that is there, and its bytes."""
    found: dict[bytes, int] = {}
    for stored in store.list("chunks/", deadline_s=time.monotonic() + LISTING_S):
        name = stored.key.rpartition("/")[2]
        if layout.is_id(name) and layout.chunk_key(name) == stored.key:
            found[bytes.fromhex(name)] = stored.size
    return found


def _bad_chunks(
    store: Store, wanted: dict[bytes, _Seen], sizes: dict[bytes, int], data: bool, told: Told
) -> dict[str, str]:
    """What is wrong with which chunk."""
    bad: dict[str, str] = {}
    done = [0, 0]
    total = sum(seen.plain_bytes for seen in wanted.values())

    def one(key: bytes) -> None:
        chunk_id, seen = key.hex(), wanted[key]
        try:
            if key not in sizes and store.size(layout.chunk_key(chunk_id), deadline_s=time.monotonic() + 60) is None:
                bad[chunk_id] = "missing"
            elif data:
                _read_whole(store, chunk_id, seen.plain_bytes)
            elif sizes.get(key) != seen.stored_bytes and not _has_tables(store, chunk_id, seen.plain_bytes):
                bad[chunk_id] = "missing"
        except (IntegrityError, NotFoundError) as e:
            bad[chunk_id] = str(e)
        done[0] += 1
        done[1] += seen.plain_bytes
        if data:
            told("bytes", done[1], total)
        else:
            told("chunks", done[0], len(wanted))

    for_each(list(wanted), one, at_once=READS_PARALLEL)
    return bad


def _read_whole(store: Store, chunk_id: str, plain_bytes: int = 0) -> None:
    """Read a chunk, decode and verify it. plain_bytes: 0 for as many as it says. Raises: as `read_chunk`."""
    if not plain_bytes:
        table = read_table(store, chunk_id)
        if table is None:
            raise NotFoundError("missing")
        plain_bytes = table.plain_bytes
    read_chunk(store, chunk_id, plain_bytes)


def _has_tables(store: Store, chunk_id: str, plain_bytes: int) -> bool:
    """Whether a chunk is there; read without its frames. Raises: IntegrityError; NotFoundError for one below it."""

    def look(wanted_id: str) -> tuple[Table | None, str | None]:
        table = read_table(store, wanted_id, plain_bytes or None)
        if table is None and wanted_id != chunk_id:
            raise NotFoundError(f"stands on chunk {wanted_id[:12]}, which is not in the registry")
        return table, table.base if table else None

    return None not in walk(chunk_id, look)


def drop(store: Store, checked: Checked) -> list[str]:
    """Delete the chunks that are damaged themselves, so that the next push stores them anew; their keys.

    Each is read again first, whole, under the record of a collection: so that nothing goes that a push has mended
    since, or that was only read wrongly. What live pushes name stays (`work`), and what is good but stands on damage.
    Raises: as `gc.collect`.
    """
    bad = {damage.key.rpartition("/")[2] for damage in checked.damages if damage.key.startswith("chunks/")}
    proven: list[str] = []

    def prove(chunk_id: str) -> None:
        def look(wanted_id: str) -> tuple[Table | None, str | None]:
            is_to_blame = wanted_id in bad and wanted_id != chunk_id
            table = None if is_to_blame else read_table(store, wanted_id)
            return table, table.base if table else None

        try:
            tables = list(walk(chunk_id, look))
            if tables[0] and tables[-1]:  # else it is gone, or stands on what is: a push sees that
                read_chunk(store, chunk_id, tables[0].plain_bytes)
        except NotFoundError:
            pass
        except IntegrityError:
            proven.append(layout.chunk_key(chunk_id))

    with work.collecting(store, deadline_s=time.monotonic() + LISTING_S) as lease:
        lapses_count = lease.lapses_count
        deadline_s = time.monotonic() + LISTING_S
        pushes = lease.look(deadline_s=deadline_s).pushes
        named = {name for push in pushes for name in work.named_chunks(store, push, deadline_s=deadline_s)}
        for_each(sorted(bad - named), prove, at_once=READS_PARALLEL)
        sweep(store, lease, lapses_count, sorted(proven), lambda what, count: None)
    return sorted(proven)


def _blame(
    store: Store, there: list[Revision], reached: Reached, bad: dict[str, str], damages: dict[str, Damage]
) -> None:
    """Name which revisions and files need what is bad."""
    for revision, manifest in _each(store, there):
        if isinstance(manifest, IntegrityError):
            continue
        broken = {index: {chunk.id} for index, chunk in enumerate(manifest.chunks) if chunk.id in bad}
        stands_on = [chunk_id for chunk_id in manifest.requires if chunk_id in bad]
        if stands_on:
            for index, chunk_id in _standing_on(store, manifest, set(stands_on)).items():
                broken.setdefault(index, set()).add(chunk_id)
        for chunk_id in set(stands_on).union(*broken.values()):
            damage = damages.setdefault(layout.chunk_key(chunk_id), Damage(layout.chunk_key(chunk_id), bad[chunk_id]))
            damage.revisions.append(_name(revision, reached))
        for file in manifest.files:
            for chunk_id in set[str]().union(*(broken[index] for index in file.chunks if index in broken)):
                damage = damages[layout.chunk_key(chunk_id)]
                if len(damage.files) < FILES_MAX:
                    damage.files.append(f"{shown(revision)}/{file.path}")
                else:
                    damage.more_files_count += 1


def _standing_on(store: Store, manifest: Manifest, bad: set[str]) -> dict[int, str]:
    """Index of each chunk that is a difference to a bad one, over all steps: which one."""
    found: dict[int, str] = {}

    def one(item: tuple[int, str, int]) -> None:
        index, chunk_id, plain_bytes = item

        def look(wanted_id: str) -> tuple[str, str | None]:
            table = None if wanted_id in bad and wanted_id != chunk_id else read_table(store, wanted_id, plain_bytes)
            return wanted_id, table.base if table else None

        with suppress(IntegrityError):
            _, *below = walk(chunk_id, look)
            if below and below[-1] in bad:
                found[index] = below[-1]

    for_each(((i, chunk.id, chunk.plain_bytes) for i, chunk in enumerate(manifest.chunks)), one, at_once=16)
    return found


def _name(revision: Revision, reached: Reached) -> str:
    names = reached.named.get(revision)
    return f"{shown(revision)} ({', '.join(names)})" if names else shown(revision)
