"""The tables say what stands on SSD: after every order of writes, evictions, growth, kills and damage."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfs.cache import residency, sealing
from mfs.cache.chunks import full_mask, mask_bytes
from mfs.cache.residency import ResidencyTables, scan
from mfs.cache.residency_sums import blocks_count
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.errors import NotFoundError, StoreError
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ObjectId
from mfs.workers.frames import object_to_wire
from mfs.workers.jobs import Jobs
from mfs.workers.replies import Replies
from mfs.workers.tier import Tier
from tests.cache.objectfiles import content, data_path, make_object, make_tier, write_chunk

FULL = full_mask(CHUNK_BYTES)


@pytest.fixture
def tier(tmp_path: Path) -> SsdTier:
    return make_tier(tmp_path)


@pytest.fixture
def tables(tmp_path: Path, tier: SsdTier) -> ResidencyTables:
    return ResidencyTables(tmp_path, writable=True)


def put(tier: SsdTier, tables: ResidencyTables, obj: ObjectId, index: int, mask: int) -> None:
    """Write blocks as a worker does: the file first, then the row."""
    tables.set_mask(obj, index, write_chunk(tier, obj, index, mask))


def sidecar_bytes(obj: ObjectId) -> int:
    """What a sidecar takes, whole pages of it."""
    return 4096 + -(-obj.chunks_count // 8) * 4096


def bytes_on_disk(directory: Path) -> int:
    """What the files of the objects hold, holes left out, as the disk counts it."""
    files = (directory / "v2" / "objects").rglob("*")
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())


def shown(directory: Path) -> dict[str, int]:
    """What tools see without a daemon: path -> bytes."""
    return {found.path: found.ssd_bytes for found in scan(directory)}


sizes = st.sampled_from([1, BLOCK_BYTES, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 70_000])
steps = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.sampled_from([0, 1, 0b1010, FULL, 1 << 31])), max_size=25
)


@settings(max_examples=30, deadline=None)
@given(st.lists(sizes, min_size=5, max_size=5), steps)
def test_rows_agree_with_a_dict(
    tmp_path_factory: pytest.TempPathFactory, object_sizes: list[int], orders: list[tuple[int, int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    make_tier(directory)
    tables = ResidencyTables(directory, writable=True)
    objects = [make_object(f"{number}.bin", size) for number, size in enumerate(object_sizes)]
    model: dict[tuple[ObjectId, int], int] = {}
    for which, index, mask in orders:
        obj = objects[which]
        index %= obj.chunks_count
        mask &= full_mask(len(obj.chunk_range(index)))
        tables.set_mask(obj, index, mask)
        model[obj, index] = mask
    for obj in objects:
        present = {i: model.get((obj, i), 0) for i in range(obj.chunks_count)}
        if any(present.values()):  # another object may have got the row of one with nothing there
            assert list(tables.masks(obj.cache_id)) == list(present.values())
        assert tables.resident_bytes(obj.cache_id) == sum(
            mask_bytes(mask, len(obj.chunk_range(i))) for i, mask in present.items()
        )
    used = sum(mask_bytes(m, len(o.chunk_range(i))) for (o, i), m in model.items())
    used += sum(sidecar_bytes(o) for o in {o for (o, _), m in model.items() if m})
    assert tables.usage().used_bytes == used
    assert tables.usage().objects_count == len({o for (o, _), m in model.items() if m})
    reader = ResidencyTables(directory, writable=False)
    assert reader.usage() == tables.usage()


def test_usage_is_what_the_files_take(tmp_path: Path, tier: SsdTier, tables: ResidencyTables) -> None:
    obj, small = make_object(), make_object("small.json", 4096)
    put(tier, tables, obj, 0, 0b1011)
    put(tier, tables, obj, 1, full_mask(len(obj.chunk_range(1))) & ~0b11)
    put(tier, tables, small, 0, 1)
    used = tables.usage().used_bytes
    tail = -obj.size % 4096  # the disk gives whole blocks
    assert used <= bytes_on_disk(tmp_path) <= used + tail
    assert shown(tmp_path) == {"model.bin": 6 * BLOCK_BYTES + 777, "small.json": 4096}


def test_victims_are_the_coldest_unpinned_chunks(
    tier: SsdTier, tables: ResidencyTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = [make_object(f"{n}.bin", 2 * CHUNK_BYTES) for n in range(3)]
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(residency.time, "time", lambda: next(clock))
    for index in (1, 0):
        for obj in objects:
            tables.set_mask(obj, index, FULL)
    tables.touch(objects[0].cache_id, [1, 99])
    tables.set_pinned(objects[1], True)
    found = [(cache_id, index) for cache_id, index, _, _ in tables.victims(10**12)]
    assert found == [(objects[2].cache_id, 1), (objects[0].cache_id, 0), (objects[2].cache_id, 0),
                     (objects[0].cache_id, 1)]  # fmt: skip
    assert len(list(tables.victims(1))) == 1
    assert len(list(tables.victims(CHUNK_BYTES + 1))) == 2
    assert list(tables.victims(0)) == []
    spared = [cache_id for cache_id, *_ in tables.victims(10**12, {objects[0].cache_id})]
    assert spared == [cache_id for cache_id, _ in found if cache_id != objects[0].cache_id]
    assert len(list(tables.victims(1, {found[0][0]}))) == 1  # in place of what is spared another goes


def test_what_is_kept_for_who_has_it_open_is_no_victim_until_then(tables: ResidencyTables, tmp_path: Path) -> None:
    """The mark is a time: nobody needs to take it away, and another process sees it."""
    kept, other = (ObjectId("s", name, CHUNK_BYTES, "v") for name in ("kept", "other"))
    now = int(time.time())
    tables.keep(kept, now + 100)
    for obj in (kept, other):
        tables.set_mask(obj, 0, 2**32 - 1)
    tables.keep(kept, now - 100)  # a longer mark stands
    for seen in (tables, ResidencyTables(tmp_path, writable=True)):
        assert [cache_id for cache_id, *_ in seen.victims(10**12)] == [other.cache_id]
        assert (seen.protected(kept.cache_id), seen.protected(other.cache_id)) == (True, False)
    tables.keep(other, now - 1)
    assert [cache_id for cache_id, *_ in tables.victims(10**12)] == [other.cache_id]


@pytest.mark.parametrize("how", ["keep", "pin"])
@pytest.mark.parametrize("job", ["enforce_budget", "evict"])
def test_what_is_kept_while_an_eviction_runs_loses_nothing_from_then_on(
    tmp_path: Path, tier: SsdTier, monkeypatch: pytest.MonkeyPatch, how: str, job: str
) -> None:
    """Evicting gigabytes takes seconds; who opens a file meanwhile and finds all of it may rely on that."""
    opened = Tier(SsdConfig(tmp_path))
    opened.start(lenient=False)
    jobs = Jobs([], opened, Replies())
    objects = [make_object(name, 2 * CHUNK_BYTES) for name in ("a.bin", "b.bin")]
    for obj in objects:
        for index in (0, 1):
            put(tier, opened.require()[1], obj, index, FULL)
    removed: list[str] = []
    drop_chunk, remove = SsdTier.drop_chunk, SsdTier.remove

    def drop_and_note(tier: SsdTier, cache_id: str, index: int) -> bool:
        removed.append(cache_id)
        return drop_chunk(tier, cache_id, index)

    def remove_and_note(tier: SsdTier, cache_id: str) -> None:
        removed.append(cache_id)
        remove(tier, cache_id)

    protected = ResidencyTables._is_protected

    def open_one(tables: ResidencyTables, row: int) -> bool:
        if len(removed) == 1:  # the eviction is in the middle of it
            [opened] = [obj for obj in objects if obj.cache_id != removed[0]]
            column, value = (7, int(time.time()) + 100) if how == "keep" else (6, 1)
            tables._objects[tables.find(opened.cache_id), column] = value
            removed.append("")
        return protected(tables, row)

    monkeypatch.setattr(SsdTier, "drop_chunk", drop_and_note)
    monkeypatch.setattr(SsdTier, "remove", remove_and_note)
    monkeypatch.setattr(ResidencyTables, "_is_protected", open_one)
    if job == "evict":
        found = jobs.evict(objects=[object_to_wire(obj) for obj in objects], emit=print)
        assert found == {"ssd_bytes": 2 * CHUNK_BYTES, "kept_pinned_count": 1}
        assert removed == [objects[0].cache_id, ""]
    else:
        jobs.enforce_budget(budget_bytes=1, target_bytes=0, emit=print)
        assert len({cache_id for cache_id in removed if cache_id}) == 1


def test_small_files_are_victims_last_unless_they_are_many(tables: ResidencyTables) -> None:
    small = [ObjectId("s", f"small-{n}", 1000, "v") for n in range(3)]
    large = ObjectId("s", "large", CHUNK_BYTES, "v")
    for obj in [*small, large]:
        tables.set_mask(obj, 0, full_mask(obj.size))
    found = [cache_id for cache_id, *_ in tables.victims(10**12)]
    assert found[0] == large.cache_id
    assert len(found) == 4
    many = [ObjectId("s", f"many-{n}", 1 << 20, "v") for n in range(20)]
    for obj in many:
        tables.set_mask(obj, 0, full_mask(obj.size))
    tables.touch(large.cache_id, [0])
    assert next(tables.victims(1))[0] == small[0].cache_id


def test_a_pin_outlives_its_bytes_and_an_unpin_needs_none(tmp_path: Path, tables: ResidencyTables) -> None:
    obj = make_object()
    tables.set_pinned(obj, False)
    assert tables.find(obj.cache_id) is None
    tables.set_pinned(obj, True)
    tables.set_mask(make_object("same-count.bin"), 0, 1)
    assert tables.pinned(obj.cache_id)
    assert tables.masks(obj.cache_id).sum() == 0
    assert ResidencyTables(tmp_path, writable=False).pinned(obj.cache_id)


def test_pins_outlive_tables_that_are_lost(tmp_path: Path, tier: SsdTier, tables: ResidencyTables) -> None:
    kept, bare, freed = (make_object(name, 2 * CHUNK_BYTES) for name in ("kept", "bare", "freed"))
    put(tier, tables, kept, 0, FULL)
    for obj in (kept, bare, freed):
        tables.set_pinned(obj, True)
    tables.set_pinned(freed, False)
    shutil.rmtree(tmp_path / "v2" / "index")
    rebuilt = ResidencyTables(tmp_path, writable=True)
    assert [rebuilt.pinned(obj.cache_id) for obj in (kept, bare, freed)] == [True, True, False]
    assert rebuilt.resident_bytes(kept.cache_id) == CHUNK_BYTES
    assert list(rebuilt.victims(1 << 40)) == []


def test_an_empty_file_can_be_pinned(tables: ResidencyTables, tmp_path: Path) -> None:
    tables.set_pinned(make_object("empty", 0), True)
    tables.set_pinned(make_object("empty-too", 0), True)
    assert tables.usage().used_bytes == 0
    assert len(list(scan(tmp_path))) == 2
    assert ResidencyTables(tmp_path, writable=True).pinned(make_object("empty", 0).cache_id)


def test_rows_are_used_again_and_the_table_does_not_grow_for_ever(tables: ResidencyTables) -> None:
    for number in range(300):
        obj = make_object(f"{number}.bin", 400 * CHUNK_BYTES)
        tables.set_mask(obj, 7, FULL)
        tables.set_mask(obj, 7, 0)
    assert int(tables._meta[0]) == 1
    assert int(tables._meta[1]) == 400


def test_two_objects_written_at_the_same_time_both_get_a_row(tier: SsdTier, tables: ResidencyTables) -> None:
    """Shards have equal sizes: the second must not take the row of the first, whose bytes are on their way."""
    first, second = make_object("1.bin"), make_object("2.bin")
    mask_of_first = write_chunk(tier, first, 0, FULL)
    tables.set_mask(second, 0, write_chunk(tier, second, 0, 0b1))
    tables.set_mask(first, 0, mask_of_first)
    assert list(tables.masks(first.cache_id)) == [FULL, 0]
    assert list(tables.masks(second.cache_id)) == [1, 0]


def test_a_row_that_went_to_another_object_is_not_dropped(tier: SsdTier, tables: ResidencyTables) -> None:
    old, new = make_object("old.bin"), make_object("new.bin")
    put(tier, tables, old, 0, FULL)
    [(cache_id, index, row, _)] = tables.victims(1)
    assert tables.drop(tier, cache_id, row, index) == [(0, CHUNK_BYTES)]
    put(tier, tables, new, 0, FULL)
    assert tables.find(new.cache_id) == row
    assert tables.drop(tier, cache_id, row, index) == []
    assert list(tables.masks(new.cache_id)) == [FULL, 0]
    assert tier.mask(new.cache_id, 0) == FULL


def test_the_last_chunk_takes_the_files_along(tmp_path: Path, tier: SsdTier, tables: ResidencyTables) -> None:
    obj = make_object(size=3 * CHUNK_BYTES)
    for index in (0, 2):
        put(tier, tables, obj, index, FULL)
    row = tables.find(obj.cache_id)
    assert row is not None
    assert tables.drop(tier, obj.cache_id, row, 0) == [(0, CHUNK_BYTES)]
    assert bytes_on_disk(tmp_path) == tables.usage().used_bytes == CHUNK_BYTES + sidecar_bytes(obj)
    assert tables.drop(tier, obj.cache_id, row, 2) == [(2, CHUNK_BYTES)]
    assert not [path for path in (tmp_path / "v2" / "objects").rglob("*") if path.is_file()]
    assert tables.usage().used_bytes == 0


def test_a_sealed_object_is_one_victim_as_warm_as_its_warmest_chunk(
    tier: SsdTier, tables: ResidencyTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(residency.time, "time", lambda: next(clock))
    sealed, growing, cold = (make_object(name, 3 * CHUNK_BYTES) for name in ("sealed", "growing", "cold"))
    for obj in (sealed, cold):
        for index in range(3):
            put(tier, tables, obj, index, FULL)
        assert sealing.seal(tier, obj)
        tables.learn(tier, obj.cache_id)
    put(tier, tables, growing, 1, FULL)
    tables.touch(sealed.cache_id, [1])
    put(tier, tables, growing, 0, FULL)
    found = [(cache_id, index, nbytes) for cache_id, index, _, nbytes in tables.victims(10**12)]
    assert found == [
        (cold.cache_id, None, 3 * CHUNK_BYTES), (growing.cache_id, 1, CHUNK_BYTES),
        (sealed.cache_id, None, 3 * CHUNK_BYTES), (growing.cache_id, 0, CHUNK_BYTES),
    ]  # fmt: skip
    tables.set_pinned(sealed, True)
    tables.set_pinned(make_object("nothing-of-it"), True)
    usage = tables.usage()
    assert (usage.pinned_count, usage.pinned_bytes) == (2, 3 * CHUNK_BYTES)
    assert (usage.sealed_count, usage.sealed_bytes) == (2, 6 * CHUNK_BYTES)
    assert [cache_id for cache_id, *_ in tables.victims(10**12)] == [cold.cache_id] + [growing.cache_id] * 2
    [(cache_id, index, row, _)] = tables.victims(1)
    assert tables.drop(tier, cache_id, row, index) == [(i, CHUNK_BYTES) for i in range(3)]
    assert tier.header(cold.cache_id) is None
    assert tables.sealed_after("") == sealed.cache_id
    assert tables.sealed_after(sealed.cache_id) is None
    tables.set_pinned(sealed, False)
    rebuilt = tables.find(sealed.cache_id)
    assert rebuilt is not None
    assert tables._objects[rebuilt, 6] == 2


def test_a_seal_the_tables_do_not_know_of_still_keeps_the_file_whole(tier: SsdTier, tables: ResidencyTables) -> None:
    """Killed between the sidecar and the row: who evicts one chunk finds the seal, and takes all of it by unlink."""
    obj = make_object(size=2 * CHUNK_BYTES)
    for index in range(2):
        put(tier, tables, obj, index, FULL)
    assert sealing.seal(tier, obj)
    fd = sealing.open_sealed(tier, obj)
    assert fd is not None
    [(cache_id, index, row, _)] = tables.victims(1)
    assert index is not None
    assert tables.drop(tier, cache_id, row, index) == [(0, CHUNK_BYTES), (1, CHUNK_BYTES)]
    assert tables.usage().used_bytes == 0
    assert os.pread(fd, obj.size + 1, 0) == b"".join(content(obj, index) for index in range(2))
    os.close(fd)


def test_tables_grow_under_a_reader_that_mapped_them_small(tmp_path: Path, tables: ResidencyTables) -> None:
    reader, other = ResidencyTables(tmp_path, writable=False), ResidencyTables(tmp_path, writable=True)
    objects = [make_object(f"{n}.bin", 100 * CHUNK_BYTES) for n in range(1500)]  # beyond one step of both tables
    for number, obj in enumerate(objects):
        (tables if number % 2 else other).set_mask(obj, 99, 1)
    for each in (reader, other, tables):
        assert each.usage().objects_count == 1500
        assert each.masks(objects[-1].cache_id)[99] == 1


_GROWER = """
import sys
import time
from pathlib import Path
from mfs.cache.residency import ResidencyTables
from tests.cache.objectfiles import make_object
from mfs.types import CHUNK_BYTES
tables = ResidencyTables(Path(sys.argv[1]), writable=True)
for n in range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])):
    tables.set_mask(make_object(f"{n}.bin", 150 * CHUNK_BYTES), n % 150, 1)
    if n % 10 == 0: tables.usage(); list(tables.victims(10**6))
    if n % 50 == 0: print(n, flush=True)
"""


def grow_elsewhere(directory: Path, first: int, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _GROWER, str(directory), str(first), str(count)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


_MIXER = """
import random, sys
from pathlib import Path
from mfs.cache import sealing
from mfs.cache.residency import ResidencyTables
from tests.cache.objectfiles import make_object, make_tier, write_chunk
tier, dice = make_tier(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
tables = ResidencyTables(Path(sys.argv[1]), writable=True)
for _ in range(100):
    obj = make_object(f"{dice.randrange(3)}.bin", 2 * (4 << 20))
    row, index = tables.find(obj.cache_id), dice.randrange(2)
    match dice.randrange(8):
        case 0 if row is not None: tables.drop(tier, obj.cache_id, row, index)
        case 1 if row is not None: tables.drop(tier, obj.cache_id, row, None)
        case 2 | 3:
            sealing.seal(tier, obj)
            tables.learn(tier, obj.cache_id)
        case _:
            write_chunk(tier, obj, index, dice.choice([2**32 - 1, dice.randrange(1, 2**32)]))
            tables.learn_chunk(tier, obj, index)
"""


def test_the_tables_are_exact_after_processes_that_write_evict_and_seal_the_same(
    tmp_path: Path, tier: SsdTier, tables: ResidencyTables
) -> None:
    for round_number in range(2):  # nobody is killed, so there is nothing to reconcile
        mixers = [
            subprocess.Popen(
                [sys.executable, "-c", _MIXER, str(tmp_path), str(10 * round_number + n)], stderr=subprocess.PIPE
            )
            for n in range(3)
        ]
        assert [mixer.communicate()[1].decode() for mixer in mixers] == [""] * 3
        for number in range(3):
            obj = make_object(f"{number}.bin", 2 * CHUNK_BYTES)
            standing, row = tier.standing(obj.cache_id), tables.find(obj.cache_id)
            if standing is None or not any(standing.masks):
                assert not tables.masks(obj.cache_id).any()
            else:
                assert row is not None
                assert tables.masks(obj.cache_id).tolist() == standing.masks
                assert bool(tables._objects[row, 6] & np.uint64(2)) == (standing.header.sealed is not None)


def test_processes_grow_the_tables_together(tmp_path: Path, tables: ResidencyTables) -> None:
    growers = [grow_elsewhere(tmp_path, first, 400) for first in (0, 400, 800)]
    assert [grower.communicate()[1].decode() for grower in growers] == [""] * 3
    assert tables.usage().objects_count == 1200
    for number in range(1200):
        masks = tables.masks(make_object(f"{number}.bin", 150 * CHUNK_BYTES).cache_id)
        assert list(masks.nonzero()[0]) == [number % 150]


def test_killed_growers_leave_tables_that_open(tmp_path: Path, tables: ResidencyTables) -> None:
    dice = random.Random(3)
    for turn in range(6):
        grower = grow_elsewhere(tmp_path, turn * 1000, 1000)
        assert grower.stdout is not None
        for _ in range(dice.randrange(1, 8)):
            grower.stdout.readline()
        grower.kill()
        grower.communicate()
        count = tables.usage().objects_count
        tables.set_mask(make_object(f"mine-{turn}.bin", 200 * CHUNK_BYTES), 0, 1)
        again = ResidencyTables(tmp_path, writable=True)
        assert again.usage().objects_count == count + 1 == tables.usage().objects_count


# -- damage


@pytest.fixture
def filled(tmp_path: Path, tier: SsdTier, tables: ResidencyTables) -> Path:
    put(tier, tables, make_object(), 0, FULL)
    put(tier, tables, make_object(), 1, 0b11)
    put(tier, tables, make_object("other.bin", 3 * CHUNK_BYTES), 2, 0b1000)
    return tmp_path


TRUTH = {"model.bin": CHUNK_BYTES + 2 * BLOCK_BYTES, "other.bin": BLOCK_BYTES}
FILES = [
    f"{table}/{file}.ninja" for table in ("meta", "objects", "chunks") for file in ("data", "shape", "dtype", "order")
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_damaged_tables_are_rebuilt_from_the_sidecars(filled: Path, file: str, damage: str) -> None:
    path = filled / "v2" / "index" / file
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            os.truncate(path, path.stat().st_size // 2)
        case "garbage":
            path.write_bytes(random.Random(5).randbytes(path.stat().st_size))
    if file != "chunks/data.ninja" or damage != "garbage":  # garbage there looks like masks: only `reconcile` sees it
        with pytest.raises(StoreError, match="rebuilds it"):
            ResidencyTables(filled, writable=False)
    tables = ResidencyTables(filled, writable=True)
    tables.reconcile(make_tier(filled))
    if damage != "garbage" or not file.startswith("chunks/data"):
        assert shown(filled) == TRUTH
        assert tables.usage().objects_count == 2


def test_a_missing_index_is_made_from_the_sidecars(filled: Path) -> None:
    shutil.rmtree(filled / "v2" / "index")
    ResidencyTables(filled, writable=True)
    assert shown(filled) == TRUTH


def test_those_who_have_the_tables_open_follow_a_rebuild(filled: Path, tables: ResidencyTables) -> None:
    os.truncate(filled / "v2" / "index" / "objects" / "shape.ninja", 3)
    ResidencyTables(filled, writable=True)
    tables.set_mask(make_object("later.bin", CHUNK_BYTES), 0, 1)
    assert shown(filled) == TRUTH | {"": BLOCK_BYTES}  # no file says what later.bin is called
    assert tables.usage().objects_count == 3


def test_reconciling_finds_what_kills_left_apart(filled: Path, tier: SsdTier, tables: ResidencyTables) -> None:
    late, gone = make_object("late.bin"), make_object("gone.bin")
    write_chunk(tier, late, 1, 0b101)  # killed before its row was written
    put(tier, tables, gone, 0, FULL)
    tier.remove(gone.cache_id)  # killed before its row was cleared
    half = data_path(filled, gone)
    half.touch()  # killed while its files were made
    tables.reconcile(tier)
    assert shown(filled) == TRUTH | {"late.bin": 2 * BLOCK_BYTES}
    assert not half.exists()


def test_no_cache_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="--cache-dir"):
        list(scan(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_disk_without_room_for_tables_is_an_error_not_a_signal(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    try:
        make_tier(place)
        opener = "import sys; from pathlib import Path; from mfs.cache.residency import ResidencyTables\n" \
            "ResidencyTables(Path(sys.argv[1]), writable=True)"  # fmt: skip
        done = subprocess.run([sys.executable, "-c", opener, str(place)], capture_output=True)
        assert done.returncode == 1
        assert b"No space left" in done.stderr
    finally:
        subprocess.run(["umount", str(place)], check=True)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_blocks_are_counted_as_python_counts_them(masks: list[int]) -> None:
    table = np.array([[mask, 7] for mask in masks], np.uint32).reshape(-1, 2)
    assert blocks_count(table[:, 0]).tolist() == [mask.bit_count() for mask in masks]
