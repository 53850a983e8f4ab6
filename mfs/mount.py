"""Composition root of the daemon: the only place that knows which concrete parts make a mount."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

from mfs.cache.chunk_cache import CacheConfig, ChunkCache
from mfs.cache.chunk_state import Chunk, ObjectState
from mfs.cache.ram import PROCESS_BYTES, RamConfig, RamTier
from mfs.cache.sealing import open_sealed
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.cache.warming import keep_warm
from mfs.config import MountConfig
from mfs.control import detach, mountinfo
from mfs.errors import ConfigError, MfsError
from mfs.fuse import kernel, session
from mfs.fuse.device import Agreement
from mfs.fuse.operations import Operations, OwnerConfig
from mfs.fuse.session import Session
from mfs.loads import Loads
from mfs.looking import Listings, Looking
from mfs.materialize import Keeper, KeeperConfig
from mfs.metrics.tally import Tally
from mfs.oplog import OpLog
from mfs.prefetch.engine import PrefetchConfig, Prefetcher
from mfs.reader import ObjectReader
from mfs.shown import mask_url
from mfs.tracing.beside import Beside
from mfs.tracing.tracer import Tracer
from mfs.tree.namespace import Namespace
from mfs.tree.nodes import Changes
from mfs.tree.publication import Publication
from mfs.tree.record import TreeRecord
from mfs.tree.small_files import SmallFiles, SmallFilesConfig
from mfs.types import ObjectId
from mfs.whole import OpenSealed, WholeFiles
from mfs.workers.frames import Frame
from mfs.workers.pool import PoolConfig, WorkerPool
from mfs.workers.shares import Group

logger = logging.getLogger(__name__)

_TELL_S = 5.0  # the kernel may be held up by a request about the same directory that waits for its origin

_MAINTENANCE_S = 5.0
_SAVE_PARTIAL_AFTER_S = 2.0
_HIGH_WATERMARK, _LOW_WATERMARK = 0.95, 0.90  # of the SSD budget; the gap keeps evictions rare and large
_CLOSING_S = 5.0
_SILENCE_MIN_S, _SILENCE_MAX_S = 2.0, 10.0  # of a worker, between them a quarter of a reader's time
_READY_WITHIN_S = 3.0  # that a mount takes for what was looked into last time, and its small files, to be here
_SHARD = re.compile(r"^(?P<stem>.*-)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[^/]*)$")


class Predecessor(Protocol):
    """The daemon that serves the mount or has served it, for the one that takes it over; see `mfs.succession`."""

    agreement: Agreement
    """What kernel and libfuse agreed on when it was mounted."""

    async def hand_over(self, mount: Mount) -> None:
        """Make `mount`, whose session waits for its device, the one that serves. Raises: MfsError if it keeps it."""
        ...


class Mount:
    """A mount that serves: its parts, and what is done to them from time to time."""

    def __init__(self, config: MountConfig, *, coming_bytes: int = 0, identities: Sequence[str] | None = None) -> None:
        """coming_bytes: memory that a daemon which hands its mount over gives back before ours is used up.
        identities: of the sources, as far as is known, where we follow a daemon that has failed: nothing is refused
            then that can be done without.

        Raises: ConfigError if the RAM tier cannot be had.
        """
        follows = identities is not None
        self.config = config
        self.started_at = time.time()
        self.tracer = Tracer()
        self.exporting = Beside()
        beside_bytes = PROCESS_BYTES * (1 + config.workers_count + self.tracer.is_on)
        self.memory = RamTier(RamConfig(config.ram_bytes, beside_bytes, coming_bytes, serves=follows))
        self.pool = WorkerPool(replace(_pool_config(config), identities=tuple(identities or ())))
        ssd = config.cache_dir is not None
        self.cache = ChunkCache(CacheConfig(config.timeout_s, ssd), self.memory, self.pool)
        self.prefetcher = Prefetcher(
            PrefetchConfig(max(2, config.connections_count - 2), ssd),
            self.cache, self.pool, self._siblings,
        )  # fmt: skip
        names = [source.name for source in config.sources]
        self.tally = Tally(names)
        self.listings = Listings(self.pool, self.tally, timeout_s=config.timeout_s)
        self.namespace = Namespace(names, self.listings.list, self._identity)
        self.publication: Publication | None = None
        """What goes with publishing where there is an SSD tier."""
        if config.cache_dir is not None:
            self.publication = Publication(
                self.namespace, self._identity, TreeRecord(config.cache_dir),
                SmallFiles(SmallFilesConfig(), self.cache, self.pool), timeout_s=config.timeout_s,
            )  # fmt: skip
        self.looking = Looking(
            config, self.namespace, self.listings.list, self.publication,
            tell=lambda names: self.session.invalidate_names(names), is_ours=lambda: self.session.is_ours,
        )  # fmt: skip
        self.oplog = OpLog(names)
        self.loads = Loads(names, self.tracer.begin)
        self.cache.waits.listeners.append(self.loads.note)
        self.cache.filler.span_of = self.loads.span_of
        self.cache.waits.listeners.append(self.tally.waited)
        self.cache.filler.on_failed = lambda state, error: self.tally.failed(state.group, error)
        self.cache.filler.on_filled = self._filled
        self.pool.on_tier_back = self.cache.saver.resume
        self.whole_files = WholeFiles(self.cache, self.pool, _sealed_files(config))
        self.keeper = Keeper(
            _keeper_config(config, self.memory.slots_count), self.cache, self.pool, self.whole_files
        )  # fmt: skip
        self.reader = ObjectReader(
            self.cache, self.prefetcher, self.whole_files, self.pool, self.oplog, self.loads, self.keeper
        )  # fmt: skip
        owner = OwnerConfig(
            os.getuid() if config.uid is None else config.uid,
            os.getgid() if config.gid is None else config.gid,
            config.umask,
        )
        self.operations = Operations(self.namespace, self.reader, owner, timeout_s=config.timeout_s)
        self.whole_files.on_sealed = lambda state: self.session.invalidate_names(self.operations.files.renew(state))
        self.whole_files.reads_count = lambda: self.operations.files.counters.count
        self.whole_files.on_dropped = self.operations.files.passthrough.drop_all
        self.whole_files.on_lost = lambda state: self.session.invalidate_names(self.operations.files.disown(state))
        self.kernel = kernel.KernelSettings()
        self.session: Session
        self.warnings = [self.memory.shortage] if self.memory.shortage else []
        self.make_way: Callable[[], None] | None = None
        """Called in a thread when all that can fail before mounting is done: takes away what stands there."""
        self.arrived: Counter[Group] = Counter()
        """Bytes that came from the origins, by model."""
        self._page_fault = ""
        self.cache.filler.on_changed = lambda state: self.looking.look_soon(state.source)
        self._saved_at_last_check = -1
        self.on_connected: Callable[[], None] = lambda: None
        """Told when the kernel is ours to answer, before anything is."""
        self.on_closing: Callable[[], None] = lambda: None
        """Told when the mount ends in an orderly way; not when it was handed over."""
        self.is_held: Callable[[], bool] = lambda: False
        """Whether another daemon goes on with the mount, should we fail."""
        self.metrics_at: str | None = None
        """HOST:PORT where Prometheus is answered now."""
        self._follows, self._is_gone = follows, False
        self.unheld = ""
        """Why the mount would not outlive a daemon that is killed, '' if it would."""

    @property
    def is_ours(self) -> bool:
        """Whether the mount is no other daemon's, now or next; also before there is one."""
        return self._is_gone or (self.session.is_ours if hasattr(self, "session") else not self._follows)

    @property
    def all_warnings(self) -> list[str]:
        """What is not as it should be: since the start, and now."""
        fault = self.pool.tier_fault
        without = [f"serving without the SSD tier: {fault}"] if fault else []
        unheld = [f"should this daemon be killed, the mount ends: {self.unheld}"] if self.unheld else []
        pageless = [f"the page is not served: {self._page_fault}"] if self._page_fault else []
        untraced = [self.tracer.fault] if self.tracer.fault else []
        return [*self.warnings, *self.looking.warnings, *without, *unheld, *pageless, *untraced]

    # -- serving

    @asynccontextmanager
    async def serving(self, predecessor: Predecessor | None = None) -> AsyncIterator[trio.CancelScope]:
        """The tree is mounted and answers while this is open.

        predecessor: a daemon that serves this mount until we can.
        Yields a scope that is cancelled when somebody unmounts. Raises: MfsError naming what keeps it from working.
        """
        async with self.pool.running():
            if predecessor is None:
                if self.publication is not None:
                    await self.publication.recall(self.pool.identities)
                await self.looking.first()
                if self.make_way is not None:
                    await trio.to_thread.run_sync(self.make_way)
            async with trio.open_nursery() as nursery:
                async with self._open_session(predecessor) as self.session:
                    await nursery.start(self.prefetcher.run)
                    if predecessor is not None:
                        self.session.is_held = self.is_held
                        await predecessor.hand_over(self)
                    self.operations.note_agreement(
                        self.session.agreement, self.pool.identities, after_crash=self._follows
                    )
                    self.session.on_closing = self.on_closing
                    self.on_connected()
                    self.session.start()
                    self.pool.device = self.session.device
                    self.session.on_letting_go = self.pool.take_device_back
                    nursery.start_soon(self._maintain)
                    nursery.start_soon(self.loads.run)
                    nursery.start_soon(self.tracer.run, self.exporting.send)
                    nursery.start_soon(self.keeper.run)
                    nursery.start_soon(self.operations.files.passthrough.run)
                    nursery.start_soon(self.whole_files.run)
                    if self.config.cache_dir is not None:
                        nursery.start_soon(self.whole_files.scrub)
                        nursery.start_soon(self.whole_files.follower.run)
                        nursery.start_soon(
                            keep_warm, self.memory, self.cache.slots, self.pool,
                            lambda: self.whole_files.expects_fetches,
                        )  # fmt: skip
                    nursery.start_soon(self.looking.keep_fresh)
                    if self.publication is not None:
                        nursery.start_soon(self.publication.run)
                    try:
                        await self._settle()
                    except MfsError as error:
                        if predecessor is None:
                            raise
                        logger.warning("the kernel could not be tuned: %s", error)  # no reason to end what goes on
                    if predecessor is not None and not self.operations.settled.is_set():
                        nursery.start_soon(self._look_again)
                    if predecessor is None:
                        with trio.move_on_after(_READY_WITHIN_S):
                            if self.publication is not None:
                                await self.publication.wait_settled()
                    self.session.is_held = self.is_held  # a mount that never came about is taken away
                    yield self.session.ended
                # Only now, that the files are closed: closing one tells the prefetcher.
                nursery.cancel_scope.cancel()
            await self.save()
            await self.tracer.flush(self.exporting.send)  # and not before another daemon takes over: `run` goes on then
            await self.exporting.close()

    def _open_session(self, predecessor: Predecessor | None) -> AbstractAsyncContextManager[Session]:
        sources = self.config.sources
        label = mask_url(sources[0].url if len(sources) == 1 else "registry")
        options: dict[str, Any] = {
            "label": label, "allow_other": self.config.allow_other, "unmount": self.unmount,
        }  # fmt: skip
        if predecessor is None:
            return session.mounted(self.operations, self.config.mountpoint, **options)
        return session.adopting(self.operations, predecessor.agreement, **options)

    def unmount(self) -> None:
        """Take the mount away, if it is one of ours. Blocks."""
        mountpoint = str(self.config.mountpoint)
        found = mountinfo.mount_at(mountpoint)
        if found is None or not found.is_mfs:  # somebody else's, whatever stands there now
            return
        try:
            detach.unmount(mountpoint, lazy=True)
        except MfsError as error:
            logger.warning("%s", error)

    def give_up(self) -> None:
        """Take away a mount that we were to go on with. Blocks."""
        self.unmount()
        self.note_gone()

    def note_gone(self) -> None:
        """Nobody goes on with the mount: what is known of it may go."""
        self._is_gone = True

    def note_page_fault(self, fault: str) -> None:
        """The page in a browser is not there for this reason, '' if it is."""
        self._page_fault = fault

    async def _look_again(self) -> None:
        """See what has changed since a daemon was killed; what the kernel asks of unknown nodes waits for that."""
        try:
            await self.looking.after_crash()
        finally:
            self.operations.settled.set()

    async def _settle(self) -> None:
        """Wait until the kernel has finished INIT and the mount answers, then tune the kernel."""
        mountpoint = str(self.config.mountpoint)
        await self.pool.call("stat_path", path=mountpoint, timeout_s=self.config.timeout_s)
        found = mountinfo.mount_at(mountpoint)
        if found is None:
            raise ConfigError(f"{mountpoint} was mounted, but /proc/self/mountinfo does not show it")
        self.kernel = await trio.to_thread.run_sync(kernel.tune, found.device)
        self.warnings += self.kernel.notes

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
            "enforce_budget", budget_bytes=int(budget * _HIGH_WATERMARK), target_bytes=int(budget * _LOW_WATERMARK),
            spare=self.whole_files.given,
        )  # fmt: skip
        self.cache.note_evicted(found["dropped"])
        if found["dropped"]:
            self.operations.files.passthrough.drop_all()  # what lingers of it would hold its blocks
        self.cache.counters.ssd_evictions += sum(map(len, found["dropped"].values()))
        self.cache.counters.ssd_evicted_bytes += found["evicted_bytes"]
        if found["evicted_bytes"]:
            logger.info("evicted %d bytes from SSD, %d stay", found["evicted_bytes"], found["used_bytes"])

    async def refresh(self) -> Changes:
        """List the sources again, publish what changed, tell the kernel.

        Returns when the kernel knows, so that who asked for it then sees it; it is given a few seconds for that.
        """
        changes = await self.looking.refresh()
        with trio.move_on_after(_TELL_S):
            await self.session.wait_told()
        return changes

    # -- what the parts ask each other

    def _filled(self, chunk: Chunk, mask: int, is_ahead: bool, result: Frame) -> None:
        self.loads.filled(chunk.state.group, origin_bytes=result["origin_bytes"], ssd_bytes=result["ssd_bytes"])
        self.tally.filled(
            chunk.state.group, origin_bytes=result["origin_bytes"], ssd_bytes=result["ssd_bytes"],
            shared_bytes=result["shared_bytes"],
        )  # fmt: skip
        self.arrived[chunk.state.group] += result["origin_bytes"]
        if self.oplog.watched:
            state = chunk.state
            span = state.object.chunk_range(chunk.index)
            self.oplog.note_fetch(
                state.source, state.object.path, span, mask, result["origin_bytes"], result["ssd_bytes"], is_ahead
            )

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
    place, cache = str(config.mountpoint), str(config.cache_dir or "")
    setup = {
        "sources": [{"url": source.url, "options": source.options(place, cache)} for source in config.sources],
        # Resolved once: what a link on the way leads to later is another directory.
        "cache_dir": os.path.realpath(config.cache_dir) if config.cache_dir else None,
        "cache_fsync": config.cache_fsync,
        "cache_shared": config.cache_shared,
        "log_level": config.log_level.upper(),
        "log_format": config.log_format,
    }
    limit = config.connections_count
    silence_s = min(max(_SILENCE_MIN_S, config.timeout_s / 4), _SILENCE_MAX_S)
    return PoolConfig(setup, config.workers_count, limit, max(1, limit - 2), silence_s=silence_s)


def _sealed_files(config: MountConfig) -> OpenSealed | None:
    if config.cache_dir is None:
        return None
    directory = Path(os.path.realpath(config.cache_dir))
    return partial(open_sealed, SsdTier(SsdConfig(directory, shared=config.cache_shared)))


def _keeper_config(config: MountConfig, slots_count: int) -> KeeperConfig:
    return KeeperConfig(
        config.materialize, tuple(source.name for source in config.sources), config.timeout_s,
        config.cache_bytes if config.cache_dir else None, slots_count,
    )  # fmt: skip
