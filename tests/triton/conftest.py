"""A repository on a mount and a server over it, shared by the tests of a module: each uses models of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mfs.testing.mounting import TestMount
from tests.cli.conftest import Mfs
from tests.mount import origins
from tests.servers import triton
from tests.servers.liar import LiarServer
from tests.servers.triton import TritonServer


@pytest.fixture(scope="session", autouse=True)
def _needs_triton() -> None:
    reason = triton.missing()
    if reason and "run tools/setup" not in reason:
        pytest.skip(reason)


class LiarOrigin(origins.WebOrigin):
    """A folder of a server that lies as told."""

    def __init__(self, liar: LiarServer) -> None:
        self.liar = liar
        self.root = liar.files
        self.url = liar.url
        self.source = {}
        self.env = {}


class Repository:
    """What stands at an origin, and the mount that shows it."""

    def __init__(self, origin: origins.Origin, folder: Path, **settings: Any) -> None:
        self.origin = origin
        self.files: dict[str, bytes] = {}
        self.mount = origins.mount(origin, folder, **{"workers_count": 2} | settings)

    @property
    def path(self) -> Path:
        return self.mount.path

    def add(self, files: Mapping[str, bytes]) -> None:
        """Publish further files, or others in their place."""
        self.publish({**self.files, **files})

    def remove(self, prefix: str) -> None:
        """Publish without the files below `prefix`."""
        self.publish({name: content for name, content in self.files.items() if not name.startswith(prefix)})

    def publish(self, files: Mapping[str, bytes], *, refresh: bool = True) -> None:
        """Make exactly these files, and let the mount look."""
        self.files = dict(files)
        self.origin.put_all(self.files)
        if isinstance(self.origin, origins.FolderOrigin | origins.WebOrigin):
            self.origin.remove_empty_folders()
        if refresh and self.mount.is_running:
            errors = self.mount.client.refresh()["errors"]
            assert not errors, errors

    def look(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` in a process that may touch the mount, and ends."""
        outside = self.mount.outside()
        try:
            return outside.call(function, *args)
        finally:
            outside.close()


@pytest.fixture(scope="module")
def server(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Over the module's own `repository`: explicit control, nothing loaded."""
    folder = tmp_path_factory.mktemp("triton")
    with TritonServer(folder, repository.path, "--model-control-mode=explicit") as made:
        yield made


@pytest.fixture
def mfs() -> Mfs:
    """The command."""
    return Mfs()


Serve = Callable[..., TritonServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """`serve(path, *options)` is a started server over a repository, for this test only."""
    with contextlib.ExitStack() as stack:

        def start(path: Path, *options: str, ready: bool = True, **settings: Any) -> TritonServer:
            server = TritonServer(tmp_path / f"t{len(started)}", path, *options, **settings)
            started.append(server)
            stack.callback(server.stop)
            return server.start(ready=ready)

        started: list[TritonServer] = []
        yield start


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = 20.0) -> None:
    """Raises: AssertionError if it does not come true."""
    assert TestMount.wait_for(condition, timeout_s=timeout_s), f"{what}: not within {timeout_s:g} s"
