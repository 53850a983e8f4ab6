"""A tensor-parallel rank on a real mount: what it fetches from the origin, by the daemon's own count, and gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gpuload
from mfs.testing.mounting import TestMount

WORLD = 4
BLOCK = 128 << 10
"""What the mount fetches at least, see mfs/decisions/0002-blocks-in-chunks.md."""


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Rows of 4 KiB, and of 1 MiB; 8 MiB each tensor."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"narrow": (2048, 1024), "wide": (8, 1 << 18), "other": (2048, 1024)}
    made = {n: torch.randint(0, 1 << 30, s, dtype=torch.int32, generator=generator) for n, s in shapes.items()}
    (tmp_path / "registry" / "model").mkdir(parents=True)
    save_file(made, tmp_path / "registry" / "model" / "model.safetensors")
    return made


@pytest.fixture
def mount(tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[TestMount]:
    with TestMount(tmp_path / "m", str(tmp_path / "registry")) as mount:
        monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
        yield mount


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("rules", "fetched"),
    [
        ({"narrow": 0, "wide": 0, "other": 0}, 3 * (2 << 20)),
        ({"narrow": 0, "wide": 1, "other": 0}, 3 * (2 << 20)),
        ({"narrow": 1, "wide": 1, "other": 0}, 8 * (1 << 20) + 2 * (2 << 20)),
    ],
    ids=["rows", "columns wider than a block", "columns narrower than a block: all of that tensor"],
)
def test_a_rank_fetches_its_share_and_no_more_from_the_origin(
    mount: TestMount, whole: dict[str, torch.Tensor], rules: dict[str, int], fetched: int, rank: int
) -> None:
    got = gpuload.load_model(mount.path / "model", rank=rank, world=WORLD, rules=rules)
    for name, tensor in whole.items():
        assert torch.equal(got[name], tensor.chunk(WORLD, rules[name])[rank]), name
    mount.wait_quiet()
    edges = 1 + 2 * sum(whole[n].shape[0] if rules[n] == 1 and n == "wide" else 1 for n in whole)  # header, both ends
    assert fetched <= mount.origin_bytes <= fetched + edges * BLOCK
    assert mount.origin_bytes < 24 << 20
