"""The suite every source passes. Subclass it with a fixture `origin`; checks go around the source under test.

class TestFolder(SourceSuite):
    @pytest.fixture
    def origin(self, tmp_path): return FolderOrigin(tmp_path)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import pytest

from mfs.errors import ChangedError, MfsError, NotFoundError, StoreError
from mfs.sources.base import Source
from mfs.testing.ramp import ramp
from mfs.types import CHUNK_BYTES, ByteRange, Entry, EntryKind, ObjectId

TIMEOUT_S = 30.0

NAMES = (
    "plain.txt",
    "with space",
    "100%25.bin",
    "плюс+равно=.x",
    "模型 🤗",
    "a#b?c&d;e",
    "quote\"'`",
    "back\\slash",
    "~tilde[1]",
)
"""Names that break careless quoting, each legal on every source."""


class Origin(Protocol):
    """The place a source reads from, changed without the source's help."""

    def source(self) -> Source:
        """A fresh source over this origin, to be closed by the caller."""
        ...

    def put(self, path: str, content: bytes) -> None:
        """Create or replace a file so that its version differs from all before it."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file."""
        ...


def deadline(timeout_s: float = TIMEOUT_S) -> float:
    """A time.monotonic() value `timeout_s` from now."""
    return time.monotonic() + timeout_s


def list_tree(source: Source) -> dict[str, Entry]:
    """Every entry below the root by path, whichever directories the source chose to yield ahead."""
    found: dict[str, Entry] = {}
    done: set[str] = set()
    waiting = [""]
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        for directory, entries in source.list(path, deadline_s=deadline()):
            done.add(directory)
            for entry in entries:
                inner = f"{directory}/{entry.name}" if directory else entry.name
                assert inner not in found, f"{inner} was listed twice"
                found[inner] = entry
                if entry.kind is EntryKind.DIRECTORY:
                    waiting.append(inner)
        assert path in done, f"list({path!r}) did not yield the directory asked for"
    return found


def object_of(source: Source, path: str, entry: Entry) -> ObjectId:
    """The object that a listed file stands for."""
    return ObjectId(source.identity, path, entry.size, entry.version, entry.digest, entry.locator)


def read(source: Source, obj: ObjectId, start: int = 0, stop: int | None = None, *, deadline_s: float = 0.0) -> bytes:
    """Bytes of an object through the source, into memory that held something else."""
    span = ByteRange(start, obj.size if stop is None else stop)
    out = bytearray(b"\xee" * len(span))
    source.get_range(obj, span, out=memoryview(out), deadline_s=deadline_s or deadline())
    return bytes(out)


class SourceSuite:
    """What listing and reading mean, for any source."""

    keeps_old_versions = False
    """Whether the origin still serves a version after it was replaced or removed, as a Hub's commits do."""

    @pytest.fixture
    def source(self, origin: Origin) -> Iterator[Source]:
        """The source under test, over an origin that may be filled before and after."""
        source = origin.source()
        yield source
        source.close()

    def _one(self, origin: Origin, source: Source, content: bytes, path: str = "m/w.bin") -> ObjectId:
        origin.put(path, content)
        return object_of(source, path, list_tree(source)[path])

    def test_lists_nested_directories_with_sizes(self, origin: Origin, source: Source) -> None:
        files = {"a.txt": b"1", "m/config.json": b"{}", "m/deep/er/w.bin": ramp(1000), "n/empty": b""}
        for path, content in files.items():
            origin.put(path, content)
        found = list_tree(source)
        sizes = {path: entry.size for path, entry in found.items() if entry.kind is EntryKind.FILE}
        assert sizes == {path: len(content) for path, content in files.items()}
        directories = {path for path, entry in found.items() if entry.kind is EntryKind.DIRECTORY}
        assert directories == {"m", "m/deep", "m/deep/er", "n"}
        assert all(entry.version for entry in found.values() if entry.kind is EntryKind.FILE)

    def test_a_directory_below_can_be_listed_alone(self, origin: Origin, source: Source) -> None:
        origin.put("m/deep/w.bin", b"12")
        origin.put("mx/other", b"3")
        pages = dict(source.list("m/deep", deadline_s=deadline()))
        assert [(entry.name, entry.size) for entry in pages["m/deep"]] == [("w.bin", 2)]
        assert all(path == "m/deep" or path.startswith("m/deep/") for path in pages)

    @pytest.mark.parametrize("name", NAMES)
    def test_names_of_any_spelling_are_listed_and_read(self, origin: Origin, source: Source, name: str) -> None:
        obj = self._one(origin, source, name.encode(), f"d {name}/{name}")
        assert read(source, obj) == name.encode()

    def test_a_missing_directory_is_not_found(self, origin: Origin, source: Source) -> None:
        origin.put("m/w.bin", b"1")
        with pytest.raises(NotFoundError):
            list(source.list("nowhere", deadline_s=deadline()))

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 1), (0, 0), (CHUNK_BYTES - 1, CHUNK_BYTES + 1), (CHUNK_BYTES, CHUNK_BYTES + 77), (5, 4005)],
    )
    def test_ranges_are_exact(self, origin: Origin, source: Source, start: int, stop: int) -> None:
        obj = self._one(origin, source, ramp(CHUNK_BYTES + 77))
        assert read(source, obj, start, stop) == ramp(stop - start, start)

    def test_first_last_and_all_bytes(self, origin: Origin, source: Source) -> None:
        size = CHUNK_BYTES + 12_345
        obj = self._one(origin, source, ramp(size))
        assert read(source, obj) == ramp(size)
        assert read(source, obj, size - 1) == ramp(1, size - 1)
        assert read(source, obj, size, size) == b""

    def test_an_empty_file_reads_as_nothing(self, origin: Origin, source: Source) -> None:
        obj = self._one(origin, source, b"")
        assert (obj.size, read(source, obj)) == (0, b"")

    def test_equal_listings_give_equal_versions(self, origin: Origin, source: Source) -> None:
        first = self._one(origin, source, b"x")
        assert object_of(source, first.path, list_tree(source)[first.path]) == first

    def test_the_identity_is_the_same_for_another_process(self, origin: Origin, source: Source) -> None:
        other = origin.source()
        other.close()
        assert other.identity == source.identity

    @pytest.mark.parametrize("size", [1000, 999, 1001, 0])
    def test_a_replaced_object_is_changed_and_the_new_one_readable(
        self, origin: Origin, source: Source, size: int
    ) -> None:
        old = self._one(origin, source, ramp(1000))
        origin.put(old.path, ramp(size, 7))
        if self.keeps_old_versions:
            assert read(source, old, 10, 20) == ramp(10, 10)
        else:
            with pytest.raises(ChangedError):
                read(source, old, 10, 20)
        new = object_of(source, old.path, list_tree(source)[old.path])
        assert new.version != old.version
        assert read(source, new) == ramp(size, 7)

    def test_a_vanished_object_is_not_found_or_changed(self, origin: Origin, source: Source) -> None:
        obj = self._one(origin, source, ramp(100))
        origin.put("m/other", b"x")
        origin.delete(obj.path)
        if self.keeps_old_versions:
            assert read(source, obj) == ramp(100)
            return
        with pytest.raises((NotFoundError, ChangedError)) as caught:
            read(source, obj)
        assert "w.bin" in str(caught.value)

    def test_many_threads_at_once(self, origin: Origin, source: Source) -> None:
        size = 3 * 1024 * 1024 + 11
        obj = self._one(origin, source, ramp(size))
        spans = [(start, min(start + 65_537, size)) for start in range(0, size, 65_537)]
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(lambda span: read(source, obj, *span), spans))
        assert b"".join(parts) == ramp(size)

    def test_a_passed_deadline_is_an_error_and_not_a_hang(self, origin: Origin, source: Source) -> None:
        obj = self._one(origin, source, ramp(100))
        with pytest.raises(StoreError):
            read(source, obj, deadline_s=time.monotonic() - 1)

    def test_bytes_beyond_the_end_are_an_error(self, origin: Origin, source: Source) -> None:
        obj = self._one(origin, source, ramp(100))
        grown = dataclasses.replace(obj, size=200)
        with pytest.raises(MfsError) as caught:
            read(source, grown, 50, 150, deadline_s=deadline(2))
        assert "w.bin" in str(caught.value)
        assert "\n" not in str(caught.value)
