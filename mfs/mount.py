"""Composition root of the daemon: the only place that knows which concrete parts make a mount."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from mfs.cache.chunk_cache import CacheConfig, ChunkCache
from mfs.cache.chunk_state import Chunk, Fill, ObjectState
from mfs.cache.ram import SLOTS_COUNT_MIN, RamConfig, SlotMemory
from mfs.config import MountConfig, SourceConfig
from mfs.control import detach, mountinfo
from mfs.errors import ConfigError, MfsError
from mfs.fuse import kernel, session
from mfs.fuse.device import Agreement
from mfs.fuse.operations import Operations, OwnerConfig
from mfs.fuse.session import Session
from mfs.listing import Drafts
from mfs.materialize import Keeper, KeeperConfig
from mfs.namespace import Namespace
from mfs.nodes import Changes
from mfs.oplog import OpLog
from mfs.prefetch.engine import PrefetchConfig, Prefetcher
from mfs.publication import Publication
from mfs.reader import ObjectReader
from mfs.refresh import Next, Refresher
from mfs.small_files import SmallFiles, SmallFilesConfig
from mfs.sources import shown_url
from mfs.tree_record import TreeRecord
from mfs.types import Entry, EntryKind, ObjectId
from mfs.workers.frames import Frame
from mfs.workers.pool import PoolConfig, Priority, WorkerPool

logger = logging.getLogger(__name__)

_TELL_S = 5.0  # the kernel may be held up by a request about the same directory that waits for its origin

_MAINTENANCE_S = 5.0
_SAVE_PARTIAL_AFTER_S = 2.0
_HIGH_WATERMARK, _LOW_WATERMARK = 0.95, 0.90  # of the SSD budget; the gap keeps evictions rare and large
_CLOSING_S = 5.0
_PREDECESSOR_ENDS_S = 60.0
_REFRESH_SOON_S = 2.0
_READY_WITHIN_S = 3.0  # that a mount takes for what was looked into last time, and its small files, to be here
_SHARD = re.compile(r"^(?P<stem>.*-)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[^/]*)$")


@dataclass
class RefreshState:
    """What the last look at the sources said."""

    last_at: float = 0.0
    last_errors: list[str] = field(default_factory=list)


class Predecessor(Protocol):
    """The daemon that serves the mount, for the one that takes it over; see `mfs.handover`."""

    agreement: Agreement
    """What kernel and libfuse agreed on when it was mounted."""

    async def hand_over(self, mount: Mount) -> None:
        """Make `mount`, whose session waits for its device, the one that serves. Raises: MfsError if it keeps it."""
        ...

    async def wait_ended(self) -> None:
        """Until its process is gone."""
        ...


class Mount:
    """A mount that serves: its parts, and what is done to them from time to time."""

    def __init__(self, config: MountConfig) -> None:
        """Raises: ConfigError if the RAM tier cannot be had."""
        self.config = config
        self.started_at = time.time()
        self.memory = SlotMemory(RamConfig(config.ram_bytes))
        self.pool = WorkerPool(_pool_config(config), self.memory.fd)
        ssd = config.cache_dir is not None
        self.cache = ChunkCache(CacheConfig(config.timeout_s, ssd), self.memory, self.pool)
        self.prefetcher = Prefetcher(
            PrefetchConfig(max(2, config.connections_count - 2), ssd),
            self.cache, self.pool, self._siblings,
        )  # fmt: skip
        self.namespace = Namespace([source.name for source in config.sources], self._list, self._identity)
        self._refresher = Refresher(
            self.namespace, self._list, self._prepare, lambda names: self.session.invalidate_names(names)
        )
        self.publication: Publication | None = None
        """What goes with publishing where there is an SSD tier."""
        if config.cache_dir is not None:
            self.publication = Publication(
                self.namespace, self._identity, TreeRecord(config.cache_dir),
                SmallFiles(SmallFilesConfig(), self.cache, self.pool), timeout_s=config.timeout_s,
            )  # fmt: skip
        self.oplog = OpLog([source.name for source in config.sources])
        self.cache.on_filled = self._filled
        self.keeper = Keeper(_keeper_config(config, self.memory.slots_count), self.cache, self.pool)
        self.reader = ObjectReader(self.cache, self.prefetcher, self.pool, self.oplog, self.keeper)
        owner = OwnerConfig(
            os.getuid() if config.uid is None else config.uid,
            os.getgid() if config.gid is None else config.gid,
            config.umask,
        )
        self.operations = Operations(self.namespace, self.reader, owner)
        self.kernel = kernel.KernelSettings()
        self.session: Session
        self.refreshed = [RefreshState() for _ in config.sources]
        """By source."""
        self.warnings: list[str] = []
        self._refresh_soon = [trio.Event() for _ in config.sources]
        self.cache.on_changed = lambda state: self._refresh_soon[state.source].set()
        self._saved_at_last_check = -1

    # -- serving

    @asynccontextmanager
    async def serving(self, predecessor: Predecessor | None = None) -> AsyncIterator[trio.CancelScope]:
        """The tree is mounted and answers while this is open.

        predecessor: a daemon that serves this mount until we can.
        Yields a scope that is cancelled when somebody unmounts. Raises: MfsError naming what keeps it from working.
        """
        await self.memory.populate(SLOTS_COUNT_MIN)
        async with self.pool.running():
            if predecessor is None:
                if self.publication is not None:
                    await self.publication.recall(self.pool.identities)
                await self._look_at_sources()
            async with trio.open_nursery() as nursery:
                async with self._open_session(predecessor) as self.session:
                    await nursery.start(self.prefetcher.run)
                    if predecessor is not None:
                        await predecessor.hand_over(self)
                    self.session.start()
                    nursery.start_soon(self._populate, predecessor)
                    nursery.start_soon(self._maintain)
                    nursery.start_soon(self.keeper.run)
                    for source in range(len(self.config.sources)):
                        nursery.start_soon(self._keep_fresh, source)
                    if self.publication is not None:
                        nursery.start_soon(self.publication.run)
                    if predecessor is None:
                        await self._settle()
                        with trio.move_on_after(_READY_WITHIN_S):
                            if self.publication is not None:
                                await self.publication.wait_settled()
                    yield self.session.ended
                # Only now, that the files are closed: closing one tells the prefetcher.
                nursery.cancel_scope.cancel()
            await self.save()

    def _open_session(self, predecessor: Predecessor | None) -> AbstractAsyncContextManager[Session]:
        sources = self.config.sources
        label = shown_url(sources[0].url if len(sources) == 1 else "registry")
        options: dict[str, Any] = {
            "label": label, "allow_other": self.config.allow_other, "unmount": self._unmount,
        }  # fmt: skip
        if predecessor is None:
            return session.mounted(self.operations, self.config.mountpoint, **options)
        return session.adopting(self.operations, predecessor.agreement, **options)

    def _unmount(self) -> None:
        mountpoint = str(self.config.mountpoint)
        found = mountinfo.mount_at(mountpoint)
        if found is None or not found.is_mfs:  # somebody else's, whatever stands there now
            return
        try:
            detach.unmount(mountpoint, lazy=True)
        except MfsError as error:
            logger.warning("%s", error)

    async def _populate(self, predecessor: Predecessor | None) -> None:
        """Touch the RAM tier, but not beside the old daemon's: there may not be room for both."""
        if predecessor is not None:
            with trio.move_on_after(_PREDECESSOR_ENDS_S):
                await predecessor.wait_ended()
        await self.memory.populate()

    async def _look_at_sources(self) -> None:
        """List every root: an endpoint, bucket or credential that is wrong is said now, not at the first read."""
        root = await self.namespace.listing(self.namespace.root)
        if self.config.sources[0].name:
            for inode in root.inodes:
                directory = self.namespace.directory(inode)
                assert directory is not None
                try:
                    await self.namespace.listing(directory)
                except MfsError as error:
                    raise type(error)(f"source {directory.name!r}: {error}") from error
        self.refreshed = [RefreshState(time.time()) for _ in self.config.sources]

    async def _settle(self) -> None:
        """Wait until the kernel has finished INIT and the mount answers, then tune the kernel."""
        mountpoint = str(self.config.mountpoint)
        await self.pool.call("stat_path", path=mountpoint, timeout_s=self.config.timeout_s)
        found = mountinfo.mount_at(mountpoint)
        if found is None:
            raise ConfigError(f"{mountpoint} was mounted, but /proc/self/mountinfo does not show it")
        self.kernel = await trio.to_thread.run_sync(kernel.tune, found.device)
        self.warnings += self.kernel.notes
        if self.memory.note:
            self.warnings.append(self.memory.note)

    async def save(self) -> None:
        """What is only in RAM goes to SSD, as far as a few seconds allow."""
        with trio.move_on_after(_CLOSING_S, shield=True):
            self.cache.saver.save_quiet(older_than_s=0)
            await self._flush_uses()
            if self.publication is not None and self.session.is_ours:  # else the next daemon writes, and knows better
                await self.publication.write_record()
            await self.cache.saver.wait_saved()

    # -- from time to time

    async def _maintain(self) -> None:
        while True:
            try:
                await self._flush_uses()
                self.cache.saver.save_quiet(older_than_s=_SAVE_PARTIAL_AFTER_S)
                await self.enforce_budget()
            except MfsError as error:
                logger.warning("maintenance: %s", error)
            with trio.move_on_after(_MAINTENANCE_S):
                await self.cache.saver.wait_saved_more(int(self.config.cache_bytes * (1 - _HIGH_WATERMARK)))

    async def _flush_uses(self) -> None:
        uses = self.cache.take_uses()
        if uses and self.config.cache_dir is not None:
            await self.pool.call("touch", uses=uses)

    async def enforce_budget(self) -> None:
        """Evict from SSD what is over the budget, if anything was written since the last look."""
        saved = self.cache.counters.saved_bytes
        if self.config.cache_dir is None or saved == self._saved_at_last_check or not self.session.is_ours:
            return  # whoever has the mount may have another budget
        self._saved_at_last_check = saved
        budget = self.config.cache_bytes
        found = await self.pool.call(
            "enforce_budget", budget_bytes=int(budget * _HIGH_WATERMARK), target_bytes=int(budget * _LOW_WATERMARK)
        )
        self.cache.note_evicted(found["dropped"])
        if found["evicted_bytes"]:
            logger.info("evicted %d bytes from SSD, %d stay", found["evicted_bytes"], found["used_bytes"])

    async def refresh(self) -> Changes:
        """List the sources again, publish what changed, tell the kernel.

        Returns when the kernel knows, so that who asked for it then sees it; it is given a few seconds for that.
        """
        changes = Changes()

        async def look(source: int) -> None:
            found = await self._refresh(source)
            changes.added_count += found.added_count
            changes.changed_count += found.changed_count
            changes.removed_count += found.removed_count
            changes.errors += found.errors
            changes.names += found.names

        async with trio.open_nursery() as nursery:
            for source in range(len(self.config.sources)):
                nursery.start_soon(look, source)
        with trio.move_on_after(_TELL_S):
            await self.session.wait_told()
        return changes

    async def _refresh(self, source: int) -> Changes:
        changes = await self._refresher.refresh(source)
        self.refreshed[source] = RefreshState(time.time(), changes.errors)
        for line in changes.errors:
            logger.warning("refresh: %s", line)
        return changes

    async def _keep_fresh(self, source: int) -> None:
        """Look at a source regularly, and when it answered with another version than listed; then not all the time."""
        while True:
            with trio.move_on_after(math.inf if self.config.refresh_s is None else self.config.refresh_s):
                await self._refresh_soon[source].wait()
            was_told = self._refresh_soon[source].is_set()
            self._refresh_soon[source] = trio.Event()
            if not self.session.is_ours:  # handed over: the next daemon looks
                return
            await self._refresh(source)
            if was_told:
                await trio.sleep(_REFRESH_SOON_S)

    # -- what the parts ask each other

    def _filled(self, chunk: Chunk, fill: Fill, result: Frame) -> None:
        if self.oplog.watched:
            state, ahead = chunk.state, fill.job is not None and fill.job.priority is Priority.BACKGROUND
            span = state.object.chunk_range(chunk.index)
            self.oplog.note_fetch(
                state.source, state.object.path, span, fill.mask, result["origin_bytes"], result["ssd_bytes"], ahead
            )

    async def _list(self, source: int, path: str, drafts: Drafts) -> None:
        def on_part(part: Frame) -> None:
            if "again" in part:
                drafts.clear()
            else:
                directory, entries = part["page"]
                drafts.add(directory, map(_entry, entries))

        await self.pool.call(
            "list_directory", source=source, path=path, timeout_s=self.config.timeout_s, on_part=on_part
        )

    async def _prepare(self, source: int, coming: Sequence[Next]) -> None:
        if self.publication is not None:
            await self.publication.prepare(source, coming)

    def _identity(self, source: int) -> str:
        return self.pool.identities[source]

    def _siblings(self, state: ObjectState) -> Sequence[tuple[ObjectId, int]]:
        """The other shards of a sharded file, those after it first."""
        folder, _, name = state.object.path.rpartition("/")
        shard = _SHARD.match(name)
        directory = self.namespace.directory_at(state.source, folder) if shard else None
        if shard is None or directory is None or directory.listing is None:
            return []
        number, count = int(shard["number"]), int(shard["count"])
        found = []
        for other in [*range(number + 1, count + 1), *range(1, number)]:
            sibling = f"{shard['stem']}{other:05d}-of-{shard['count']}{shard['suffix']}"
            index = directory.listing.find(sibling.encode())
            node = self.namespace.node(directory.listing.inodes[index]) if index >= 0 else None
            if node is not None and node.object is not None:
                found.append((node.object, state.source))
        return found


def _pool_config(config: MountConfig) -> PoolConfig:
    setup = {
        "sources": [{"url": source.url, "options": _options(source)} for source in config.sources],
        "cache_dir": str(config.cache_dir) if config.cache_dir else None,
        "cache_fsync": config.cache_fsync,
        "log_level": config.log_level.upper(),
    }
    limit = config.connections_count
    return PoolConfig(setup, config.workers_count, limit, max(1, limit - 2))


def _keeper_config(config: MountConfig, slots_count: int) -> KeeperConfig:
    return KeeperConfig(
        config.materialize, tuple(source.name for source in config.sources), config.timeout_s,
        config.cache_bytes if config.cache_dir else None, slots_count,
    )  # fmt: skip


def _options(source: SourceConfig) -> Frame:
    """A source's settings as `sources.SourceOptions` takes them."""
    return {
        "endpoint_url": source.endpoint_url, "profile": source.profile, "region": source.region,
        "unsigned": source.unsigned, "token": source.token, "layout": source.layout,
    }  # fmt: skip


def _entry(fields: list[object]) -> Entry:
    name, kind, *rest = fields
    return Entry(name, EntryKind(kind), *rest)  # type: ignore[arg-type]
