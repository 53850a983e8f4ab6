"""Sealed objects: whole, on the disk as they were checked, and for who has them open never anything else."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mfs.cache import eras, page_cache
from mfs.cache.chunks import full_mask
from mfs.cache.object_files import OpenObject
from mfs.cache.residency import ResidencyTables
from mfs.cache.sealing import is_sealed, open_sealed, scrub, seal
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ObjectId
from mfs.workers.frames import Frame, object_to_wire
from mfs.workers.jobs import Jobs
from mfs.workers.replies import Replies
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
    return Jobs([], opened, Replies())


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


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The chunks that sealing has read and verified."""
    seen, read = list[int](), SsdTier.read_verified

    def counted(self: SsdTier, found: OpenObject, index: int, *arguments: Any) -> tuple[int, dict[int, int]]:
        seen.append(index)
        return read(self, found, index, *arguments)

    monkeypatch.setattr(SsdTier, "read_verified", counted)
    return seen


def begin_another_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart of the machine."""
    monkeypatch.setattr(eras, "_boot_id", lambda: b"another")


def rot(path: Path, offset: int) -> None:
    """Change a byte as a disk does it, not a program: the file's time stays."""
    before = path.stat()
    flip(path, offset)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class TestWithoutReading:
    """What was written in this life of the machine and of the mount, and by nobody else since, is not read."""

    def test_what_was_just_written(self, tier: SsdTier, tmp_path: Path, reads: list[int]) -> None:
        obj = written(tier)
        write_chunk(tier, obj, 1, full_mask(CHUNK_BYTES))  # as it stands: changes nothing
        assert seal(tier, obj, may_read=False)
        assert not reads
        assert cached_pages(data_path(tmp_path, obj)) <= 1  # the end, which is no whole page

    def test_what_is_of_an_earlier_life_is_read(
        self, tier: SsdTier, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        obj = written(tier)
        begin_another_life(monkeypatch)
        assert seal(tier, obj, may_read=False) is None
        assert not is_sealed(tier, obj)
        assert seal(tier, obj)
        assert reads == [0, 1, 2]
        assert cached_pages(data_path(tmp_path, obj)) <= 1

    def test_damage_of_an_earlier_life_is_found(
        self, tier: SsdTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        obj = written(tier)
        rot(data_path(tmp_path, obj), CHUNK_BYTES + 3 * BLOCK_BYTES)
        begin_another_life(monkeypatch)
        assert seal(tier, obj) is False
        assert tier.mask(obj.cache_id, 1) == full_mask(CHUNK_BYTES) & ~0b1000

    def test_only_the_chunks_of_an_earlier_life_are(
        self, tier: SsdTier, reads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        obj = make_object(size=3 * CHUNK_BYTES)
        full = full_mask(CHUNK_BYTES)
        write_chunk(tier, obj, 0, full)
        write_chunk(tier, obj, 1, full & ~1)
        begin_another_life(monkeypatch)
        write_chunk(tier, obj, 1, 1)
        write_chunk(tier, obj, 2, full)
        assert seal(tier, obj)
        assert reads == [0, 1]

    def test_all_is_read_where_somebody_else_wrote_last(self, tier: SsdTier, tmp_path: Path, reads: list[int]) -> None:
        obj = written(tier)
        os.utime(data_path(tmp_path, obj))
        assert seal(tier, obj)
        assert reads == [0, 1, 2]

    def test_all_is_read_where_the_kernel_does_not_tell_one_mount_from_the_next(
        self, tier: SsdTier, reads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(eras, "_statx", lambda: None)
        assert seal(tier, written(tier))
        assert reads == [0, 1, 2]

    def test_a_chunk_that_was_found_bad_is_read_again(self, tier: SsdTier, tmp_path: Path, reads: list[int]) -> None:
        """Where one block was damaged others may be."""
        obj = written(tier)
        rot(data_path(tmp_path, obj), CHUNK_BYTES + 3 * BLOCK_BYTES)
        assert tier.read_into(obj, 1, 0b1000, make_slot())[0] == 0
        write_chunk(tier, obj, 1, 0b1000)
        reads.clear()
        assert seal(tier, obj)
        assert reads == [1]

    def test_another_mount_of_the_file_system_is_another_life(self, tmp_path: Path, reads: list[int]) -> None:
        """What a disk had not been forced to keep may be gone when it comes back."""
        device, tree = tmp_path / "device", tmp_path / "tree"
        device.write_bytes(b"")
        os.truncate(device, 64 << 20)
        tree.mkdir()
        with disk(device, tree):
            obj = written(make_tier(tree))
        with disk(device, tree, make=False):
            assert seal(make_tier(tree), obj)
        assert reads == [0, 1, 2]


@contextlib.contextmanager
def disk(device: Path, tree: Path, *, make: bool = True) -> Iterator[None]:
    """A file as a disk, mounted meanwhile."""
    for command in (["mkfs.ext4", "-q", str(device)], ["mount", "-o", "loop", str(device), str(tree)])[not make :]:
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            pytest.skip(f"{command[0]} does not work here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(tree)], check=True)


_KILLED = """
import os, signal, sys
from pathlib import Path
from mfs.cache import sealing, sidecar
from tests.cache.objectfiles import make_object, make_tier
def die(header):
    os.kill(os.getpid(), signal.SIGKILL)
sidecar.encode_header = die
sealing.seal(make_tier(Path(sys.argv[1])), make_object(size=int(sys.argv[2])))
"""


def test_who_is_killed_between_forcing_and_marking_has_sealed_nothing(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path), str(obj.size)])
    assert done.returncode == -signal.SIGKILL
    assert not is_sealed(tier, obj)
    assert seal(tier, obj, may_read=False)
    assert data_path(tmp_path, obj).read_bytes() == whole(obj)


def fails(code: int) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_what_cannot_be_forced_to_the_disk_is_dropped(
    tier: SsdTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says so once, and forgets what it could not write."""
    obj = written(tier)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails(errno.EIO))
        assert not seal(tier, obj)
    assert not data_path(tmp_path, obj).exists()
    assert seal(tier, written(tier))


@pytest.mark.parametrize("step", ["pwrite", "fdatasync"])
def test_a_mark_that_the_disk_does_not_take_costs_the_seal_alone(
    tier: SsdTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    obj = written(tier)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails(errno.ENOSPC))
        assert not seal(tier, obj)
    assert "cannot be sealed" in caplog.text
    assert data_path(tmp_path, obj).exists()
    assert seal(tier, obj)


def test_the_page_cache_is_filled_on_request(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier)
    assert page_cache.fill(tier, obj, [0, 1, 2]) == 0  # not sealed: its bytes may still change
    assert seal(tier, obj)
    assert page_cache.fill(tier, obj, [2, 0]) == obj.size - CHUNK_BYTES
    assert cached_pages(data_path(tmp_path, obj)) >= -(-(obj.size - CHUNK_BYTES) // 4096)  # and what was read ahead


def test_the_page_cache_is_filled_where_the_kernel_has_no_huge_pages(
    tier: SsdTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    obj = written(tier)
    assert seal(tier, obj)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # as unknown there as this is here
    assert page_cache.fill(tier, obj, [0, 1, 2]) == obj.size


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


def test_the_front_is_where_the_page_cache_has_a_gap(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier, size=24 * CHUNK_BYTES + 5)
    assert page_cache.front(tier, obj, 0, 0) is None
    assert seal(tier, obj)
    with data_path(tmp_path, obj).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # what is read here is all that is read
        assert page_cache.front(tier, obj, 0, 0) == (0, True)
        for index in (0, 1, 2, 8):
            assert len(os.pread(file.fileno(), CHUNK_BYTES, index * CHUNK_BYTES)) == CHUNK_BYTES
        assert page_cache.front(tier, obj, 0, 0) == (3, False)
        assert page_cache.front(tier, obj, 2, 0) == (3, False)
        assert page_cache.front(tier, obj, 3, 9) == (3, True)  # what stands before is of our own filling
        assert page_cache.front(tier, obj, 24, 0) == (24, True)
        os.pread(file.fileno(), 1, 24 * CHUNK_BYTES)
        assert page_cache.front(tier, obj, 24, 0) == (25, True)


def test_where_the_kernel_does_not_tell_of_its_page_cache_that_is_said_once(
    tier: SsdTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    obj = written(tier)
    assert seal(tier, obj)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(page_cache, "_SYS_CACHESTAT", 9999)  # Linux before 6.5
    page_cache._say.cache_clear()
    assert [page_cache.front(tier, obj, 0, 0) for _ in range(3)] == [None] * 3
    assert caplog.text.count("cachestat: Function not implemented") == 1


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


def test_what_changes_while_it_is_sealed_is_not(tier: SsdTier, monkeypatch: pytest.MonkeyPatch) -> None:
    obj, fsync = written(tier), os.fsync

    def evict_and_bring_again(fd: int) -> None:
        fsync(fd)
        tier.drop_chunk(obj.cache_id, 0)
        write_chunk(tier, obj, 0, full_mask(CHUNK_BYTES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", evict_and_bring_again)
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


@pytest.mark.parametrize("is_right", [True, False])
def test_scrubbing_compares_with_what_the_source_states(tier: SsdTier, is_right: bool) -> None:
    plain = make_object()
    sha256 = hashlib.sha256(whole(plain) if is_right else b"").hexdigest()
    obj = replace(plain, digest=f"sha256:{sha256}")
    for index in range(obj.chunks_count):
        write_chunk(tier, obj, index, full_mask(len(obj.chunk_range(index))))
    assert seal(tier, obj)
    assert scrub(tier, obj.cache_id) == (obj.size, not is_right)
    assert is_sealed(tier, obj) is is_right


# -- as jobs


def test_the_jobs_say_where_a_sealed_file_stands(tier: SsdTier, jobs: Jobs, tmp_path: Path) -> None:
    obj, incomplete = written(tier), make_object("incomplete.bin")
    write_chunk(tier, incomplete, 0, 1)
    wire, path = object_to_wire(obj), str(data_path(tmp_path, obj))
    masks = [full_mask(len(obj.chunk_range(index))) for index in range(obj.chunks_count)]
    assert jobs.masks(obj=wire, emit=no_frames) == {"masks": masks, "sealed": False}
    assert jobs.seal(obj=object_to_wire(incomplete), may_read=True, emit=no_frames) == {
        "sealed": False,
        "needs_reading": False,
    }
    assert jobs.seal(obj=wire, may_read=True, emit=no_frames) == {"sealed": True, "needs_reading": False}
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
    assert jobs.seal(obj=object_to_wire(obj), may_read=True, emit=no_frames)["sealed"]
    flip(data_path(tmp_path, obj), CHUNK_BYTES + 5)
    found = jobs.verify(obj=object_to_wire(obj), emit=lambda frame: None)
    assert [chunk for chunk, _ in found["bad"]] == [1]
    assert jobs.residency(objects=[object_to_wire(obj)], emit=no_frames) == {"rows": [[0, False]]}
    assert not data_path(tmp_path, obj).exists()


def test_verify_looks_at_what_the_tables_were_not_told(tier: SsdTier, jobs: Jobs, tmp_path: Path) -> None:
    """A worker killed between a record and the tables leaves this."""
    obj = make_object(size=2 * CHUNK_BYTES)
    write_chunk(tier, obj, 1, full_mask(CHUNK_BYTES))
    wire = object_to_wire(obj)
    assert jobs.verify(obj=wire, emit=lambda frame: None) == {"checked_bytes": CHUNK_BYTES, "bad": []}
    rot(data_path(tmp_path, obj), CHUNK_BYTES + 5)
    found = jobs.verify(obj=wire, emit=lambda frame: None)
    assert [chunk for chunk, _ in found["bad"]] == [1]
    assert tier.mask(obj.cache_id, 1) == full_mask(CHUNK_BYTES) & ~1


def test_the_scrub_goes_from_one_sealed_object_to_the_next(tier: SsdTier, jobs: Jobs, tmp_path: Path) -> None:
    objects = sorted((written(tier, f"{number}.bin", CHUNK_BYTES + 5) for number in range(4)), key=lambda o: o.cache_id)
    for obj in objects[:1] + objects[2:]:
        assert jobs.seal(obj=object_to_wire(obj), may_read=True, emit=no_frames)["sealed"]
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
