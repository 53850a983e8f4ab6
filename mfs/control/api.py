"""What the daemon can be asked to do: the one list of control operations, with their shapes.

`control.server` turns HTTP into calls of this protocol, `control.client` turns calls into HTTP; the daemon
(`mfs.daemon`) implements it. Paths are relative to the mount's root, '/'-separated, '' is the root.
All dicts are plain JSON values; byte counts are integers in bytes, times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, Protocol

from mfs.metrics.families import Text

Json = dict[str, Any]
Tier = Literal["ssd", "ram"]
EvictTier = Literal["ssd", "ram", "all"]


class DaemonApi(Protocol):
    """One mounted tree. Methods raise mfs.errors; the server maps them to HTTP statuses by class name."""

    async def status(self) -> Json:
        """Everything a person looks at first.

        {version, pid, mountpoint, started_at, uptime_s, sources: [{name, url, via: the cache that is asked first, or
        None, is_dragonfly, listed_directories, last_refresh_at, last_error}], tree: {files_count, bytes} of the
        directories listed so far, cache_dir, ssd: {used_bytes, budget_bytes, free_disk_bytes, objects_count,
        pinned_count, pinned_bytes, sealed_count, sealed_bytes: whole and verified, state, hits_bytes},
        ram: {used_bytes, warm_bytes: memory kept ready for what comes, beside that, budget_bytes, slots_count,
        slots_free, slots_leased, hits_bytes, note},
        origin: {fetched_bytes, shared_bytes, requests_count, errors_count, inflight; of sources that have a cache,
        cache_bytes came through it and direct_bytes past it, and it failed cache_faults times}, reads: {count, bytes,
        errors_count, waiting}, open_files, passthrough: {open_files: read by the kernel itself, sealed_count: became
        whole on SSD since the start, note: why the kernel reads none}, prefetch: {queued_bytes, active_objects},
        metrics_addr, workers: [{pid, inflight, restarts}], kernel: {read_ahead_kb, max_background, notes: [str]},
        warnings: [str]}
        """
        ...

    async def overview(self, *, sort: str, match: str, count: int) -> Json:
        """What `mfs top` and the page show once a second: {status: as above, models, fetches, waits}.

        models: {count: all there are, matched_count: with `match` in their path, rows: the first `count` of these by
        `sort`, each {path, is_model: False for the files beside the models, size: None where nobody has looked yet,
        files_count, ssd_bytes, ram_bytes, origin_bytes: fetched for it since the start, pinned_count, open_count,
        fetching_count, last_used_at, waited_s: that its readers have waited since somebody looks}}. Of the SSD tier
        they may be some seconds old where there are many.
        fetches: {count, queued_count, rows: the oldest, each {path, start, stop, since_s, ahead: nobody waits for it,
        from: 'origin' | 'ssd'}}. waits: {cause: {count, seconds}} of readers, likewise.
        """
        ...

    async def heat(self, path: str) -> Json:
        """Which parts of the files at and below a path are where: {files: [{path, size, ssd_bytes, ram_bytes, pinned,
        open_handles, ssd: strip, ram: strip}], left_out}. A strip is a text of at most 96 digits over the length of the
        file: '0' nothing, '9' all, between them in part."""
        ...

    async def ls(self, path: str) -> list[Json]:
        """[{name, kind: 'file'|'directory'|'symlink', size, mtime, ssd_bytes, ram_bytes, pinned}] of a directory, or
        of the one file. Of a directory in it: sums over the files below, as far as somebody has listed it; pinned: all
        of them."""
        ...

    async def stat(self, path: str) -> Json:
        """{path, kind, size, mtime, inode, source, source_path, revision, digest, model_revision: 'model@sha256:…' in a
        registry, a Hub's commit, else None; ssd_bytes, ram_bytes, pinned, chunks_count, open_handles}. Of a directory
        as in `ls`."""
        ...

    async def loads(self, path: str) -> Json:
        """The last loads of the models at, below or around a path, oldest first; see `mfs.loads`.

        {loads: [{model, began_at, began_s: the same on the machine's monotonic clock, seconds, is_over, files_count,
        phases: {open, header, origin, ssd, decode, slot, share, page_cache, other}: seconds, which add up to `seconds`;
        reads: [{at: seconds after the beginning, waited_s, on: a phase, path, start, stop}]: of those that waited the
        longest, in order; waits_count, left_out: how many more there were; strip: {step_s, phases: [what most of each
        step went to]}; bytes: {origin, ssd, ram}}]}
        """
        ...

    async def latest_load(self, path: str, number: int) -> Json:
        """Of `loads` the last, or that many before it. {count: of all, load: None if there are not so many}"""
        ...

    def prefetch(self, paths: Sequence[str], tier: Tier, *, wait: bool) -> AsyncIterator[Json]:
        """Bring files (directories: all below) into a tier. Yields {total_bytes, done_bytes, files_count, path} at most
        ten times a second and lastly {done: true, total_bytes, done_bytes, files_count, failed: [{path, error}]}.
        With wait=False yields the total and returns; the work goes on. Closing the iterator cancels the rest."""
        ...

    async def pin(self, paths: Sequence[str]) -> Json:
        """Protect from SSD eviction (does not fetch). {files_count, bytes}"""
        ...

    async def unpin(self, paths: Sequence[str]) -> Json: ...

    async def evict(self, paths: Sequence[str], tier: EvictTier) -> Json:
        """Drop what is resident and neither pinned nor leased.

        {files_count, ram_bytes, ssd_bytes, kept_pinned_count, kept_open_count}
        """
        ...

    async def refresh(self) -> Json:
        """List the sources again and publish the new tree. {changed_count, added_count, removed_count, errors: [..]}"""
        ...

    def verify(self, paths: Sequence[str]) -> AsyncIterator[Json]:
        """Re-read and re-hash what the SSD holds; drop what is bad. Progress as in `prefetch`, lastly {done: true,
        checked_bytes, bad: [{path, chunk, reason}]}"""
        ...

    def watch(self) -> AsyncIterator[Json]:
        """What readers do, from the first item on and until the iterator is closed. Yields several times a second
        {at_s, records: [see mfs.oplog], dropped_count}: at_s is the monotonic clock, all records before it and not yet
        yielded are in this item unless it has 500; dropped_count counts those lost so far to a slow watcher."""
        ...

    async def config(self) -> Json:
        """The effective settings, secrets masked."""
        ...

    async def metrics(self, accept: str) -> Text:
        """What Prometheus is told: version 0.0.4, or OpenMetrics 1.0 where `accept` says so (RFC 9110 §12.5.1)."""
        ...

    async def shutdown(self) -> Json:
        """Unmount and stop, after the answer is sent. {pid}"""
        ...
