"""Mounts and origins for the tests beside this file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mfs.testing.mounting import TestMount
from tests.mount import origins
from tests.servers.docker_registry import DockerRegistry
from tests.servers.hub import HubServer
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

Mounted = Callable[..., TestMount]
"""See `mounted`."""


@pytest.fixture(params=["folder", "s3", "web", "hub", "registry", "oci"])
def origin(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    swift: SwiftServer,
    nginx: NginxServer,
    hub: HubServer,
    registry: DockerRegistry,
) -> origins.Origin:
    """Each kind of origin in turn, empty."""
    # The servers are asked for by name, not when needed: one started within a test would count as left behind by it.
    match request.param:
        case "folder":
            return origins.FolderOrigin(tmp_path / "registry")
        case "s3":
            return origins.S3Origin(swift, request.getfixturevalue("s3_bucket"))
        case "web":
            return origins.WebOrigin(nginx)
        case "registry":
            return origins.RegistryOrigin(tmp_path / "registry")
        case "oci":
            return origins.OciOrigin(registry)
        case _:
            return origins.HubOrigin(hub)


@pytest.fixture
def folder(tmp_path: Path) -> origins.FolderOrigin:
    """An empty folder to mount."""
    return origins.FolderOrigin(tmp_path / "registry")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    """`mounted(origin or url, **settings)` is a started mount, checked and stopped at the end of the test.

    Several may be had; `name=` gives each its folder. A test that ends one itself is free to.
    """
    with contextlib.ExitStack() as stack:

        def make(what: origins.Origin | str, *, name: str = "m", **settings: Any) -> TestMount:
            settings = {"workers_count": 2} | settings  # as users have: two must agree on what they do
            if isinstance(what, str):
                mount = TestMount(tmp_path / name, what, **settings)
            else:
                mount = origins.mount(what, tmp_path / name, **settings)
            return stack.enter_context(mount)

        yield make
