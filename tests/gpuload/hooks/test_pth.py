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


def test_the_line_starts_the_hook_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pth, "location", lambda: tmp_path / pth.NAME)
    assert not pth.is_installed()
    assert pth.install().read_text().count("\n") == 1
    assert pth.is_installed()
    assert loaded(tmp_path, "1")
    assert not loaded(tmp_path, "0")
    assert not loaded(tmp_path, "")
    pth.remove()
    pth.remove()
    assert not pth.is_installed()
    assert list(tmp_path.iterdir()) == []
