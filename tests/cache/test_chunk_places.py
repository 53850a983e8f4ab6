"""Where chunks stand in the cache's objects: found by all processes, bounded, and never worse than a miss."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfs.cache import chunk_places
from mfs.cache.chunk_places import ChunkPlaces, Content, Place
from mfs.cache.directory import open_directory, root_of


def chunk(number: int) -> bytes:
    """An id of a chunk; neighbours differ in their first bytes."""
    return number.to_bytes(8, "big") + bytes(24)


def content(number: int, *chunks: int) -> Content:
    """A file of chunks of 100 bytes."""
    ids = [chunk(item) for item in chunks]
    return Content(f"{number:040x}", 100 * len(ids), ids, [100 * i for i in range(len(ids))])


def found(places: ChunkPlaces, number: int) -> list[Place]:
    return list(places.find(chunk(number).hex()))


def everything(cache_id: str) -> bool:
    return True


def nothing(cache_id: str) -> bool:
    return False


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    directory = tmp_path / "cache"
    open_directory(directory)
    return directory


def test_a_chunk_is_found_in_each_file_that_has_it_the_latest_first(cache: Path) -> None:
    places = ChunkPlaces(cache)
    assert found(places, 7) == []
    places.add([content(1, 5, 7, 6)], everything)
    places.add([content(2, 7), content(3, 9)], everything)
    assert found(places, 7) == [Place(f"{2:040x}", 100, 0), Place(f"{1:040x}", 300, 100)]
    assert found(places, 9) == [Place(f"{3:040x}", 100, 0)]
    assert found(places, 8) == []


def test_what_one_process_adds_another_sees(cache: Path) -> None:
    one, other = ChunkPlaces(cache), ChunkPlaces(cache)
    one.add([content(1, 5)], everything)
    assert found(other, 5) == found(one, 5) != []
    other.add([content(2, 6)], everything)
    assert found(one, 6) == [Place(f"{2:040x}", 100, 0)]


def test_the_same_file_again_changes_nothing(cache: Path) -> None:
    places = ChunkPlaces(cache)
    places.add([content(1, 5, 6)], everything)
    before = (root_of(cache) / "chunks.index").stat()
    places.add([content(1, 5, 6)], everything)
    assert (root_of(cache) / "chunks.index").stat() == before


def test_what_is_not_here_any_more_leaves_with_the_next_change(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ChunkPlaces(cache)
    places.add([content(1, 5), content(2, 6)], nothing)
    places.add([content(3, 7)], nothing)
    assert found(places, 5), "what was just added is about to be fetched"
    monkeypatch.setattr(chunk_places, "SETTLE_S", -1)
    places.add([content(4, 8)], lambda cache_id: cache_id == f"{2:040x}")
    assert [found(places, number) != [] for number in (5, 6, 7, 8)] == [False, True, False, True]


def test_the_oldest_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_places, "ROWS_MAX", 5)
    places = ChunkPlaces(cache)
    for number in range(4):
        places.add([content(number, 10 * number, 10 * number + 1)], everything)
    assert [found(places, 10 * number) != [] for number in range(4)] == [False, False, True, True]
    places.add([content(9, *range(100, 120))], everything)
    assert sum(bool(found(places, number)) for number in range(200)) == 5


@pytest.mark.parametrize("damage", [b"", b"MFSCHNK\0", b"\xff" * 5000, None])
def test_a_damaged_table_is_an_empty_one_and_written_anew(cache: Path, damage: bytes | None) -> None:
    places = ChunkPlaces(cache)
    places.add([content(1, 5, 6)], everything)
    path = root_of(cache) / "chunks.index"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] if damage is None else damage)
    fresh = ChunkPlaces(cache)
    assert found(fresh, 5) == []
    fresh.add([content(1, 5, 6)], everything)
    assert found(fresh, 5) == [Place(f"{1:040x}", 200, 0)]


def test_no_link_is_followed(cache: Path, tmp_path: Path) -> None:
    places = ChunkPlaces(cache)
    places.add([content(1, 5)], everything)
    path = root_of(cache) / "chunks.index"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert found(ChunkPlaces(cache), 5) == []
