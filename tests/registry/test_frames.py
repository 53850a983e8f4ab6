"""Ranges of chunks: exact, verified, in few requests, and from what the node has where it has it."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mfs.errors import IntegrityError
from mfs.registry import codecs, layout
from mfs.registry.chunk import FRAME_BYTES, table_bytes
from mfs.registry.encode import Base, encode_chunk
from mfs.registry.folder_store import FolderStore
from mfs.registry.frames import FrameReader
from mfs.registry.manifest import Chunk, File, Manifest
from mfs.registry.revisions import Part, Revision, Revisions
from mfs.registry.store import Store
from mfs.sources.base import Moved
from mfs.testing import ramp
from mfs.types import ByteRange
from tests.registry import made

CONTENT = random.Random(1).randbytes(3_000_000)
CUTS = {"w.bin": [5, 700_000, 700_001, 2_000_000]}


class Counting(FolderStore):
    """A folder that remembers what was asked of it."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, ByteRange | None]] = []

    def read_range(self, key: str, span: ByteRange, *, size: int, out: memoryview, deadline_s: float) -> None:
        self.asked.append((key, span))
        super().read_range(key, span, size=size, out=out, deadline_s=deadline_s)

    def size(self, key: str, *, deadline_s: float) -> int | None:
        self.asked.append((key, None))
        return super().size(key, deadline_s=deadline_s)

    @property
    def asked_bytes(self) -> int:
        return sum(len(span) for _, span in self.asked if span is not None)


class Shelf:
    """What a node has of chunks, as told; and what it hands out may be wrong."""

    def __init__(self, **chunks: bytes) -> None:
        self.chunks = chunks
        self.asked: list[ByteRange] = []

    def may_have(self, chunk_id: str) -> bool:
        return chunk_id in self.chunks

    def read(self, chunk_id: str, span: ByteRange, out: memoryview) -> bool:
        self.asked.append(span)
        found = self.chunks.get(chunk_id)
        if found is not None:
            out[:] = found[span.start : span.stop]
        return found is not None

    def note(self, contents: object) -> None:
        """Nothing to remember."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Counting]:
    store = Counting(str(tmp_path / "registry"))
    yield store
    store.close()


@pytest.fixture
def reader(store: Counting) -> FrameReader:
    return FrameReader(lambda deadline_s: store)


def revision(store: Store, pushed: str) -> Revision:
    return Revisions(lambda deadline_s: store).get("m", pushed, deadline_s=made.soon())


def read(reader: FrameReader, found: Revision, start: int, stop: int, path: str = "w.bin") -> tuple[bytes, Moved]:
    out, moved, at = bytearray(b"\xee" * (stop - start)), Moved(), 0
    for part in found.parts(found.files[path], ByteRange(start, stop)):
        moved += reader.read(part, memoryview(out)[at : at + len(part.span)], deadline_s=made.soon())
        at += len(part.span)
    assert at == len(out)
    return bytes(out), moved


def test_any_range_of_a_file_however_it_is_cut(store: Counting, reader: FrameReader) -> None:
    found = revision(store, made.put_revision(store, "m", {"w.bin": CONTENT}, cuts=CUTS))
    edges = sorted({0, 1, 4, 5, 6, 699_999, 700_000, 700_001, 700_002, 2_000_000, 5 + FRAME_BYTES, len(CONTENT)})
    for start in edges:
        for stop in (stop for stop in edges if stop > start):
            assert read(reader, found, start, stop)[0] == CONTENT[start:stop], (start, stop)


def test_a_whole_chunk_is_one_request_and_a_part_of_it_only_its_frames(store: Counting, reader: FrameReader) -> None:
    size = 20 * FRAME_BYTES + 7
    content = ramp(size)
    found = revision(store, made.put_revision(store, "m", {"w.bin": content}, chunk_bytes=size))
    head = table_bytes(size)
    _, moved = read(reader, found, FRAME_BYTES + 1, FRAME_BYTES + 2)
    assert (moved.requests, moved.origin_bytes) == (2, head + FRAME_BYTES)
    _, moved = read(reader, found, 3 * FRAME_BYTES, 5 * FRAME_BYTES + 1)
    assert (moved.requests, moved.origin_bytes) == (1, 3 * FRAME_BYTES), "the table is known by now"
    for stop, nbytes in ((size, head + size), (2 * FRAME_BYTES, head + 2 * FRAME_BYTES)):
        fresh = FrameReader(lambda deadline_s: store)
        got, moved = read(fresh, found, 0, stop)
        assert got == content[:stop]
        assert (moved.requests, moved.origin_bytes, moved.shared_bytes) == (1, nbytes, 0)


@pytest.mark.parametrize("stored", ["evenly", "the first part longer"])
def test_what_comes_first_comes_once(store: Counting, reader: FrameReader, stored: str) -> None:
    """Table and first frames come by a guess: a short last frame does not upset it; of one too short the rest comes."""
    half = 20 * FRAME_BYTES
    rng = np.random.default_rng(1)
    few = rng.integers(0, 128, 2 * half + 7, np.uint8).tobytes()  # seven bits of each byte
    plain = few if stored == "evenly" else rng.bytes(half) + bytes(half + 7)
    encoded = encode_chunk(memoryview(plain), 1)
    store.create(layout.chunk_key(encoded.table.id), encoded.body, deadline_s=made.soon())
    chunk = Chunk(encoded.table.id, len(plain), len(encoded.body))
    file = File("w.bin", len(plain), hashlib.sha256(plain).hexdigest(), (0,))
    found = revision(store, made.put_manifest(store, "m", Manifest(made.CREATED_AT, (chunk,), (file,))))
    got, moved = read(reader, found, 3, half)
    assert got == plain[3:half]
    stop = encoded.table.stored_range(0, 20).stop
    if stored == "evenly":
        assert moved.requests == 1
        assert stop <= moved.origin_bytes <= stop + (40 << 10)
    else:
        assert (moved.requests, moved.origin_bytes) == (2, stop), "nothing of it twice"
    assert read(reader, found, half - 1, len(plain))[0] == plain[half - 1 :]


def damaged_key(store: Counting, found: Revision) -> str:
    part = list(found.parts(found.files["w.bin"], ByteRange(0, len(CONTENT))))[-1]
    return layout.chunk_key(part.chunk.id)


@pytest.mark.parametrize("what", ["table", "frame", "cut", "longer", "another", "gone", "empty"])
def test_a_damaged_chunk_is_an_error_and_its_neighbours_are_read(
    store: Counting, reader: FrameReader, tmp_path: Path, what: str
) -> None:
    found = revision(store, made.put_revision(store, "m", {"w.bin": CONTENT}, cuts=CUTS))
    path = tmp_path / "registry" / damaged_key(store, found)
    body = bytearray(path.read_bytes())
    if what == "table":
        body[70] ^= 1
    elif what == "frame":
        body[-FRAME_BYTES] ^= 1
    elif what == "cut":
        del body[-1]
    elif what == "longer":
        body += b"0"
    elif what == "another":
        other = found.chunk(0).id
        body = bytearray((tmp_path / "registry" / layout.chunk_key(other)).read_bytes())
    path.unlink()
    if what == "empty":
        path.write_bytes(b"")
    elif what != "gone":
        path.write_bytes(body)
    with pytest.raises(IntegrityError, match="fsck" if what == "gone" else "chunk") as caught:
        read(reader, found, 1_990_000, 2_900_000)
    assert "\n" not in str(caught.value)
    assert read(reader, found, 0, 2_000_000)[0] == CONTENT[:2_000_000]
    if what == "frame":
        assert read(reader, found, 2_000_000, 2_100_000)[0] == CONTENT[2_000_000:2_100_000], "frames before it"


def test_a_chunk_that_was_mended_is_read_by_whoever_met_the_damage(
    store: Counting, reader: FrameReader, tmp_path: Path
) -> None:
    found = revision(store, made.put_revision(store, "m", {"w.bin": CONTENT}, cuts=CUTS))
    path = tmp_path / "registry" / damaged_key(store, found)
    body = path.read_bytes()
    path.unlink()
    path.write_bytes(body[:-5])
    with pytest.raises(IntegrityError):
        read(reader, found, 2_000_000, 3_000_000)
    path.write_bytes(body)
    assert read(reader, found, 2_000_000, 3_000_000)[0] == CONTENT[2_000_000:]


def test_what_the_node_has_is_not_fetched(store: Counting, reader: FrameReader) -> None:
    found = revision(store, made.put_revision(store, "m", {"w.bin": CONTENT}, cuts=CUTS))
    parts = list(found.parts(found.files["w.bin"], ByteRange(0, len(CONTENT))))
    shelf = Shelf(**{_id(parts[1]): CONTENT[5:700_000], _id(parts[3]): CONTENT[700_001:2_000_000]})
    reader.resident = shelf
    got, moved = read(reader, found, 100, 2_500_000)
    assert got == CONTENT[100:2_500_000]
    assert moved.shared_bytes == 700_000 - 100 + 2_000_000 - 700_001
    assert {key for key, _ in store.asked} == {layout.chunk_key(_id(parts[2])), layout.chunk_key(_id(parts[4]))}
    shelf.asked.clear()
    assert read(reader, found, 800_000, 800_001)[0] == CONTENT[800_000:800_001]
    assert [len(span) for span in shelf.asked] == [FRAME_BYTES], "its digests are known by now"


@pytest.mark.parametrize("at", [0, 5, FRAME_BYTES + 5, 699_994])
def test_what_the_node_has_and_is_wrong_is_fetched(store: Counting, reader: FrameReader, at: int) -> None:
    found = revision(store, made.put_revision(store, "m", {"w.bin": CONTENT}, cuts=CUTS))
    part = list(found.parts(found.files["w.bin"], ByteRange(0, len(CONTENT))))[1]
    wrong = bytearray(CONTENT[5:700_000])
    wrong[at] ^= 0x10
    reader.resident = Shelf(**{_id(part): bytes(wrong)})
    for _ in range(2):  # first by the chunk's id, then by digests that are known
        got, moved = read(reader, found, 5, 700_000)
        assert got == CONTENT[5:700_000]
        assert moved.shared_bytes == 0


def tuned(plain: bytes, seed: int) -> bytes:
    """What a little training makes of bf16 numbers: some differ in their last bits, one frame not at all."""
    words = np.frombuffer(plain, "<u2").copy()
    words[: 9 * FRAME_BYTES // 2] += np.random.default_rng(seed).integers(0, 3, 9 * FRAME_BYTES // 2, np.uint16)
    return words.tobytes()


class Chain:
    """A base and what was tuned from it, and from that: each chunk a difference to the one before."""

    def __init__(self, store: Store) -> None:
        noise = np.random.default_rng(1).standard_normal(10 * FRAME_BYTES // 2 + 500).astype("<f4")
        self.plains = [(noise.view("<u4") >> 16).astype("<u2").tobytes()]
        self.chunks: list[Chunk] = []
        base: Base | None = None
        for seed in range(4):
            encoded = encode_chunk(memoryview(self.plains[-1]), 2, base=base)
            assert encoded.table.depth == seed
            store.create(layout.chunk_key(encoded.table.id), encoded.body, deadline_s=made.soon())
            self.chunks.append(Chunk(encoded.table.id, len(self.plains[-1]), len(encoded.body)))
            base = Base(encoded.table.id, seed, memoryview(self.plains[-1]))
            self.plains.append(tuned(self.plains[-1], seed))

    def read(self, reader: FrameReader, number: int, start: int, stop: int) -> tuple[bool, Moved]:
        """Whether a range of a chunk is what it must be, and what it cost."""
        out = bytearray(stop - start)
        part = Part(self.chunks[number], ByteRange(start, stop))
        moved = reader.read(part, memoryview(out), deadline_s=made.soon())
        return bytes(out) == self.plains[number][start:stop], moved


class TestDifferences:
    @pytest.fixture
    def chain(self, store: Counting) -> Chain:
        return Chain(store)

    @pytest.mark.parametrize("number", range(4))
    def test_any_range_at_any_depth(self, store: Counting, chain: Chain, number: int) -> None:
        size = chain.chunks[number].plain_bytes
        for start, stop in ((0, size), (0, 1), (size - 1, size), (FRAME_BYTES - 3, FRAME_BYTES + 3), (7, size - 7)):
            assert chain.read(FrameReader(lambda deadline_s: store), number, start, stop)[0], (start, stop)

    def test_a_base_that_the_node_has_is_not_fetched(self, store: Counting, chain: Chain, reader: FrameReader) -> None:
        shelf = Shelf(**{chain.chunks[1].id: chain.plains[1]})
        reader.resident = shelf
        is_right, moved = chain.read(reader, 2, 0, chain.chunks[2].plain_bytes)
        assert is_right
        assert {key for key, _ in store.asked} == {layout.chunk_key(chain.chunks[2].id)}
        assert (moved.requests, moved.origin_bytes) == (1, chain.chunks[2].stored_bytes)
        assert moved.shared_bytes == chain.chunks[1].plain_bytes

    def test_a_base_that_the_node_has_wrong_is_fetched(
        self, store: Counting, chain: Chain, reader: FrameReader
    ) -> None:
        reader.resident = Shelf(**{chain.chunks[1].id: chain.plains[2]})
        assert chain.read(reader, 2, 5, 500_000)[0]
        assert layout.chunk_key(chain.chunks[1].id) in {key for key, _ in store.asked}

    def test_frames_that_are_no_difference_need_no_base(self, store: Counting, chain: Chain) -> None:
        """Such as those where the base has nothing alike."""
        plain = chain.plains[0][: 2 * FRAME_BYTES] + os.urandom(FRAME_BYTES)
        base = Base(chain.chunks[0].id, 0, memoryview(chain.plains[0])[: len(plain)])
        encoded = encode_chunk(memoryview(plain), 2, base=base)
        assert encoded.table.frames[2].codec != codecs.DIFFERENCE
        store.create(layout.chunk_key(encoded.table.id), encoded.body, deadline_s=made.soon())
        reader = FrameReader(lambda deadline_s: store)
        out, start = bytearray(100), 2 * FRAME_BYTES
        part = Part(Chunk(encoded.table.id, len(plain), len(encoded.body)), ByteRange(start, start + 100))
        reader.read(part, memoryview(out), deadline_s=made.soon())
        assert out == plain[start : start + 100]
        assert {key for key, _ in store.asked} == {layout.chunk_key(encoded.table.id)}

    @pytest.mark.parametrize("number", [0, 1])
    @pytest.mark.parametrize("what", ["bit", "gone"])
    def test_damage_below_is_damage(
        self, store: Counting, chain: Chain, reader: FrameReader, tmp_path: Path, number: int, what: str
    ) -> None:
        path = tmp_path / "registry" / layout.chunk_key(chain.chunks[number].id)
        body = bytearray(path.read_bytes())
        path.unlink()
        if what == "bit":
            body[-FRAME_BYTES] ^= 1
            path.write_bytes(body)
        with pytest.raises(IntegrityError, match=chain.chunks[number].id[:12]):
            chain.read(reader, 2, 0, chain.chunks[2].plain_bytes)

    def test_differences_that_go_in_a_circle_are_refused(
        self, store: Counting, chain: Chain, reader: FrameReader, tmp_path: Path
    ) -> None:
        """Nobody honest makes one; steps are counted."""
        base = Base(chain.chunks[1].id, 1, memoryview(chain.plains[1]))
        encoded = encode_chunk(memoryview(chain.plains[0]), 2, base=base)
        assert encoded.table.base == chain.chunks[1].id
        path = tmp_path / "registry" / layout.chunk_key(chain.chunks[0].id)
        path.unlink()
        path.write_bytes(encoded.body)
        with pytest.raises(IntegrityError, match="stands on itself"):
            chain.read(reader, 1, 0, 10)


def _id(part: Part) -> str:
    return part.chunk.id


def test_a_manifest_that_many_want_at_once_is_fetched_once(store: Counting) -> None:
    pushed = made.put_revision(store, "m", {"w.bin": CONTENT}, chunk_bytes=4_096)
    asked: list[str] = []

    class Slow(Counting):
        def read(self, key: str, *, deadline_s: float) -> bytes:
            asked.append(key)
            all_asked.wait(5)
            return super().read(key, deadline_s=deadline_s)

    all_asked = threading.Barrier(8, timeout=10)
    slow = Slow(store._root)
    revisions = Revisions(lambda deadline_s: slow)

    def get(number: int) -> Revision:
        if number:
            all_asked.wait(5)  # let go once the first has asked the store, and all others are on their way
        return revisions.get("m", pushed, deadline_s=made.soon())

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(get, range(8)))
    assert all(one is found[0] for one in found)
    assert asked == [layout.manifest_key("m", pushed)]


def test_many_tables_are_forgotten_in_time(
    store: Counting, reader: FrameReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mfs.registry.frames.TABLES_FRAMES_MAX", 4)
    found = revision(store, made.put_revision(store, "m", {"w.bin": CONTENT}, chunk_bytes=FRAME_BYTES))
    assert read(reader, found, 0, len(CONTENT))[0] == CONTENT
    before = len(store.asked)
    assert read(reader, found, 0, 1)[1].requests == 1
    assert store.asked[before:] == [(store.asked[0][0], ByteRange(0, table_bytes(FRAME_BYTES) + FRAME_BYTES))]


def test_a_content_is_named_by_its_chunks_alone(store: Counting) -> None:
    one = revision(store, made.put_revision(store, "m", {"a": CONTENT, "b": CONTENT[:-1]}))
    two = revision(store, made.put_revision(store, "m", {"x/y": CONTENT}, created_at="2027-01-01T00:00:00Z"))
    cut = revision(store, made.put_revision(store, "m", {"a": CONTENT}, cuts={"a": [7]}))
    assert one.files["a"].content == two.files["x/y"].content
    assert len({one.files["a"].content, one.files["b"].content, cut.files["a"].content}) == 3
