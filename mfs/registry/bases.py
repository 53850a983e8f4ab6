"""What a chunk may be stored as a difference to: the chunk of another revision that holds the same tensors.

Which revision: the one that the author names, or the one found by itself: among the model's own tags and some of the
registry's, that which has most of the tensors by name, dtype and shape, if samples of them show that differences help.
"""

from __future__ import annotations

import heapq
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise, takewhile
from typing import NamedTuple

from mfs.errors import IntegrityError, MfsError, NotFoundError, UsageError
from mfs.registry import layout
from mfs.registry.chunk import DEPTH_MAX, FRAME_BYTES, frames_count
from mfs.registry.chunk_io import IO_S, read_chunk, read_frame
from mfs.registry.encode import Base, Effort, encode_chunk
from mfs.registry.manifest import Chunk, Manifest, Tensor, parse_manifest
from mfs.registry.store import Store
from mfs.registry.tags import Tags, current

log = logging.getLogger(__name__)

MODELS_MAX = 16
"""Other models of the registry that are looked at, those of similar names first."""
NAMES_MAX = 10_000
"""Names of models that are compared: ten requests."""
TAGS_MAX = 8
"""Revisions that are looked at of the model itself, the last moved first; of another model 2."""
SAMPLES_COUNT = 8
"""Frames by which a revision is judged."""
SHARED_MIN = 0.25
"""What a base must have of the bytes that are to be sent, by name and shape of their tensors."""
HELP_MAX = 0.9
"""What samples may come to, as differences, of what they are alone: so that reading twice is worth it."""

_WORD = re.compile(r"[a-z]+|\d+")

Key = tuple[object, int, int]


class Revision(NamedTuple):
    """A revision of some model."""

    model: str
    manifest_id: str
    manifest: Manifest


def chunk_keys(path: str, tensors: Iterable[Tensor], spans: Iterable[tuple[int, int]]) -> Iterator[Key]:
    """For each chunk of a file what it holds by name: (names, dtypes and shapes of its tensors, offset, bytes).

    spans: in order. What holds no tensor is called by its file and place.
    """
    ordered = sorted((t for t in tensors if t.stop > t.start), key=lambda t: t.start)
    first = 0
    for start, stop in spans:
        while first < len(ordered) and ordered[first].stop <= start:
            first += 1
        last = first
        while last < len(ordered) and ordered[last].start < stop:
            last += 1
        if first == last or ordered[first].start > start:
            yield path, start, stop - start
        else:
            inside = tuple((t.name, t.dtype, t.shape) for t in ordered[first:last])
            yield inside, start - ordered[first].start, stop - start


class Candidate:
    """A revision as a base."""

    def __init__(self, store: Store, revision: Revision) -> None:
        self.revision = revision
        self._store = store
        manifest = revision.manifest
        self._chunks: dict[Key, Chunk] = {}
        for file in manifest.files:
            starts = manifest.starts(file)
            spans = pairwise(starts)
            for key, index in zip(chunk_keys(file.path, file.tensors, spans), file.chunks, strict=True):
                self._chunks.setdefault(key, manifest.chunks[index])

    def find(self, key: Key) -> Chunk | None:
        return self._chunks.get(key)

    def read(self, key: Key) -> Base | None:
        """The chunk of this key, to be stored a difference to; None if there is none, or it cannot be read."""
        chunk = self.find(key)
        if chunk is None:
            return None
        try:
            plain = read_chunk(self._store, chunk.id, chunk.plain_bytes)
            while len(plain.bases) >= DEPTH_MAX:
                plain = read_chunk(self._store, plain.bases[0], chunk.plain_bytes)
        except (IntegrityError, NotFoundError) as error:  # the registry is damaged there; the chunk is stored alone
            log.warning("%s", error)
            return None
        return Base(plain.table.id, len(plain.bases), plain.data, plain.bases)


class Wanted(NamedTuple):
    """A chunk that is to be stored."""

    key: Key
    nbytes: int
    element_bytes: int
    read: Callable[[int, int], memoryview]
    """Its plain bytes [start, stop)."""


def find_base(store: Store, revisions: Iterable[Revision], wanted: Sequence[Wanted]) -> Candidate | None:
    """The revision that helps most to store what is wanted, None if none does.

    A revision that is named later is taken only if it does better. Reads SAMPLES_COUNT frames of those that have
    SHARED_MIN of the bytes, and of `wanted`. What cannot be read of a revision counts against it.
    """
    total = sum(chunk.nbytes for chunk in wanted)
    best, best_share = None, HELP_MAX
    for revision in revisions:
        candidate = Candidate(store, revision)
        shared = [chunk for chunk in wanted if candidate.find(chunk.key)]
        if sum(chunk.nbytes for chunk in shared) < SHARED_MIN * total or not total:
            continue
        try:
            share = _sampled(store, candidate, shared)
        except MfsError as error:
            log.warning("%s: not used as a base: %s", revision.model, error)
            continue
        if share < best_share:
            best, best_share = candidate, share
    return best


def _sampled(store: Store, candidate: Candidate, shared: Sequence[Wanted]) -> float:
    """What samples come to as differences, of what they are alone. Raises: MfsError."""
    largest = sorted(shared, key=lambda chunk: -chunk.nbytes)
    large = [chunk for chunk in largest if 2 * chunk.nbytes >= largest[0].nbytes]
    step = max(1, len(large) // SAMPLES_COUNT)
    alone = differing = 0
    for number, wanted in enumerate(large[::step][:SAMPLES_COUNT]):
        chunk = candidate.find(wanted.key)
        assert chunk is not None
        index = (number * frames_count(wanted.nbytes)) // SAMPLES_COUNT  # not always the first: rows may differ
        start = index * FRAME_BYTES
        plain = wanted.read(start, min(start + FRAME_BYTES, wanted.nbytes))
        base = Base(chunk.id, 0, read_frame(store, chunk.id, chunk.plain_bytes, index))
        encoded = encode_chunk(plain, wanted.element_bytes, Effort.FAST, base)
        alone += encoded.alone_bytes
        differing += len(encoded.body)
    return differing / alone


def candidates(store: Store, model: str, known: Sequence[Revision]) -> Iterator[Revision]:
    """Revisions that may be a base: the model's own, which the caller knows, and some of other models of the registry.

    What cannot be read is left out.
    """
    yield from known
    try:
        deadline_s = time.monotonic() + IO_S
        names = islice(store.names("tags/", deadline_s=deadline_s), NAMES_MAX)
        tags = Tags(store)
        for other in heapq.nlargest(MODELS_MAX, (n for n in names if n != model), key=lambda n: _likeness(model, n)):
            yield from revisions_of(store, tags, other, count_max=2)
    except MfsError as error:  # who may write a model need not be let see others
        log.warning("no base is looked for among other models: %s", error)


def _likeness(model: str, other: str) -> tuple[int, int]:
    """How alike two names are: by their words, then by how they begin."""
    model, other = model.lower(), other.lower()
    shared = set(_WORD.findall(model)) & set(_WORD.findall(other))
    begin = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(model, other, strict=False)))
    return sum(map(len, shared)), begin


def revisions_of(store: Store, tags: Tags, model: str, *, count_max: int = TAGS_MAX) -> Iterator[Revision]:
    """What the model's tags mean, the last moved first, each once. What cannot be read is left out, and said."""
    moves = tags.read(model, deadline_s=time.monotonic() + IO_S).values()
    ids = dict.fromkeys(
        move.manifest for move in sorted(moves, key=lambda move: move.at, reverse=True) if move.manifest
    )
    for manifest_id in list(ids)[:count_max]:
        try:
            yield read_revision(store, model, manifest_id)
        except MfsError as error:
            log.warning("%s@sha256:%s: left out: %s", model, manifest_id[:12], error)


def read_revision(store: Store, model: str, manifest_id: str) -> Revision:
    """Raises: NotFoundError, IntegrityError, AccessError, StoreError."""
    body = store.read(layout.manifest_key(model, manifest_id), deadline_s=time.monotonic() + IO_S)
    return Revision(model, manifest_id, parse_manifest(body, manifest_id))


def named_base(store: Store, text: str) -> Revision:
    """The revision that the author names: 'llama:v3' or 'llama@sha256:…', of the same registry.

    Raises: UsageError, NotFoundError, IntegrityError, AccessError, StoreError.
    """
    model, at, digest = text.partition("@sha256:")
    tag = ""
    if not at:
        model, _, tag = text.partition(":")
    if not layout.is_name(model) or not (layout.is_id(digest) if at else layout.is_name(tag)):
        raise UsageError(f"--base {text!r:.200}: expected MODEL:TAG or MODEL@sha256:DIGEST of the same registry")
    if tag:
        found = current(store, model, tag, deadline_s=time.monotonic() + IO_S)
        if found is None or found.manifest is None:
            raise NotFoundError(f"--base {text}: no such tag in {store.identity}")
        digest = found.manifest
    return read_revision(store, model, digest)
