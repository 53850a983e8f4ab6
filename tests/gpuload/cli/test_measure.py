"""tools/gpu/measure.py: a machine that is taken back at any moment leaves what was measured until then."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

MEASURE = Path(__file__).resolve().parents[3] / "tools/gpu/measure.py"


@pytest.fixture(scope="module")
def measure() -> Any:
    spec = importlib.util.spec_from_file_location("measure", MEASURE)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_killed_after_its_first_rows_it_leaves_them(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, MEASURE, "--device", "cpu", "--size", "160MiB", "--dir", tmp_path, "--out", out]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        found: dict[str, Any] = {}
        while not found.get("bench") and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
            found = json.loads(out.read_text()) if out.exists() else {}
        process.kill()
    found = json.loads(out.read_text())
    assert found["bench"]["rows"][0]["what"] == "bare memcpy, all cores", "before any model is made"
    assert found["machine"]["cpus"]
    assert not found["is_complete"]


def test_a_step_that_fails_keeps_its_rows_and_costs_no_other(measure: Any, tmp_path: Path) -> None:
    results = measure.Results(tmp_path / "out.json", time.monotonic() + 3600)

    def fails() -> None:
        results.add("bench", {"what": "one"})
        raise ValueError("as asked")

    assert not results.step("bench", fails)
    assert results.step("others", lambda: {"rows": []})
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["bench"]["rows"] == [{"what": "one"}]
    assert "as asked" in found["bench"]["failed"]
    assert found["others"] == {"rows": []}


def test_without_time_a_step_is_said_not_to_have_been_run(measure: Any, tmp_path: Path) -> None:
    results = measure.Results(tmp_path / "out.json", time.monotonic())
    assert not results.step("tests", lambda: pytest.fail("it was run"))
    assert "not run" in json.loads((tmp_path / "out.json").read_text())["tests"]["failed"]
