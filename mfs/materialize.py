"""Files that are whole as long as they are open: what a mapping of them needs stands here before `open` returns.

For servers that map weights and must not meet SIGBUS later, when the origin is gone: a fault on a page that cannot be
fetched kills the process. So `open` brings the whole file, or fails; until the last handle is released, which for a
mapping is after the last unmap, nothing of it is evicted.

Where it is kept: in the SSD tier, marked there so that no mount that shares the directory evicts it; the mark lapses by
itself, should we die. Without an SSD tier in RAM slots, each held by a lease. What does not fit is refused at once.
"""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from mfs.cache.chunk_cache import ChunkCache
from mfs.cache.chunk_state import Chunk, ObjectState
from mfs.cache.chunks import full_mask
from mfs.errors import MfsError, RoomError, StoreError
from mfs.several import for_each
from mfs.types import CHUNK_BYTES
from mfs.units import exact_size
from mfs.whole import WholeFiles
from mfs.workers.job import Priority
from mfs.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_RATE_MIN = 8 << 20  # bytes a second that any origin must give, on top of the time-out
_MARK_S = 120.0  # that a mark outlives its daemon
_RENEW_S = 10.0
_PARALLEL = 8
_SHARE = 0.9  # of the SSD budget, and three quarters of the slots: readers of other files need some


@dataclass(frozen=True)
class KeeperConfig:
    """What is kept whole, and where."""

    patterns: tuple[str, ...]
    """See `matches`."""
    sources: tuple[str, ...]
    """The names of the sources, '' for one that is the root of the mount."""
    timeout_s: float
    """As for reads; a whole file has in addition what it takes at 8 MiB/s."""
    ssd_bytes: int | None
    """Budget of the SSD tier; None: there is none."""
    slots_count: int


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern names a file, or a directory it stands in. path: from the root of the mount, no leading '/'.

    '*', '?' and '[…]' stay within one name, '**' stands for any number of names. A pattern without '/' may match at any
    depth ('llama', '*.safetensors'), one with '/' is meant from the root of the mount ('prod/llama', '/llama').
    """
    parts = tuple(part for part in pattern.split("/") if part)
    return _matches(parts if "/" in pattern else ("**", *parts), tuple(path.split("/")))


def _matches(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(pattern[1:], parts[skip:]) for skip in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:])


@dataclass(eq=False)
class _Held:
    """One object that is open and kept whole."""

    users: int = 0
    ready: bool = False
    settled: trio.Event = field(default_factory=trio.Event)
    """Set when one attempt to bring it has ended."""
    error: MfsError | None = None
    chunks: list[Chunk] = field(default_factory=list)
    """Leased, where there is no SSD tier."""


class Keeper:
    """Keeps open files whole. Everything here belongs to the trio thread."""

    def __init__(self, config: KeeperConfig, cache: ChunkCache, pool: WorkerPool, whole_files: WholeFiles) -> None:
        self._config = config
        self._cache = cache
        self._pool = pool
        self._whole_files = whole_files
        self._held: dict[ObjectState, _Held] = {}
        self._inherited: list[ObjectState] = []

    def wants(self, source: int, path: str) -> bool:
        """Whether the file at a path of a source is to be kept whole."""
        name = self._config.sources[source]
        return any(matches(pattern, f"{name}/{path}" if name else path) for pattern in self._config.patterns)

    async def hold(self, state: ObjectState) -> None:
        """Have all of an object here, and keep it until `release`, which must come as often as this returned.

        Raises: RoomError if it does not fit; the origin's MfsError; StoreError when it takes too long. Nothing is held
            then. Cancellation: nothing is held; others that wait for the same object start over.
        """
        held = self._held.setdefault(state, _Held())
        held.users += 1
        try:
            while not held.ready:
                if held.settled.is_set():
                    held.settled, held.error = trio.Event(), None
                    await self._bring(state, held)
                elif held.users == 1:
                    await self._bring(state, held)
                else:
                    await held.settled.wait()
                    if held.error is not None:
                        raise held.error
        except BaseException:
            self.release(state)
            raise

    def release(self, state: ObjectState) -> None:
        """One handle less needs it."""
        held = self._held[state]
        held.users -= 1
        if not held.users:
            del self._held[state]
            for chunk in held.chunks:
                self._cache.release(chunk)

    def inherit(self, state: ObjectState) -> None:
        """A handle that another daemon has opened: what it kept is kept on, brought again where it is missing."""
        held = self._held.setdefault(state, _Held())
        held.users += 1
        if held.users == 1:
            self._inherited.append(state)

    async def run(self) -> None:
        """Bring again what is inherited and renew the marks, until cancelled."""
        async with trio.open_nursery() as nursery:
            for state in self._inherited:
                nursery.start_soon(self._bring_again, state)
            self._inherited.clear()
            await self._renew()

    async def _bring_again(self, state: ObjectState) -> None:
        held = self._held.get(state)
        if held is not None:
            try:
                await self._bring(state, held)
            except MfsError as error:
                logger.warning("%s is open and not kept whole any more: %s", state.object, error)

    async def _renew(self) -> None:
        while True:
            await trio.sleep(_RENEW_S)
            if self._held and self._config.ssd_bytes is not None:
                try:
                    await self._mark(list(self._held))
                except MfsError as error:
                    logger.warning("files kept whole: %s", error)

    # -- bringing

    async def _bring(self, state: ObjectState, held: _Held) -> None:
        obj = state.object
        allowed_s = self._config.timeout_s + obj.size / _RATE_MIN
        since_s = time.monotonic()
        try:
            with trio.move_on_after(allowed_s) as scope:
                await (self._bring_to_ram(state, held) if self._config.ssd_bytes is None else self._bring_to_ssd(state))
            if scope.cancelled_caught:
                raise StoreError(f"{obj}: {obj.size} bytes were not all here within {allowed_s:.0f} s")
            held.ready = True
            if self._config.ssd_bytes is not None:
                await self._whole_files.seal(state)
            logger.info("%s is whole after %.1f s and kept while it is open", obj.path, time.monotonic() - since_s)
        except MfsError as error:
            held.error = error
            raise
        finally:
            held.settled.set()

    async def _bring_to_ssd(self, state: ObjectState) -> None:
        obj = state.object
        room = int(_SHARE * (self._config.ssd_bytes or 0))
        others = sum(other.object.size for other in self._held if other is not state)
        if others + obj.size > room:
            raise RoomError(
                f"{obj.path} cannot be kept whole: {obj.size} bytes beside {others} kept already are more than "
                f"{room}, {_SHARE:.0%} of the SSD tier; mount with a larger --cache-size"
            )
        await self._mark([state])
        missing = await self._lacking(state)
        await for_each(missing, lambda index: self._cache.bring(state, index, to_ssd=True), at_once=_PARALLEL)
        if missing and (still := await self._lacking(state)):
            raise RoomError(f"{obj.path} cannot be kept whole: {len(still)} chunks did not reach the cache's disk")

    async def _bring_to_ram(self, state: ObjectState, held: _Held) -> None:
        obj = state.object
        room = self._config.slots_count * 3 // 4
        others = sum(other.object.chunks_count for other in self._held if other is not state)
        if others + obj.chunks_count > room:
            raise RoomError(
                f"{obj.path} cannot be kept whole: {obj.chunks_count} slots beside {others} kept already are more than "
                f"{room}, three quarters of the RAM tier of {exact_size(self._config.slots_count * CHUNK_BYTES)}; "
                f"mount with --cache-dir or a larger --ram-size"
            )
        there = {chunk.index for chunk in held.chunks}

        async def lease(index: int) -> None:
            whole = full_mask(len(obj.chunk_range(index)))
            chunk = await self._cache.lease(state, index, whole, priority=Priority.BACKGROUND)
            if state in self._held:
                held.chunks.append(chunk)
            else:  # closed meanwhile
                self._cache.release(chunk)

        await for_each((index for index in range(obj.chunks_count) if index not in there), lease, at_once=_PARALLEL)

    async def _lacking(self, state: ObjectState) -> list[int]:
        """Chunks of which the SSD tier's files do not have all."""
        found: list[int] = (await self._pool.call("lacking", obj=state.wire))["chunks"]
        return found

    async def _mark(self, states: Sequence[ObjectState]) -> None:
        """Have no mount that shares the SSD tier evict these for a while."""
        until_s = int(time.time() + _MARK_S)
        await self._pool.call("keep", objects=[state.wire for state in states], until_s=until_s)
