"""Memory that comes and goes, as operators see it: the command against a server on the modelled driver. NO GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpuload.cli.app import cli
from gpuload.testing import random_tensors, write
from mfs.cli.run import run

SIMULATE = Path(__file__).parents[3] / "tools/gpu/simulate"
MIB = 1 << 20


def test_a_card_that_an_engine_needs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here: the modelled driver cannot be built")
    # 400 MiB of which half is others'; granules of 8 MiB
    simulated = [sys.executable, str(SIMULATE), "--memory", str(200 * MIB), "--", sys.executable, "-m", "gpuload"]
    monkeypatch.setenv("GPULOAD_SOCKET", str(tmp_path / "s.sock"))

    def gpuload(*args: object, status: int = 0) -> Any:
        got, said = run(cli, list(map(str, args)), "gpuload"), capsys.readouterr()
        assert got == status, said
        return json.loads(said.out) if "--json" in args else said.out + said.err

    one, two = (write(tmp_path / f"{n}.safetensors", random_tensors(n, {"w": (40 * MIB,)})) for n in (1, 2))  # 80 MiB
    for path in (two, one):
        while gpuload("digest", path, "--digests", tmp_path / "d", "--json")["files"][0]["reason"]:
            pass  # it was written a moment ago
    serve = [*simulated, "serve", "--arena", "cuda:0=120M", "--ram-tier", "192M", "--digests", str(tmp_path / "d")]
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert "serving" in server.stderr.readline()
            before = gpuload("status", "--json")
            assert before["devices"][0]["device_free_bytes"] == 200 * MIB, "nothing is taken yet"
            gpuload("load", one, "--name", "one")
            while gpuload("status", "--json")["ram_tiers"][0]["locked_bytes"] < 192 * MIB:
                pass
            assert gpuload("load", two, "--name", "two", "--json")["report"]["evicted"] == ["one"]
            refused = gpuload("resize", "cuda:0", "40M", status=1)
            assert "80.0 M of the arena on cuda:0; 40.0 M would do without two: say --evict" in refused
            assert "evicted: two" in gpuload("resize", "cuda:0", "40M", "--evict")
            shown = gpuload("status", "--json")
            assert shown["devices"][0]["device_free_bytes"] == 200 * MIB
            assert shown["ram_tiers"][0]["saved_bytes"] == 160 * MIB
            assert "RAM tier behind cuda:0: 160 M of 192 M used, 192 M page-locked" in gpuload("status")
            short = gpuload("load", one, "--name", "one", status=1)
            assert "the arena has 40.0 M" in short
            plan = [*simulated, "plan", str(one), "--device", "cuda:0", "--json"]  # it has to see the card
            planned = json.loads(subprocess.run(plan, capture_output=True, check=True, timeout=150).stdout)["targets"]
            found = {t["target"]: (t["fits"], t["shortfall_bytes"]) for t in planned}
            assert found["the server's arena on cuda:0"] == (False, 40 * MIB)
            assert found["the server's RAM tier behind cuda:0"] == (True, 0)
            gpuload("resize", "cuda:0", "120M")
            report = gpuload("load", one, "--name", "one", "--json")["report"]
            assert report["bytes_from_ram"] == report["bytes_total"] == 80 * MIB
        finally:
            server.terminate()
    assert server.returncode == 0
