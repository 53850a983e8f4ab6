"""The server on a real mount of a Hub: what is known of a file by its content holds over remounts, names, servers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuload.client.asking import ask, connect, exchange, load_resident
from gpuload.client.attached import attach
from gpuload.device.host import HostDevice
from gpuload.server import ram_tier
from gpuload.server.daemon import ServerConfig
from gpuload.testing import assert_same, random_tensors, running_server, write
from mfs.errors import MfsError
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


def test_a_server_outlives_the_mounts_that_it_loads_from(
    config: ServerConfig, small_granules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dead mount even closing a file is an error: one line for who asked, and all others go on being served."""
    monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
    tensors = random_tensors(1, SHAPES)
    origin = tmp_path / "registry"
    origin.mkdir()
    write(origin / "a.safetensors", tensors)
    with running_server(config, lambda _: HostDevice(granule_bytes=4096)) as server:
        load_resident(origin / "a.safetensors", "m", "cpu", socket_path=server.socket_path)
        mount = TestMount(tmp_path / "m", str(origin)).start()
        fd = os.open(mount.path / "a.safetensors", os.O_RDONLY | os.O_CLOEXEC)
        try:
            mount.kill(detach=False)
            request = {"op": "load", "model": "n", "device": "cpu", "files": [str(mount.path / "a.safetensors")]}
            with closing(connect(server.socket_path, 30)) as sock, pytest.raises(MfsError, match="not connected"):
                exchange(sock, request, [fd])
        finally:
            with suppress(OSError):
                os.close(fd)
            mount.clean_up()
        assert ask({"op": "ping"}, socket_path=server.socket_path)["pid"]
        assert_same(attach("m", socket_path=server.socket_path), tensors)
        server.on_loop(server.sites["cpu"].catalog.models["m"].retire)


def test_what_a_mounts_ram_keeps_page_locked_is_not_kept_twice(
    config: ServerConfig, small_granules: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
    origin = tmp_path / "registry"
    origin.mkdir()
    for seed in (1, 2):
        write(origin / f"{seed}.safetensors", random_tensors(seed, SHAPES))
    card = HostDevice(granule_bytes=4096, is_direct=False)
    config = replace(config, arena_bytes={"cpu": 60 * 4096}, ram_tier_bytes=8 << 20)
    monkeypatch.setattr(ram_tier, "SLAB_BYTES", 1 << 20)
    monkeypatch.setattr(ram_tier, "SLOT_BYTES", 1 << 16)
    with running_server(config, lambda _: card) as server:
        site = server.sites["cpu"]
        leaving, tier = site.leaving, site.tier
        assert leaving is not None
        assert tier is not None
        while not tier.locked_bytes:
            server.settle()
        kept = leaving.is_held_elsewhere.__self__  # type: ignore[attr-defined]

        def load(path: Path) -> dict[str, Any]:
            report: dict[str, Any] = load_resident(path, path.name, "cpu", socket_path=server.socket_path)["report"]
            kept.wait_idle()
            return report

        with TestMount(tmp_path / "m", str(origin)) as mount:
            load(mount.path / "1.safetensors")
            assert kept.locked_bytes > 0
            assert load(mount.path / "2.safetensors")["evicted"] == ["1.safetensors"]
            server.settle()
            assert (tier.blocks_count, tier.totals.dropped) == (0, 0)
            assert load(mount.path / "1.safetensors")["bytes_copied"] == 6 * 32768, "from the mount's RAM, in place"
        (block, *_) = site.catalog.models["1.safetensors"].parts[0].blocks
        while leaving.is_held_elsewhere(block.lenders):  # the mount is gone, and what it lent goes
            server.settle()
        ask({"op": "resize", "device": "cpu", "bytes": 0, "evict": True}, socket_path=server.socket_path)
        while not tier.totals.saved:
            server.settle()
