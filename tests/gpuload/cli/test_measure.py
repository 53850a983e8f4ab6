"""tools/gpu/measure.py: a machine that is taken back at any moment leaves what was measured until then."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
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


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here: the modelled driver cannot be built")
def test_a_row_that_fails_says_so_and_costs_no_other(tmp_path: Path) -> None:
    """On a modelled card torch can do nothing, and everything that needs no torch is measured all the same."""
    bench = ["-m", "gpuload", "bench", "--device", "cuda:0", "--size", "160MiB", "--dir", tmp_path, "--json"]
    done = subprocess.run(
        [sys.executable, MEASURE.parent / "simulate", "--", sys.executable, *bench],
        capture_output=True, text=True, cwd=MEASURE.parents[2],
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    rows = {row["what"]: row for row in json.loads(done.stdout)["rows"]}
    failed = {what for what, row in rows.items() if "failed" in row}
    assert {"gpuload load_file", "fresh process: gpuload load_file", "server: attach, in a fresh process"} <= failed
    assert not failed & {
        "bare copy from page-locked memory", "page-lock memory mapped read-only, in pieces", "copy out of it in place",
        "server: first load", "server: swap, 1 of 10 differs, digests unknown",
        "server: swap, 1 of 10 differs, digests known", "server: bytes a swap copied",
    }  # fmt: skip


def test_what_it_imports_is_there_or_brought() -> None:
    """The machine has what tools/gpu/run names, with what that needs; everything else comes as wheels."""
    there = ["torch", "safetensors", "numpy", "msgpack", "rich", "pytest", "pytest-timeout", "hypothesis"]
    assert all(name in (MEASURE.parent / "run").read_text() for name in there)
    brought = {line.strip() for line in (MEASURE.parent / "wheels.txt").read_text().splitlines() if line[:1] != "#"}
    allowed = brought | _with_their_own(there)
    ours = "gpuload.cli.app, gpuload.cli.bench, gpuload.client.attached, gpuload.server.daemon, gpuload.testing"
    code = (
        f"import sys, {ours}, mfs.metrics.exposition, pytest_trio; print(*{{n.partition('.')[0] for n in sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=MEASURE.parents[2])
    owners = packages_distributions()
    used = {_normal(owner) for name in done.stdout.split() for owner in owners.get(name, ())[:1]}
    assert {"trio", "h11", "torch"} <= used, done.stderr
    assert used - allowed <= {"mfs", "tqdm"}, "to be added to tools/gpu/wheels.txt"  # torch takes tqdm if it is there


@pytest.mark.parametrize("tool", ["run", "mounted", "source_ways", "simulate"])
def test_each_tool_for_that_day_begins(tool: str) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    interpreter = [] if tool == "run" else [sys.executable]
    done = subprocess.run(
        [*interpreter, MEASURE.parent / tool, "--help"], capture_output=True, text=True, env=environment
    )
    assert "usage:" in done.stdout, done.stderr


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _with_their_own(names: list[str]) -> set[str]:
    """These and whatever they need, as far as it is installed."""
    found, todo = set[str](), list(names)
    while todo:
        name = _normal(todo.pop())
        if name in found:
            continue
        found.add(name)
        with suppress(PackageNotFoundError):
            needs = [need for need in requires(name) or () if "extra ==" not in need]
            todo += [re.split(r"[^A-Za-z0-9_.-]", need, maxsplit=1)[0] for need in needs]
    return found
