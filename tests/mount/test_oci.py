"""An OCI registry mounted: lazily, by a tag that moves, on a network that fails. See also the fixture `origin`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mfs.testing import ramp
from mfs.testing.mounting import MountFailedError
from tests.mount import touching
from tests.mount.conftest import Mounted
from tests.oci import static
from tests.oci.artifacts import MODEL, RegistryOrigin, Repository, digest_of, packed, tar_of
from tests.servers.chaos import ChaosProxy
from tests.servers.docker_registry import DockerRegistry
from tests.servers.liar import LiarServer, Lie

MIB = 1 << 20
FILES = {"m/w.bin": ramp(9 * MIB + 5), "m/warm.bin": ramp(5 * MIB + 1, 13), "m/config.json": b"{}"}
TIMEOUT_S = 3.0
PATIENCE_S = 15.0
"""What an answer may take where TIMEOUT_S is the promise. A hang is endless."""


@pytest.fixture
def pushed(registry: DockerRegistry) -> Iterator[RegistryOrigin]:
    origin = RegistryOrigin(registry)
    yield origin
    origin.close()


def test_a_large_layer_is_read_by_range_and_not_pulled(
    pushed: RegistryOrigin, mounted: Mounted, chaos: Callable[[str], ChaosProxy], registry: DockerRegistry
) -> None:
    content = ramp(48 * MIB)
    pushed.put_all({"m/w.bin": content, "m/config.json": b"{}"})
    proxy = chaos(registry.url)
    mount = mounted(f"oci+{proxy.url}/{pushed.repository.name}:v1")
    path = str(mount.path / "m/w.bin")
    assert mount.call(touching.pread_direct, path, 4096, 40 * MIB) == content[40 * MIB :][:4096]
    assert mount.call(touching.pread_direct, path, 4096, 0) == content[:4096]
    mount.wait_quiet()
    assert proxy.stats().down_bytes < 12 * MIB


def test_a_tag_that_moves_is_shown_whole_and_back(pushed: RegistryOrigin, mounted: Mounted) -> None:
    pushed.put_all(FILES)
    mount = mounted(pushed.url)
    path = str(mount.path / "m/w.bin")
    first = mount.call(touching.hold, "old", path)
    new = {**FILES, "m/w.bin": ramp(9 * MIB + 5, 77), "m/added": b"1"}
    pushed.put_all(new)
    mount.client.refresh()
    assert mount.wait_for(lambda: mount.call(touching.read, path) == new["m/w.bin"])
    assert mount.call(touching.tree, str(mount.path)) == {name: len(content) for name, content in new.items()}
    # The registry has the old layer still, so the open file goes on.
    assert mount.call(touching.held_read, "old", 7 * MIB, 4096) == FILES["m/w.bin"][7 * MIB :][:4096]
    mount.call(touching.release, "old")
    pushed.put_all(FILES)
    mount.client.refresh()
    assert mount.wait_for(lambda: mount.call(touching.stat, path)["st_ino"] == first)
    assert mount.call(touching.read, path) == FILES["m/w.bin"]


def test_a_repository_with_its_tags(registry: DockerRegistry, mounted: Mounted) -> None:
    repository = Repository(registry)
    for number in (1, 2):
        repository.manifest([repository.file("w.bin", ramp(100_000, number))], f"v{number}")
    mount = mounted(repository.url)
    assert mount.call(touching.list_names, str(mount.path)) == ["v1", "v2"]
    assert mount.call(touching.read, str(mount.path / "v2/w.bin")) == ramp(100_000, 2)
    repository.manifest([repository.file("w.bin", ramp(100_000, 3))], "v3")
    mount.client.refresh()
    path = str(mount.path / "v3/w.bin")
    assert mount.wait_for(lambda: mount.call(touching.read_failure, path) == "")
    assert mount.call(touching.read, path) == ramp(100_000, 3)
    repository.close()


def test_layers_of_every_packing_side_by_side(registry: DockerRegistry, mounted: Mounted) -> None:
    repository = Repository(registry)
    files = {f"{how}/{name}": content for how in ("raw", "tar", "gzip", "zstd") for name, content in FILES.items()}
    layers = [repository.file(f"raw/{name}", content) for name, content in FILES.items()]
    for how in ("tar", "gzip", "zstd"):
        body = tar_of({f"{how}/{name}": content for name, content in FILES.items()})
        suffix = "tar" if how == "tar" else f"tar+{how}"
        layers.append(repository.layer(body if how == "tar" else packed(body, how), f"{MODEL}.weight.v1.{suffix}"))
    repository.manifest(layers)
    repository.close()
    mount = mounted(f"{repository.url}:v1")
    assert {name: mount.call(touching.read, str(mount.path / name)) for name in files} == files
    assert [path.name for path in (mount.folder / "cache/v2/layers").glob("*.tmp")] == []
    assert len(list((mount.folder / "cache/v2/layers").glob("*.tar"))) == 2


@pytest.mark.parametrize(
    ("weather", "outcome"),
    [
        ({"reset_after_bytes": 100_000, "faults_count": 2}, "passes"),
        ({"truncate_after_bytes": 100_000}, ""),  # each answer brings some, and that counts
        ({"truncate_after_bytes": 0}, "EIO"),
        ({"stall_after_bytes": 0}, "EIO"),
    ],
    ids=["resets", "each cut off", "nothing", "stall"],
)
def test_bad_weather(
    pushed: RegistryOrigin, mounted: Mounted, chaos: Callable[[str], ChaosProxy], registry: DockerRegistry,
    weather: dict[str, Any], outcome: str,
) -> None:  # fmt: skip
    pushed.put_all(FILES)
    proxy = chaos(registry.url)
    timeout_s = 20.0 if outcome == "passes" else TIMEOUT_S
    mount = mounted(f"oci+{proxy.url}/{pushed.repository.name}:v1", timeout_s=timeout_s)
    assert mount.call(touching.read, str(mount.path / "m/warm.bin")) == FILES["m/warm.bin"]
    proxy.set(**weather)
    path = str(mount.path / "m/w.bin")
    if outcome != "passes":
        reader = mount.outside()
        reader.start(touching.read_failure, path, 5 * MIB)
        warm = str(mount.path / "m/warm.bin")
        mount.call(touching.drop_pages, warm)
        assert mount.call(touching.read, warm, timeout_s=PATIENCE_S) == FILES["m/warm.bin"]
        assert reader.finish(timeout_s=PATIENCE_S if outcome else 120) == outcome
        proxy.clear()
    assert mount.call(touching.read, path) == FILES["m/w.bin"]


def test_a_version_that_hangs_delays_no_other(liar: LiarServer, mounted: Mounted) -> None:
    """Each tag is a model to the mount, which waits ten minutes: what is answered meanwhile did not wait for it."""
    places = static.publish(liar.files, "team/m", {"v1": {"hanging.bin": ramp(64 * MIB)}, "v2": FILES})
    mount = mounted(f"oci+{liar.url}team/m", timeout_s=600.0, connections_count=2)
    liar.lie(Lie.SILENCE, pattern=places["v1/hanging.bin"])
    readers = [mount.outside() for _ in range(4)]
    for number, reader in enumerate(readers):
        reader.start(touching.pread, str(mount.path / "v1/hanging.bin"), 8 * MIB, number * 16 * MIB)
    assert mount.wait_for(lambda: mount.client.status()["reads"]["waiting"] >= len(readers))
    for name, content in FILES.items():
        assert mount.call(touching.read, str(mount.path / "v2" / name), timeout_s=60) == content
    assert all(reader.is_busy() for reader in readers)
    liar.tell_truth()
    for number, reader in enumerate(readers):
        assert reader.finish(timeout_s=60) == ramp(8 * MIB, number * 16 * MIB)


def test_bytes_changed_in_the_registrys_storage_are_found_by_verify(
    pushed: RegistryOrigin, mounted: Mounted, registry: DockerRegistry
) -> None:
    """Sizes true, bytes not: no read of a part can tell. `mfs verify` compares the whole with the layer's digest."""

    pushed.put_all({"w.bin": FILES["m/w.bin"]})
    mount = mounted(pushed.url)
    path = str(mount.path / "w.bin")
    stored = registry.blob_file(digest_of(FILES["m/w.bin"]))
    stored.write_bytes(FILES["m/w.bin"][:-1] + b"\xff")
    assert mount.call(touching.read, path)[-1] == 0xFF
    mount.wait_saved("w.bin")
    [bad] = list(mount.client.verify(["w.bin"]))[-1]["bad"]
    assert "sha256" in bad["reason"]
    stored.write_bytes(FILES["m/w.bin"])
    mount.call(touching.drop_pages, path)
    assert mount.call(touching.read, path) == FILES["m/w.bin"]


def test_a_mount_of_an_artifact_that_is_not_there_says_so(
    registry: DockerRegistry, tmp_path: Path, mounted: Mounted
) -> None:

    with pytest.raises(MountFailedError, match=r"team/nothing:v1: the registry answered 404"):
        mounted(f"oci://{registry.host}/team/nothing:v1")
