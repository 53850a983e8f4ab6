"""Figures come from results files, say from which row, and are missed when they are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import UsageError
from tools.fleet.measured import GPULOAD_FILE, MOUNT_FILE, RESULTS, measured_ways, published_ways


def _copied(folder: Path) -> dict[str, Any]:
    found = {}
    for name in (MOUNT_FILE, GPULOAD_FILE):
        found[name] = json.loads((RESULTS / name).read_text())
        (folder / name).write_text(json.dumps(found[name]))
    return found


def test_measured_figures_are_those_of_the_files() -> None:
    ways = measured_ways()
    rows = {row["title"]: row["median"] for row in json.loads((RESULTS / MOUNT_FILE).read_text())["rows"]}
    assert ways["download"].origin.value == pytest.approx(rows["cold: boto3"] * 1e9)
    assert ways["gpuload"].origin.value == pytest.approx(rows["cold: mfs"] * 1e9)
    bench = json.loads((RESULTS / GPULOAD_FILE).read_text())["bench"]["rows"]
    seconds = {row["what"]: row["seconds"] for row in bench}
    swap = ways["gpuload"].ram
    assert swap is not None
    assert swap.value == pytest.approx(117440512 / seconds["server: swap, 1 of 10 differs, digests known"])


@pytest.mark.parametrize("read", [measured_ways, published_ways])
def test_every_figure_says_where_it_is_from(read: Any) -> None:
    for way in read().values():
        for figure in way.figures():
            assert figure.value > 0
            assert figure.unit in ("B/s", "s")
            assert (
                ".json: row '" in figure.source
                or "#" in figure.source
                or "20" in figure.source
                or "0." in figure.source
            )


@pytest.mark.parametrize("read", [measured_ways, published_ways])
def test_nearer_tiers_are_no_slower(read: Any) -> None:
    for way in read().values():
        rates = [figure.value for figure in (way.origin, way.ssd, way.ram) if figure]
        assert rates == sorted(rates)


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    documents = _copied(tmp_path)
    mount = documents[MOUNT_FILE]
    mount["rows"] = [row for row in mount["rows"] if row["title"] != "ssd: mfs"]
    (tmp_path / MOUNT_FILE).write_text(json.dumps(mount))
    with pytest.raises(UsageError, match=r"mount-2-cores\.json: expected a row 'ssd: mfs', got"):
        measured_ways(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": 1}', '{"rows": [{"title": "cold: mfs", "unit": "GB/s", "values": []}]}']
)
def test_what_is_no_results_file(tmp_path: Path, text: str) -> None:
    _copied(tmp_path)
    (tmp_path / MOUNT_FILE).write_text(text)
    with pytest.raises(UsageError, match=r"mount-2-cores\.json"):
        measured_ways(tmp_path)


def test_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read.*tools/gpu/run write"):
        measured_ways(tmp_path)
