"""The command: what it prints, writes, draws and refuses; and that what it wrote can be run again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.fleet import __main__ as command
from tools.fleet import report, setups
from tools.fleet.scenario import Scenario, from_json, to_json, with_ways

SMALL = ("--duration", "10m", "--seeds", "2", "--utilisation", "0.02", "--quiet")


def _run(monkeypatch: pytest.MonkeyPatch, *argv: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["tools/fleet/run", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code if isinstance(ended.value.code, int) else 1


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "compared.json"
    assert _run(monkeypatch, "compare", *SMALL, "--out", path) == 0
    return path


def test_compare_has_its_inputs_its_sources_and_every_system(written: Path) -> None:
    document = json.loads(written.read_text())
    assert [series["name"] for series in document["results"]] == list(setups.NAMES)
    assert document["scenario"]["seeds"] == [1, 2]
    sources = json.dumps(document["scenario"]["ways"])
    assert "mount-2-cores.json: row 'cold: mfs'" in sources
    assert "vllm#48193" in sources
    dedicated = document["results"][0]["figures"]
    assert dedicated["gpu_hours"] == pytest.approx([5 * 600 / 3600] * 2, rel=0.05)
    assert dedicated["cost"] == pytest.approx([hours * 2.5 for hours in dedicated["gpu_hours"]])
    requests = [series["figures"]["requests"] for series in document["results"]]
    assert all(each == requests[0] for each in requests)


def test_a_run_repeated_from_its_output_is_the_same(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "repeat", written, "--quiet") == 0
    assert "the same results again" in capsys.readouterr().err
    document = json.loads(written.read_text())
    document["results"][1]["figures"]["gpu_hours"][0] += 1
    written.write_text(json.dumps(document))
    assert _run(monkeypatch, "repeat", written, "--quiet") == 1
    assert "other results than in" in capsys.readouterr().err


def test_map_and_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    axes = ("--utilisations", "0.01", "--burstinesses", "1,5", "--burst", "20s")
    assert _run(monkeypatch, "map", *SMALL, *axes, "--plot", tmp_path / "map.svg", "--json") == 0
    cells = json.loads(capsys.readouterr().out)["results"]
    assert [cell["burstiness"] for cell in cells] == [1.0, 5.0]
    assert cells[0]["dedicated_gpus"]["mean"] == 5
    assert 1 <= cells[0]["shared_gpus"]["mean"] < 5
    assert cells[0]["fixed_saving"]["mean"] == pytest.approx(1 - cells[0]["shared_gpus"]["mean"] / 5)
    assert "<svg" in (tmp_path / "map.svg").read_text()
    assert _run(monkeypatch, "grow", *SMALL, "--steps", "2:1,6:2", "--fewest", "--plot", tmp_path / "grow.png") == 0
    assert "fewest GPUs" in capsys.readouterr().out
    assert (tmp_path / "grow.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{minute:02}:00.0000000,100,20" for minute in range(60)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    out = tmp_path / "out.json"
    assert _run(monkeypatch, "compare", "--llm-trace", trace, "--seeds", "1", "--quiet", "--out", out) == 0
    assert json.loads(out.read_text())["results"][0]["figures"]["requests"] == [60]
    trace.write_text(trace.read_text() + "\n2023-11-16 19:00:00,1,1\n")
    assert _run(monkeypatch, "repeat", out, "--quiet") == 2
    assert "expected the file whose SHA-256 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--services", "0"), "expected 1 to 100000 services, got 0"),
        (("--size", "100G"), "do not fit a card with 48.0 GB for them"),
        (("--burstiness", "0"), "burstiness from 1 to 1000"),
        (("--duration", "soon"), "not a duration: 'soon'"),
        (("--shared-gpus", "0"), "shared: expected 1 to 10000 GPUs, got 0"),
        (("--systems", "both"), "unknown: both; expected dedicated"),
        (("--seeds", "0"), "one seed or more"),
        (("--utilisation", "nan"), "utilisation above 0"),
        (("--llm-trace", "/no/where"), "/no/where: cannot be read: No such file"),
        (("--plot", "x.gif"), "x.gif: expected a name that ends in .png or .svg"),
        (("--out", "/no/where.json"), "/no/where.json: cannot be written"),
    ],
)
def test_what_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    assert _run(monkeypatch, "compare", "--quiet", "--duration", "1m", "--seeds", "1", *argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "scenario": {}, "command": "compare"}'])
def test_what_cannot_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "it.json"
    path.write_text(content)
    assert _run(monkeypatch, "repeat", path) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_figures_name_their_sources(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "figures") == 0
    out = capsys.readouterr().out
    assert "row 'cold: mfs'" in out
    assert "ServerlessLLM" in out


@pytest.mark.parametrize("rates", ["measured", "published"])
def test_inputs_come_back_from_json(rates: str) -> None:
    scenario = with_ways(Scenario(rates=rates))
    said: dict[str, Any] = json.loads(json.dumps(to_json(scenario)))
    assert from_json(said) == scenario


def test_numbers_are_short() -> None:
    assert [report.number(value) for value in (1234.5, 12.34, 0.126)] == ["1,234", "12.3", "0.13"]
