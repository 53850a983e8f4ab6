"""A daemon without a file system: DaemonApi over a dictionary, for testing whoever speaks to daemons.

It passes the same suite as the real one (tests/control/suite.py). Run as a program it takes the place of
`mfs.daemon`: a FUSE mount that answers no request at all, so that whoever touches it hangs and is found out, with a
real record and socket beside it.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import trio

from mfs.config import MountConfig
from mfs.control import mountinfo, runtime
from mfs.control.api import EvictTier, Json, Tier
from mfs.control.ready import DaemonStart
from mfs.control.server import serve
from mfs.errors import ConfigError, NotFoundError
from mfs.metrics.exposition import exposed
from mfs.metrics.families import Families, Text
from mfs.types import CHUNK_BYTES


@dataclass
class FakeFile:
    """One file of the fake tree and where its bytes are."""

    size: int
    ssd_bytes: int = 0
    ram_bytes: int = 0
    pinned: bool = False
    is_bad: bool = False
    """Its SSD copy is corrupt: `verify` finds and drops it."""


class FakeDaemon:
    """DaemonApi over `files` (path -> FakeFile). Fetching is instant, except for files named in `blocked`."""

    def __init__(self, files: dict[str, FakeFile], config: MountConfig | None = None) -> None:
        self.files = files
        self.blocked: set[str] = set()
        """Paths whose prefetch never ends."""
        self.cancelled = trio.Event()
        """Set once a prefetch was cancelled."""
        self.stopped = trio.Event()
        """Set by `shutdown`."""
        self._config = config
        self._started_at = time.time()
        self._fetched_bytes = 0

    async def status(self) -> Json:
        used_ssd = sum(file.ssd_bytes for file in self.files.values())
        used_ram = sum(file.ram_bytes for file in self.files.values())
        config = self._config
        slots_count = (config.ram_bytes if config else 64 << 20) // CHUNK_BYTES
        slots_used = -(-used_ram // CHUNK_BYTES)
        return {
            "version": "0.0.0-fake",
            "pid": os.getpid(),
            "mountpoint": str(config.mountpoint) if config else "/fake",
            "started_at": self._started_at,
            "uptime_s": time.time() - self._started_at,
            "sources": [
                {"name": source.name, "url": source.url, "via": None, "is_dragonfly": False,
                 "listed_directories": len(self._directories()),
                 "last_refresh_at": self._started_at, "last_error": None}
                for source in (config.sources if config else ())
            ],
            "cache_dir": str(config.cache_dir) if config and config.cache_dir else None,
            "ssd": {
                "used_bytes": used_ssd, "budget_bytes": config.cache_bytes if config else 1 << 30,
                "free_disk_bytes": 1 << 40, "objects_count": sum(1 for f in self.files.values() if f.ssd_bytes),
                "pinned_count": 0, "pinned_bytes": 0, "sealed_count": 0, "sealed_bytes": 0,
                "state": "ok" if config and config.cache_dir else "off", "hits_bytes": 0,
                "note": None,
            },
            "ram": {
                "used_bytes": used_ram, "warm_bytes": 0, "budget_bytes": slots_count * CHUNK_BYTES,
                "slots_count": slots_count, "slots_free": slots_count - slots_used, "slots_leased": 0,
                "hits_bytes": 0, "note": "",
            },
            "origin": {"fetched_bytes": self._fetched_bytes, "shared_bytes": 0, "requests_count": 0, "errors_count": 0,
                       "inflight": 0, "cache_bytes": 0, "direct_bytes": 0, "cache_faults": 0},
            "reads": {"count": 0, "bytes": 0, "errors_count": 0, "waiting": 0},
            "open_files": 0,
            "passthrough": {"open_files": 0, "sealed_count": 0, "read_ahead_bytes": 0, "note": None},
            "prefetch": {"queued_bytes": 0, "active_objects": 0},
            "metrics_addr": None,
            "workers": [],
            "kernel": {"read_ahead_kb": None, "max_background": None, "notes": []},
            "warnings": [],
        }  # fmt: skip

    async def overview(self, *, sort: str, match: str, count: int) -> Json:
        names = sorted({path.partition("/")[0] for path in self.files})
        rows = [self._model_row(name) for name in names if match.casefold() in name.casefold()]
        rows.sort(key=lambda row: -row[f"{sort}_bytes"] if f"{sort}_bytes" in row else 0)
        return {
            "status": await self.status(),
            "models": {"count": len(names), "matched_count": len(rows), "rows": rows[:count]},
            "fetches": {"count": 0, "queued_count": 0, "rows": []},
            "waits": {},
        }

    async def heat(self, path: str) -> Json:
        rows = [
            {
                "path": name, "size": file.size, "ssd_bytes": file.ssd_bytes, "ram_bytes": file.ram_bytes,
                "pinned": file.pinned, "open_handles": 0,
                "ssd": "90"[not file.ssd_bytes], "ram": "90"[not file.ram_bytes],
            }
            for name in self._below([path]) for file in [self.files[name]]
        ]  # fmt: skip
        return {"files": rows, "left_out": 0}

    def _model_row(self, name: str) -> Json:
        files = [self.files[file] for file in self._below([name])]
        return {
            "path": name, "is_model": True, "size": sum(file.size for file in files), "files_count": len(files),
            "ssd_bytes": sum(file.ssd_bytes for file in files), "ram_bytes": sum(file.ram_bytes for file in files),
            "origin_bytes": 0, "pinned_count": sum(file.pinned for file in files), "open_count": 0,
            "fetching_count": 0, "last_used_at": 0, "waited_s": 0,
        }  # fmt: skip

    async def ls(self, path: str) -> list[Json]:
        if path in self.files:
            return [self._row(path.rpartition("/")[2], path)]
        if path not in self._directories():
            raise NotFoundError(f"{path} does not exist in this mount")
        prefix = f"{path}/" if path else ""
        rows: dict[str, Json] = {}
        for file in self.files:
            name, slash, _ = file.removeprefix(prefix).partition("/")
            if not file.startswith(prefix) or name in rows:
                continue
            rows[name] = self._directory_row(name, prefix + name) if slash else self._row(name, file)
        return [rows[name] for name in sorted(rows)]

    async def stat(self, path: str) -> Json:
        if path in self.files:
            row = self._row(path.rpartition("/")[2], path)
        elif path in self._directories():
            row = self._directory_row(path.rpartition("/")[2], path)
        else:
            raise NotFoundError(f"{path} does not exist in this mount")
        del row["name"]
        is_file = row["kind"] == "file"
        return row | {
            "path": path,
            "inode": 2 + (sorted(self.files).index(path) if is_file else len(self.files)),
            "source": "fake" if is_file else None,
            "source_path": path if is_file else None,
            "revision": "v1" if is_file else None,
            "digest": None,
            "model_revision": None,
            "chunks_count": -(-row["size"] // CHUNK_BYTES),
            "open_handles": 0,
        }

    async def loads(self, path: str) -> Json:
        return {"loads": []}

    async def latest_load(self, path: str, number: int) -> Json:
        return {"count": 0, "load": None}

    async def prefetch(self, paths: Sequence[str], tier: Tier, *, wait: bool) -> AsyncIterator[Json]:
        chosen = self._below(paths)
        total_bytes = sum(self.files[path].size for path in chosen)
        done_bytes = 0
        try:
            for path in chosen if wait else []:
                yield _progress(total_bytes, done_bytes, len(chosen), path)
                if path in self.blocked:
                    await trio.sleep_forever()
                file = self.files[path]
                self._fetched_bytes += file.size - file.ssd_bytes
                if tier == "ram":
                    file.ram_bytes = file.size
                file.ssd_bytes = file.size
                done_bytes += file.size
        except trio.Cancelled:
            self.cancelled.set()
            raise
        if not wait:
            yield _progress(total_bytes, 0, len(chosen), "")
        yield _progress(total_bytes, done_bytes, len(chosen), "") | {"done": True, "failed": []}

    async def pin(self, paths: Sequence[str]) -> Json:
        return self._set_pinned(paths, True)

    async def unpin(self, paths: Sequence[str]) -> Json:
        return self._set_pinned(paths, False)

    async def evict(self, paths: Sequence[str], tier: EvictTier) -> Json:
        answer = {"files_count": 0, "ram_bytes": 0, "ssd_bytes": 0, "kept_pinned_count": 0,
                  "kept_open_count": 0}  # fmt: skip
        for path in self._below(paths):
            file = self.files[path]
            before = file.ram_bytes + file.ssd_bytes
            if tier in ("ram", "all"):
                answer["ram_bytes"] += file.ram_bytes
                file.ram_bytes = 0
            if tier in ("ssd", "all") and file.ssd_bytes:
                if file.pinned:
                    answer["kept_pinned_count"] += 1
                else:
                    answer["ssd_bytes"] += file.ssd_bytes
                    file.ssd_bytes = 0
            answer["files_count"] += file.ram_bytes + file.ssd_bytes < before
        return answer

    async def refresh(self) -> Json:
        return {"changed_count": 0, "added_count": 0, "removed_count": 0, "errors": []}

    async def verify(self, paths: Sequence[str]) -> AsyncIterator[Json]:
        chosen = self._below(paths)
        total_bytes = sum(self.files[path].ssd_bytes for path in chosen)
        checked_bytes, bad = 0, []
        for path in chosen:
            yield _progress(total_bytes, checked_bytes, len(chosen), path)
            file = self.files[path]
            checked_bytes += file.ssd_bytes
            if file.is_bad and file.ssd_bytes:
                bad.append({"path": path, "chunk": 0, "reason": "checksum mismatch"})
                file.ssd_bytes, file.is_bad = 0, False
        yield {"done": True, "checked_bytes": checked_bytes, "bad": bad}

    async def watch(self) -> AsyncIterator[Json]:
        while True:
            yield {"at_s": time.monotonic(), "records": [], "dropped_count": 0}
            await trio.sleep(0.05)

    async def metrics(self, accept: str) -> Text:
        families = Families()
        families.info("mfs_build", "What serves.", {"version": "0.0.0-fake"})
        return exposed(families.found, accept)

    async def config(self) -> Json:
        return self._config.masked() if self._config else {}

    async def shutdown(self) -> Json:
        self.stopped.set()
        return {"pid": os.getpid()}

    def _row(self, name: str, path: str) -> Json:
        file = self.files[path]
        return {
            "name": name, "kind": "file", "size": file.size, "mtime": 1_700_000_000.0, "ssd_bytes": file.ssd_bytes,
            "ram_bytes": file.ram_bytes, "pinned": file.pinned,
        }  # fmt: skip

    def _directory_row(self, name: str, path: str) -> Json:
        files = [self.files[file] for file in self._below([path])]
        return {
            "name": name, "kind": "directory", "size": sum(file.size for file in files), "mtime": 1_700_000_000.0,
            "ssd_bytes": sum(file.ssd_bytes for file in files), "ram_bytes": sum(file.ram_bytes for file in files),
            "pinned": all(file.pinned for file in files),
        }  # fmt: skip

    def _set_pinned(self, paths: Sequence[str], pinned: bool) -> Json:
        chosen = self._below(paths)
        for path in chosen:
            self.files[path].pinned = pinned
        return {"files_count": len(chosen), "bytes": sum(self.files[path].size for path in chosen)}

    def _below(self, paths: Sequence[str]) -> list[str]:
        chosen: dict[str, None] = {}
        for path in paths:
            found = [file for file in self.files if file == path or not path or file.startswith(f"{path}/")]
            if not found and path:
                raise NotFoundError(f"{path} does not exist in this mount")
            chosen |= dict.fromkeys(found)
        return list(chosen)

    def _directories(self) -> set[str]:
        parents = {""}
        for file in self.files:
            while file := file.rpartition("/")[0]:
                parents.add(file)
        return parents


def _progress(total_bytes: int, done_bytes: int, files_count: int, path: str) -> Json:
    return {"total_bytes": total_bytes, "done_bytes": done_bytes, "files_count": files_count, "path": path}


def example_files() -> dict[str, FakeFile]:
    """A small tree with a bit of everything."""
    return {
        "llama/config.json": FakeFile(712, ssd_bytes=712),
        "llama/model-00001-of-00002.safetensors": FakeFile(9 << 20, ssd_bytes=4 << 20, ram_bytes=4 << 20),
        "llama/model-00002-of-00002.safetensors": FakeFile(5 << 20),
        "minilm/model.safetensors": FakeFile(3 << 20, ssd_bytes=3 << 20, pinned=True),
        "minilm/naïve name\u202e.txt": FakeFile(10),
    }


async def _run(start: DaemonStart) -> None:
    import pyfuse3

    config = MountConfig.from_json(start.config_json)
    mountpoint = str(config.mountpoint)
    if any(source.url.endswith("/unreachable") for source in config.sources):
        raise ConfigError(f"{config.sources[0].url} is unreachable: check the name and the network")
    if any(source.url.endswith("/crash") for source in config.sources):
        raise RuntimeError("a defect")
    if any(source.url.endswith("/silent") for source in config.sources):
        await trio.sleep_forever()
    cache_dir = str(config.cache_dir) if config.cache_dir else None
    urls = tuple(source.url for source in config.sources)
    record = runtime.record_of_self(
        mountpoint, cache_dir=cache_dir, log_file=str(config.log_file), started_at=time.time(), sources=urls
    )
    with runtime.registered(record) as socket_file:
        # Mounted, but pyfuse3.main() never runs: nothing answers.
        pyfuse3.init(pyfuse3.Operations(), mountpoint, {"fsname=mfs:fake", "subtype=mfs"})
        try:
            daemon = FakeDaemon(example_files(), config)
            if any(source.url.endswith("/stuck") for source in config.sources):
                daemon.blocked = set(daemon.files)
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, daemon, socket_file)
                nursery.start_soon(_stop_on_sigterm, daemon)
                nursery.start_soon(_stop_when_unmounted, daemon, mountpoint)
                start.ready(["kernel read-ahead is 128 KiB: run 'sudo something' to raise it"])
                await daemon.stopped.wait()
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.close(unmount=True)


async def _stop_on_sigterm(daemon: FakeDaemon) -> None:
    import signal

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            daemon.stopped.set()


async def _stop_when_unmounted(daemon: FakeDaemon, mountpoint: str) -> None:
    """A real daemon notices in its FUSE loop; this one asks the table of mounts, which can be polled."""
    await trio.to_thread.run_sync(_wait_until_unmounted, mountpoint, abandon_on_cancel=True)
    daemon.stopped.set()


def _wait_until_unmounted(mountpoint: str) -> None:
    with open("/proc/self/mountinfo") as table:
        poll = select.poll()
        poll.register(table, select.POLLPRI | select.POLLERR)
        while mountinfo.mount_at(mountpoint) is not None:
            poll.poll()


def main() -> None:
    start = DaemonStart.receive(sys.argv[1:])
    try:
        trio.run(_run, start)
    except ConfigError as error:
        start.failed(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
