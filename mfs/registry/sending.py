"""The chunks of one push, from question to manifest: which the registry has, and what the others are stored as."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from mfs.registry.bases import Candidate, Revision, Wanted, candidates, find_base
from mfs.registry.chunk_io import IO_S
from mfs.registry.encode import Effort
from mfs.registry.hashing import Hashed, read_span
from mfs.registry.manifest import Chunk, File, Manifest
from mfs.registry.parallel import for_each
from mfs.registry.presence import Presence, Present
from mfs.registry.store import Store
from mfs.registry.upload import Missing, Sent, Uploader
from mfs.registry.work import Lease, utc
from mfs.sources import Source
from mfs.types import ObjectId

ASKED_AT_ONCE = 32
"""Questions whether a chunk is there. They are small, so only the way there and back counts."""
BASE_WANTED_BYTES = 1 << 20
"""Where less is to be sent no base is looked for: that would cost more than it saves."""

Advance = Callable[..., object]
"""(phase, path, done, total, of_file), see `push.Step`."""


class Sending:
    """In this order: `ask`, `choose_base`, `send`, `check` (as often as need be), `manifest`."""

    def __init__(
        self, store: Store, source: Source, chunks: Mapping[str, Missing], effort: Effort, advance: Advance
    ) -> None:
        """chunks: every chunk of the revision once, by its id."""
        self.chunks = chunks
        self.base: Candidate | None = None
        """What chunks may be stored as differences to."""
        self.sent = Sent()
        """All of it, also what was sent again."""
        self._store, self._source, self._advance = store, source, advance
        self._uploader = Uploader(store, source, effort)
        self._stated: dict[str, int] = {}
        """Bytes of objects, by manifests that are known, and of what was stored."""
        self._relied_on: set[str] = set()
        """What manifests that are known need, as it was stored. Whoever finds one of these missing stores it alone:
        a difference would put more below what already stands on it, which may then be more than can be read."""
        self._named: set[str] = set()
        self._presence = Presence(store)
        self._present: dict[str, Present] = {}

    def ask(self, known: Sequence[Manifest]) -> None:
        """See which chunks are there. known: manifests that name some of them."""
        for manifest in known:
            self._know(manifest)
        self._look()

    def choose_base(self, model: str, known: Sequence[Revision], named: Revision | None, lease: Lease) -> None:
        """Settle what missing chunks may be differences to: `named`, or else what is found and helps."""
        missing = self._missing()
        nbytes = sum(chunk.span.nbytes for chunk in missing)
        if named is None and nbytes < BASE_WANTED_BYTES:
            return
        if named is not None:
            self.base = Candidate(self._store, named)
        else:
            found = map(self._known, candidates(self._store, model, known))
            self.base = find_base(self._store, found, [*map(self._wanted, missing)])
        if self.base:
            self._know(self.base.revision.manifest)
            lease.name(self.base.revision.manifest.chunk_ids(), deadline_s=time.monotonic() + IO_S)

    def send(self) -> None:
        """Store what is missing. Raises: ChangedError if a file is not what was hashed; AccessError, StoreError."""
        missing = self._missing()
        total = sum(chunk.span.nbytes for chunk in missing)
        if missing:
            self._advance("sending", "", 0, total)
            of_file: Counter[str] = Counter()
            for chunk in missing:
                of_file[chunk.obj.path] += chunk.span.nbytes

            def advance(obj: ObjectId, count: int) -> None:
                self._advance("sending", obj.path, count, total, of_file[obj.path])

            sent = self._uploader.bring(missing, self._presence, self.base, self._relied_on, advance)
            self._present |= sent.found
            self._stated |= {chunk_id: found.stored_bytes for chunk_id, found in sent.found.items()}
            self.sent = self.sent.plus(sent)

    def check(self, lease: Lease) -> None:
        """See once more whether all is there, and send what is not."""
        while True:
            self._look()
            self.send()
            if not self.name_bases(lease):
                return

    def name_bases(self, lease: Lease) -> bool:
        """Say what chunks of the revision stand on, beside its own; whether there was something to say."""
        new = self._bases() - self._named
        lease.name(new, deadline_s=time.monotonic() + IO_S)
        self._named |= new
        return bool(new)

    def _bases(self) -> set[str]:
        return {base for found in self._present.values() for base in found.bases} - self.chunks.keys()

    def manifest(self, files: Iterable[Hashed], annotations: Mapping[str, str]) -> Manifest:
        """What the revision is, now that all of it is there."""
        index = {chunk_id: number for number, chunk_id in enumerate(self.chunks)}
        used = self.base.revision.manifest_id if self.base and self.sent.differences_count else None
        return Manifest(
            utc(),
            tuple(Chunk(c.id, c.span.nbytes, self._present[c.id].stored_bytes) for c in self.chunks.values()),
            tuple(
                File(file.obj.path, file.obj.size, file.sha256, tuple(index[i] for i in file.chunk_ids), file.tensors)
                for file in files
            ),
            base=used,
            requires=tuple(sorted(self._bases())),
            annotations=dict(annotations),
        )

    def _know(self, manifest: Manifest) -> None:
        self._stated |= {chunk.id: chunk.stored_bytes for chunk in manifest.chunks}
        self._relied_on.update(manifest.chunk_ids())

    def _known(self, revision: Revision) -> Revision:
        self._know(revision.manifest)
        return revision

    def _look(self) -> None:
        presence, present = Presence(self._store, self._stated), dict[str, Present]()
        self._advance("asking", "", 0, len(self.chunks))

        def one(chunk: Missing) -> None:
            if found := presence.look(chunk.id, chunk.span.nbytes):
                present[chunk.id] = found
            self._advance("asking", chunk.obj.path, 1, len(self.chunks))

        for_each(self.chunks.values(), one, at_once=ASKED_AT_ONCE)
        self._presence, self._present = presence, present

    def _missing(self) -> list[Missing]:
        return [chunk for chunk in self.chunks.values() if chunk.id not in self._present]

    def _wanted(self, chunk: Missing) -> Wanted:
        span = chunk.span

        def read(start: int, stop: int) -> memoryview:
            out = memoryview(bytearray(stop - start))
            return read_span(self._source, chunk.obj, span.start + start, span.start + stop, out)

        return Wanted(chunk.key, span.nbytes, span.element_bytes, read)


def says_the_same(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests are of one revision: the same files, chunks and annotations, and all that `one` needs."""

    def contents(manifest: Manifest) -> object:
        ids = [chunk.id for chunk in manifest.chunks]
        files = [(f.path, f.size, f.sha256, [ids[i] for i in f.chunks], f.tensors) for f in manifest.files]
        return files, dict(manifest.annotations)

    return contents(one) == contents(other) and set(one.requires) <= set(other.chunk_ids())
