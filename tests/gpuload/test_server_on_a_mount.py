"""The server on a real mount of a Hub: what is known of a file by its content holds over remounts, names, servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuload.asking import load_resident
from gpuload.client import attach
from gpuload.device.host import HostDevice
from gpuload.server.daemon import ServerConfig
from gpuload.testing import assert_same, random_tensors, running_server, write
from mfs.testing.mounting import TestMount
from tests.mount.origins import HubOrigin
from tests.servers.hub import HubServer

SHAPES = {f"l.{i}.w": (8, 2048) for i in range(6)}


@pytest.fixture
def day(
    hub: HubServer, config: ServerConfig, small_granules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """One more day: mounts a repository, starts a server, and gives a function that loads or swaps from the mount."""
    config = replace(config, digests_folder=str(tmp_path / "d"))
    monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))

    @contextmanager
    def one(origin: HubOrigin) -> Iterator[Any]:
        with (
            TestMount(tmp_path / "m", origin.url, env=origin.env) as mount,
            running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server,
        ):

            def load(name: str, *, is_swap: bool = False) -> dict[str, Any]:
                path = mount.path / name
                reply = load_resident(path, "m", "cpu", is_swap=is_swap, socket_path=server.socket_path)
                return reply["report"]

            yield load

    return one


def test_a_swap_reads_what_differs_after_a_remount_from_another_repository_by_a_new_server(
    day: Any, hub: HubServer, config: ServerConfig, tmp_path: Path
) -> None:
    old = random_tensors(1, SHAPES)
    new = {**old, **random_tensors(2, {"l.3.w": (8, 2048)})}
    files = {n: write(tmp_path / f"{n}.safetensors", t).read_bytes() for n, t in (("a", old), ("b", new))}
    one, two = HubOrigin(hub), HubOrigin(hub)
    one.put_all({f"{name}.safetensors": content for name, content in files.items()})
    two.put_all({"old/x.safetensors": files["a"], "new/y.safetensors": files["b"]})
    with day(one) as load:
        assert load("a.safetensors")["bytes_hashed"] == 6 * 32768
        first = load("b.safetensors", is_swap=True)
        assert (first["bytes_hashed"], first["bytes_copied"]) == (6 * 32768, 32768), "one pass"
    with day(two) as load:
        load("old/x.safetensors")
        swapped = load("new/y.safetensors", is_swap=True)
        assert (swapped["bytes_hashed"], swapped["bytes_copied"]) == (0, 32768)
        assert_same(attach("m", socket_path=config.socket_path), new)
