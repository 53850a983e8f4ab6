"""The RAM tier's files: exactly their objects, bounded by the budget, and nobody's to write but ours."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mfs import limits, mapping
from mfs.cache.pieces import Piece, mapped
from mfs.cache.ram import SLOTS_COUNT_MIN, Place, RamConfig, RamFile, RamTier
from mfs.errors import ConfigError, TransientStoreError
from mfs.testing import ramp
from mfs.types import CHUNK_BYTES

BUDGET = SLOTS_COUNT_MIN * CHUNK_BYTES


@pytest.fixture
def memory() -> Iterator[RamTier]:
    with closing(RamTier(RamConfig(BUDGET + 1))) as memory:
        yield memory


def fill(memory: RamTier, obj: RamFile, size: int) -> list[Place]:
    """As workers do, by a descriptor of their own."""
    places = []
    for start in range(0, size, CHUNK_BYTES):
        places.append(memory.take(obj, start))
        put(places[-1], ramp(min(CHUNK_BYTES, size - start), start))
    return places


def put(place: Place, content: bytes) -> None:
    with mapped(Piece(os.dup(place.file.fd), place.start, len(content)), to_fill=2**32 - 1) as piece:
        piece[: len(content)] = content


def memory_of(obj: RamFile) -> int:
    return os.fstat(obj.fd).st_blocks * 512


def test_a_file_is_its_object_and_its_memory_goes_piece_by_piece(memory: RamTier) -> None:
    assert memory.slots_count == memory.slots_free == SLOTS_COUNT_MIN
    size = 2 * CHUNK_BYTES + 5000
    obj = memory.open(size)
    assert memory_of(obj) == 0, "nothing is touched ahead"
    first, middle, last = fill(memory, obj, size)
    assert os.pread(obj.fd, size + 1, 0) == obj.view(0, size) == ramp(size)
    assert memory.slots_used == 3
    before = memory_of(obj)
    memory.give(middle)
    assert memory_of(obj) == before - CHUNK_BYTES
    assert obj.view(2 * CHUNK_BYTES, size) == ramp(5000, 2 * CHUNK_BYTES)
    assert not memory.close_if_unused(obj)
    memory.give(first)
    memory.give(last)
    assert memory.close_if_unused(obj)
    assert memory.slots_free == SLOTS_COUNT_MIN


def test_pieces_of_the_common_file_go_from_one_to_the_next_with_their_memory(memory: RamTier) -> None:
    first, second = memory.take_common(), memory.take_common()
    put(first, ramp(CHUNK_BYTES))
    put(second, ramp(5000))
    before = memory_of(first.file)
    memory.give(first)
    assert memory_of(first.file) == before
    again = memory.take_common()
    assert (again.file, again.start) == (first.file, first.start)
    assert again.slot not in (first.slot, second.slot)
    assert again.file.view(again.start, again.start + CHUNK_BYTES) == ramp(CHUNK_BYTES)
    assert memory.slots_used == 2


def test_memory_where_somebody_may_still_write_is_left_to_him(memory: RamTier) -> None:
    """A worker that was given up and hangs in the kernel: its disk may answer yet."""
    place = memory.take_common()
    put(place, ramp(CHUNK_BYTES))
    with mapped(Piece(os.dup(place.file.fd), place.start, CHUNK_BYTES), to_fill=0):
        memory.give(place, is_clean=False)
        assert memory_of(place.file) == 0
    assert memory.slots_free == SLOTS_COUNT_MIN


def test_memory_without_a_user_gives_way_to_the_files_of_objects(memory: RamTier) -> None:
    places = [memory.take_common() for _ in range(SLOTS_COUNT_MIN)]
    for place in places:
        put(place, ramp(CHUNK_BYTES))
    assert not memory.has_room(None)
    for place in places:
        memory.give(place)
    common = places[0].file
    obj = memory.open(4 * CHUNK_BYTES)
    fill(memory, obj, 4 * CHUNK_BYTES)
    assert memory_of(common) + memory_of(obj) == BUDGET
    memory.cool_down()
    assert memory_of(common) == 0


def test_what_was_cooled_down_stays_so_until_somebody_takes_a_slot(memory: RamTier) -> None:
    """The mount is handed over: what is dropped then is the next daemon's to take."""
    first, second = memory.take_common(), memory.take_common()
    put(first, ramp(CHUNK_BYTES))
    put(second, ramp(CHUNK_BYTES))
    memory.give(first)
    assert memory.warm_bytes == CHUNK_BYTES
    memory.cool_down()
    memory.give(second)
    assert memory_of(first.file) == memory.warm_bytes == 0
    assert memory.warm_up() is None
    memory.give(memory.take_common())
    assert memory.warm_bytes == CHUNK_BYTES


def test_a_slot_in_the_common_file_needs_no_further_file(memory: RamTier) -> None:
    memory.give(memory.take_common())
    memory.objects_max = 1
    assert not memory.has_room(None)
    assert memory.has_room(memory.common)


def test_what_is_touched_ahead_fits_into_the_budget(memory: RamTier) -> None:
    obj = memory.open(CHUNK_BYTES)
    fill(memory, obj, CHUNK_BYTES)
    seen = set()
    while (place := memory.warm_up()) is not None:
        seen.add(place.start)
        assert (memory.used_bytes, memory.warm_bytes) == (CHUNK_BYTES, len(seen) * CHUNK_BYTES)
        assert memory.slots_free == SLOTS_COUNT_MIN - 2
        put(place, bytes(CHUNK_BYTES))
        memory.give(place)
    assert len(seen) == SLOTS_COUNT_MIN - 1
    assert memory.slots_used == 1
    assert memory.take_common().start in seen
    assert memory.warm_up() is None


@pytest.mark.parametrize("advice", [mapping._MADV_POPULATE_WRITE, 9999], ids=["asked for", "unknown to the kernel"])
def test_memory_is_there_before_anybody_fills_it(memory: RamTier, advice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_MADV_POPULATE_WRITE", advice)
    obj = memory.open(CHUNK_BYTES)
    view = mapping.map_file(obj.fd, CHUNK_BYTES, writable=True)
    assert memory_of(obj) == 0
    mapping.populate(view)
    assert memory_of(obj) == CHUNK_BYTES


def test_a_slot_in_a_file_of_its_own_finds_the_memory_of_a_warm_piece(memory: RamTier) -> None:
    place = memory.take_common()
    put(place, bytes(CHUNK_BYTES))
    memory.give(place)
    assert memory.warm_bytes == memory_of(place.file) == CHUNK_BYTES
    memory.take(memory.open(CHUNK_BYTES), 0)
    assert memory.warm_bytes == memory_of(place.file) == 0


def test_the_page_behind_the_end_is_zeros(memory: RamTier) -> None:
    """Whoever maps the file sees it; O_DIRECT reads whole pages of a file on disk into it."""
    obj = memory.open(5000)
    with mapped(Piece(os.dup(obj.fd), 0, 5000), to_fill=2**32 - 1) as piece:
        assert len(piece) == 8192
        piece[:] = b"x" * 8192
    with mmap.mmap(obj.fd, 5000, prot=mmap.PROT_READ) as peer:
        assert peer[:] == b"x" * 5000
    with mapped(Piece(os.dup(obj.fd), 0, 5000), to_fill=0) as piece:
        assert piece[5000:] == bytes(3192)


def test_a_view_outlives_its_file(memory: RamTier) -> None:
    obj = memory.open(CHUNK_BYTES)
    [place] = fill(memory, obj, CHUNK_BYTES)
    view = obj.view(0, 100)
    memory.give(place)
    assert memory.close_if_unused(obj)
    assert view == bytes(100)


def test_a_worker_keeps_nothing_mapped_and_no_descriptor(memory: RamTier) -> None:
    obj = memory.open(CHUNK_BYTES)
    before = os.listdir("/proc/self/fd"), Path("/proc/self/maps").read_text().count("\n")
    for _ in range(3):
        with mapped(Piece(os.dup(obj.fd), 0, CHUNK_BYTES), to_fill=2**32 - 1) as piece:
            piece[0] = 1
        del piece
    assert (os.listdir("/proc/self/fd"), Path("/proc/self/maps").read_text().count("\n")) == before


_READER = """
import mmap, sys
file = open(f"/proc/{sys.argv[1]}/fd/{sys.argv[2]}", "rb")
held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.readline()
import zlib
print(zlib.crc32(held), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only a tmpfs of our own says what others hold")
def test_what_was_given_whole_counts_until_its_last_reader_has_gone(memory: RamTier) -> None:
    """Nothing is punched out under him: he reads on, and the budget is short by what he holds."""
    import zlib

    size = 4 * CHUNK_BYTES
    obj = memory.open(size)
    fill(memory, obj, size)
    obj.given = True
    command = [sys.executable, "-c", _READER, str(os.getpid()), str(obj.fd)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "mapped\n"
        memory.give_whole(obj)
        assert memory.close_if_unused(obj)
        assert (memory.slots_used, memory.held_bytes) == (0, size)
        assert memory.slots_free == SLOTS_COUNT_MIN - 4
        other = memory.open(BUDGET)
        while memory.has_room(other):
            memory.take(other, 0)
        assert memory.slots_used == SLOTS_COUNT_MIN - 4
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == f"{zlib.crc32(ramp(size))}\n"
    assert memory.has_room(other)
    assert memory.held_bytes == 0


def test_more_files_than_descriptors_allow_are_refused(memory: RamTier) -> None:
    memory.objects_max = 4
    held = [memory.open(1) for _ in range(3)]
    for obj in held[:2]:
        memory.hold(obj)
    with pytest.raises(TransientStoreError, match="2 files of the RAM tier are lent already"):
        memory.hold(held[2])
    memory.open(1)
    assert not memory.has_room(None)
    assert memory.has_room(held[0])
    with pytest.raises(TransientStoreError, match="has 4 files already"):
        memory.open(1)
    memory.unhold(held[0])
    assert memory.close_if_unused(held[0])
    assert memory.has_room(None)


@pytest.mark.parametrize("budget_bytes", [0, CHUNK_BYTES, BUDGET - 1])
def test_a_budget_too_small_is_refused(budget_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"expected at least {BUDGET} bytes.*--ram-size"):
        RamTier(RamConfig(budget_bytes))


@pytest.mark.parametrize("budget_bytes", [limits.available().free_bytes + (64 << 30), 1 << 62], ids=["machine", "any"])
def test_a_budget_beyond_the_machine_is_refused(budget_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"does not fit.*--ram-size"):
        RamTier(RamConfig(budget_bytes))


_LIMITED = """
import resource
from mfs.cache.ram import RamConfig, RamTier
resource.setrlimit(resource.RLIMIT_FSIZE, {limits})
memory = RamTier(RamConfig({budget}))
memory.open({budget})
print(*resource.getrlimit(resource.RLIMIT_FSIZE))
"""


def limited(soft: int, hard: int) -> tuple[str, str]:
    """What is printed and said of a tier in a process whose files are limited."""
    script = _LIMITED.format(limits=(soft, hard), budget=BUDGET)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr


def test_files_may_be_as_large_as_the_hard_limit_says() -> None:
    assert limited(4096, -1) == ("-1 -1", "")
    assert limited(4096, BUDGET) == (f"{BUDGET} {BUDGET}", "")


def test_a_budget_larger_than_a_file_may_be_is_refused() -> None:
    said, error = limited(4096, BUDGET - 1)
    assert not said
    assert (
        f"ConfigError: RAM budget of {BUDGET} bytes does not fit: ulimit -f allows files of {BUDGET - 1} bytes" in error
    )


_BORROWER = """
import mmap, os, sys
from mfs.cache.pieces import *
from mfs.cache.ram import *
if {uid}:
    os.setgroups([]); os.setgid({uid}); os.setuid({uid})
memory = RamTier(RamConfig(SLOTS_COUNT_MIN * CHUNK_BYTES))
assert bool({uid}) == bool(memory.note)
obj = memory.open(CHUNK_BYTES)
place = memory.take(obj, 0)
with mapped(Piece(os.dup(obj.fd), 0, CHUNK_BYTES), to_fill=2**32 - 1) as piece:
    piece[:4] = b"true"
fd = memory.lend(obj)
path = f"/proc/self/fd/{{fd}}"
attempts = dict(
    map=lambda: mmap.mmap(fd, 4096), write=lambda: os.pwrite(fd, b"x", 0), cut=lambda: os.ftruncate(fd, 0),
    cut_by_path=lambda: os.truncate(path, 0), open_again=lambda: os.open(path, os.O_RDWR),
    append=lambda: os.open(path, os.O_WRONLY | os.O_APPEND), empty=lambda: os.open(path, os.O_RDONLY | os.O_TRUNC),
)
if {uid}:
    attempts |= dict(shrink=lambda: os.ftruncate(obj.fd, 0), grow=lambda: os.ftruncate(obj.fd, 2 * CHUNK_BYTES))
else:
    attempts |= dict(mode=lambda: os.fchmod(fd, 0o666), owner=lambda: os.fchown(fd, 1, 1))
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(f"{{name}} worked")
assert mmap.mmap(fd, CHUNK_BYTES, prot=mmap.PROT_READ)[:4] == b"true"
memory.give(place)
assert os.pread(fd, 4, 0) == bytes(4)
assert os.environ["TMPDIR"] not in open("/proc/self/mountinfo").read()  # those of other tests come and go
"""


@pytest.mark.parametrize("uid", [0, 65534])
def test_what_is_lent_cannot_be_opened_again_for_writing(uid: int, tmp_path: Path) -> None:
    """Not by root either, where root mounted: it comes by a read-only mount that nobody else can reach."""
    if os.getuid():
        pytest.skip("only root can mount a tmpfs, and take its own rights away")
    done = subprocess.run(
        [sys.executable, "-c", _BORROWER.format(uid=uid)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert not done.returncode, done.stderr


def test_what_the_processes_need_beside_the_slots_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def available() -> limits.Available:
        return limits.Available(1 << 30, 20 * CHUNK_BYTES, "the control group /x (memory.max)")

    monkeypatch.setattr(limits, "available", available)
    RamTier(RamConfig(BUDGET, beside_bytes=4 * CHUNK_BYTES)).close()
    with pytest.raises(ConfigError, match=r"does not fit: the control group /x \(memory.max\) has .* beside it; lower"):
        RamTier(RamConfig(BUDGET, beside_bytes=5 * CHUNK_BYTES))
    RamTier(RamConfig(BUDGET, beside_bytes=5 * CHUNK_BYTES, coming_bytes=CHUNK_BYTES)).close()


@pytest.mark.parametrize(("free_count", "slots_count"), [(40, 30), (26, 16), (20, 16), (0, 16)])
def test_a_mount_that_serves_does_with_what_there_is(
    monkeypatch: pytest.MonkeyPatch, free_count: int, slots_count: int
) -> None:
    monkeypatch.setattr(limits, "available", lambda: limits.Available(1 << 30, free_count * CHUNK_BYTES, "the machine"))
    config = RamConfig(32 * CHUNK_BYTES, beside_bytes=10 * CHUNK_BYTES, serves=True)
    with closing(RamTier(config)) as memory:
        assert memory.slots_count == slots_count
        assert memory.size_bytes == slots_count * CHUNK_BYTES
        assert "the machine has" in memory.shortage
