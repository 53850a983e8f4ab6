"""Caches, and nodes that read through them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.dfdaemon import DfdaemonServer
from tests.servers.node_cache import NginxCache


@pytest.fixture
def nginx_cache(tmp_path: Path) -> Iterator[NginxCache]:
    """An empty nginx, as in RECIPES.md."""
    with NginxCache(tmp_path / "nginx-cache") as cache:
        yield cache


@pytest.fixture
def stale_cache(tmp_path: Path) -> Iterator[NginxCache]:
    """The same with keys that lack the version."""
    with NginxCache(tmp_path / "stale-cache", knows_versions=False) as cache:
        yield cache


@pytest.fixture
def dfdaemon(tmp_path: Path) -> Iterator[DfdaemonServer]:
    """An empty stand-in for Dragonfly."""
    with DfdaemonServer(tmp_path / "dfdaemon") as server:
        yield server
