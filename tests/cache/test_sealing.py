"""Sealed objects: whole, verified as they stand on the disk, and for who has them open never anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mfs.cache import sealing
from mfs.cache.chunks import full_mask
from mfs.cache.residency import ResidencyTables
from mfs.cache.sealing import is_sealed, open_sealed, scrub, seal
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ObjectId
from mfs.workers.frames import Frame, object_to_wire
from mfs.workers.jobs import Jobs
from mfs.workers.tier import Tier
from tests.cache.objectfiles import (
    cached_pages,
    content,
    data_path,
    flip,
    make_object,
    make_slot,
    make_tier,
    sums_path,
    write_chunk,
)


@pytest.fixture
def tier(tmp_path: Path) -> SsdTier:
    return make_tier(tmp_path)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    opened = Tier(SsdConfig(tmp_path))
    opened.start(lenient=False)
    return Jobs([], opened)


def written(tier: SsdTier, name: str = "model.bin", size: int = 2 * CHUNK_BYTES + 5 * BLOCK_BYTES + 777) -> ObjectId:
    """A complete object, in the tables too."""
    obj = make_object(name, size)
    tables = ResidencyTables(tier.config.directory, writable=True)
    for index in range(obj.chunks_count):
        write_chunk(tier, obj, index, full_mask(len(obj.chunk_range(index))))
        tables.learn_chunk(tier, obj, index)
    return obj


def whole(obj: ObjectId) -> bytes:
    return b"".join(content(obj, index) for index in range(obj.chunks_count))


def no_frames(frame: Frame) -> None:
    raise AssertionError(frame)


@pytest.mark.parametrize("size", [1, 4096, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 777])
def test_a_complete_object_is_sealed_and_its_file_is_the_object(tier: SsdTier, tmp_path: Path, size: int) -> None:
    obj = written(tier, size=size)
    assert not is_sealed(tier, obj)
    assert seal(tier, obj)
    assert seal(tier, obj)
    assert is_sealed(tier, obj)
    path = data_path(tmp_path, obj)
    assert path.read_bytes() == whole(obj)
    fd = open_sealed(tier, obj)
    assert fd is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    for index in range(obj.chunks_count):
        mask = full_mask(len(obj.chunk_range(index)))
        assert tier.read_into(obj, index, mask, make_slot())[0] == mask


def test_sealing_fills_the_page_cache(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier)
    assert cached_pages(data_path(tmp_path, obj)) <= 1
    assert seal(tier, obj)
    assert cached_pages(data_path(tmp_path, obj)) == -(-obj.size // 4096)


@pytest.mark.parametrize("index", [0, 2])
def test_what_lacks_a_block_is_not_sealed(tier: SsdTier, index: int) -> None:
    obj = make_object(size=2 * CHUNK_BYTES + 5 * BLOCK_BYTES + 777)
    assert not seal(tier, obj)
    for each in range(3):
        write_chunk(tier, obj, each, full_mask(len(obj.chunk_range(each))) & ~(0b1000 if each == index else 0))
    assert not seal(tier, obj)
    assert not is_sealed(tier, obj)
    write_chunk(tier, obj, index, 0b1000)
    assert seal(tier, obj)


def test_a_damaged_block_is_dropped_and_the_object_not_sealed(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier)
    flip(data_path(tmp_path, obj), CHUNK_BYTES + 3 * BLOCK_BYTES)
    assert not seal(tier, obj)
    assert tier.mask(obj.cache_id, 1) == full_mask(CHUNK_BYTES) & ~0b1000
    write_chunk(tier, obj, 1, 0b1000)
    assert seal(tier, obj)


def test_nothing_is_written_to_what_is_sealed(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier)
    assert seal(tier, obj)
    files = data_path(tmp_path, obj), sums_path(tmp_path, obj)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    full = full_mask(CHUNK_BYTES)
    assert write_chunk(tier, obj, 0, 0b11) == full
    assert write_chunk(tier, obj, 0, 0b11, data=bytes(CHUNK_BYTES)) == full
    assert not tier.remove_if_empty(obj.cache_id)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def drop_a_chunk(tier: SsdTier, obj: ObjectId) -> None:
    assert tier.drop_chunk(obj.cache_id, 1)


def remove(tier: SsdTier, obj: ObjectId) -> None:
    tier.remove(obj.cache_id)


def read_what_is_bad(tier: SsdTier, obj: ObjectId) -> None:
    flip(sums_path(tier.config.directory, obj), 4096 + 512 + 20)
    assert tier.read_into(obj, 1, 1, make_slot()) == (0, {})


@pytest.mark.parametrize("end", [drop_a_chunk, remove, read_what_is_bad])
def test_who_has_it_open_keeps_it_however_it_goes(
    tier: SsdTier, tmp_path: Path, end: Callable[[SsdTier, ObjectId], None]
) -> None:
    obj = written(tier)
    assert seal(tier, obj)
    fd = open_sealed(tier, obj)
    assert fd is not None
    end(tier, obj)
    assert not data_path(tmp_path, obj).exists()
    assert not sums_path(tmp_path, obj).exists()
    assert open_sealed(tier, obj) is None
    again = written(tier)  # another file under the name
    assert os.pread(fd, obj.size + 1, 0) == whole(obj)
    assert open_sealed(tier, again) is None
    os.close(fd)


# -- only the very file that was sealed


def write_to(path: Path) -> None:
    flip(path, 100)


def put_a_copy(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    copy.rename(path)


@pytest.mark.parametrize(("befall", "is_good"), [(write_to, False), (put_a_copy, True)])
def test_another_file_in_its_place_is_verified_anew_first(
    tier: SsdTier, tmp_path: Path, befall: Callable[[Path], None], is_good: bool
) -> None:
    obj = written(tier)
    assert seal(tier, obj)
    befall(data_path(tmp_path, obj))
    assert open_sealed(tier, obj) is None
    assert not is_sealed(tier, obj)
    assert seal(tier, obj) is is_good
    assert is_sealed(tier, obj) is is_good
    assert data_path(tmp_path, obj).exists() is is_good  # a bad one goes whole, its readers keep what they have


def test_a_file_of_another_length_is_no_object(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier)
    assert seal(tier, obj)
    os.truncate(data_path(tmp_path, obj), obj.size - 1)
    assert open_sealed(tier, obj) is None
    assert not data_path(tmp_path, obj).exists()


def test_what_changes_while_it_is_verified_is_not_sealed(tier: SsdTier, monkeypatch: pytest.MonkeyPatch) -> None:
    obj, verify = written(tier), sealing._verify

    def evict_and_bring_again(*arguments: object) -> int:
        bad = verify(*arguments)  # type: ignore[arg-type]
        tier.drop_chunk(obj.cache_id, 0)
        write_chunk(tier, obj, 0, full_mask(CHUNK_BYTES))
        return bad

    with monkeypatch.context() as patch:
        patch.setattr(sealing, "_verify", evict_and_bring_again)
        assert not seal(tier, obj)
    assert seal(tier, obj)


# -- scrubbing


def test_scrubbing_finds_what_went_bad_and_leaves_the_page_cache_alone(tier: SsdTier, tmp_path: Path) -> None:
    good, bad, growing = (written(tier, name) for name in ("good", "bad", "growing"))
    for obj in (good, bad):
        assert seal(tier, obj)
        fd = os.open(data_path(tmp_path, obj), os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    flip(data_path(tmp_path, bad), 2 * CHUNK_BYTES + 5 * BLOCK_BYTES + 700)
    assert scrub(tier, good.cache_id) == (good.size, False)
    assert cached_pages(data_path(tmp_path, good)) == 0
    assert scrub(tier, bad.cache_id) == (2 * CHUNK_BYTES, True)
    assert not data_path(tmp_path, bad).exists()
    assert scrub(tier, growing.cache_id) == (0, False)
    assert scrub(tier, "f" * 40) == (0, False)


# -- as jobs


def test_the_jobs_say_where_a_sealed_file_stands(tier: SsdTier, jobs: Jobs, tmp_path: Path) -> None:
    obj, incomplete = written(tier), make_object("incomplete.bin")
    write_chunk(tier, incomplete, 0, 1)
    wire, path = object_to_wire(obj), str(data_path(tmp_path, obj))
    masks = [full_mask(len(obj.chunk_range(index))) for index in range(obj.chunks_count)]
    assert jobs.masks(obj=wire, emit=no_frames) == {"masks": masks, "sealed": False}
    assert jobs.seal(obj=object_to_wire(incomplete), emit=no_frames) == {"sealed": False}
    assert jobs.seal(obj=wire, emit=no_frames) == {"sealed": True}
    assert jobs.masks(obj=wire, emit=no_frames) == {"masks": masks, "sealed": True}
    assert jobs.lacking(obj=wire, emit=no_frames) == {"chunks": []}
    assert jobs.lacking(obj=object_to_wire(incomplete), emit=no_frames) == {"chunks": [0, 1]}
    tier.remove(incomplete.cache_id)
    found = jobs.enforce_budget(budget_bytes=obj.size // 2, target_bytes=obj.size // 4, emit=no_frames)
    assert found == {"evicted_bytes": obj.size, "used_bytes": 0, "dropped": {obj.cache_id: [0, 1, 2]}}
    assert not Path(path).exists()
    assert jobs.masks(obj=wire, emit=no_frames) == {"masks": [0, 0, 0], "sealed": False}


def test_verify_of_a_sealed_object_removes_it_whole_and_says_so_once(tier: SsdTier, jobs: Jobs, tmp_path: Path) -> None:
    obj = written(tier)
    assert jobs.seal(obj=object_to_wire(obj), emit=no_frames)["sealed"]
    flip(data_path(tmp_path, obj), CHUNK_BYTES + 5)
    found = jobs.verify(obj=object_to_wire(obj), emit=lambda frame: None)
    assert [chunk for chunk, _ in found["bad"]] == [1]
    assert jobs.residency(objects=[object_to_wire(obj)], emit=no_frames) == {"rows": [[0, False]]}
    assert not data_path(tmp_path, obj).exists()


def test_the_scrub_goes_from_one_sealed_object_to_the_next(tier: SsdTier, jobs: Jobs, tmp_path: Path) -> None:
    objects = sorted((written(tier, f"{number}.bin", CHUNK_BYTES + 5) for number in range(4)), key=lambda o: o.cache_id)
    for obj in objects[:1] + objects[2:]:
        assert jobs.seal(obj=object_to_wire(obj), emit=no_frames)["sealed"]
    flip(data_path(tmp_path, objects[2]), 7)
    after, seen = "", []
    while True:
        step = jobs.scrub(after=after, emit=no_frames)
        after = step["cache_id"]
        if not after:
            break
        seen.append((after, step["checked_bytes"], step["bad"]))
    assert seen == [
        (objects[0].cache_id, CHUNK_BYTES + 5, False), (objects[2].cache_id, 0, True),
        (objects[3].cache_id, CHUNK_BYTES + 5, False),
    ]  # fmt: skip
    rows = jobs.residency(objects=[object_to_wire(obj) for obj in objects], emit=no_frames)["rows"]
    assert [bool(resident) for resident, _ in rows] == [True, True, False, True]


_SEALER = """
import sys
from pathlib import Path
from mfs.cache.sealing import seal
from tests.cache.objectfiles import make_object, make_tier
tier = make_tier(Path(sys.argv[1]))
print("ready", flush=True)
print(seal(tier, make_object("large.bin", int(sys.argv[2]))), flush=True)
"""


def test_processes_that_seal_the_same_object_together_all_succeed(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier, "large.bin", 8 * CHUNK_BYTES + 3)
    sealers = [
        subprocess.Popen([sys.executable, "-c", _SEALER, str(tmp_path), str(obj.size)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [sealer.communicate()[0] for sealer in sealers] == [b"ready\nTrue\n"] * 3
    assert is_sealed(tier, obj)
