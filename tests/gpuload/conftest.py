"""A server in a thread, small granules, and a look at every gauge afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuload.client.attached
from gpuload.device.host import HostDevice
from gpuload.moving.pipeline import Limits
from gpuload.server import versions
from gpuload.server.daemon import ServerConfig
from gpuload.testing import ServerThread, running_server

GRANULE = 4096


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    folder = os.open(tmp_path, os.O_RDONLY)  # an overlay, in some containers: here its times are ours alone
    monkeypatch.setattr(versions, "CHANGE_STAMPED", versions.CHANGE_STAMPED | {versions._file_system(folder)})
    os.close(folder)
    return ServerConfig(
        socket_path=str(tmp_path / "s.sock"),
        arena_bytes={"cpu": 256 * GRANULE},
        settled_s=0,
        linger_s=0,
        limits=Limits(buffer_bytes=16384, buffers_count=2, readers_count=2, step_timeout_s=60),
    )


@pytest.fixture
def small_granules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this process open devices with the server's granule."""
    monkeypatch.setattr(gpuload.client.attached, "open_device", lambda name: HostDevice(granule_bytes=GRANULE))


@pytest.fixture(params=[True, False], ids=["direct", "staged"])
def server(request: pytest.FixtureRequest, config: ServerConfig, small_granules: None) -> Iterator[ServerThread]:
    open_one = lambda name: HostDevice(granule_bytes=GRANULE, is_direct=request.param)  # noqa: E731
    with running_server(config, open_one) as running:
        yield running
        catalog = running.sites["cpu"].catalog
        for model in list(catalog.models.values()):
            running.on_loop(model.retire)
        assert set(running.gauges().values()) == {0}, "the test left something resident or leased"
