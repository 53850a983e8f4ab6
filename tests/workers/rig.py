"""A worker pool with real processes over a folder, for tests of the pool and of the cache that stands on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from mfs.cache.chunk_cache import CacheConfig, ChunkCache
from mfs.cache.pieces import Piece
from mfs.cache.ram import SLOTS_COUNT_MIN, RamConfig, RamFile, RamTier
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.errors import MfsError
from mfs.testing import ramp
from mfs.types import CHUNK_BYTES, ObjectId
from mfs.workers.pool import PoolConfig, WorkerPool

_SITE = Path(__file__).parent / "faulty_site"
FAULTY_PATH = f"{_SITE}:{Path(__file__).parents[2]}"
"""PYTHONPATH of workers whose sources may be faulty; see `faulty_url`."""


@dataclass
class Rig:
    """Files of an origin, a cache directory, and what runs between them."""

    origin: Path
    cache_dir: Path
    memory: RamTier
    pool: WorkerPool
    cache: ChunkCache
    contents: dict[ObjectId, bytes] = field(default_factory=dict)
    files: dict[ObjectId, RamFile] = field(default_factory=dict)
    """In RAM, for orders that no cache gives."""

    def put(self, name: str, data: bytes) -> ObjectId:
        """A file of the origin, written beside its place so that its inode is new; returns its version."""
        path = self.origin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_bytes(data)
        temporary.rename(path)
        status = path.stat()
        version = f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
        obj = ObjectId(f"file://{self.origin}", name, len(data), version)
        self.contents[obj] = data
        return obj

    def put_ramp(self, name: str, size: int, start: int = 0) -> ObjectId:
        return self.put(name, ramp(size, start))

    def piece(self, obj: ObjectId, index: int) -> Piece:
        """A chunk's place in RAM, for an order that no cache gives."""
        if obj not in self.files:
            self.files[obj] = self.memory.open(obj.size)
        return Piece(self.files[obj].fd, index * CHUNK_BYTES, len(obj.chunk_range(index)))

    def in_ram(self, obj: ObjectId, index: int) -> memoryview:
        """What stands there."""
        span = obj.chunk_range(index)
        return self.files[obj].view(span.start, span.stop)

    @property
    def faults(self) -> Path:
        """The folder where a faulty origin looks for what it shall do wrong."""
        return Path(f"{self.origin}.faults")

    def gate(self, model: str = "") -> Path:
        """Make the origin's reads, all or those of one model, wait until the file returned is gone."""
        gate = self.faults / (f"gate-{model}" if model else "gate")
        gate.touch()
        return gate

    def fail(self, count: int, error: type[MfsError]) -> None:
        """Make the next `count` reads of the origin fail."""
        for number in range(count):
            (self.faults / f"fail-{number}").write_text(error.__name__)

    def origin_reads(self) -> list[tuple[str, int, int]]:
        """(path, start, stop) of all reads the origin has seen."""
        log = self.faults / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(path, int(start), int(stop)) for path, start, stop in (line.split() for line in lines)]

    @property
    def ssd(self) -> SsdTier:
        """The SSD tier as another process of the same machine has it."""
        return SsdTier(SsdConfig(self.cache_dir))

    def object_file(self, obj: ObjectId) -> Path:
        return self.ssd.files.path(obj.cache_id)

    def ssd_mask(self, obj: ObjectId, index: int) -> int:
        """The blocks of a chunk that stand on SSD, by its sidecar."""
        return self.ssd.mask(obj.cache_id, index)

    def assert_idle(self) -> None:
        """Every gauge at rest, every slot free or in a chunk nobody holds."""
        assert self.cache.leases_count == 0
        assert self.cache.fills_count == 0
        for lane in ("origin", "ssd", "disk", "control"):
            assert self.pool.inflight(lane) == 0, lane
            assert self.pool.queued(lane) == 0, lane
        assert self.cache.slots.coming.count == 0
        assert self.memory.slots_used == len(self.cache.slots.chunks)
        assert self.memory.slots_free == self.memory.slots_count - self.memory.slots_used
        assert all(chunk.idle and chunk.valid for chunk in self.cache.slots.chunks)
        assert self.cache.unread_count == sum(chunk.unread for chunk in self.cache.slots.chunks)
        held = {chunk.state for chunk in self.cache.slots.chunks}
        own = self.memory._objects - set(self.files.values()) - {self.memory._common}
        assert own == {chunk.place.file for chunk in self.cache.slots.chunks if chunk.is_own}
        assert all(state in held or state.users for state in self.cache._states.values())


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Wait for something another process does, asking again and again."""
    with trio.move_on_after(timeout_s):
        while not condition():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"{what}: not within {timeout_s} s")


def process_state(pid: int) -> str:
    """'R', 'S', 'T' ... of a process, '' if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


@contextlib.asynccontextmanager
async def running_rig(
    directory: Path, *, ssd: bool = True, slots_count: int = SLOTS_COUNT_MIN, timeout_s: float = 20,
    cache_dir: Path | None = None, **pool_limits: int,
) -> AsyncIterator[Rig]:  # fmt: skip
    """Everything below the mount, running; torn down in the end, whatever happened."""
    origin = directory / "origin"
    origin.mkdir(exist_ok=True)
    Path(f"{origin}.faults").mkdir(exist_ok=True)
    os.environ["PYTHONPATH"] = FAULTY_PATH  # conftest puts the environment back after the test
    cache_dir = cache_dir or directory / "cache"
    memory = RamTier(RamConfig(slots_count * CHUNK_BYTES))
    try:
        setup = {
            "sources": [{"url": f"faulty://{origin}", "options": {}}],
            "cache_dir": str(cache_dir) if ssd else None,
            "cache_fsync": False,
            "log_level": "WARNING",
        }
        pool = WorkerPool(PoolConfig(setup, **pool_limits))
        async with pool.running():
            yield Rig(origin, cache_dir, memory, pool, ChunkCache(CacheConfig(timeout_s, ssd), memory, pool))
        for lane in ("origin", "ssd", "disk", "control"):
            assert pool.inflight(lane) == 0
    finally:
        memory.close()


@contextlib.contextmanager
def raises_inside(kind: type[Exception], match: str) -> Iterator[None]:
    """`pytest.raises` for what comes out of nurseries, wrapped once per nursery."""
    with pytest.raises(kind, match=match):  # noqa: PT012
        try:
            yield
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                [error] = error.exceptions
            raise error from None
