"""Ranks that load together, as processes of their own over gloo: each byte is read once among them, and errors are all
ranks' alike."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuload.hooks.ranks import ALIGN_BYTES, HEAD_BYTES, fingerprint, plan_turns
from gpuload.moving.plan import Transfer
from gpuload.moving.shards import close_shards, open_shards
from gpuload.testing import ServerThread, random_tensors, write
from tests.gpuload.hooks.conftest import NO_SOCKET, run_program
from tests.gpuload.hooks.programs import digests

MIB = 1 << 20


def transfers(sizes: Sequence[int]) -> list[Transfer]:
    return [Transfer(f"t{i}", "U8", (n,), "cpu", 0, 0, n, 1, n) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_turns_hold_every_tensor_once_and_load_all_ranks_alike(world: int) -> None:
    sizes = [0, 5, 300 * MIB, *[n * 100_001 % (30 * MIB) for n in range(200)], 0]
    turns = plan_turns(transfers(sizes), world)
    assert [i for turn in turns for i in turn.members] == list(range(len(sizes)))
    for turn in turns:
        assert len(turn.members) == 1 or turn.nbytes <= (64 << 20) + ALIGN_BYTES
        ends = [HEAD_BYTES, *(o + sizes[i] for o, i in zip(turn.offsets, turn.members, strict=True))]
        assert all(end <= offset for end, offset in itertools.pairwise([*_interleaved(ends, turn.offsets)]))
        assert turn.nbytes == ends[-1]
        assert not any(offset % ALIGN_BYTES for offset in turn.offsets)
    loads = [sum(t.nbytes for t in turns if t.rank == rank) for rank in range(world)]
    assert max(loads) - min(loads) <= 301 * MIB, "no more than the largest turn apart"


def test_files_of_two_mounts_are_not_taken_for_one(tmp_path: Path) -> None:
    """Two mounts number and date their files alike; the revision is what tells one's from the other's."""
    shards = open_shards([write(tmp_path / "a.safetensors", {"w": torch.ones(4)})])
    found = []
    for revision in (b"one", b"other", b"one"):
        try:
            os.setxattr(shards[0].path, "user.mfs.revision", revision)
        except OSError as error:
            pytest.skip(f"no extended attributes here: {error}")
        found.append(fingerprint(shards, []))
    close_shards(shards)
    assert found[0] == found[2] != found[1]


def _interleaved(ends: Sequence[int], offsets: Sequence[int]) -> list[int]:
    return [x for pair in zip(ends, offsets, strict=False) for x in pair] + [ends[-1]]


def run_ranks(folder: Path, cases: Sequence[dict[str, Any]], world: int = 2) -> list[list[dict[str, Any]]]:
    """Per case, what each rank found."""
    names = [json.dumps(case) for case in cases]

    def one(rank: int) -> Any:
        return run_program(
            "rank_programs:ranks", folder, rank, world, *names, socket_path=None, OMP_NUM_THREADS="1"
        ).found

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(one, range(world)))
    return [[of_rank[name] for of_rank in found] for name in names]


@pytest.mark.timeout(400)
def test_ranks_read_each_byte_once_and_fail_alike(resident: ServerThread, tmp_path: Path) -> None:
    """One pair of processes for all cases: they start slowly."""
    made = [random_tensors(i, {f"w{i}.{k}": (512, 1024 * (1 + k)) for k in range(8)}) for i in range(3)]
    made[0] |= {"w0.none": torch.empty(0, 3), "w0.scalar": torch.tensor(7.5), "w0.flags": torch.tensor([True, False])}
    names = [write(tmp_path / f"{i}.safetensors", part).name for i, part in enumerate(made)]
    want = {name: tensor for part in made for name, tensor in part.items()}
    total = sum(t.nbytes for t in want.values())
    twin = tmp_path / "twin"
    twin.mkdir()
    for name in names:
        shutil.copy(tmp_path / name, twin / name)
        os.utime(twin / name, ns=(5, 5))
    cases = [
        {"files": [names], "socket": resident.socket_path},  # first: a server that is away is not asked again soon
        {"files": [names], "socket": NO_SOCKET},
        {"files": [names], "socket": NO_SOCKET, "fails": 1},
        {"files": [names, [f"twin/{name}" for name in names]], "socket": NO_SOCKET},
        {"files": [names, [*names[:2], "missing.safetensors"]], "socket": NO_SOCKET},
        {"files": [names], "socket": NO_SOCKET, "devices": ["cpu", "cuda:0"]},  # as where one card has no room for it
        {"files": [names], "socket": NO_SOCKET, "last": True},
    ]
    served, shared, failed, apart, missing, unlike, after = run_ranks(tmp_path, cases)
    for one in (*shared, *apart, *served, unlike[0], *after):
        assert one["tensors"] == json.loads(json.dumps(digests(want)))
    assert shared[0]["names"] == shared[1]["names"]
    assert sum(one["read"] for one in shared) < total + 3 * 64 * 1024, "once among them"
    assert all(one["read"] > total // 4 for one in shared), "and each a part"
    assert [one["counts"] for one in shared] == [[0, len(want)]] * 2
    assert failed[1]["error"] == "the disk of this rank is gone"
    assert failed[0]["error"] == "rank 1 could not read its part: the disk of this rank is gone"
    assert all(one["read"] >= total - 8 for one in apart), "other files, perhaps of other bytes: each its own"
    assert set(missing[0]["tensors"]) == set(want)
    assert "missing.safetensors" in missing[1]["error"]
    assert unlike[0]["read"] >= total - 8, "what one rank cannot do none does"
    assert "cuda" in unlike[1]["error"].lower(), "by itself, and there is no card"
    assert sum(one["read"] for one in after) < total + 3 * 64 * 1024, "the ranks still understand each other"
    assert [one["read"] for one in served] == [0, 0], "one memory for both"
    assert [one["counts"] for one in served] == [[len(want), 0]] * 2
