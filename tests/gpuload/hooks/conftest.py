"""A server as `gpuload serve` makes it, and processes that are hooked as `gpuload run` hooks them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import gpuload
from gpuload.hooks.safetensors_patch import SMALL_VARIABLE
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, running_server
from tests.gpuload.hooks import programs
from tests.servers.warm import WarmPython

SITE = Path(gpuload.__file__).parent / "hooks" / "site"
REPOSITORY = Path(gpuload.__file__).parent.parent
NO_SOCKET = "/nonexistent/gpuload.sock"
DEADLINE_S = 150

Run = Callable[..., subprocess.CompletedProcess[str]]
"""`run_hooked`, or `warmed`'s."""


@pytest.fixture(autouse=True)
def served_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' files are, and their programs' too."""
    monkeypatch.setenv(SMALL_VARIABLE, "0")


@pytest.fixture
def resident(tmp_path: Path) -> Iterator[ServerThread]:
    """A server with the granules of a real one, for clients that nobody prepared; empty and unleased at the end."""
    config = ServerConfig(socket_path=str(tmp_path / "s.sock"), arena_bytes={"cpu": 192 << 20}, settled_s=0)
    with running_server(config) as running:
        yield running
        for model in list(running.sites["cpu"].catalog.models.values()):
            running.on_loop(model.retire)
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


def run_hooked(
    code: str, *args: object, socket_path: str | None, timeout_s: float = DEADLINE_S, **env: str
) -> subprocess.CompletedProcess[str]:
    """A Python of its own that runs `code`, hooked; it must succeed. Nothing that it started outlives this call.

    Into files and not through pipes, whose end would be waited for if a grandchild (an engine's worker) lingers.
    """
    command = [sys.executable, "-c", code, *map(str, args)]
    environment = hooked_environment(socket_path, **env)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=out, stderr=err, start_new_session=True
        )
        try:
            status = process.wait(timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(command, status, out.read(), err.read())
    assert done.returncode == 0, done.stderr
    return done


@contextlib.contextmanager
def warmed(folder: Path, *imports: str, values: Sequence[str] = ("1", "0")) -> Iterator[Run]:
    """`run_hooked`, by Pythons that were started as it starts them and have imported these: see `WarmPython`. For the
    fixture of a module: started in a test, they would be left behind.

    values: of GPULOAD_AUTO that are asked for.
    """
    with contextlib.ExitStack() as started:
        pythons = {}
        for value in values:
            environment = hooked_environment(None, GPULOAD_AUTO=value)
            pythons[value] = WarmPython(imports, log=folder / f"hooked-{value}.log", env=environment)
            started.callback(pythons[value].stop)

        def run(
            code: str, *args: object, socket_path: str | None, timeout_s: float = DEADLINE_S, **env: str
        ) -> subprocess.CompletedProcess[str]:
            environment = hooked_environment(socket_path, **env)
            done = pythons[environment["GPULOAD_AUTO"]].run(code, *args, env=environment, timeout_s=timeout_s)
            assert done.returncode == 0, done.stderr
            return done

        yield run


@dataclass(frozen=True)
class Outcome:
    """A program's own findings, what its hooks counted, and what it wrote to stderr."""

    found: Any
    counts: dict[str, int]
    stderr: str


def run_program(
    name: str,
    *args: object,
    socket_path: str | None,
    timeout_s: float = DEADLINE_S,
    run: Run = run_hooked,
    **env: str,
) -> Outcome:
    """One of `programs` in a hooked process."""
    code = "from tests.gpuload.hooks.programs import main; main()"
    done = run(code, name, *args, socket_path=socket_path, timeout_s=timeout_s, **env)
    said = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"found"'))  # vLLM talks too
    return Outcome(said["found"], said["counts"], done.stderr)


@pytest.fixture
def plainly() -> Callable[..., Any]:
    """The same program here, without hooks; its findings as they look after JSON."""

    def run(name: str, *args: object) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other libraries' own
            return json.loads(json.dumps(getattr(programs, name)(*map(str, args))))

    return run
