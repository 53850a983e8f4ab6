"""Only the bytes that are needed cross the network, each once: counted at the origin, not at the daemon."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import save

from mfs.testing import ramp
from mfs.types import BLOCK_BYTES
from tests.mount import origins, touching
from tests.mount.conftest import Mounted
from tests.servers.chaos import ChaosProxy
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer

MIB = 1 << 20
SHARDS_COUNT = 4
TENSOR_BYTES = 4 * MIB
TENSORS_PER_SHARD = 8


def shard_name(number: int) -> str:
    return f"model-{number + 1:05d}-of-{SHARDS_COUNT:05d}.safetensors"


def shard(number: int) -> bytes:
    """A shard of tensors with recognisable content."""
    tensors = {
        f"layer.{number}.{i}": np.frombuffer(ramp(TENSOR_BYTES, 17 * (number * TENSORS_PER_SHARD + i)), np.uint8)
        for i in range(TENSORS_PER_SHARD)
    }
    content: bytes = save(tensors)
    return content


class Counted:
    """A web origin whose bytes are counted by nginx itself."""

    def __init__(self, nginx: NginxServer, files: dict[str, bytes]) -> None:
        self.nginx = nginx
        self.origin = origins.WebOrigin(nginx)
        self.origin.put_all(files)
        self.sizes = {name: len(content) for name, content in files.items()}
        nginx.forget_requests()

    def spans(self, name: str) -> list[tuple[int, int]]:
        """The byte ranges of a file that were asked for, in order."""
        path = f"/{self.origin.root.name}/{name}"
        matches = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.range) for request in self.nginx.requests(path)]
        return [(int(match[1]), int(match[2]) + 1) for match in matches if match]

    def bytes(self, name: str) -> int:
        """Body bytes of a file that were sent."""
        return sum(request.sent_bytes for request in self.nginx.requests(f"/{self.origin.root.name}/{name}"))

    def total(self) -> int:
        return sum(map(self.bytes, self.sizes))


@pytest.fixture
def model(nginx: NginxServer) -> Counted:
    return Counted(nginx, {shard_name(number): shard(number) for number in range(SHARDS_COUNT)})


class TestOnlyWhatIsNeeded:
    def test_mounting_and_listing_fetch_no_bytes(self, model: Counted, mounted: Mounted) -> None:
        mount = mounted(model.origin)
        assert mount.call(touching.tree, str(mount.path)) == model.sizes
        for name in model.sizes:
            mount.call(touching.attributes, str(mount.path / name))
        assert model.total() == 0

    def test_a_sweep_over_headers_fetches_headers(self, model: Counted, mounted: Mounted) -> None:
        mount = mounted(model.origin)
        for number in range(SHARDS_COUNT):
            keys = mount.call(touching.safe_open_keys, str(mount.path / shard_name(number)))
            assert len(keys) == TENSORS_PER_SHARD
        mount.wait_quiet()
        per_shard = [model.bytes(shard_name(number)) for number in range(SHARDS_COUNT)]
        # One block each: they are in the page cache before the mapping's first fault could have the kernel read around.
        assert max(per_shard) == BLOCK_BYTES

    def test_headers_by_read_fetch_little(self, model: Counted, mounted: Mounted) -> None:
        mount = mounted(model.origin)
        for number in range(SHARDS_COUNT):
            header = mount.call(touching.safetensors_header, str(mount.path / shard_name(number)))
            assert len(header) == TENSORS_PER_SHARD
        mount.wait_quiet()
        assert model.total() <= SHARDS_COUNT * MIB

    def test_one_slice_fetches_about_that_slice(self, model: Counted, mounted: Mounted) -> None:
        mount = mounted(model.origin)
        name = f"layer.2.{TENSORS_PER_SHARD // 2}"
        start, stop = 2 * MIB, 2 * MIB + 300_000
        part = mount.call(touching.safe_open_slice, str(mount.path / shard_name(2)), name, start, stop)
        seed = 17 * (2 * TENSORS_PER_SHARD + TENSORS_PER_SHARD // 2)
        assert part == ramp(stop - start, seed + start)
        mount.wait_quiet()
        print(f"one get_slice of {stop - start:,} bytes fetched {model.total():,}")
        assert model.total() <= 10 * MIB
        assert model.total() == model.bytes(shard_name(2))

    def test_nothing_is_fetched_twice(self, model: Counted, mounted: Mounted) -> None:
        mount = mounted(model.origin)
        name = shard_name(0)
        for offset in (0, 5 * MIB, 100, 20 * MIB, 5 * MIB + 1000, 28 * MIB):
            mount.call(touching.pread, str(mount.path / name), 70_000, offset)
        assert mount.call(touching.read, str(mount.path / name)) == shard(0)
        mount.wait_quiet(prefetch=False)
        spans = sorted(model.spans(name))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), spans
        assert model.bytes(name) == model.sizes[name]

    def test_eight_processes_reading_one_file_fetch_it_once(self, model: Counted, mounted: Mounted) -> None:
        mount = mounted(model.origin)
        path, content = str(mount.path / shard_name(1)), shard(1)
        readers = [mount.outside() for _ in range(8)]
        for number, reader in enumerate(readers):
            if number % 2:
                reader.start(touching.map_file, path, "shared")
            else:
                reader.start(touching.read, path)
        for reader in readers:
            assert reader.finish(timeout_s=60) == content
        mount.wait_quiet(prefetch=False)
        assert model.bytes(shard_name(1)) == len(content)

    def test_two_names_of_one_digest_are_fetched_once(self, hub: object, mounted: Mounted) -> None:
        origin = origins.HubOrigin(hub)  # type: ignore[arg-type]
        content = ramp(9 * MIB + 5)
        origin.put_all({"a/w.bin": content, "b/same.bin": content})
        mount = mounted(origin)
        assert mount.call(touching.read, str(mount.path / "a/w.bin")) == content
        mount.wait_saved("a/w.bin")
        before = mount.origin_bytes
        assert mount.call(touching.read, str(mount.path / "b/same.bin")) == content
        assert mount.origin_bytes == before


class TestWarmFiles:
    def test_readable_after_the_origin_died(
        self, swift: SwiftServer, s3_bucket: str, mounted: Mounted, chaos: Callable[[str], ChaosProxy]
    ) -> None:
        origin = origins.S3Origin(swift, s3_bucket)
        files = {"warm.bin": ramp(9 * MIB + 1), "cold.bin": ramp(9 * MIB + 2, 5)}
        origin.put_all(files)
        proxy = chaos(swift.endpoint)
        origin.source = {"endpoint_url": proxy.url}
        mount = mounted(origin, timeout_s=3)
        assert mount.call(touching.read, str(mount.path / "warm.bin")) == files["warm.bin"]
        mount.wait_saved("warm.bin")
        proxy.stop()
        mount.client.evict(["warm.bin"], "ram")
        mount.call(touching.drop_pages, str(mount.path / "warm.bin"))
        assert mount.call(touching.read, str(mount.path / "warm.bin")) == files["warm.bin"]
        assert mount.call(touching.read_failure, str(mount.path / "cold.bin")) == "EIO"
        assert mount.call(touching.tree, str(mount.path)) == {name: len(content) for name, content in files.items()}
        proxy.start()
        assert mount.call(touching.read, str(mount.path / "cold.bin")) == files["cold.bin"]


class TestMemory:
    def test_the_daemon_keeps_no_second_copy_in_the_page_cache(
        self, folder: origins.FolderOrigin, mounted: Mounted
    ) -> None:
        content = ramp(24 * MIB)
        folder.put("w.bin", content)
        mount = mounted(folder)
        mount.call(touching.hold, "w", str(mount.path / "w.bin"))  # and so read through us, also once it is sealed
        assert mount.call(touching.held_read, "w", 0, len(content)) == content
        mount.wait_saved("w.bin")
        mount.client.evict(["w.bin"], "ram")
        mount.call(touching.held_drop_pages, "w")
        assert mount.call(touching.held_read, "w", 0, len(content)) == content  # from SSD now
        files = [file for file in (mount.folder / "cache/v2/objects").rglob("*") if file.is_file()]
        cached = sum(touching.resident_pages(str(file)) for file in files) * 4096
        print(f"page cache held by {len(files)} files: {cached:,} bytes")
        assert cached <= len(files) * 128 * 1024
        # the kernel's memory management may have taken some pages again
        assert mount.call(touching.held_resident_pages, "w") * 4096 >= len(content) * 0.9
