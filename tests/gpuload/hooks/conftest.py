"""A server as `gpuload serve` makes it, and processes that are hooked as `gpuload run` hooks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import gpuload
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, running_server
from tests.gpuload.hooks import programs

SITE = Path(gpuload.__file__).parent / "hooks" / "site"
REPOSITORY = Path(gpuload.__file__).parent.parent
NO_SOCKET = "/nonexistent/gpuload.sock"
DEADLINE_S = 150


@pytest.fixture
def resident(tmp_path: Path) -> Iterator[ServerThread]:
    """A server with the granules of a real one, for clients that nobody prepared; empty and unleased at the end."""
    config = ServerConfig(socket_path=str(tmp_path / "s.sock"), arena_bytes={"cpu": 192 << 20}, settled_s=0)
    with running_server(config) as running:
        yield running
        catalog = running.loaders["cpu"].catalog
        for model in list(catalog.models.values()):
            running.on_loop(lambda model=model: catalog.retire(model))
        assert set(running.gauges().values()) == {0}, "the test left something resident or leased"


def hooked_environment(socket_path: str | None, **more: str) -> dict[str, str]:
    """What `gpuload run` sets, and no server where there is none."""
    paths = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "GPULOAD_AUTO": "1",
        "PYTHONPATH": paths,
        "GPULOAD_SOCKET": socket_path or NO_SOCKET,
        **more,
    }


def run_hooked(code: str, *args: object, socket_path: str | None, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own that runs `code`, hooked; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=hooked_environment(socket_path, **env),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    return done


@dataclass(frozen=True)
class Outcome:
    """A program's own findings, what its hooks counted, and what it wrote to stderr."""

    found: Any
    counts: dict[str, int]
    stderr: str


def run_program(name: str, *args: object, socket_path: str | None, **env: str) -> Outcome:
    """One of `programs` in a hooked process."""
    code = "from tests.gpuload.hooks.programs import main; main()"
    done = run_hooked(code, name, *args, socket_path=socket_path, **env)
    said = json.loads(done.stdout.splitlines()[-1])
    return Outcome(said["found"], said["counts"], done.stderr)


@pytest.fixture
def plainly() -> Callable[..., Any]:
    """The same program here, without hooks; its findings as they look after JSON."""

    def run(name: str, *args: object) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other libraries' own
            return json.loads(json.dumps(getattr(programs, name)(*map(str, args))))

    return run
