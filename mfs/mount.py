"""Composition root of the daemon: the only place that knows which concrete parts make a mount."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
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
from mfs.listing import Drafts, Listing
from mfs.materialize import Keeper, KeeperConfig
from mfs.namespace import Changes, Directory, Namespace
from mfs.oplog import OpLog
from mfs.prefetch.engine import PrefetchConfig, Prefetcher
from mfs.reader import ObjectReader
from mfs.refresh import Next, Refresher
from mfs.small_files import SmallFiles, SmallFilesConfig, Wanted, small_files
from mfs.sources import shown_url
from mfs.tree_record import TreeRecord
from mfs.types import Entry, EntryKind, ObjectId
from mfs.workers.frames import Frame
from mfs.workers.pool import PoolConfig, Priority, WorkerPool

logger = logging.getLogger(__name__)

_MAINTENANCE_S = 5.0
_SAVE_PARTIAL_AFTER_S = 2.0
_HIGH_WATERMARK, _LOW_WATERMARK = 0.95, 0.90  # of the SSD budget; the gap keeps evictions rare and large
_CLOSING_S = 5.0
_PREDECESSOR_ENDS_S = 60.0
_REFRESH_SOON_S = 2.0
_SMALL_FILES_BATCH = 64
_READY_WITHIN_S = 3.0  # that a mount takes for what was looked into last time, and its small files, to be here
_REVISIT_PARALLEL, _REVISITED_MAX = 4, 2000
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
        self.namespace.on_published = self._published
        self._refresher = Refresher(
            self.namespace, self._list, self._prepare, lambda names: self.session.invalidate_names(names)
        )
        self._record = TreeRecord(config.cache_dir) if config.cache_dir else None
        self._small_files = SmallFiles(SmallFilesConfig(), self.cache, self.pool)
        self._new: dict[Directory, None] = {}
        """Published, and their small files not looked at yet."""
        self._something_new = trio.Event()
        self._small_files_there = trio.Event()
        """Set once none are missing of what is shown first."""
        self._revisited = trio.Event()
        """Set once all is listed that was looked into on the last mount."""
        self._unrecorded: dict[Directory, None] = {}
        """Published, and not yet written down, in that order."""
        self._something_unrecorded = trio.Event()
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
                await self._recall()
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
                    if self.config.cache_dir is not None:
                        nursery.start_soon(self._revisit)
                        nursery.start_soon(self._keep_record)
                        nursery.start_soon(self._bring_small_files)
                    if predecessor is None:
                        await self._settle()
                        with trio.move_on_after(_READY_WITHIN_S):
                            await self._revisited.wait()
                            await self._small_files_there.wait()
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
            self.cache.save_partial(older_than_s=0)
            await self._flush_uses()
            if self.session.is_ours:  # else the next daemon writes its own, and knows better
                await self._write_record()
            await self.cache.wait_saved()

    # -- from time to time

    async def _maintain(self) -> None:
        while True:
            try:
                await self._flush_uses()
                self.cache.save_partial(older_than_s=_SAVE_PARTIAL_AFTER_S)
                await self.enforce_budget()
            except MfsError as error:
                logger.warning("maintenance: %s", error)
            with trio.move_on_after(_MAINTENANCE_S):
                await self.cache.wait_saved_more(int(self.config.cache_bytes * (1 - _HIGH_WATERMARK)))

    async def _flush_uses(self) -> None:
        uses = self.cache.take_uses()
        if uses and self.config.cache_dir is not None:
            await self.pool.call("touch", uses=uses)

    async def enforce_budget(self) -> None:
        """Evict from SSD what is over the budget, if anything was written since the last look."""
        saved = self.cache.counters.saved_bytes
        if self.config.cache_dir is None or saved == self._saved_at_last_check:
            return
        self._saved_at_last_check = saved
        budget = self.config.cache_bytes
        found = await self.pool.call(
            "enforce_budget", budget_bytes=int(budget * _HIGH_WATERMARK), target_bytes=int(budget * _LOW_WATERMARK)
        )
        self.cache.note_evicted(found["dropped"])
        if found["evicted_bytes"]:
            logger.info("evicted %d bytes from SSD, %d stay", found["evicted_bytes"], found["used_bytes"])

    async def refresh(self) -> Changes:
        """List the sources again, publish what changed, tell the kernel."""
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
            await self._refresh(source)
            if was_told:
                await trio.sleep(_REFRESH_SOON_S)

    # -- times that outlive a remount

    async def _recall(self) -> None:
        """Before anything is listed: what directories showed when they were last mounted."""
        if self._record is not None:
            records, latest_ns = await trio.to_thread.run_sync(self._record.load, self.pool.identities)
            self.namespace.adopt_records(records, latest_ns)

    async def _revisit(self) -> None:
        """List what was looked into last time: what changed while nothing was mounted shows in its directory's time
        before somebody reads that.
        """
        places = list(reversed(self.namespace.recorded()[:_REVISITED_MAX]))
        tops = {top.source: top for top in self.namespace.tops()}

        async def work() -> None:
            while places:
                source, path = places.pop()
                with contextlib.suppress(MfsError):  # gone, or whoever looks next hears of it
                    node = await self.namespace.resolve("/".join(filter(None, (tops[source].full_path, path))))
                    directory = self.namespace.directory(node.inode)
                    if directory is not None:
                        await self.namespace.listing(directory)

        async with trio.open_nursery() as nursery:
            for _ in range(_REVISIT_PARALLEL):
                nursery.start_soon(work)
        self._revisited.set()

    def _published(self, directory: Directory) -> None:
        """Told by the namespace; nothing may wait here."""
        if self.config.cache_dir is not None:
            self._unrecorded[directory] = self._new[directory] = None
            self._something_unrecorded.set()
            self._something_new.set()

    def unrecorded(self) -> list[int]:
        """Inodes of directories that are still to be written down."""
        return [directory.inode for directory in self._unrecorded]

    def record_again(self, inodes: Sequence[int]) -> None:
        """Write down what another daemon did not come to."""
        for inode in inodes:
            if (directory := self.namespace.directory(inode)) is not None:
                self._published(directory)

    async def _keep_record(self) -> None:
        while True:
            await self._something_unrecorded.wait()
            await self._write_record()

    async def _write_record(self) -> None:
        """Write down what was published since the last time."""
        self._something_unrecorded = trio.Event()
        directories, self._unrecorded = list(self._unrecorded), {}
        rows = [
            (self._identity(d.source), d.path, d.mtime_ns, d.listing.fingerprint(), d.listing.mtimes.tobytes())
            for d in directories
            if d.listing is not None and not d.removed
        ]
        if rows and self._record is not None:
            await trio.to_thread.run_sync(self._record.save, rows)

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
        """Before a model is published: its new small files come first. Raises: MfsError if they do not."""
        if self.config.cache_dir is not None:
            wanted = [item for path, new, old in coming for item in self._small(source, path, new, old)]
            await self._small_files.bring_for_publication(wanted, timeout_s=self.config.timeout_s)

    def _small(self, source: int, path: str, new: Listing, old: Listing | None = None) -> Iterator[Wanted]:
        for index in small_files(new, old):
            entry = new.entry(index)
            yield entry.object_at(self._identity(source), path), source

    async def _bring_small_files(self) -> None:
        """Those of directories that are listed for the first time; after a refresh there is nothing left to do."""
        while True:
            await self._something_new.wait()
            self._something_new = trio.Event()
            directories, self._new = list(self._new), {}
            wanted: list[Wanted] = []
            for directory in directories:
                if directory.listing is not None and self._small_files.has_allowance:
                    wanted += self._small(directory.source, directory.path, directory.listing)
                if len(wanted) >= _SMALL_FILES_BATCH or directory is directories[-1]:
                    batch, wanted = wanted, []
                    await self._bring_batch(batch)
            self._small_files_there.set()

    async def _bring_batch(self, wanted: Sequence[Wanted]) -> None:
        try:
            await self._small_files.bring_unasked(wanted)
        except MfsError as error:
            logger.info("small files come when they are read: %s", error)

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
