"""Granules, layouts and the catalog: pure bookkeeping, against slow and obvious models of it."""

from __future__ import annotations

from itertools import pairwise

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuload.errors import FitError
from gpuload.moving.plan import Transfer
from gpuload.server.catalog import Block, Catalog, Model, Part, ResidentTensor
from gpuload.server.estate import FORMAT
from gpuload.server.granules import PIECE_COUNT, Granules, Pieces
from gpuload.server.layout import ALIGN_BYTES, BLOCK_GRANULES, plan_blocks
from gpuload.server.records import packed


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_granules_are_never_given_twice_and_never_lost(steps: list[tuple[bool, int]]) -> None:
    granules, held = Granules(40), []
    for takes, n in steps:
        if takes and n <= granules.free_count:
            held.append(granules.take(n))
        elif takes:
            with pytest.raises(ValueError, match="free"):
                granules.take(n)
        elif held:
            granules.put(held.pop(n % len(held)))
        used = [g for runs in held for first, count in runs for g in range(first, first + count)]
        assert len(used) == len(set(used)) == granules.count - granules.free_count
        assert all(0 <= g < 40 for g in used)
    for runs in held:
        granules.put(runs)
    assert granules.take(40) == [(0, 40)], "all free granules are one run again"


def test_what_is_free_is_not_given_back_twice() -> None:
    granules = Granules(10)
    runs = granules.take(4)
    granules.put(runs)
    with pytest.raises(ValueError, match="not taken"):
        granules.put(runs)


class TestPieces:
    def made(self, *sizes: int) -> Pieces:
        pieces = Pieces(4 * 40)
        pieces.came(pieces.coming(sum(sizes), sizes))
        return pieces

    def shaped(self, pieces: Pieces) -> tuple[int, int]:
        """As a site does it: granules that went, and that came."""
        bare = sorted(pieces._bare)
        free = pieces.free_count
        donors = pieces.going_for(bare)
        went, came = sum(count for _, count in donors), sum(count for _, count in bare)
        assert pieces.free_count == free - (went - came), "what is under way for one is not lacking to others"
        pieces.gone(donors)
        for run in bare:
            pieces.dressed(run)
        rest = pieces.coming(went - came)
        pieces.came(rest)
        return went, came

    def test_a_block_has_the_free_piece_of_its_size_whole(self) -> None:
        pieces = self.made(10, 7, 13)
        (ten,), (thirteen,) = pieces.take_all([10, 13])
        assert (ten[1], thirteen[1], pieces.bare_count, pieces.free_count) == (10, 13, 0, 7)
        pieces.put([ten])
        assert pieces.take(10) == [ten]

    def test_what_fits_another_block_is_no_donor(self) -> None:
        pieces = self.made(10, 13)
        ((odd,), (ten,)) = pieces.take_all([12, 10])
        assert (pieces.is_bare(odd), pieces.is_bare(ten)) == (True, False)
        assert [count for _, count in pieces.donors(12)] == [13]
        assert pieces.free_count == 1, "what is held back for it is not free"
        assert self.shaped(pieces) == (13, 12)
        assert (pieces.bare_count, pieces.free_count, pieces.present_count) == (0, 1, 23)

    def test_small_pieces_are_the_first_to_go_for_others(self) -> None:
        pieces = self.made(13, 1, 2, 8)
        assert [count for _, count in pieces.donors(11)] == [1, 2, 8]

    def test_what_never_got_memory_is_absent_again(self) -> None:
        pieces = self.made(13)
        absent = pieces.absent_count
        runs = pieces.take(5)
        pieces.came(pieces.going_for(runs))
        pieces.put(runs)
        assert (pieces.absent_count, pieces.free_count, pieces.taken_count) == (absent, 13, 0)

    def test_memory_is_made_in_the_shapes_that_nothing_fits(self) -> None:
        pieces = self.made(10, 10)
        lacking = pieces.unmatched([10, 10, 10, 12, 9], [(150, 9)])
        assert sorted(lacking) == [10, 12]
        assert [count for _, count in pieces.coming(15, lacking)] == [12, 3], "as far as so many are to come"
        assert {count for _, count in pieces.coming(20)} == {PIECE_COUNT, 20 % PIECE_COUNT}

    def test_pieces_go_whole(self) -> None:
        pieces = self.made(8, 8, 3)
        assert [count for _, count in pieces.going(12)] == [8, 3]
        assert pieces.going(7) == []
        assert [count for _, count in pieces.going(1, is_exact=True)] == [8]

    @settings(max_examples=200, deadline=None)
    @given(steps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=60))
    def test_none_is_given_twice_and_none_lost(self, steps: list[tuple[int, int]]) -> None:
        pieces, held, budget = Pieces(4 * 40), list[list[tuple[int, int]]](), 40
        for kind, n in steps:
            if kind == 0:
                pieces.came(pieces.coming(min(n, budget - pieces.present_count), [n]))
            elif kind == 1 and n <= pieces.free_count:
                held.append(pieces.take(n))
                assert sum(count for _, count in held[-1]) == n
                self.shaped(pieces)
            elif kind == 2 and held:
                pieces.put(held.pop(n % len(held)))
            elif kind == 3:
                pieces.gone(pieces.going(min(n, pieces.free_count)))
            used = [g for runs in held for first, count in runs for g in range(first, first + count)]
            assert len(used) == len(set(used)) == pieces.taken_count
            assert pieces.present_count == pieces.taken_count + pieces.free_count <= budget
        for runs in held:
            pieces.put(runs)
        pieces.gone(pieces.going(pieces.free_count))
        assert pieces.absent_runs() == [(0, 160)], "all numbers are one run again"


def transfers(sizes: list[int]) -> list[Transfer]:
    return [Transfer(f"t{i}", "U8", (n,), "cpu", 0, 8, n, 1, n) for i, n in enumerate(sizes)]


@given(sizes=st.lists(st.integers(0, 200_000), max_size=40))
def test_layouts_place_everything_once_and_waste_little(sizes: list[int]) -> None:
    blocks = plan_blocks(transfers(sizes), 4096)
    assert sorted(index for block in blocks for index in block.transfers) == [i for i, n in enumerate(sizes) if n]
    for i, block in enumerate(blocks):
        ends = sorted((o, o + sizes[index]) for index, o in zip(block.transfers, block.offsets, strict=True))
        assert all(a[1] <= b[0] < a[1] + ALIGN_BYTES for a, b in pairwise(ends)), i
        assert ends[0][0] == 0
        assert ends[-1][1] == block.nbytes
        assert all(start % ALIGN_BYTES == 0 for start, _ in ends)
    granules = sum(b.granules_count(4096) for b in blocks)
    slack = len(sizes) * ALIGN_BYTES + 2 * 4096
    assert granules * 4096 <= sum(sizes) * (1 + 1 / BLOCK_GRANULES) + slack


def test_a_large_tensor_is_a_block_of_its_own_wherever_it_stands() -> None:
    large = BLOCK_GRANULES * 4096
    for sizes in ([large, 10], [10, large], [10, 3, large, 7]):
        assert [b.nbytes for b in plan_blocks(transfers(sizes), 4096) if len(b.transfers) == 1 and b.nbytes >= large]


def model(catalog: Catalog, name: str, contents: list[bytes]) -> Model:
    """A model whose blocks are named by `contents`, 10 granules each."""
    blocks = []
    for content in contents:
        equal = catalog.blocks.get(content)
        if equal is not None:
            catalog.hold(equal)
            blocks.append(equal)
        else:
            blocks.append(catalog.complete(*catalog.reserve(10 * 4096), content, [(0, 5, content)]))
    digest = "".join(c.hex() for c in contents)
    made = Model(name, digest, [Part(catalog, digest, blocks)], [], [])
    made.publish()
    return made


def test_room_is_made_by_oldest_use_first_and_refusals_touch_nothing() -> None:
    catalog = Catalog("cpu", 50, 4096)
    a, b, c = (model(catalog, n, [n.encode()]) for n in "abc")
    a.touch()
    assert catalog.make_room(20, "x") == []
    assert catalog.make_room(21, "x") == [b]
    assert catalog.make_room(31, "x") == [b, c]
    b.lease()
    c.is_pinned = True
    assert catalog.make_room(30, "x") == [a]
    with pytest.raises(FitError, match=r"short by 4.0 K; nothing was evicted") as caught:
        catalog.make_room(31, "x")
    assert caught.value.shortfall_bytes == 4096
    assert set(catalog.models) == {"a", "b", "c"}


def test_evicting_one_of_two_that_share_frees_only_its_own() -> None:
    catalog = Catalog("cpu", 30, 4096)
    a, b = model(catalog, "a", [b"1", b"2"]), model(catalog, "b", [b"2", b"3"])
    assert catalog.granules.free_count == 0
    assert catalog.make_room(10, "x") == [a]
    assert catalog.make_room(11, "x") == [a, b]
    a.retire()
    assert catalog.granules.free_count == 10
    b.retire()
    assert set(catalog.gauges().values()) == {0}


def test_a_retired_model_lives_until_its_last_lease() -> None:
    catalog = Catalog("cpu", 30, 4096)
    old = model(catalog, "a", [b"1"])
    leases = [old.lease(), old.lease()]
    model(catalog, "a", [b"2"])
    assert (old.was, old.name) == ("a", None)
    leases.pop().end()
    assert catalog.gauges()["granules_used"] == 20
    leases.pop().end()
    assert catalog.gauges()["granules_used"] == 10


def test_retain_lease_goes_with_the_last_lease() -> None:
    catalog = Catalog("cpu", 30, 4096)
    made = model(catalog, "a", [b"1"])
    made.retain = "lease"
    made.lease().end()
    assert set(catalog.gauges().values()) == {0}


def test_a_piece_is_found_in_whatever_block_still_has_it() -> None:
    catalog = Catalog("cpu", 30, 4096)
    first = catalog.complete(*catalog.reserve(4096), b"x", [(0, 5, b"p")])
    second = catalog.complete(*catalog.reserve(4096), b"y", [(7, 5, b"p")])
    catalog.let_go(first)
    assert catalog.find_piece(b"p") == (second, 7)
    catalog.let_go(second)
    assert catalog.find_piece(b"p") is None


def test_a_record_is_what_servers_of_its_format_write() -> None:
    """Another one misreads, or refuses, what is other than this: `FORMAT` is to be raised with it."""
    block = Block([(0, 1)], 12, b"d" * 32, [(0, 12, b"p" * 32)])
    part = Part(Catalog("cpu", 8, 4096), "e", [block])
    record = packed(Model(None, "c", [part], [ResidentTensor("t", "F32", (3,), 0, 0, 0, 12)], [{"k": "v"}]))
    assert FORMAT == 2
    assert msgpack.unpackb(record) == {
        "digest": "c",
        "label": "",
        "retain": "lru",
        "metadata": [{"k": "v"}],
        "placements": [{"device": "cpu", "device_map": {}, "rank": 0, "world": 1, "rules": {}}],
        "tensors": [["t", "F32", [3], 0, 0, 0, 12]],
        "parts": [["cpu", "e", [[[[0, 1]], 12, b"d" * 32, [[0, 12, b"p" * 32]]]]]],
    }
