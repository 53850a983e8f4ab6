"""Chunk files: what was written comes back or is missed, whatever befalls the file."""

from __future__ import annotations

import errno
import json
import mmap
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

from mfs.cache import ssd
from mfs.cache.chunks import full_mask
from mfs.cache.ssd import FORMAT, HEADER_BYTES, SsdTier, open_directory
from mfs.errors import ConfigError
from mfs.types import BLOCK_BYTES, CHUNK_BYTES, ObjectId
from tests.cache.chunkfiles import (
    assert_blocks,
    cached_pages,
    chunk_path,
    content,
    make_object,
    make_slot,
    make_tier,
    write_chunk,
)

FULL = full_mask(CHUNK_BYTES)


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


def rewrite_header(path: Path, offset: int, field: bytes) -> None:
    """Change header bytes and make the header's own checksum fit again."""
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(field)] = field
    raw[HEADER_BYTES - 8 : HEADER_BYTES] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(raw[: HEADER_BYTES - 8])))
    path.write_bytes(raw)


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
    assert read_chunk(tier, obj, index, asked & whole) == asked & stands
    assert read_chunk(tier, obj, index, whole) == stands
    if stands:
        assert chunk_path(tier._config.directory, obj, index).stat().st_size == HEADER_BYTES + len(
            obj.chunk_range(index)
        )


def test_the_header_names_the_object_for_people(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object("folder/größe.bin")
    write_chunk(tier, obj, 1, 5)
    header = tier.header(obj.cache_id, 1)
    assert header is not None
    assert (header.cache_id, header.index, header.object_bytes, header.mask) == (obj.cache_id, 1, obj.size, 5)
    assert json.loads(header.identity) == [obj.source, obj.path, obj.size, obj.version, None]


def test_an_identity_too_long_for_the_header_is_cut(tier: SsdTier) -> None:
    obj = make_object("x" * 5000)
    write_chunk(tier, obj, 0, FULL)
    assert read_chunk(tier, obj, 0, FULL) == FULL


def test_a_new_write_of_a_block_replaces_it(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, 0b11, data=bytes(CHUNK_BYTES))
    write_chunk(tier, obj, 0, 0b11)
    assert read_chunk(tier, obj, 0, 0b11) == 0b11


# -- damage


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 32, 36, 40, 79, 80, 327, 336, 400, 4087, 4088, 4095])
def test_a_flipped_header_byte_loses_the_chunk_and_says_so(
    tier: SsdTier, tmp_path: Path, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, FULL)
    path = chunk_path(tmp_path, obj, 0)
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert not path.exists()
    assert "dropped" in caplog.text


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        (0, b"OTHERMAG"),
        (8, struct.pack("<I", FORMAT + 1)),
        (16, struct.pack("<Q", 1)),
        (16, struct.pack("<Q", 2**63)),
        (24, struct.pack("<Q", 3)),
        (24, struct.pack("<Q", 2**64 - 1)),
        (32, struct.pack("<I", CHUNK_BYTES - 1)),
        (32, struct.pack("<I", 2**32 - 1)),
        (40, b"f" * 40),
        (40, b"\xff" * 40),
        (40, b"../../../../../../../../../etc/passwd\0\0\0\0"),
    ],
)
def test_a_header_that_verifies_but_is_another_chunks_loses_it(
    tier: SsdTier, tmp_path: Path, offset: int, field: bytes
) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, FULL)
    rewrite_header(chunk_path(tmp_path, obj, 0), offset, field)
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert not chunk_path(tmp_path, obj, 0).exists()


def test_blocks_beyond_the_end_of_the_chunk_are_no_blocks(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object(size=3 * BLOCK_BYTES)
    write_chunk(tier, obj, 0, 0b111)
    rewrite_header(chunk_path(tmp_path, obj, 0), 12, struct.pack("<I", FULL))
    assert read_chunk(tier, obj, 0, 0b111) == 0
    assert list(tier.walk()) == []


@pytest.mark.parametrize("block", [0, 7, 31])
def test_a_flipped_body_byte_loses_its_block_alone(tier: SsdTier, tmp_path: Path, block: int) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, FULL)
    path = chunk_path(tmp_path, obj, 0)
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + block * BLOCK_BYTES + 12345)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    untouched = FULL & ~(1 << block)
    assert read_chunk(tier, obj, 0, untouched) == untouched
    assert path.exists()  # nobody looked at the bad block
    assert read_chunk(tier, obj, 0, FULL) == untouched
    assert not path.exists()


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, HEADER_BYTES + BLOCK_BYTES, HEADER_BYTES + CHUNK_BYTES - 1])
def test_a_truncated_file_gives_what_verifies_and_goes(tier: SsdTier, tmp_path: Path, length: int) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, FULL)
    path = chunk_path(tmp_path, obj, 0)
    os.truncate(path, length)
    whole_blocks = max(0, length - HEADER_BYTES) // BLOCK_BYTES
    assert read_chunk(tier, obj, 0, FULL) == (1 << whole_blocks) - 1
    assert not path.exists()


@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES, HEADER_BYTES + CHUNK_BYTES])
def test_garbage_under_a_good_name_is_dropped(tier: SsdTier, tmp_path: Path, size: int) -> None:
    obj = make_object()
    path = chunk_path(tmp_path, obj, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(random.Random(1).randbytes(size))
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert not path.exists()


def test_another_chunk_under_the_name_is_dropped(tier: SsdTier, tmp_path: Path) -> None:
    obj, other = make_object(), make_object("other.bin")
    write_chunk(tier, other, 0, FULL)
    path = chunk_path(tmp_path, obj, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    chunk_path(tmp_path, other, 0).rename(path)
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert not path.exists()


def test_a_file_grown_by_garbage_still_gives_its_chunk(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object()
    write_chunk(tier, obj, 1, FULL & full_mask(len(obj.chunk_range(1))))
    with open(chunk_path(tmp_path, obj, 1), "ab") as file:
        file.write(b"rubbish" * 1000)
    whole = full_mask(len(obj.chunk_range(1)))
    assert read_chunk(tier, obj, 1, whole) == whole


def test_a_file_that_cannot_be_read_is_a_logged_miss(
    tier: SsdTier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    obj = make_object()
    chunk_path(tmp_path, obj, 0).mkdir(parents=True)
    assert read_chunk(tier, obj, 0, FULL) == 0
    assert "fetching from the origin" in caplog.text


def test_merging_into_a_damaged_file_never_launders_its_blocks(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object()
    write_chunk(tier, obj, 0, 0b0011)
    with open(chunk_path(tmp_path, obj, 0), "r+b") as file:
        file.seek(HEADER_BYTES + 10)
        file.write(b"damage")
    write_chunk(tier, obj, 0, 0b1100)
    assert read_chunk(tier, obj, 0, FULL) == 0b1110


def test_walking_yields_sound_chunks_and_removes_the_rest(tier: SsdTier, tmp_path: Path) -> None:
    obj, other = make_object(), make_object("other.bin")
    write_chunk(tier, obj, 0, FULL)
    write_chunk(tier, obj, 1, 1)
    write_chunk(tier, other, 0, FULL)
    folder = chunk_path(tmp_path, obj, 0).parent
    chunk_path(tmp_path, other, 0).rename(folder / f"{obj.cache_id}.00000009")
    (folder / "stray").write_bytes(b"?")
    young, old = folder / "young.tmp", folder / "old.tmp"
    young.touch()
    old.touch()
    os.utime(old, (1, 1))
    assert sorted((h.cache_id, h.index) for h in tier.walk()) == [(obj.cache_id, 0), (obj.cache_id, 1)]
    assert sorted(p.name for p in folder.iterdir()) == sorted([f"{obj.cache_id}.0000000{i}" for i in (0, 1)] + [
        "young.tmp"])  # fmt: skip


# -- kills

_WRITER = """
import random, sys
from pathlib import Path
from tests.cache.chunkfiles import make_object, make_tier, write_chunk
tier, dice = make_tier(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    obj = make_object(f"{dice.randrange(3)}.bin")
    index = dice.randrange(2)
    mask = dice.choice([2**32 - 1, dice.randrange(1, 2**32)]) & (2**32 - 1 if not index else 2**6 - 1)
    if mask:
        write_chunk(tier, obj, index, mask)
"""


def test_killed_writers_leave_only_sound_chunks(tmp_path: Path) -> None:
    """kill -9 at 12 random instants, two writers at a time on the same chunks."""
    tier, dice, found = make_tier(tmp_path), random.Random(7), 0
    for turn in range(6):
        writers = [
            subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(2 * turn + n)], stdout=subprocess.PIPE)
            for n in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        # How far they have come when they are killed is told by what they wrote, not by a clock.
        before = {path.name for path in tmp_path.rglob("*.tmp")}
        for _ in range(dice.randrange(1, 200)):
            if {path.name for path in tmp_path.rglob("*.tmp")} - before:
                break
        for writer in writers:
            writer.kill()
            writer.communicate()
        for number in range(3):
            for index in range(2):
                found += bool(read_chunk(tier, make_object(f"{number}.bin"), index, FULL if not index else 0b111111))
    assert found
    # What was left half written never gets into anybody's way, and is swept when it is old.
    for path in tmp_path.rglob("*.tmp"):
        os.utime(path, (1, 1))
    for number in range(256):
        list(tier.names(f"{number:02x}"))
    assert not list(tmp_path.rglob("*.tmp"))


# -- the disk


def test_no_second_copy_of_the_bytes_stays_in_the_page_cache(tier: SsdTier, tmp_path: Path) -> None:
    obj = make_object()
    path = chunk_path(tmp_path, obj, 0)
    write_chunk(tier, obj, 0, 0b1011)
    write_chunk(tier, obj, 0, 0b0100)  # a merge reads the old file
    write_chunk(tier, obj, 0, FULL)
    assert cached_pages(path) == 0
    read_chunk(tier, obj, 0, FULL)
    read_chunk(tier, obj, 0, 0b10)
    assert tier.header(obj.cache_id, 0) is not None
    assert len(list(tier.walk())) == 1
    assert cached_pages(path) == 0


@pytest.mark.parametrize("mounted", [["-t", "ramfs", "none"]], indirect=True, ids=["ramfs"])
def test_a_file_system_without_o_direct_serves_as_well(mounted: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier, obj = make_tier(mounted / "cache"), make_object()
    assert write_chunk(tier, obj, 0, 0b11) == 0b11
    assert write_chunk(tier, obj, 0, FULL & ~1) == FULL
    assert read_chunk(tier, obj, 0, FULL) == FULL
    assert caplog.text.count("has no O_DIRECT") == 1


def test_without_o_direct_no_page_stays_either(tier: SsdTier, tmp_path: Path) -> None:
    tier._direct = 0  # what a refusal leaves behind; the disk below tmp_path takes fadvise, a ramfs would not
    obj = make_object()
    write_chunk(tier, obj, 0, FULL)
    assert cached_pages(chunk_path(tmp_path, obj, 0)) == 0
    assert read_chunk(tier, obj, 0, FULL) == FULL
    assert cached_pages(chunk_path(tmp_path, obj, 0)) == 0


@pytest.mark.parametrize("mounted", [["-t", "tmpfs", "-o", "size=8m", "none"]], indirect=True, ids=["tmpfs"])
def test_a_full_disk_is_enospc_and_keeps_what_stands(mounted: Path) -> None:
    tier, obj = make_tier(mounted / "cache"), make_object(size=8 * CHUNK_BYTES)
    write_chunk(tier, obj, 0, FULL)
    with pytest.raises(OSError) as caught:
        write_chunk(tier, obj, 1, FULL)
    assert caught.value.errno == errno.ENOSPC
    assert read_chunk(tier, obj, 0, FULL) == FULL
    assert not list(mounted.rglob("*.tmp"))


# -- the directory


@pytest.mark.parametrize("marker", ['{"format": 2}', '{"format": "1"}', "{}", "[]", "null", "", "\0\0"])
def test_a_cache_of_another_version_is_refused(tmp_path: Path, marker: str) -> None:
    (tmp_path / "mfs-cache.json").write_text(marker)
    with pytest.raises(ConfigError, match="--cache-dir"):
        open_directory(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mfs-cache.json"]


def test_a_foreign_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("\\documentclass")
    with pytest.raises(ConfigError, match="neither empty nor an mfs cache"):
        open_directory(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_or_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be used"):
            open_directory(place)


def test_a_new_file_system_and_a_killed_start_count_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "mfs-cache.1234.tmp").touch()
    open_directory(tmp_path)
    open_directory(tmp_path)


_OPENER = "import sys; from pathlib import Path; from mfs.cache.ssd import open_directory\n" \
    "sys.stdin.read(1)\nfor n in range(200): open_directory(Path(sys.argv[1]) / str(n))"  # fmt: skip


def test_processes_that_start_together_all_get_the_directory(tmp_path: Path) -> None:
    openers = [
        subprocess.Popen([sys.executable, "-c", _OPENER, str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write(b"g")
        opener.stdin.flush()
    assert [opener.communicate()[1].decode() for opener in openers] == [""] * 3


def test_a_good_file_that_replaced_a_bad_one_while_it_was_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, obj = make_tier(tmp_path), make_object("model", CHUNK_BYTES)
    write_chunk(tier, obj, 0, full_mask(CHUNK_BYTES))
    path = chunk_path(tmp_path, obj, 0)
    good = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + 10)
        file.write(b"\xff\xfe")
    checksum = ssd.xxh3_64_intdigest

    def replacing(data: memoryview) -> int:
        """Another process writes the chunk anew, just now."""
        path.with_suffix(".new").write_bytes(good)
        path.with_suffix(".new").rename(path)
        return checksum(data)

    slot = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    with monkeypatch.context() as patch:
        patch.setattr(ssd, "xxh3_64_intdigest", replacing)
        brought, _ = tier.read_into(obj, 0, full_mask(CHUNK_BYTES), slot)
    assert brought == full_mask(CHUNK_BYTES) & ~1
    assert tier.read_into(obj, 0, full_mask(CHUNK_BYTES), slot)[0] == full_mask(CHUNK_BYTES)
