"""The rows of `gpuload bench --modelled`: their processes, on the modelled driver. NO GPU, and no figure is judged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gpuload.cli import bench_modelled
from gpuload.errors import DeviceError

LINK_GB_S = 0.5


@pytest.fixture
def model(tmp_path: Path) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here: the modelled driver cannot be built")
    return bench_modelled.write_model(tmp_path / "m.safetensors", 20_000_000, 2000, has_bytes=False)


@pytest.mark.parametrize("way", ["client", "server"])
def test_processes_load_side_by_side_over_a_link_each(model: Path, way: str) -> None:
    nbytes = 2000 * (20_000_000 // 2000 // 512 * 512)
    found = bench_modelled._loads(model, LINK_GB_S, way, models_reads=True, processes_count=2, cards_count=2)
    assert len(found) == 2
    for rounds in found:
        assert 0 < rounds.best_s <= rounds.later_s
        assert min(rounds.first_s, rounds.best_s) >= nbytes / LINK_GB_S / 1e9, "no byte is faster than its link"


def test_a_load_that_fails_says_why(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DeviceError, match="the modelled load failed"):
        bench_modelled._loads(tmp_path / "gone", LINK_GB_S, "client", models_reads=True)


def test_the_row_of_several_cards_is_the_slowest_ones() -> None:
    row = bench_modelled._row_of("load", 4_000_000_000, [2.0, 1.0, 4.0], 4.0)
    assert row["of_link"] == pytest.approx(0.25)
    assert row["of_links"] == pytest.approx([0.25, 0.5, 1.0])
