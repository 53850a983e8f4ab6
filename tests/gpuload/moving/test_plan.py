"""Plans are pure: slices, pieces and batches cover exactly what is wanted, once, in bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuload.moving.plan import MEGATRON_RULES, Placement, cut_axis, plan_batches, plan_transfers
from mfs.errors import UsageError
from mfs.safetensors import Header, TensorInfo


def header(**shapes: tuple[int, ...]) -> Header:
    """U8 tensors one after the other, from byte 100 on."""
    tensors, at = [], 100
    for name, shape in shapes.items():
        n = 1
        for d in shape:
            n *= d
        tensors.append(TensorInfo(name, "U8", shape, at, at + n))
        at += n
    return Header(tuple(tensors), None, 100, at, ())


def wanted(info: TensorInfo, axis: int | None, first: int, last: int) -> list[int]:
    """File offsets of the slice's bytes, the slow and obvious way."""
    if axis is None:
        return list(range(info.start, info.stop))
    inner = 1
    for d in info.shape[axis + 1 :]:
        inner *= d
    size = info.shape[axis]
    return [info.start + i for i in range(info.nbytes) if first <= (i // inner) % size < last]


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(shape=shapes, data=st.data(), buffer_bytes=st.integers(1, 64), piece_bytes=st.integers(1, 64))
def test_batches_bring_exactly_the_wanted_bytes(shape, data, buffer_bytes, piece_bytes) -> None:  # type: ignore[no-untyped-def]
    table = header(a=shape, b=(5,), c=shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    first = data.draw(st.integers(0, shape[axis]))
    last = data.draw(st.integers(first, shape[axis]))
    transfers = [
        cut_axis(t, 0, "cpu", axis if t.name != "b" else 0, first, last) for t in table.tensors if t.name != "b"
    ]
    got: dict[int, dict[int, int]] = {0: {}, 1: {}}
    for batch in plan_batches(transfers, buffer_bytes=buffer_bytes, piece_bytes=piece_bytes):
        assert 0 < batch.nbytes <= buffer_bytes
        for piece in batch.pieces:
            assert batch.start <= piece.start
            assert piece.stop <= batch.stop
            for row in range(piece.rows_count):
                for i in range(piece.row_bytes):
                    place = piece.offset + row * piece.row_bytes + i
                    assert place not in got[piece.transfer], "a byte is brought twice"
                    got[piece.transfer][place] = piece.start + row * piece.pitch_bytes + i
    for index, info in enumerate([table.tensors[0], table.tensors[2]]):
        assert [got[index][i] for i in sorted(got[index])] == wanted(info, axis, first, last)


def test_equal_tensors_give_equal_pieces_wherever_they_stand() -> None:
    pieces = {}
    for lead in (1, 33, 40):
        table = header(lead=(lead,), a=(100,))
        batches = plan_batches(plan_transfers([table], Placement()), buffer_bytes=64, piece_bytes=16)
        pieces[lead] = [(p.offset, p.nbytes) for b in batches for p in b.pieces if p.transfer == 1]
    assert pieces[1] == pieces[33] == pieces[40]


def test_ranks_together_are_the_tensor() -> None:
    table = header(**{"x.q_proj.weight": (8, 6), "x.o_proj.weight": (6, 8), "norm": (7,)})
    ranks = [plan_transfers([table], Placement(rank=r, world=2, rules=MEGATRON_RULES)) for r in (0, 1)]
    assert [t.shape for t in ranks[0]] == [(4, 6), (6, 4), (7,)]
    assert sum(t.nbytes for rank in ranks for t in rank) == 48 + 48 + 2 * 7
    assert (ranks[1][1].rows_count, ranks[1][1].row_bytes, ranks[1][1].pitch_bytes) == (6, 4, 8)


def test_a_placement_that_says_one_thing_of_all_tensors_is_what_its_parts_come_to() -> None:
    tables = [header(a=(3, 5), none=(0, 4), scalar=()), header(b=(7,))]
    one_by_one = plan_transfers(tables, Placement(device_map={"": "cuda:1"}))
    assert plan_transfers(tables, Placement(device="cuda:1")) == one_by_one
    assert [(t.name, t.shard, t.nbytes) for t in one_by_one] == [
        ("a", 0, 15),
        ("none", 0, 0),
        ("scalar", 0, 1),
        ("b", 1, 7),
    ]


def test_an_axis_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"'x.q_proj.weight' of shape \[9, 2\]"):
        plan_transfers([header(**{"x.q_proj.weight": (9, 2)})], Placement(world=2, rules=MEGATRON_RULES))


def test_half_bytes_are_not_cut() -> None:
    with pytest.raises(UsageError, match="not whole bytes"):
        cut_axis(TensorInfo("a", "F4", (4, 4), 0, 8), 0, "cpu", 1, 1, 3)
    assert cut_axis(TensorInfo("a", "F4", (4, 4), 0, 8), 0, "cpu", 1, 2, 4).row_bytes == 1


def test_a_name_in_two_shards_is_refused() -> None:
    with pytest.raises(UsageError, match="shard 0 and again in shard 1"):
        plan_transfers([header(a=(1,)), header(a=(1,))], Placement())


def test_device_maps_choose_the_longest_module() -> None:
    p = Placement(device="cpu", device_map={"model": "cuda:0", "model.layers.1": "cuda:1"})
    assert [p.device_of(n) for n in ("model.layers.1.w", "model.layers.10.w", "model.norm", "lm_head")] == [
        "cuda:1", "cuda:0", "cuda:0", "cpu",
    ]  # fmt: skip
    assert Placement(device_map={"": "cuda:3"}).device_of("anything") == "cuda:3"


def test_ranks_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError):
        Placement(rank=2, world=2)
