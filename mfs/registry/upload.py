"""Bringing the chunks that a registry lacks into it: read again, verified, encoded, stored; several at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from mfs.errors import ChangedError
from mfs.registry import layout
from mfs.registry.bases import Candidate, Key
from mfs.registry.chunk_io import IO_S
from mfs.registry.cutting import Span
from mfs.registry.encode import Base, Effort, Encoded, encode_chunk
from mfs.registry.hashing import read_span
from mfs.registry.parallel import for_each
from mfs.registry.presence import Presence, Present
from mfs.registry.store import Store
from mfs.sources import Source
from mfs.types import ObjectId

AT_ONCE = 8
"""Chunks under way. Each holds five times 8 MiB at most: plain, encoded alone and as a difference, the base twice."""
UPLINK_MIN = 128 << 10
"""Bytes a second at least of the way out, which all under way share: the slower need more time than a request has."""


class Missing(NamedTuple):
    """A chunk to be stored, and where its bytes are."""

    id: str
    obj: ObjectId
    span: Span
    key: Key
    """What it holds by name, see `bases`."""


@dataclass
class Sent:
    """What was stored."""

    chunks_count: int = 0
    plain_bytes: int = 0
    stored_bytes: int = 0
    alone_bytes: int = 0
    """As they would be without differences."""
    differences_count: int = 0
    found: dict[str, Present] = field(default_factory=dict)
    """Every chunk asked for, as it stands in the registry now."""

    def plus(self, other: Sent) -> Sent:
        """Both together."""
        return Sent(
            self.chunks_count + other.chunks_count,
            self.plain_bytes + other.plain_bytes,
            self.stored_bytes + other.stored_bytes,
            self.alone_bytes + other.alone_bytes,
            self.differences_count + other.differences_count,
            self.found | other.found,
        )


class Uploader:
    """Stores chunks of files of one source."""

    def __init__(self, store: Store, source: Source, effort: Effort) -> None:
        self._store, self._source, self._effort = store, source, effort
        self._lock = threading.Lock()

    def bring(
        self,
        missing: Sequence[Missing],
        presence: Presence,
        base: Candidate | None,
        alone: Set[str],
        advance: Callable[[ObjectId, int], object],
    ) -> Sent:
        """Store every chunk of `missing`. What is under way when one fails is finished; the rest is not begun.

        presence: by which it is missing. base: what chunks may be differences to. alone: ids of those that may not.
        advance: told each chunk's file and plain bytes, from several threads.
        Raises: ChangedError if a file no longer holds what was hashed; AccessError, StoreError.
        """
        sent = Sent()

        def one(chunk: Missing) -> None:
            is_alone = chunk.id in alone or presence.is_damaged(chunk.id)
            of_base = None if base is None or is_alone else base.read(chunk.key)
            encoded = self._encoded(chunk, of_base)
            ours = Present(len(encoded.body), (of_base.id, *of_base.bases) if of_base and encoded.table.depth else ())
            found = self._put(chunk, encoded, ours, presence)
            with self._lock:
                sent.found[chunk.id] = found
                if found is ours:
                    sent.chunks_count += 1
                    sent.plain_bytes += chunk.span.nbytes
                    sent.stored_bytes += len(encoded.body)
                    sent.alone_bytes += encoded.alone_bytes
                    sent.differences_count += bool(encoded.table.depth)
            advance(chunk.obj, chunk.span.nbytes)

        for_each(missing, one, at_once=AT_ONCE)
        return sent

    def _encoded(self, chunk: Missing, base: Base | None) -> Encoded:
        span, buffer = chunk.span, memoryview(bytearray(chunk.span.nbytes))
        plain = read_span(self._source, chunk.obj, span.start, span.stop, buffer)
        encoded = encode_chunk(plain, span.element_bytes, self._effort, base)
        if encoded.table.id != chunk.id:
            raise ChangedError(
                f"{chunk.obj.source}/{chunk.obj.path}: its bytes {span.start} to {span.stop} are others than when it "
                "was hashed; push again once nobody writes there"
            )
        return encoded

    def _put(self, chunk: Missing, encoded: Encoded, ours: Present, presence: Presence) -> Present:
        """The chunk as it stands now: `ours`, or another's."""
        key = layout.chunk_key(chunk.id)
        if not presence.is_damaged(chunk.id):
            if self._store.create(key, encoded.body, deadline_s=_deadline(encoded)):
                return ours
            presence.forget(chunk.id)  # another push was quicker: what counts is how that one stored it
            if found := presence.look(chunk.id, chunk.span.nbytes):
                return found
        self._store.write(key, encoded.body, deadline_s=_deadline(encoded))
        return ours


def _deadline(encoded: Encoded) -> float:
    return time.monotonic() + IO_S + AT_ONCE * len(encoded.body) / UPLINK_MIN
