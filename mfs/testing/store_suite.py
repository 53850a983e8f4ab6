"""The suite that everything a registry stands on passes. Subclass it with a fixture `place`; checks go around it.

class TestFolder(StoreSuite):
    @pytest.fixture
    def place(self, tmp_path): return FolderPlace(tmp_path)

`ReadingSuite` is the part that a store has which only reads.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import pytest

from mfs.errors import ChangedError, MfsError, NotFoundError, StoreError
from mfs.registry.store import Store
from mfs.testing.ramp import ramp
from mfs.testing.suite import deadline
from mfs.types import ByteRange

_CHUNK = "chunks/ab/" + "ab" * 32


class Place(Protocol):
    """Where a store's objects lie, looked at and changed without the store's help."""

    def store(self) -> Store:
        """A fresh store over this place, to be closed by the caller."""
        ...

    def put(self, key: str, content: bytes) -> None:
        """Create or replace an object."""
        ...

    def get(self, key: str) -> bytes | None:
        """An object's bytes, None if there is none."""
        ...


def read_range(store: Store, key: str, start: int, stop: int, size: int, *, deadline_s: float = 0.0) -> bytes:
    """A range of an object through the store, into memory that held something else."""
    out = bytearray(b"\xee" * (stop - start))
    store.read_range(
        key, ByteRange(start, stop), size=size, out=memoryview(out), deadline_s=deadline_s or deadline()
    )  # fmt: skip
    return bytes(out)


def keys(store: Store, prefix: str = "") -> list[str]:
    """What the store lists."""
    return [found.key for found in store.list(prefix, deadline_s=deadline())]


class ReadingSuite:
    """What reading and listing mean, for any store."""

    @pytest.fixture
    def store(self, place: Place) -> Iterator[Store]:
        """The store under test, over a place that may be filled before and after."""
        store = place.store()
        yield store
        store.close()

    def test_an_object_is_read_whole(self, place: Place, store: Store) -> None:
        for size in (0, 1, 300_000):
            key = f"tags/m/t/{size:010d}"
            place.put(key, ramp(size))
            assert store.read(key, deadline_s=deadline()) == ramp(size)
            assert store.size(key, deadline_s=deadline()) == size

    def test_what_is_longer_than_its_kind_is_refused(self, place: Place, store: Store) -> None:
        place.put("tags/m/t/1", ramp(100))
        assert store.read("tags/m/t/1", bytes_max=100, deadline_s=deadline()) == ramp(100)
        with pytest.raises(StoreError) as caught:
            store.read("tags/m/t/1", bytes_max=99, deadline_s=deadline())
        assert "99" in str(caught.value)

    def test_ranges_are_exact(self, place: Place, store: Store) -> None:
        size = (5 << 20) + 77
        place.put(_CHUNK, ramp(size))
        for start, stop in ((0, 1), (5, 4005), (0, size), (size - 1, size), (4 << 20, size), (9, 9)):
            assert read_range(store, _CHUNK, start, stop, size) == ramp(stop - start, start)

    def test_what_is_not_there(self, place: Place, store: Store) -> None:
        place.put("tags/m/t/1", b"x")
        for key in (_CHUNK, "tags/m/t/2", "tags/m", "tags"):
            assert store.size(key, deadline_s=deadline()) is None
            with pytest.raises(NotFoundError) as caught:
                store.read(key, deadline_s=deadline())
            assert key.rsplit("/", 1)[-1] in str(caught.value)
        with pytest.raises(NotFoundError):
            read_range(store, _CHUNK, 0, 1, 10)

    def test_an_object_of_another_size_is_changed(self, place: Place, store: Store) -> None:
        for size in (99, 101):
            place.put(_CHUNK, ramp(size))
            with pytest.raises(ChangedError) as caught:
                read_range(store, _CHUNK, 10, 20, 100)
            assert "\n" not in str(caught.value)

    def test_a_range_beyond_the_end_is_an_error(self, place: Place, store: Store) -> None:
        place.put(_CHUNK, ramp(100))
        with pytest.raises(MfsError):
            read_range(store, _CHUNK, 50, 150, 150, deadline_s=deadline(2))

    def test_all_below_a_prefix_is_listed_in_the_order_of_keys(self, place: Place, store: Store) -> None:
        names = ("a", "a-b", "a.b", "a0", "B", "_z")
        put = [*sorted(f"tags/m/{name}/1" for name in names), "tags/m2/t/1"]
        for number, key in enumerate(put):
            place.put(key, ramp(number))
        found = list(store.list("tags/m/", deadline_s=deadline()))
        assert [(stored.key, stored.size) for stored in found] == [(key, put.index(key)) for key in sorted(put[:-1])]
        assert keys(store, "tags/") == sorted(put)
        assert abs(found[0].modified_ns / 1e9 - time.time()) < 3600

    def test_nothing_below_a_prefix_is_no_error(self, place: Place, store: Store) -> None:
        place.put("tags/m/t/1", b"x")
        assert keys(store, "manifests/") == []
        assert keys(store, "tags/m/t/1/") == []
        assert list(store.names("manifests/", deadline_s=deadline())) == []

    def test_names_are_first_components(self, place: Place, store: Store) -> None:
        for key in ("tags/m/t/1", "tags/m/u/1", "tags/n/t/1", "tags/m-2/t/1", "mfs-registry.json"):
            place.put(key, b"x")
        assert list(store.names("", deadline_s=deadline())) == ["mfs-registry.json", "tags"]
        assert list(store.names("tags/", deadline_s=deadline())) == ["m-2", "m", "n"]
        assert list(store.names("tags/m/", deadline_s=deadline())) == ["t", "u"]
        assert list(store.names("tags/m/t/", deadline_s=deadline())) == ["1"]

    def test_what_is_no_key_is_not_asked_for(self, place: Place, store: Store) -> None:
        for key in ("../x", "tags/../x", "/etc/passwd", "", "tags//x", ".x", "a b", "x\n", "tags/"):
            with pytest.raises(NotFoundError):
                store.read(key, deadline_s=deadline())

    def test_a_passed_deadline_is_an_error_and_not_a_hang(self, place: Place, store: Store) -> None:
        place.put(_CHUNK, ramp(100))
        with pytest.raises(StoreError):
            read_range(store, _CHUNK, 0, 10, 100, deadline_s=time.monotonic() - 1)

    def test_the_identity_is_the_same_for_another_process(self, place: Place, store: Store) -> None:
        other = place.store()
        other.close()
        assert other.identity == store.identity

    def test_many_threads_at_once(self, place: Place, store: Store) -> None:
        size = (1 << 20) + 11
        place.put(_CHUNK, ramp(size))
        starts = range(0, size, 65_537)
        with ThreadPoolExecutor(16) as pool:
            parts = list(
                pool.map(lambda at: read_range(store, _CHUNK, at, min(at + 65_537, size), size), starts)
            )  # fmt: skip
        assert b"".join(parts) == ramp(size)


class StoreSuite(ReadingSuite):
    """What writing means as well."""

    is_conditional = True
    """Whether the store decides who creates an object."""

    def test_created_once_and_never_replaced(self, place: Place, store: Store) -> None:
        key = "tags/m/t/0000000001"
        assert store.create(key, b"first", deadline_s=deadline())
        assert not store.create(key, b"other", deadline_s=deadline())
        assert place.get(key) == b"first"

    def test_it_says_whether_it_decides_and_leaves_nothing_behind(self, place: Place, store: Store) -> None:
        assert store.is_conditional(deadline_s=deadline()) is self.is_conditional
        # Looked at one by one: rclone lists what was written by many at once for a long while after it is gone.
        assert [key for key in keys(store) if place.get(key) is not None] == []

    def test_of_many_who_create_at_once_one_does(self, place: Place, store: Store) -> None:
        if not self.is_conditional:
            pytest.skip("this store does not decide")
        others = [place.store() for _ in range(3)]
        ready = threading.Barrier(12)

        def create(number: int) -> bool:
            ready.wait()
            who = [store, *others][number % 4]
            return who.create("tags/m/t/0000000001", b"by %d" % number, deadline_s=deadline())

        try:
            with ThreadPoolExecutor(12) as pool:
                won = [number for number, is_won in enumerate(pool.map(create, range(12))) if is_won]
        finally:
            for other in others:
                other.close()
        assert len(won) == 1
        assert place.get("tags/m/t/0000000001") == b"by %d" % won[0]

    def test_written_and_replaced(self, place: Place, store: Store) -> None:
        for body in (b"", ramp(8 << 20), memoryview(b"short")):
            store.write(_CHUNK, body, deadline_s=deadline())
            assert place.get(_CHUNK) == bytes(body)
        assert keys(store) == [_CHUNK]

    def test_a_large_object_is_created(self, place: Place, store: Store) -> None:
        assert store.create(_CHUNK, ramp(8 << 20), deadline_s=deadline())
        assert place.get(_CHUNK) == ramp(8 << 20)

    def test_deleted_is_gone_and_what_is_not_there_is_no_error(self, place: Place, store: Store) -> None:
        put = [f"chunks/{number:02x}/{number:064x}" for number in range(14)]
        for key in put:
            place.put(key, b"x")
        gone = itertools.chain(put[:10], [_CHUNK, "tags/m/t/1"], put[:2])
        store.delete(gone, deadline_s=deadline())
        assert keys(store) == put[10:]
        assert all(place.get(key) is None for key in put[:10])
        store.delete(put, deadline_s=deadline())
        assert keys(store) == []
        assert list(store.names("chunks/", deadline_s=deadline())) == []

    def test_what_is_no_key_is_not_written(self, place: Place, store: Store) -> None:
        for key in ("../x", "tags/../x", "/x", "", "tags//x", ".x", "work/", "a b"):
            with pytest.raises(NotFoundError):
                store.create(key, b"x", deadline_s=deadline())
            with pytest.raises(NotFoundError):
                store.write(key, b"x", deadline_s=deadline())
            with pytest.raises(NotFoundError):
                store.delete([key], deadline_s=deadline())
