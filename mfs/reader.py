"""Open files: where a handle's reads meet the prefetcher and the cache, and what xattrs say."""

from __future__ import annotations

import time
from io import FileIO
from typing import Any

import trio

from mfs.cache.chunk_cache import Begun, ChunkCache, Pieces
from mfs.cache.chunk_state import ObjectState
from mfs.errors import MfsError
from mfs.loads import Load, Loads
from mfs.materialize import Keeper
from mfs.oplog import OpLog
from mfs.prefetch.engine import Prefetcher
from mfs.tree.nodes import Node
from mfs.types import ByteRange
from mfs.whole import WholeFiles
from mfs.workers.frames import object_from_wire, object_to_wire
from mfs.workers.pool import WorkerPool

_ATTRIBUTES_S = 5.0  # that an xattr waits for what a worker knows; without it the others are shown


class OpenObject:
    """One handle on one object version."""

    __slots__ = (
        "_cache", "_handle", "_is_given", "_is_held", "_keeper", "_load", "_loads", "_log", "_path", "_prefetcher",
        "_whole_files", "group", "size", "state",
    )  # fmt: skip

    def __init__(
        self, state: ObjectState, cache: ChunkCache, prefetcher: Prefetcher, whole_files: WholeFiles, log: OpLog,
        loads: Loads, keeper: Keeper | None,
    ) -> None:  # fmt: skip
        """keeper: who will keep it whole, once `settle` was called; None: nobody."""
        self.state = state
        self._cache = cache
        self._log = log
        self._handle = log.next_handle()
        self._path = state.object.path  # other names of the same bytes share the state and may rename it
        self._prefetcher = prefetcher
        self._keeper = keeper
        self._whole_files = whole_files
        self._is_held = self._is_given = False
        self.size = state.object.size
        self.group = state.group
        self._loads, self._load = loads, loads.opened(state.group)
        prefetcher.opened(state)
        if log.watched:
            self._tell("open", size=self.size)

    @property
    def settled(self) -> bool:
        """Whether `settle` would return at once."""
        return self._keeper is None or not self.size

    def read_nowait(self, span: ByteRange) -> Pieces | None:
        """The bytes of `span` where they stand, good until the next checkpoint; None where `read` would have to wait.

        What a watched mount reads is left to `read`, which tells of it.
        """
        if self._log.watched:
            return None
        pieces = self._cache.read_nowait(self.state, span)
        if pieces is not None:
            load = self._load if not self._load.is_over else self.load
            load.last_s = time.monotonic()
            load.ram_bytes += len(span)
            self.note(span)
        return pieces

    @property
    def load(self) -> Load:
        """What is read now belongs to it."""
        if self._load.is_over:
            self._load = self._loads.resumed(self._load)
        return self._load

    def begin(self, span: ByteRange, head: bytes | None) -> Begun:
        """Have what RAM lacks of `span` ordered, if nothing stands in the way. Returns what `read` is to be told."""
        return self._cache.begin(self.state, span, whole_chunks=self.note(span), head=head)

    async def read(self, span: ByteRange, begun: Begun) -> Pieces:
        """The bytes of `span`, good until the next checkpoint. Raises: MfsError."""
        load = self.load
        load.waiting += 1
        try:
            if self._log.watched:
                return await self._read_watched(span, begun)
            return await self._cache.read(self.state, span, begun)
        finally:  # no checkpoint here either
            load.waiting -= 1
            load.last_s = time.monotonic()

    async def _read_watched(self, span: ByteRange, begun: Begun) -> Pieces:
        error = {}
        try:
            return await self._cache.read(self.state, span, begun)
        except MfsError as failure:
            error = {"error": str(failure)}
            raise
        finally:  # no checkpoint here: the views are good until the next
            self._tell("read", start=span.start, stop=span.stop, waited_s=time.monotonic() - begun.since_s, **error)

    def _tell(self, op: str, **details: object) -> None:
        self._log.note(op, self.state.source, self._path, handle=self._handle, **details)

    def note(self, span: ByteRange) -> bool:
        """Say that `span` is read now. Returns whether missing chunks should be fetched whole."""
        return self._prefetcher.note(self.state, span)

    @property
    def has_header(self) -> bool:
        """Whether it has one that we know."""
        return self._prefetcher.has_header(self.state)

    async def header(self) -> bytes | None:
        """The blocks that hold the file's header, None where it has none we know or it could not be fetched."""
        with self._loads.opening(self.load, "header", self._path):
            return await self._prefetcher.header(self.state)

    async def settle(self) -> None:
        """Before anybody is told of the handle: have the whole file here, if it is one to be kept whole.

        Raises: MfsError; then the handle is of no use but to be closed.
        """
        if self._keeper is not None and self.size:
            with self._loads.opening(self.load, "open", self._path):
                await self._keeper.hold(self.state)
            self._is_held = True

    @property
    def may_be_whole(self) -> bool:
        """Whether there may be a file that is the object."""
        return self._whole_files.wants(self.state.object)

    @property
    def is_whole(self) -> bool:
        """Whether there is one, as far as is known."""
        return self._whole_files.is_whole(self.state)

    async def whole(self) -> FileIO | None:
        """A file that is the object, None if there is none now."""
        with self._loads.opening(self.load, "open", self._path):
            return await self._whole_files.open(self.state)

    def pass_through(self) -> None:
        """The kernel reads that file by itself, until `close`."""
        self._is_given = True
        self._whole_files.give(self.state)

    def inherit(self) -> None:
        """The handle was settled in another daemon."""
        if self._keeper is not None:
            self._keeper.inherit(self.state)
            self._is_held = True

    def export(self) -> list[Any]:
        """What `ObjectReader.reopen` needs to open the same version."""
        return [object_to_wire(self.state.object), self.state.source, self._is_held]

    def close(self) -> None:
        if self._log.watched:
            self._tell("close")
        if self._keeper is not None and self._is_held:
            self._keeper.release(self.state)
        if self._is_given:
            self._whole_files.take_back(self.state)
        self._prefetcher.closed(self.state)
        self._loads.closed(self._load)
        self._cache.close(self.state)


class ObjectReader:
    """Opens nodes and describes them; what `fuse.operations` calls Reader."""

    def __init__(
        self, cache: ChunkCache, prefetcher: Prefetcher, whole_files: WholeFiles, pool: WorkerPool, log: OpLog,
        loads: Loads, keeper: Keeper,
    ) -> None:  # fmt: skip
        self._loads = loads
        self._cache = cache
        self._prefetcher = prefetcher
        self._whole_files = whole_files
        self._pool = pool
        self._log = log
        self._keeper = keeper

    def open(self, node: Node) -> OpenObject:
        """A handle on the node's object version."""
        assert node.object is not None
        keeper = self._keeper if self._keeper.wants(node.source, node.path) else None
        return self._handle(self._cache.open(node.object, node.source), keeper)

    def reopen(self, exported: list[Any]) -> OpenObject:
        """A handle on the version that another daemon's handle was on."""
        fields, source, is_held = exported
        found = self._handle(self._cache.open(object_from_wire(fields), source), self._keeper if is_held else None)
        if is_held:
            found.inherit()
        self._whole_files.note(found.state)  # a daemon that was killed may not have come to seal it
        return found

    def _handle(self, state: ObjectState, keeper: Keeper | None) -> OpenObject:
        return OpenObject(state, self._cache, self._prefetcher, self._whole_files, self._log, self._loads, keeper)

    async def residency(self, nodes: list[Node]) -> list[tuple[int, int, bool]]:
        """(bytes on SSD, bytes in RAM, pinned) of each node; zeros for what is no file. Raises: MfsError."""
        files = [node for node in nodes if node.object is not None]
        rows: list[tuple[int, bool]] = []
        if files:
            wire = [object_to_wire(node.object) for node in files if node.object]
            rows = (await self._pool.call("residency", objects=wire))["rows"]
        answers = iter(rows)
        result = []
        for node in nodes:
            if node.object is None:
                result.append((0, 0, False))
            else:
                ssd_bytes, pinned = next(answers)
                result.append((ssd_bytes, self._cache.resident_bytes(node.object, node.source), pinned))
        return result

    async def attributes(self, node: Node) -> dict[str, str]:
        """The user.mfs.* attributes of a node, names without the prefix."""
        obj = node.object
        if obj is None:
            return {}
        found = {"source": f"{obj.source}/{obj.path}", "revision": obj.version}
        if obj.digest:
            found["digest"] = obj.digest
        try:
            with trio.fail_after(_ATTRIBUTES_S):  # no deadline of the worker's, which it would be killed for
                [(ssd_bytes, ram_bytes, pinned)] = await self.residency([node])
        except (MfsError, trio.TooSlowError):  # attributes are no place to fail: a worker may just be restarting
            return found
        return found | {
            "resident.ssd": str(ssd_bytes), "resident.ram": str(ram_bytes), "pinned": str(int(pinned)),
        }  # fmt: skip
