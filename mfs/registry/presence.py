"""Which chunks a registry has, and what each of them stands on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from mfs.errors import IntegrityError, NotFoundError
from mfs.registry.chunk import Table, walk
from mfs.registry.chunk_io import read_table
from mfs.registry.store import Store

log = logging.getLogger(__name__)


class Present(NamedTuple):
    """A chunk that can be read."""

    stored_bytes: int
    bases: tuple[str, ...]
    """Ids of all chunks that it is a difference to, over all steps."""


class _Step(NamedTuple):
    """What is kept of a chunk's table."""

    id: str
    stored_bytes: int
    base: str | None


class Presence:
    """Asks a store, once for each chunk. May be used by several threads.

    Every chunk is asked for, also those that some manifest names: a push is what mends a registry that lost some.
    Its table is read, and those of what it stands on; its frames are not: that is `fsck --data`.
    """

    def __init__(self, store: Store, stated: Mapping[str, int] = MappingProxyType({})) -> None:
        """stated: bytes of chunks' objects as manifests have them, or whoever stored them; where one is right, that
        chunk is one request instead of two.
        """
        self._store = store
        self._stated = stated
        self._found: dict[str, Present | None] = {}
        self._steps: dict[str, _Step | None] = {}
        self._damaged: set[str] = set()
        self._lock = threading.Lock()

    def look(self, chunk_id: str, plain_bytes: int) -> Present | None:
        """A chunk as it stands in the store; None if it is not there or is damaged. Raises: AccessError, StoreError."""
        with self._lock:
            if chunk_id in self._found:
                return self._found[chunk_id]
        try:
            found = self._look(chunk_id, plain_bytes)
        except IntegrityError as error:
            log.warning("%s: stored again", error)
            found = None
            with self._lock:
                self._damaged.add(chunk_id)
        with self._lock:
            self._found[chunk_id] = found
        return found

    def is_damaged(self, chunk_id: str) -> bool:
        """Whether something stands in this chunk's place that is not it: to be replaced, not created."""
        with self._lock:
            return chunk_id in self._damaged

    def forget(self, chunk_id: str) -> None:
        """Ask anew for a chunk: somebody has stored it since."""
        with self._lock:
            self._found.pop(chunk_id, None)
            self._steps.clear()  # they may have stored what it stands on as well

    def _look(self, chunk_id: str, plain_bytes: int) -> Present | None:
        def look(wanted_id: str) -> tuple[_Step | None, str | None]:
            step = self._step(wanted_id, plain_bytes)
            return step, step.base if step else None

        first, *below = walk(chunk_id, look)
        if first is None:
            return None
        bases = tuple(step.id for step in below if step)
        if len(bases) < len(below):
            raise IntegrityError(f"chunk {chunk_id[:12]}: what it is a difference to is not there")
        return Present(first.stored_bytes, bases)

    def _step(self, chunk_id: str, plain_bytes: int) -> _Step | None:
        with self._lock:
            if chunk_id in self._steps:
                return self._steps[chunk_id]
        stated = self._stated.get(chunk_id)
        try:
            table = self._read(chunk_id, plain_bytes, stated)
        except IntegrityError:
            if stated is None:
                raise
            table = self._read(chunk_id, plain_bytes, None)  # it may have been stored anew since, otherwise
        step = _Step(chunk_id, table.stored_bytes, table.base) if table else None
        with self._lock:
            self._steps[chunk_id] = step
        return step

    def _read(self, chunk_id: str, plain_bytes: int, stated: int | None) -> Table | None:
        try:
            return read_table(self._store, chunk_id, plain_bytes, stated)
        except NotFoundError:  # collected since it was asked for
            return None
