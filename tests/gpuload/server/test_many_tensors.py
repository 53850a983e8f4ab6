"""Files of thousands of small tensors: those side by side share a piece, which is one digest, one copy, one look-up."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from gpuload.cli.digesting import _pieces
from gpuload.client.asking import load_resident
from gpuload.client.attached import attach
from gpuload.moving.plan import Placement, Transfer, plan_transfers
from gpuload.moving.shards import close_shards, open_shards
from gpuload.server.layout import ALIGN_BYTES, MANY_COUNT, PIECE_BYTES, SMALL_BYTES, plan_blocks
from gpuload.testing import ServerThread, assert_same, random_tensors, write

GRANULE = 2 << 20


def side_by_side(sizes: list[int]) -> list[Transfer]:
    made, at = [], 8
    for i, n in enumerate(sizes):
        made.append(Transfer(f"t{i}", "U8", (n,), "cpu", 0, at, n, 1, n))
        at += n
    return made


def pieces_of(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(first byte in the file, nbytes, first byte in all blocks) of every piece; all blocks side by side."""
    found, reached = [], 0
    for block in plan_blocks(side_by_side(sizes), GRANULE):
        found += [(piece.start, piece.nbytes, reached + offset) for offset, piece in block.pieces]
        reached += block.nbytes
    return found


def test_every_byte_is_in_one_piece_and_stands_where_its_tensor_does() -> None:
    sizes = [4096, 512, 300, 256, SMALL_BYTES, SMALL_BYTES + 256, 0, 7, 1024] * (MANY_COUNT // 8)
    where, reached = {}, 0
    transfers = side_by_side(sizes)
    for block in plan_blocks(transfers, GRANULE):
        for index, offset in zip(block.transfers, block.offsets, strict=True):
            where[index] = reached + offset
            assert offset % ALIGN_BYTES == 0
        reached += block.nbytes
    pieces = pieces_of(sizes)
    assert [start for start, *_ in pieces] == sorted(start for start, *_ in pieces)
    assert max(nbytes for _, nbytes, _ in pieces) <= PIECE_BYTES
    assert sum(nbytes for _, nbytes, _ in pieces) == sum(sizes)
    assert sorted(where) == [index for index, t in enumerate(transfers) if t.nbytes]
    for index, offset in where.items():
        start, _, there = max(piece for piece in pieces if piece[0] <= transfers[index].start)
        assert offset == there + transfers[index].start - start, index


def test_pieces_are_few_where_tensors_are_many_and_even_and_a_tensor_each_where_they_are_few_or_odd() -> None:
    assert len(pieces_of([4096] * 10_000)) == 10_000 * 4096 // PIECE_BYTES + 1
    assert len(pieces_of([4096] * (MANY_COUNT - 1))) == MANY_COUNT - 1
    assert len(pieces_of([4095] * MANY_COUNT)) == MANY_COUNT, "each begins aligned in its block: not side by side there"


def test_a_swap_of_many_small_tensors_is_exact_and_moves_what_differs(server: ServerThread, tmp_path: Path) -> None:
    made = random_tensors(1, {f"t{i:04}": (64 + i % 3 * 64,) for i in range(MANY_COUNT)} | {"big": (300_000,)}, "U8")
    tuned = made | {"big": made["big"] + 1, "none": torch.empty(0)}
    for tensors, name in ((made, "base"), (tuned, "tuned")):
        write(tmp_path / f"{name}.safetensors", tensors)
    path = server.socket_path
    report = load_resident(tmp_path / "base.safetensors", "m", "cpu", socket_path=path)["report"]
    assert report["bytes_copied"] == sum(t.nbytes for t in made.values())
    before = attach("m", socket_path=path)
    assert_same(before, made)
    report = load_resident(tmp_path / "tuned.safetensors", "m", "cpu", is_swap=True, socket_path=server.socket_path)[
        "report"
    ]
    assert report["bytes_copied"] == tuned["big"].nbytes
    after = attach("m", socket_path=path)
    assert_same(after, tuned)
    assert after.digest != before.digest
    del before, after
    gc.collect()


def test_digests_computed_ahead_are_of_the_pieces_that_a_load_asks_for(tmp_path: Path) -> None:
    sizes = {f"t{i:04}": (256,) for i in range(MANY_COUNT)} | {"u": (5_000_000,)}
    shards = open_shards([write(tmp_path / "a.safetensors", random_tensors(1, sizes, "U8"))])
    transfers = plan_transfers([shards[0].header], Placement())
    close_shards(shards)
    wanted = [piece for block in plan_blocks(transfers, GRANULE) for _, piece in block.pieces]
    assert list(_pieces(shards, 1, {})[0].values()) == sorted(wanted, key=lambda p: p.start)
    assert len(wanted) == 3
