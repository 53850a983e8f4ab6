"""Stand-in drivers, one for each process that a test is about: a library each, with cards as its environment says."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import gpuload.client.attached
from gpuload.device import driver as cu
from gpuload.errors import DeviceError

SOURCE = Path(__file__).parent / "standin" / "libcuda.c"

Processes = Callable[..., cu.Driver]


@pytest.fixture(scope="session", autouse=True)
def _theirs_are_not_ours() -> None:
    """Where this machine's own driver is a model as well (tools/gpu/simulate), it has its variables by now, and the
    stand-ins of these tests get none of them."""
    with suppress(DeviceError):
        cu.load_driver()
    for name in [name for name in os.environ if name.startswith("STANDIN_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here: the stand-in driver cannot be built")
    out = tmp_path_factory.mktemp("standin") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", out, SOURCE], check=True)
    return out


@pytest.fixture
def process(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    """`process(STANDIN_DEVICES=2, CUDA_VISIBLE_DEVICES="1")`: the driver as a process with that environment has it."""
    made: list[cu.Driver] = []

    def make(**environment: object) -> cu.Driver:
        path = tmp_path / f"libcuda-{len(made)}.so.1"
        shutil.copy(compiled, path)
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, str(value))
            made.append(cu.Driver(str(path)))
        return made[-1]

    return make


@pytest.fixture
def be_client(monkeypatch: pytest.MonkeyPatch) -> Callable[[cu.Driver], None]:
    """Make this process one that has the given driver; torch takes its memory for the CPU's, which it is."""
    over, empty = gpuload.client.attached.tensors.over_memory, torch.empty
    monkeypatch.setattr(
        gpuload.client.attached.tensors, "over_memory", lambda owner, at, n, _: over(owner, at, n, "cpu")
    )
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **{**kwargs, "device": "cpu"}))
    return lambda driver: monkeypatch.setattr(cu, "load_driver", lambda: driver)


def capture(driver: cu.Driver, begin: int = -1) -> int:
    """Begin (1) or end (0) the capture of a graph by somebody; returns what was: 0 none, 1 one, 2 one that we broke."""
    return int(ctypes.CDLL(driver.path).standin_capture(begin))


def calls(driver: cu.Driver, name: str) -> int:
    """How often it was called."""
    count = ctypes.CDLL(driver.path).standin_count
    count.restype = ctypes.c_long
    return int(count(name.encode()))


def fail(driver: cu.Driver, code: int) -> None:
    """From now on every call fails with `code`, as after an error that a context does not recover from; 0: none."""
    ctypes.CDLL(driver.path).standin_fail(code)
