"""The .pth line, read by a real interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuload.hooks import pth


def loaded(folder: Path, value: str) -> bool:
    code = f"import site, sys; site.addsitedir({str(folder)!r}); print('gpuload.hooks.auto' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GPULOAD_AUTO": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip() == "True"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file goes in place of the real site-packages."""
    monkeypatch.setattr(pth, "location", lambda: tmp_path / pth.NAME)
    return tmp_path


def test_the_line_starts_the_hook_where_it_is_asked_for(folder: Path) -> None:
    assert not pth.is_installed()
    assert pth.install().read_text().count("\n") == 1
    assert pth.is_installed()
    assert loaded(folder, "1")
    assert not loaded(folder, "0")
    assert not loaded(folder, "")
    pth.remove()
    pth.remove()
    assert not pth.is_installed()
    assert list(folder.iterdir()) == []


def test_an_interpreter_that_ignores_pythonpath_reads_it_too(folder: Path, tmp_path: Path) -> None:
    """`python -I` is deaf to what `gpuload run` sets; a venv's own .pth is read all the same."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "repository.pth").write_text(f"{Path(pth.__file__).parents[2]}\n")
    (site / "zz_gpuload_auto.pth").write_text(pth.LINE)
    done = subprocess.run(
        [venv / "bin" / "python", "-I", "-c", "import sys; print('gpuload.hooks.auto' in sys.modules)"],
        env={**os.environ, "GPULOAD_AUTO": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_line_whose_gpuload_was_uninstalled_is_one_line_of_complaint(tmp_path: Path) -> None:
    """pip does not know of the file and leaves it behind."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / pth.NAME).write_text(pth.LINE)
    for value, said in (("1", "gpuload: not used here: No module named 'gpuload'\n"), ("0", "")):
        done = subprocess.run(
            [venv / "bin" / "python", "-c", "print('ran')"],
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"GPULOAD_AUTO": value},
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("ran\n", said)
