"""What the control plane can ask of a mount: `control.api.DaemonApi`, answered from the mount's parts."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import trio

from mfs import __version__
from mfs.cache.chunk_state import ObjectState
from mfs.cache.chunks import full_mask
from mfs.control.api import EvictTier, Json, Tier
from mfs.errors import MfsError, StoreError
from mfs.metrics.families import Families, Text
from mfs.metrics.mounted import gathered, processes
from mfs.metrics.processes import add_processes
from mfs.mount import Mount
from mfs.overview import Overview
from mfs.shown import mask_url
from mfs.tree.nodes import Node
from mfs.types import EntryKind, ObjectId
from mfs.workers.frames import object_to_wire

_PROGRESS_S = 0.1
_FILES_MAX = 1_000_000  # of one order; more is a mistake, and would be a list in memory
_USAGE_S = 2.0
_SCRAPE_USAGE_S = 0.2  # else what was known last is told: scrapes of a mount whose workers die must not fail
_WATCH_S = 0.1
_WATCH_BATCH = 500  # records turned into JSON without giving way to readers
_BATCH = 500  # objects per question to a worker
_NO_USAGE: Json = dict.fromkeys(
    ("used_bytes", "objects_count", "pinned_count", "pinned_bytes", "sealed_count", "sealed_bytes", "free_disk_bytes"),
    0,
)
"""As a worker's `usage`."""
_KINDS = {EntryKind.FILE: "file", EntryKind.DIRECTORY: "directory", EntryKind.SYMLINK: "symlink"}


class Service:
    """The daemon's side of every shell command."""

    def __init__(self, mount: Mount, stop: Callable[[], None], nursery: trio.Nursery) -> None:
        """stop: begins the daemon's end. nursery: where work goes on that nobody waits for."""
        self._mount = mount
        self._stop = stop
        self._nursery = nursery
        self._overview = Overview(mount, nursery)
        self._usage: Json = _NO_USAGE
        """Of the SSD tier, as far as is known."""

    # -- looking

    async def status(self) -> Json:
        mount, cache = self._mount, self._mount.cache
        config, memory, counters, reads = mount.config, mount.memory, cache.counters, mount.operations.files.counters
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mountpoint": str(config.mountpoint),
            "started_at": mount.started_at,
            "uptime_s": time.time() - mount.started_at,
            "sources": [
                {
                    "name": source.name,
                    "url": mask_url(mount.pool.identities[number]),
                    "via": mask_url(source.dragonfly or source.via or "") or None,
                    "is_dragonfly": source.dragonfly is not None,
                    "listed_directories": mount.namespace.listed_count,
                    "last_refresh_at": mount.looking.last[number].at,
                    "last_error": next(iter(mount.looking.last[number].errors), None),
                }
                for number, source in enumerate(config.sources)
            ],
            "tree": {"files_count": mount.namespace.files_count, "bytes": mount.namespace.listed_bytes},
            "cache_dir": str(config.cache_dir) if config.cache_dir else None,
            "ssd": await self._ssd_status(),
            "ram": {
                "used_bytes": memory.used_bytes,
                "warm_bytes": memory.warm_bytes,
                "budget_bytes": memory.size_bytes,
                "slots_count": memory.slots_count,
                "slots_free": memory.slots_free,
                "slots_leased": cache.leases_count,
                "hits_bytes": counters.ram_hit_bytes,
                "note": memory.note,
            },
            "origin": {
                "fetched_bytes": counters.origin_bytes,
                "shared_bytes": counters.shared_bytes,
                "requests_count": counters.origin_requests,
                "errors_count": counters.origin_errors,
                "inflight": mount.pool.inflight("origin"),
                **mount.pool.ways,
            },
            "reads": {
                "count": reads.count, "bytes": reads.bytes, "errors_count": reads.errors, "waiting": reads.waiting,
            },
            "open_files": mount.operations.files.open_count,
            "passthrough": {
                "open_files": mount.operations.files.passed_through_count,
                "sealed_count": mount.whole_files.sealed_count,
                "read_ahead_bytes": mount.whole_files.follower.filled_bytes,
                "note": mount.operations.files.passthrough.fault,
            },
            "prefetch": {
                "queued_bytes": mount.prefetcher.queued_bytes, "active_objects": mount.prefetcher.active_count,
            },
            "metrics_addr": mount.metrics_at,
            "workers": mount.pool.describe(),
            "kernel": {
                "read_ahead_kb": mount.kernel.read_ahead_kb,
                "max_background": mount.kernel.max_background,
                "notes": mount.kernel.notes,
            },
            "warnings": mount.all_warnings,
        }  # fmt: skip

    async def _ssd_status(self, patience_s: float = _USAGE_S) -> Json:
        cache, config = self._mount.cache, self._mount.config
        if config.cache_dir is None:
            return {**_NO_USAGE, "state": "off", "budget_bytes": 0, "hits_bytes": 0, "note": None}
        # Whoever asks for the status may want to know why nothing works: it must not wait for a worker that hangs.
        with trio.move_on_after(patience_s), suppress(MfsError):
            self._usage = await self._mount.pool.call("usage")
        state = "not writing" if time.monotonic() < cache.saver.suspended_until else "ok"
        fault = self._mount.pool.tier_fault
        return {
            **self._usage, "budget_bytes": config.cache_bytes, "state": state if fault is None else "away",
            "note": fault, "hits_bytes": cache.counters.ssd_hit_bytes,
        }  # fmt: skip

    async def overview(self, *, sort: str, match: str, count: int) -> Json:
        models = await self._overview.models(sort=sort, match=match, count=count)
        return {"status": await self.status(), "models": models, "fetches": self._overview.fetches(),
                "waits": self._overview.waits()}  # fmt: skip

    async def heat(self, path: str) -> Json:
        return await self._overview.heat(path)

    async def ls(self, path: str) -> list[Json]:
        node = await self._mount.namespace.resolve(path)
        directory = self._mount.namespace.directory(node.inode)
        if directory is None:
            named = iter([(path.rpartition("/")[2], node)])
        else:
            listing = await self._mount.namespace.listing(directory)
            named = ((name.decode(), child) for _, name, child in self._mount.namespace.nodes(directory, listing, 0))
        rows: list[Json] = []
        while part := list(islice(named, _BATCH)):  # of 300,000 names, so many as objects at once
            residency = await self._mount.reader.residency([child for _, child in part])
            for (name, child), found in zip(part, residency, strict=True):
                size, (ssd_bytes, ram_bytes, pinned) = child.size, found
                if child.kind is EntryKind.DIRECTORY:
                    size, ssd_bytes, ram_bytes, pinned = await self._below(child)
                rows.append({
                    "name": name, "kind": _KINDS[child.kind], "size": size, "mtime": child.mtime_ns / 1e9,
                    "ssd_bytes": ssd_bytes, "ram_bytes": ram_bytes, "pinned": pinned,
                })  # fmt: skip
        return rows

    async def _below(self, directory: Node) -> tuple[int, int, int, bool]:
        """(bytes, of these on SSD, in RAM, whether all is pinned) of the files below, as far as somebody has listed."""
        size = ssd = ram = 0
        pinned, part = True, list[Node]()

        async def add() -> None:
            nonlocal size, ssd, ram, pinned
            size += sum(node.size for node in part)
            for ssd_bytes, ram_bytes, is_pinned in await self._mount.reader.residency(part):
                ssd, ram, pinned = ssd + ssd_bytes, ram + ram_bytes, pinned and is_pinned
            part.clear()

        async for _, node in self._mount.namespace.walk(directory, "", lists=False):
            part.append(node)
            if len(part) == _BATCH:
                await add()
        await add()
        return size, ssd, ram, pinned and size > 0

    async def stat(self, path: str) -> Json:
        node = await self._mount.namespace.resolve(path)
        size = node.size
        [(ssd_bytes, ram_bytes, pinned)] = await self._mount.reader.residency([node])
        if node.kind is EntryKind.DIRECTORY:
            size, ssd_bytes, ram_bytes, pinned = await self._below(node)
        obj = node.object
        return {
            "path": path, "kind": _KINDS[node.kind], "size": size, "mtime": node.mtime_ns / 1e9,
            "inode": node.inode,
            "source": mask_url(self._mount.pool.identities[node.source]) if node.source >= 0 else None,
            "source_path": node.path, "revision": obj.version if obj else None, "digest": obj.digest if obj else None,
            "model_revision": _model_revision(obj) if obj else None,
            "ssd_bytes": ssd_bytes, "ram_bytes": ram_bytes, "pinned": pinned,
            "chunks_count": obj.chunks_count if obj else 0,
            "open_handles": self._mount.prefetcher.handles_count(obj) if obj else 0,
        }  # fmt: skip

    async def loads(self, path: str) -> Json:
        found = []
        for load in self._mount.loads.describe(path):
            found.append(load)
            await trio.lowlevel.checkpoint()
        return {"loads": found}

    async def latest_load(self, path: str, number: int) -> Json:
        count, load = self._mount.loads.describe_latest(path, number)
        return {"count": count, "load": load}

    async def watch(self) -> AsyncIterator[Json]:
        with self._mount.oplog.watching() as watcher:
            while True:
                seen_until_s, records = time.monotonic(), watcher.take(_WATCH_BATCH)
                yield {"at_s": seen_until_s, "records": records, "dropped_count": watcher.dropped_count}
                if len(records) < _WATCH_BATCH:
                    await trio.sleep(_WATCH_S)

    async def config(self) -> Json:
        return self._mount.config.masked()

    async def metrics(self, accept: str) -> Text:
        families = gathered(self._mount, await self._ssd_status(_SCRAPE_USAGE_S))
        return await trio.to_thread.run_sync(_exposed, families, processes(self._mount), accept)

    # -- moving bytes

    async def prefetch(self, paths: Sequence[str], tier: Tier, *, wait: bool) -> AsyncIterator[Json]:
        if tier == "ssd" and self._mount.config.cache_dir is None:
            raise StoreError("this mount has no SSD cache: mount with --cache-dir, or prefetch with --tier ram")
        files = await self._files(paths)
        total = sum(node.size for _, node in files)
        if tier == "ram" and total > self._mount.memory.size_bytes:
            raise StoreError(
                f"{total} bytes do not fit the RAM tier of {self._mount.memory.size_bytes} bytes; "
                f"mount with a larger --ram-size, or prefetch with --tier ssd"
            )
        work = _Prefetch(self._mount, files, tier)
        yield {"total_bytes": total, "done_bytes": 0, "files_count": len(files), "path": ""}
        if not wait:
            self._nursery.start_soon(work.run)
            yield work.report(done=True)
            return
        async for report in _with_progress(work, self._nursery):
            yield report

    async def evict(self, paths: Sequence[str], tier: EvictTier) -> Json:
        files = await self._files(paths)
        ram = ssd = kept = opened = 0
        for first in range(0, len(files), _BATCH):
            part = [node for _, node in files[first : first + _BATCH]]
            if tier in ("ram", "all"):
                ram += sum(self._mount.cache.evict(node.object, node.source) for node in part if node.object)
            if tier in ("ssd", "all") and self._mount.config.cache_dir is not None:
                given = set(self._mount.whole_files.given)
                opened += sum(1 for node in part if node.object and node.object.cache_id in given)
                part = [node for node in part if node.object and node.object.cache_id not in given]
                result = await self._mount.pool.call(
                    "evict", objects=[object_to_wire(n.object) for n in part if n.object]
                )
                ssd += result["ssd_bytes"]
                kept += result["kept_pinned_count"]
                self._mount.operations.files.passthrough.drop_all()  # as in `Mount.enforce_budget`
                for node in part:
                    if node.object:
                        self._mount.cache.note_unsaved(node.object, node.source)
        return {
            "files_count": len(files), "ram_bytes": ram, "ssd_bytes": ssd, "kept_pinned_count": kept,
            "kept_open_count": opened,
        }  # fmt: skip

    async def pin(self, paths: Sequence[str]) -> Json:
        return await self._set_pinned(paths, True)

    async def unpin(self, paths: Sequence[str]) -> Json:
        return await self._set_pinned(paths, False)

    async def _set_pinned(self, paths: Sequence[str], pinned: bool) -> Json:
        if self._mount.config.cache_dir is None:
            raise StoreError("this mount has no SSD cache, so there is nothing to pin in; mount with --cache-dir")
        files = await self._files(paths)
        for first in range(0, len(files), _BATCH):
            objects = [object_to_wire(node.object) for _, node in files[first : first + _BATCH] if node.object]
            await self._mount.pool.call("pin", objects=objects, pinned=pinned)
        return {"files_count": len(files), "bytes": sum(node.size for _, node in files)}

    async def verify(self, paths: Sequence[str]) -> AsyncIterator[Json]:
        work = _Verify(self._mount, await self._files(paths))
        async for report in _with_progress(work, self._nursery):
            yield report

    # -- the tree

    async def refresh(self) -> Json:
        changes = await self._mount.refresh()
        return {
            "changed_count": changes.changed_count, "added_count": changes.added_count,
            "removed_count": changes.removed_count, "errors": changes.errors,
        }  # fmt: skip

    async def shutdown(self) -> Json:
        self._stop()
        return {"pid": os.getpid()}

    async def _files(self, paths: Sequence[str]) -> list[tuple[str, Node]]:
        """All files at and below the paths, each once."""
        found: dict[int, tuple[str, Node]] = {}
        for path in paths:
            node = await self._mount.namespace.resolve(path)
            async for below, file in self._mount.namespace.walk(node, path):
                found.setdefault(file.inode, (below, file))
                if len(found) > _FILES_MAX:
                    raise StoreError(f"{path}: more than {_FILES_MAX} files; name a part of it")
        return list(found.values())


def _exposed(families: Families, pids: dict[str, int], accept: str) -> Text:
    from mfs.metrics.exposition import exposed  # a hundred modules: only where somebody asks

    add_processes(families, "mfs", pids)
    return exposed(families.found, accept)


def _model_revision(obj: ObjectId) -> str | None:
    """The revision of a whole model that a file was listed in, where its source has such."""
    if obj.source.startswith("mfs+"):
        model, _, manifest_id = obj.locator.partition("/")
        return f"{model}@sha256:{manifest_id}"
    return obj.locator if obj.source.startswith("hf://") else None


class _Work:
    """Something that takes long, reports progress, and may fail file by file."""

    def __init__(self, mount: Mount, files: list[tuple[str, Node]]) -> None:
        self._mount = mount
        self._files = files
        self.done_bytes = 0
        self.path = ""

    async def run(self) -> None:
        raise NotImplementedError

    def report(self, *, done: bool) -> Json:
        raise NotImplementedError


async def _with_progress(work: _Work, nursery: trio.Nursery) -> AsyncIterator[Json]:
    """Run work in `nursery`, yielding its reports; closing the iterator cancels it. Raises what the work raised."""
    scope, finished = trio.CancelScope(), trio.Event()
    failure: list[MfsError] = []

    async def run() -> None:
        try:
            with scope:
                await work.run()
        except MfsError as error:
            failure.append(error)
        finally:
            finished.set()

    nursery.start_soon(run)
    try:
        while not finished.is_set():
            with trio.move_on_after(_PROGRESS_S):
                await finished.wait()
            if not finished.is_set():
                yield work.report(done=False)
        if failure:
            raise failure[0]
        yield work.report(done=True)
    finally:
        scope.cancel()


class _Prefetch(_Work):
    """Brings files into a tier, several chunks at once, in the order of the files."""

    def __init__(self, mount: Mount, files: list[tuple[str, Node]], tier: Tier) -> None:
        super().__init__(mount, files)
        self._tier = tier
        self._failed: dict[str, str] = {}

    def report(self, *, done: bool) -> Json:
        total = sum(node.size for _, node in self._files)
        report: Json = {"total_bytes": total, "done_bytes": self.done_bytes, "files_count": len(self._files)}
        if done:
            failed = [{"path": path, "error": error} for path, error in self._failed.items()]
            return report | {"done": True, "failed": failed}
        return report | {"path": self.path}

    async def run(self) -> None:
        limiter = trio.CapacityLimiter(max(1, self._mount.config.connections_count - 2))
        async with trio.open_nursery() as nursery:
            for path, node in self._files:
                if node.object is None or not node.size:
                    continue
                self.path = path
                state = self._mount.cache.open(node.object, node.source)
                try:
                    masks = await self._ssd_masks(state)
                    for index in range(node.object.chunks_count):
                        if path in self._failed:
                            break
                        if masks is not None and masks[index] == full_mask(len(node.object.chunk_range(index))):
                            self.done_bytes += len(node.object.chunk_range(index))
                            continue
                        await limiter.acquire_on_behalf_of((state, index))
                        state.users += 1
                        nursery.start_soon(self._bring, path, state, index, limiter)
                finally:
                    self._mount.cache.close(state)
        if self._tier == "ssd":
            await self._seal()

    async def _seal(self) -> None:
        """Have what is complete now read once and given to the kernel: whoever waits finds it as fast as it gets."""
        for path, node in self._files:
            if node.object is not None and path not in self._failed:
                state = self._mount.cache.open(node.object, node.source)
                try:
                    await self._mount.whole_files.seal(state)
                finally:
                    self._mount.cache.close(state)

    async def _ssd_masks(self, state: ObjectState) -> list[int] | None:
        """What the SSD tier has already; None where everything must pass through RAM."""
        if self._tier == "ram":
            return None
        masks: list[int] = (await self._mount.pool.call("masks", obj=state.wire))["masks"]
        return masks

    async def _bring(self, path: str, state: ObjectState, index: int, limiter: trio.CapacityLimiter) -> None:
        try:
            on_ssd = await self._mount.cache.bring(state, index, to_ssd=self._tier == "ssd", keep=self._tier == "ram")
            if self._tier == "ssd" and not on_ssd:
                raise StoreError("could not be written to the SSD cache: its disk is full or fails; see the log")
            self.done_bytes += len(state.object.chunk_range(index))
        except MfsError as error:
            self._failed.setdefault(path, str(error))
        finally:
            limiter.release_on_behalf_of((state, index))
            self._mount.cache.close(state)


class _Verify(_Work):
    """Re-reads what the SSD tier has of some files."""

    def __init__(self, mount: Mount, files: list[tuple[str, Node]]) -> None:
        super().__init__(mount, files)
        self._checked = 0
        self._bad: list[Json] = []

    def report(self, *, done: bool) -> Json:
        total = sum(node.size for _, node in self._files)
        if done:
            return {"done": True, "checked_bytes": self._checked, "bad": self._bad}
        return {"total_bytes": total, "done_bytes": self.done_bytes, "files_count": len(self._files), "path": self.path}

    async def run(self) -> None:
        for path, node in self._files:
            self.path = path
            if node.object is None:
                continue
            before = self.done_bytes

            def on_part(part: dict[str, Any], before: int = before) -> None:
                self.done_bytes = before + part.get("checked_bytes", 0)

            result = await self._mount.pool.call(
                "verify", obj=object_to_wire(node.object), on_part=on_part, timeout_s=float("inf")
            )
            if result["bad"]:  # RAM may hold the same bytes: what stays leased there is at least written anew
                self._mount.cache.evict(node.object, node.source)
                self._mount.whole_files.lost_object(node.object.cache_id)
            self._checked += result["checked_bytes"]
            self.done_bytes = before + node.size
            self._bad += [{"path": path, "chunk": chunk, "reason": reason} for chunk, reason in result["bad"]]
