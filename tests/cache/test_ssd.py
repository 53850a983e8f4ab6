"""The files of objects: what was written comes back or is missed, whatever befalls them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mfs.cache import object_files, sealing, ssd
from mfs.cache.chunks import full_mask
from mfs.cache.sidecar import FORMAT, HEADER_BYTES, RECORD_BYTES, record_offset
from mfs.cache.ssd import SsdConfig, SsdTier
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ObjectId
from tests.cache.objectfiles import (
    assert_blocks,
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

FULL = full_mask(CHUNK_BYTES)
LAST = full_mask(5 * BLOCK_BYTES + 777)
"""All blocks of the second chunk of `make_object()`."""


@pytest.fixture
def tier(tmp_path: Path) -> SsdTier:
    return make_tier(tmp_path)


@pytest.fixture
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, made by `mount` with the arguments the test names."""
    place = tmp_path / "own"
    place.mkdir()
    done = subprocess.run(["mount", *request.param, str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def read_chunk(tier: SsdTier, obj: ObjectId, index: int, mask: int) -> int:
    """Read, check every byte that is said to be there; returns the blocks brought."""
    slot, data = make_slot(), content(obj, index)
    got, sums = tier.read_into(obj, index, mask, slot)
    assert not got & ~mask
    assert set(sums) == {block for block in range(32) if got >> block & 1}
    assert_blocks(slot, data, got)
    return got


def rewrite(path: Path, start: int, nbytes: int, offset: int, field: bytes) -> None:
    """Change bytes of a header page or a record, and make its own checksum fit again."""
    raw = bytearray(path.read_bytes())
    part = raw[start : start + nbytes]
    part[offset : offset + len(field)] = field
    part[-8:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(part[:-8])))
    raw[start : start + nbytes] = part
    path.write_bytes(raw)


def written(tier: SsdTier, obj: ObjectId | None = None) -> ObjectId:
    """A complete object."""
    obj = obj or make_object()
    for index in range(obj.chunks_count):
        write_chunk(tier, obj, index, full_mask(len(obj.chunk_range(index))))
    return obj


def assert_gone(directory: Path, obj: ObjectId) -> None:
    assert not os.path.lexists(data_path(directory, obj))
    assert not os.path.lexists(sums_path(directory, obj))


# -- written and read back


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, FULL), min_size=1, max_size=4), st.integers(0, FULL), st.booleans())
def test_parts_written_one_after_another_are_all_there(
    tmp_path_factory: pytest.TempPathFactory, parts: list[int], asked: int, last: bool
) -> None:
    tier, obj, index = make_tier(tmp_path_factory.mktemp("cache")), make_object(), int(last)
    whole = full_mask(len(obj.chunk_range(index)))
    stands = 0
    for part in parts:
        part &= whole
        if not part:
            continue
        stands |= part
        assert write_chunk(tier, obj, index, part) == stands
        assert data_path(tier.config.directory, obj).stat().st_size == obj.size
    assert read_chunk(tier, obj, index, asked & whole) == asked & stands
    assert read_chunk(tier, obj, index, whole) == stands == tier.mask(obj.cache_id, index)
    assert read_chunk(tier, obj, 1 - index, 0b11111) == 0


@pytest.mark.parametrize("size", [1, 777, 4095, 4096, 4097, BLOCK_BYTES, CHUNK_BYTES - 1, CHUNK_BYTES + 1])
def test_the_file_of_a_complete_object_is_the_object(tier: SsdTier, tmp_path: Path, size: int) -> None:
    obj = written(tier, make_object(size=size))
    path = data_path(tmp_path, obj)
    assert path.read_bytes() == b"".join(content(obj, index) for index in range(obj.chunks_count))
    for index in range(obj.chunks_count):
        whole = full_mask(len(obj.chunk_range(index)))
        assert read_chunk(tier, obj, index, whole) == whole


def test_the_sidecar_names_the_object_for_people(tier: SsdTier) -> None:
    obj = make_object("folder/größe.bin")
    write_chunk(tier, obj, 1, 5)
    standing = tier.standing(obj.cache_id)
    assert standing is not None
    assert (standing.header.cache_id, standing.header.object_bytes, standing.masks) == (obj.cache_id, obj.size, [0, 5])
    assert json.loads(standing.header.identity) == [obj.source, obj.path, obj.size, obj.version, None]


@pytest.mark.parametrize("character", ["x", "ö"])
def test_an_identity_too_long_for_the_header_is_cut(tier: SsdTier, character: str) -> None:
    obj = make_object(character * 5000)
    write_chunk(tier, obj, 0, FULL)
    assert read_chunk(tier, obj, 0, FULL) == FULL


def test_a_new_write_of_a_block_replaces_it(tier: SsdTier) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, 0b11, data=bytes(CHUNK_BYTES))
    write_chunk(tier, obj, 0, 0b11)
    assert read_chunk(tier, obj, 0, 0b11) == 0b11


def test_what_stands_with_the_same_checksum_is_not_written_again(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, FULL)
    before = data_path(tmp_path, obj).stat().st_mtime_ns
    assert write_chunk(tier, obj, 0, 0b1010) == FULL
    assert data_path(tmp_path, obj).stat().st_mtime_ns == before


# -- damage to the sidecar


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 32, 40, 79, 80, 84, 400, 4087, 4088, 4095])
def test_a_flipped_header_byte_loses_the_object_and_says_so(
    tier: SsdTier, tmp_path: Path, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    obj = written(tier)
    flip(sums_path(tmp_path, obj), offset)
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert_gone(tmp_path, obj)
    assert "dropped" in caplog.text
    assert written(tier) == obj
    assert read_chunk(tier, obj, 0, FULL) == FULL


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        (0, b"OTHERMAG"),
        (8, struct.pack("<I", FORMAT + 1)),
        (12, struct.pack("<I", 2)),
        (16, struct.pack("<Q", 3)),
        (16, struct.pack("<Q", 0)),
        (16, struct.pack("<Q", 2**64 - 1)),
        (40, b"f" * 40),
        (40, b"\xff" * 40),
        (40, b"../../../../../../../../../etc/passwd\0\0\0\0"[:40]),
        (80, struct.pack("<I", 2**32 - 1)),
    ],
)
def test_a_header_that_verifies_but_is_another_objects_loses_it(
    tier: SsdTier, tmp_path: Path, offset: int, field: bytes
) -> None:
    obj = written(tier)
    rewrite(sums_path(tmp_path, obj), 0, HEADER_BYTES, offset, field)
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert_gone(tmp_path, obj)


@pytest.mark.parametrize("offset", [0, 4, 8, 16, 271, 272, 503, 504, 511])
def test_a_flipped_record_byte_loses_its_chunk_alone(
    tier: SsdTier, tmp_path: Path, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    obj = written(tier)
    flip(sums_path(tmp_path, obj), record_offset(0) + offset)
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert "chunk 0 dropped" in caplog.text
    assert read_chunk(tier, obj, 1, LAST) == LAST
    assert write_chunk(tier, obj, 0, 0b1) == 0b1
    assert read_chunk(tier, obj, 0, FULL) == 0b1


@pytest.mark.parametrize(
    ("offset", "field"), [(0, struct.pack("<I", FULL)), (0, struct.pack("<I", 0)), (4, struct.pack("<I", 0))]
)
def test_a_record_that_verifies_but_cannot_be_this_chunks_loses_it(
    tier: SsdTier, tmp_path: Path, offset: int, field: bytes
) -> None:
    obj = written(tier)
    rewrite(sums_path(tmp_path, obj), record_offset(1), RECORD_BYTES, offset, field)
    assert read_chunk(tier, obj, 1, LAST) == 0
    assert tier.mask(obj.cache_id, 1) == 0
    assert read_chunk(tier, obj, 0, FULL) == FULL


@pytest.mark.parametrize("which", ["data", "sums"])
@pytest.mark.parametrize("change", [-1, -BLOCK_BYTES, -(10**9), 1, 4096])
def test_a_file_cut_or_grown_loses_the_object(tier: SsdTier, tmp_path: Path, which: str, change: int) -> None:
    obj = written(tier)
    path = (data_path if which == "data" else sums_path)(tmp_path, obj)
    os.truncate(path, max(0, path.stat().st_size + change))
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert_gone(tmp_path, obj)


@pytest.mark.parametrize("which", ["data", "sums"])
def test_one_file_without_the_other_is_nothing(tier: SsdTier, tmp_path: Path, which: str) -> None:
    obj, kept = written(tier), written(tier, make_object("kept.bin"))
    (data_path if which == "data" else sums_path)(tmp_path, obj).unlink()
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert write_chunk(tier, obj, 0, 0b10) == 0b10  # of the old half nothing is believed
    assert read_chunk(tier, obj, 0, FULL) == 0b10
    (data_path if which == "data" else sums_path)(tmp_path, obj).unlink()
    tier.sweep()
    assert_gone(tmp_path, obj)
    assert read_chunk(tier, kept, 0, FULL) == FULL


@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES, HEADER_BYTES + 2 * RECORD_BYTES])
def test_garbage_under_a_good_name_is_dropped(tier: SsdTier, tmp_path: Path, size: int) -> None:
    obj = written(tier)
    sums_path(tmp_path, obj).write_bytes(random.Random(1).randbytes(size))
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert_gone(tmp_path, obj)


def test_files_that_changed_places_are_found_out(tier: SsdTier, tmp_path: Path) -> None:
    obj, other, third = (written(tier, make_object(name)) for name in ("a.bin", "b.bin", "c.bin"))
    sums_path(tmp_path, other).rename(sums_path(tmp_path, obj))
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert_gone(tmp_path, obj)
    data_path(tmp_path, other).rename(data_path(tmp_path, third))
    assert read_chunk(tier, third, 0, FULL) == 0
    assert read_chunk(tier, third, 1, LAST) == 0
    assert tier.standing(third.cache_id).masks == [0, 0]  # type: ignore[union-attr]


# -- damage to the data


@pytest.mark.parametrize("block", [0, 7, 31])
def test_a_flipped_byte_loses_its_block_alone_and_gives_its_space_back(
    tier: SsdTier, tmp_path: Path, block: int, caplog: pytest.LogCaptureFixture
) -> None:
    obj = written(tier)
    path = data_path(tmp_path, obj)
    flip(path, block * BLOCK_BYTES + 12345)
    before, untouched = path.stat().st_blocks, FULL & ~(1 << block)
    assert read_chunk(tier, obj, 0, untouched) == untouched
    assert tier.mask(obj.cache_id, 0) == FULL  # nobody looked at the bad block
    assert read_chunk(tier, obj, 0, FULL) == untouched
    assert f"blocks {1 << block:#x} fail their checksums" in caplog.text
    assert tier.mask(obj.cache_id, 0) == untouched
    assert before - path.stat().st_blocks == BLOCK_BYTES // 512
    assert write_chunk(tier, obj, 0, 1 << block) == FULL
    assert read_chunk(tier, obj, 0, FULL) == FULL


def test_writing_beside_a_damaged_block_never_launders_it(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, 0b0011)
    flip(data_path(tmp_path, obj), 10)
    write_chunk(tier, obj, 0, 0b1100)
    assert read_chunk(tier, obj, 0, FULL) == 0b1110


def test_a_block_that_was_evicted_while_it_was_read_is_a_plain_miss(
    tier: SsdTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    obj, checksum = written(tier), ssd.xxh3_64_intdigest
    for again in (False, True):  # evicted only; evicted and brought once more
        slot, turns = make_slot(), iter([True])

        def evict_first(data: memoryview, turns: Iterator[bool] = turns, again: bool = again) -> int:
            if next(turns, False):
                tier.drop_chunk(obj.cache_id, 0)
                if again:
                    write_chunk(tier, obj, 0, FULL)
                return 0  # what is read from a hole
            return checksum(data)

        with monkeypatch.context() as patch:
            patch.setattr(ssd, "xxh3_64_intdigest", evict_first)
            brought, _ = tier.read_into(obj, 0, FULL, slot)
        assert brought == FULL & ~1
        assert tier.mask(obj.cache_id, 0) == (FULL if again else 0)
        assert not caplog.records
        write_chunk(tier, obj, 0, FULL)


@pytest.mark.parametrize("again", [False, True])
def test_an_object_that_was_removed_while_it_was_read_is_a_plain_miss(
    tier: SsdTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, again: bool
) -> None:
    obj, turns = written(tier), iter([True])

    def remove_first(data: memoryview) -> int:
        if next(turns, False):
            tier.remove(obj.cache_id)
            if again:
                written(tier)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(ssd, "xxh3_64_intdigest", remove_first)
        assert tier.read_into(obj, 0, FULL, make_slot()) == (0, {})
    assert not caplog.records
    assert tier.mask(obj.cache_id, 0) == (FULL if again else 0)


# -- what is none of ours


def test_a_file_that_cannot_be_read_is_a_logged_miss(
    tier: SsdTier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    obj = make_object()
    data_path(tmp_path, obj).parent.write_text("a file where a directory was")
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert "fetching from the origin" in caplog.text


@pytest.mark.parametrize("which", ["data", "sums"])
@pytest.mark.parametrize("what", ["directory", "link", "fifo", "another user's"])
@pytest.mark.parametrize("first", ["read", "write"])
def test_what_is_no_file_of_ours_is_dropped_and_not_in_the_way(
    tier: SsdTier, tmp_path: Path, which: str, what: str, first: str
) -> None:
    obj = written(tier)
    path, kept = (data_path if which == "data" else sums_path)(tmp_path, obj), tmp_path / "kept"
    path.rename(kept)
    match what:
        case "directory":
            (path / "below").mkdir(parents=True)
        case "link":
            path.symlink_to(kept)
        case "fifo":
            os.mkfifo(path)
        case _:
            if os.geteuid():
                pytest.skip("only root can give a file away")
            path.write_bytes(kept.read_bytes())
            os.chown(path, 12345, 12345)
    if first == "read":
        assert read_chunk(tier, obj, 0, FULL) == 0
        assert_gone(tmp_path, obj)
    assert write_chunk(tier, obj, 0, FULL) == FULL
    assert read_chunk(tier, obj, 0, FULL) == FULL
    assert kept.exists()


def test_walking_yields_sound_objects_and_removes_the_rest(tier: SsdTier, tmp_path: Path) -> None:
    obj, other, third = written(tier), written(tier, make_object("other.bin")), written(tier, make_object("third.bin"))
    flip(sums_path(tmp_path, other), 40)
    flip(sums_path(tmp_path, third), record_offset(1))
    folder = data_path(tmp_path, obj).parent
    (folder / "stray").write_bytes(b"?")
    (folder / f"{obj.cache_id}.new").write_bytes(b"half a sidecar")
    (folder / ("f" * 40)).touch()
    assert {found.header.cache_id: found.masks for found in tier.walk_all()} == {
        obj.cache_id: [FULL, LAST],
        third.cache_id: [FULL, 0],
    }
    assert_gone(tmp_path, other)
    assert sorted(path.name for path in folder.iterdir()) == [obj.cache_id, f"{obj.cache_id}.sums"]


# -- eviction


def test_a_dropped_chunk_gives_its_space_back_and_leaves_the_others(tier: SsdTier, tmp_path: Path) -> None:
    obj = written(tier, make_object(size=3 * CHUNK_BYTES + 777))
    path = data_path(tmp_path, obj)
    for index, rest in ((1, 2 * CHUNK_BYTES + 4096), (3, 2 * CHUNK_BYTES)):
        assert not tier.drop_chunk(obj.cache_id, index)
        assert path.stat().st_blocks * 512 == rest
        assert path.stat().st_size == obj.size
    assert [bool(read_chunk(tier, obj, index, 1)) for index in range(4)] == [True, False, True, False]
    assert not tier.remove_if_empty(obj.cache_id)
    for index in (0, 2):
        tier.drop_chunk(obj.cache_id, index)
    assert tier.remove_if_empty(obj.cache_id)
    assert_gone(tmp_path, obj)
    assert tier.drop_chunk(obj.cache_id, 0)


def test_where_no_holes_can_be_punched_objects_go_whole(
    tier: SsdTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, start: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(ssd, "punch", refuse)
    obj = written(tier)
    assert not tier.drop_chunk(obj.cache_id, 0)  # here it was found out
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert tier.drop_chunk(obj.cache_id, 1)
    assert_gone(tmp_path, obj)
    assert caplog.text.count("no holes can be punched") == 1


# -- kills, and several at once

_WRITER = """
import random, sys
from pathlib import Path
from mfs.cache import sealing
from tests.cache.objectfiles import make_object, make_slot, make_tier, write_chunk
tier, dice = make_tier(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    obj = make_object(f"{dice.randrange(3)}.bin")
    index = dice.randrange(2)
    whole = 2**32 - 1 if not index else 2**6 - 1
    match dice.randrange(12):
        case 0: tier.drop_chunk(obj.cache_id, index)
        case 1: tier.remove(obj.cache_id)
        case 2: sealing.seal(tier, obj)
        case 3: tier.read_into(obj, index, whole, make_slot())
        case 4: tier.remove_if_empty(obj.cache_id)
        case _:
            mask = dice.choice([whole, dice.randrange(1, 2**32) & whole])
            if mask:
                write_chunk(tier, obj, index, mask)
    print("did", flush=True)
"""


def start_writer(directory: Path, seed: int) -> subprocess.Popen[bytes]:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(directory), str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    return writer


def test_killed_processes_leave_what_verifies_or_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """kill -9 at 16 or more random instants, two at a time that write, evict, seal and read the same objects."""
    tier, dice, found, sealed = make_tier(tmp_path), random.Random(7), 0, 0
    for turn in range(40):
        if turn >= 8 and sealed:
            break
        writers = [start_writer(tmp_path, 2 * turn + n) for n in range(2)]
        for writer in writers:  # how far they have come when they are killed is told by what they did, not by a clock
            assert writer.stdout is not None
            for _ in range(dice.randrange(1, 60)):
                writer.stdout.readline()
        for writer in writers:
            writer.kill()
            assert writer.communicate()[1].decode() == "", "nothing was bad, and nothing failed"
        for number in range(3):
            obj = make_object(f"{number}.bin")
            fd = sealing.open_sealed(tier, obj)
            if fd is not None:
                sealed += 1
                assert os.pread(fd, obj.size + 1, 0) == content(obj, 0) + content(obj, 1)
                os.close(fd)
            for index in range(2):
                promised = tier.mask(obj.cache_id, index)
                assert read_chunk(tier, obj, index, FULL if not index else LAST) == promised
                found += bool(promised)
    assert found
    assert sealed
    assert not caplog.records
    tier.sweep()
    for path in (tmp_path / "v2" / "objects").rglob("*"):
        assert path.is_dir() or path.suffix in ("", ".sums")


def test_one_file_without_o_direct_does_not_cost_the_others_theirs(tier: SsdTier, tmp_path: Path) -> None:
    obj, other = make_object(), written(tier, make_object("other.bin"))
    written(tier)
    data_path(tmp_path, obj).unlink()
    (data_path(tmp_path, obj) / "below").mkdir(parents=True)  # open(2) says EINVAL of it
    assert read_chunk(tier, obj, 0, FULL) == 0
    with tier.files.reading(other.cache_id) as found:
        assert object_files.is_direct(found.data)


# -- the disk


def test_no_second_copy_of_the_bytes_stays_in_the_page_cache(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, 0b1011)
    write_chunk(tier, obj, 0, 0b0100)
    written(tier)
    path = data_path(tmp_path, obj)
    assert cached_pages(path) <= 1  # the end that is no whole page
    read_chunk(tier, obj, 0, FULL)
    read_chunk(tier, obj, 0, 0b10)
    read_chunk(tier, obj, 1, LAST)
    assert len(list(tier.walk_all())) == 1
    assert cached_pages(path) <= 1


@pytest.mark.parametrize("mounted", [["-t", "ramfs", "none"]], indirect=True, ids=["ramfs"])
def test_a_file_system_without_o_direct_serves_as_well(mounted: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier, obj = make_tier(mounted / "cache"), make_object()
    assert write_chunk(tier, obj, 0, 0b11) == 0b11
    assert write_chunk(tier, obj, 0, FULL & ~1) == FULL
    assert write_chunk(tier, obj, 1, LAST) == LAST
    assert read_chunk(tier, obj, 0, FULL) == FULL
    assert read_chunk(tier, obj, 1, LAST) == LAST
    assert caplog.text.count("has no O_DIRECT") == 1


def test_without_o_direct_no_page_stays_either(tier: SsdTier, tmp_path: Path) -> None:
    tier.files.direct = 0  # what a refusal leaves behind; the disk below tmp_path takes fadvise, a ramfs would not
    obj = written(tier)
    assert cached_pages(data_path(tmp_path, obj)) == 0
    assert read_chunk(tier, obj, 0, FULL) == FULL
    assert cached_pages(data_path(tmp_path, obj)) == 0


def test_forcing_each_write_to_the_disk_changes_nothing_else(tmp_path: Path) -> None:
    make_tier(tmp_path)
    tier = SsdTier(SsdConfig(tmp_path, fsync=True))
    obj = written(tier)
    assert read_chunk(tier, obj, 1, LAST) == LAST


@pytest.mark.parametrize("mounted", [["-t", "tmpfs", "-o", "size=8m", "none"]], indirect=True, ids=["tmpfs"])
def test_a_full_disk_is_enospc_and_keeps_what_stands(mounted: Path) -> None:
    tier, obj = make_tier(mounted / "cache"), make_object(size=8 * CHUNK_BYTES)
    write_chunk(tier, obj, 0, FULL)
    free = os.statvfs(mounted).f_bfree
    for index in range(1, 8):
        with pytest.raises(OSError) as caught:
            write_chunk(tier, obj, index, FULL)
        assert caught.value.errno == errno.ENOSPC
        assert os.statvfs(mounted).f_bfree == free  # what was half written does not stay
    small = 0
    with contextlib.suppress(OSError):
        while small < 10**4:
            write_chunk(tier, make_object(f"{small}.bin", 4096), 0, 1)
            small += 1
    assert 0 < small < 10**4
    assert read_chunk(tier, make_object("0.bin", 4096), 0, 1) == 1
    assert read_chunk(tier, obj, 0, FULL) == FULL
    assert not list(mounted.rglob("*.new"))


@pytest.mark.parametrize("mounted", [["-t", "tmpfs", "none"]], indirect=True, ids=["tmpfs"])
def test_a_read_only_disk_gives_what_it_has(mounted: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = make_tier(mounted / "cache")
    obj = written(tier)
    flip(data_path(mounted / "cache", obj), 10)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    assert read_chunk(tier, obj, 0, FULL) == FULL & ~1
    assert "cannot be dropped" in caplog.text
    with pytest.raises(OSError, match="Read-only"):
        write_chunk(tier, make_object("other.bin"), 0, 1)
    assert not tier.remove(obj.cache_id)
    assert read_chunk(tier, obj, 1, LAST) == LAST
