"""Chunks that the SSD tier has in some file: found there by every worker, never trusted, and missed without harm."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.cache.chunk_places import ChunkPlaces
from mfs.cache.directory import root_of
from mfs.cache.ssd import SsdConfig
from mfs.registry.folder_store import FolderStore
from mfs.registry.source import RegistrySource
from mfs.sources import open_source
from mfs.testing.suite import list_tree, object_of
from mfs.types import CHUNK_BYTES, ObjectId
from mfs.workers.frames import Frame, object_to_wire
from mfs.workers.jobs import Jobs
from mfs.workers.replies import Replies
from mfs.workers.resident import NodeChunks
from mfs.workers.tier import Tier
from tests.cache.objectfiles import make_slot
from tests.registry import made

SIZE = (5 << 20) + 77
BASE = random.Random(1).randbytes(SIZE)
TUNE = b"other beginning" + BASE[:3_000_000] + os.urandom(500_000) + BASE[3_500_000:]
CUTS = {"base": [1_500_000, 3_000_000, 3_500_000], "tune": [15, 1_500_015, 3_000_015, 3_500_015]}


class Worker:
    """What one worker process has."""

    def __init__(self, url: str, cache: Path) -> None:
        self.source = open_source(url)
        self.tier = Tier(SsdConfig(cache))
        self.tier.start(lenient=False)
        self.chunks = NodeChunks(self.tier, ChunkPlaces(cache))
        assert isinstance(self.source, RegistrySource)
        self.source.take_from(self.chunks)
        self.jobs = Jobs([self.source], self.tier, Replies())

    def object(self, path: str) -> ObjectId:
        return object_of(self.source, path, list_tree(self.source)[path])

    def bring(self, path: str, index: int) -> tuple[bytes, Frame]:
        """Fill a chunk of the cache and save it, as the daemon has it done."""
        obj, slot = self.object(path), make_slot()
        length = len(obj.chunk_range(index))
        mask = (1 << -(-length // (128 << 10))) - 1
        wire = object_to_wire(obj)
        found = self.jobs.fill(source=0, obj=wire, index=index, mask=mask, piece=slot, deadline_s=made.soon(),
                               replies={}, emit=lambda part: None)  # fmt: skip
        sums = [[block, checksum] for block, checksum in found["sums"]]
        self.jobs.persist(obj=wire, index=index, sums=sums, piece=slot, emit=lambda part: None)
        return bytes(slot[:length]), found

    def bring_all(self, path: str) -> tuple[bytes, int, int]:
        """All chunks: their bytes, how many came from the origin, and how many from other files."""
        parts = [self.bring(path, index) for index in range(self.object(path).chunks_count)]
        return (b"".join(content for content, _ in parts), sum(found["origin_bytes"] for _, found in parts),
                sum(found["shared_bytes"] for _, found in parts))  # fmt: skip


@pytest.fixture
def registry(tmp_path: Path) -> made.Registry:
    registry = made.Registry(FolderStore(str(tmp_path / "registry")))
    registry.push("m", "v1", {"base": BASE, "tune": TUNE}, cuts=CUTS)
    return registry


@pytest.fixture
def worker(registry: made.Registry, tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(f"mfs+file://{tmp_path}/registry/m:v1", tmp_path / "cache")
    yield worker
    worker.source.close()


@pytest.fixture
def other(registry: made.Registry, tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(f"mfs+file://{tmp_path}/registry", tmp_path / "cache")
    yield worker
    worker.source.close()


def test_another_worker_takes_from_the_first_ones_file(worker: Worker, other: Worker) -> None:
    content, origin_bytes, shared_bytes = worker.bring_all("base")
    assert content == BASE
    assert (origin_bytes > SIZE, shared_bytes) == (True, 0)
    content, origin_bytes, shared_bytes = other.bring_all("m/v1/tune")
    assert content == TUNE
    assert 500_015 <= origin_bytes < 700_000
    assert shared_bytes == len(TUNE) - 500_015


def test_what_is_damaged_on_the_disk_is_fetched(worker: Worker, other: Worker) -> None:
    worker.bring_all("base")
    path = worker.tier.require()[0].files.path(worker.object("base").cache_id)
    with path.open("r+b") as file:
        file.seek(200_000)
        file.write(bytes(200_000))
    content, origin_bytes, _ = other.bring_all("m/v1/tune")
    assert content == TUNE
    assert 500_015 + 1_500_000 <= origin_bytes < 2_300_000, "the chunk that lies there, and no other"


def test_blocks_that_are_right_and_no_chunk_of_that_name_are_fetched(worker: Worker, other: Worker) -> None:
    """A table that lies: it says of another file's bytes that they are the chunk."""
    worker.bring_all("base")
    index = root_of(worker.tier.require()[0].config.directory) / "chunks.index"
    body = bytearray(index.read_bytes())
    rows = int.from_bytes(body[16:24], "little")
    starts = len(body) - 12 * rows
    for row in range(rows):
        place = starts + 8 * row
        body[place : place + 8] = (int.from_bytes(body[place : place + 8], "little") ^ 4_096).to_bytes(8, "little")
    index.write_bytes(body)
    content, origin_bytes, shared_bytes = other.bring_all("m/v1/tune")
    assert content == TUNE
    assert (origin_bytes >= SIZE, shared_bytes) == (True, 0)


def test_what_was_evicted_is_fetched(worker: Worker, other: Worker) -> None:
    worker.bring_all("base")
    worker.jobs.evict(objects=[object_to_wire(worker.object("base"))], emit=lambda part: None)
    content, origin_bytes, shared_bytes = other.bring_all("m/v1/tune")
    assert content == TUNE
    assert (origin_bytes >= SIZE, shared_bytes) == (True, 0)


def test_a_file_that_repeats_itself_is_fetched_once(registry: made.Registry, worker: Worker) -> None:
    part = os.urandom(CHUNK_BYTES)
    registry.push("m", "v1", {"twice": part * 2}, chunk_bytes=CHUNK_BYTES)
    content, origin_bytes, shared_bytes = worker.bring_all("twice")
    assert content == part * 2
    assert (origin_bytes < CHUNK_BYTES + 10_000, shared_bytes) == (True, CHUNK_BYTES)


def test_what_is_copied_counts_as_used_where_it_was(worker: Worker, other: Worker) -> None:
    worker.bring_all("base")
    tables = worker.tier.require()[1]
    row = tables.find(worker.object("base").cache_id)
    assert row is not None
    first = int(tables._objects[row, 3])
    tables._chunks[first : first + 2, 1] = 1
    other.bring_all("m/v1/tune")
    assert (tables._chunks[first : first + 2, 1] > 1).all()
