"""A mount that requires signatures: what is signed is served exactly, and nothing else ever is, from wherever."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mfs.errors import ConfigError
from mfs.registry import layout
from mfs.registry.folder_store import FolderStore
from mfs.registry.signing import Signer
from mfs.registry.verifying import read_manifest
from mfs.testing.mounting import MountFailedError, TestMount
from tests.mount import touching
from tests.mount.conftest import Mounted
from tests.registry.keys import KeyPair, make_keys
from tests.registry.made import Registry, soon
from tests.registry.places import S3Place
from tests.servers.chaos import ChaosProxy
from tests.servers.swift import SwiftServer

FILES = {"config.json": b"{}", "model.bin": random.Random(3).randbytes(5_000_000), "deep/er/t.json": b"[]"}


class Signed:
    """A registry in a folder, a pair of keys, and mounts that require a signature by it."""

    def __init__(self, root: Path, keys: KeyPair, mounted: Mounted) -> None:
        self.root = root
        self.keys = keys
        self._mounted = mounted
        self.registry = Registry(FolderStore(str(root)))

    def sign(self, model: str, pushed: str, keys: KeyPair | None = None) -> Path:
        """Sign a revision; the file that has the bundle."""
        body, _ = read_manifest(self.registry.store, model, pushed)
        return self.root / Signer((keys or self.keys).private).put(self.registry.store, model, body, deadline_s=soon())

    def mount(self, name: str = "m", *, required: bool = True) -> TestMount:
        source = {"require_signature": self.keys.public} if required else {}
        return self._mounted(f"mfs+file://{self.root}", name=name, source=source)

    def chunk(self, model: str, pushed: str, path: str, number: int) -> Path:
        """Where a chunk of a file lies."""
        _, manifest = read_manifest(self.registry.store, model, pushed)
        return self.root / layout.chunk_key(manifest.chunks[manifest.by_path[path].chunks[number]].id)


@pytest.fixture
def signed(tmp_path: Path, mounted: Mounted) -> Signed:
    return Signed(tmp_path / "registry", make_keys(tmp_path, "key"), mounted)


def assert_served(mount: TestMount, folder: str, files: dict[str, bytes] = FILES) -> None:
    for path, content in files.items():
        assert mount.call(touching.read, f"{mount.path}/{folder}/{path}") == content


def refusal(mount: TestMount, folder: str) -> str:
    """How opening a directory, or a file of it by name, fails."""
    how = {
        mount.call(touching.failure, "listdir", f"{mount.path}/{folder}"),
        mount.call(touching.failure, "open", f"{mount.path}/{folder}/config.json", 0),
    }
    assert len(how) == 1, how
    return how.pop()


def test_what_is_signed_is_served_and_stock_tools_accept_it(signed: Signed) -> None:
    bundle = signed.sign("llama", signed.registry.push("llama", "prod", FILES))
    mount = signed.mount()
    assert_served(mount, "llama/prod")
    assert (
        mount.call(touching.pread, f"{mount.path}/llama/prod/model.bin", 1000, 3_000_001)
        == (FILES["model.bin"][3_000_001:3_001_001])
    )
    mount.run(
        sys.executable, "-m", "model_signing", "verify", "key", mount.path / "llama/prod", "--signature", bundle,
        "--public_key", signed.keys.public,
    )  # fmt: skip


def test_what_is_not_signed_is_refused_beside_what_is(signed: Signed) -> None:
    signed.sign("llama", signed.registry.push("llama", "prod", FILES))
    signed.registry.push("llama", "test", {**FILES, "config.json": b"{ }"})
    mount = signed.mount()
    assert refusal(mount, "llama/test") == "EACCES"
    assert_served(mount, "llama/prod")
    assert "not signed" in mount.log
    assert "'mfs sign' adds one" in mount.log


def test_another_key(signed: Signed, tmp_path: Path) -> None:
    signed.sign("llama", signed.registry.push("llama", "prod", FILES), make_keys(tmp_path, "other"))
    mount = signed.mount()
    assert refusal(mount, "llama/prod") == "EACCES"
    assert "signed by another key" in mount.log


def test_nothing_is_served_of_what_was_changed(signed: Signed) -> None:
    """Not from the SSD tier either, nor from what was remembered of an earlier mount, with this key or with none."""
    models = {"stripped": "EACCES", "resigned": "EIO", "changed": "EIO"}
    pushed = {model: signed.registry.push(model, "prod", FILES | {"model": model.encode()}) for model in models}
    bundles = {model: signed.sign(model, pushed[model]) for model in models}
    for required in (True, False):
        before = signed.mount(required=required)
        for model in models:
            assert_served(before, f"{model}/prod", FILES | {"model": model.encode()})
        list(before.client.prefetch([""], "ssd", wait=True))
        before.stop()
    bundles["stripped"].unlink()
    bundles["resigned"].write_bytes(bundles["resigned"].read_bytes().replace(b'"sig":"M', b'"sig":"N'))
    manifest = signed.root / layout.manifest_key("changed", pushed["changed"])
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.write_bytes(content.replace(b"config.json", b"konfig.json"))
    mount = signed.mount()
    assert {model: refusal(mount, f"{model}/prod") for model in models} == models


def test_a_changed_chunk(signed: Signed) -> None:
    pushed = signed.registry.push("llama", "prod", FILES)
    signed.sign("llama", pushed)
    place = signed.chunk("llama", pushed, "model.bin", 2)
    content = bytearray(place.read_bytes())
    content[-100] ^= 1
    place.unlink()
    place.write_bytes(content)
    mount = signed.mount()
    path = f"{mount.path}/llama/prod/model.bin"
    assert mount.call(touching.pread, path, 100_000, 0) == FILES["model.bin"][:100_000]
    assert mount.call(touching.read_failure, path, 3 * (1 << 20) - 4096) == "EIO"
    assert_served(mount, "llama/prod", {"config.json": b"{}"})


def test_a_signed_revision_of_another_model(signed: Signed) -> None:
    """Whoever may write to the store must not be able to serve the tiny model as the large one."""
    pushed = signed.registry.push("tiny", "prod", FILES)
    bundle = signed.sign("tiny", pushed)
    store = signed.registry.store
    store.create(layout.manifest_key("llama", pushed), read_manifest(store, "tiny", pushed)[0], deadline_s=soon())
    store.create(layout.signature_key("llama", pushed, bundle.name), bundle.read_bytes(), deadline_s=soon())
    signed.registry.move("llama", "prod", pushed)
    mount = signed.mount()
    assert refusal(mount, "llama/prod") == "EIO"
    assert_served(mount, "tiny/prod")


def test_a_tag_that_moves_to_an_unsigned_revision_keeps_what_it_showed(signed: Signed, tmp_path: Path) -> None:
    signed.sign("llama", signed.registry.push("llama", "prod", FILES))
    mount = signed.mount()
    assert_served(mount, "llama/prod")
    new = FILES | {"config.json": b'{"new": 1}'}
    pushed = signed.registry.push("llama", "prod", new)
    assert any("not signed" in error for error in mount.client.refresh()["errors"])
    assert_served(mount, "llama/prod")
    signed.sign("llama", pushed)
    signed.registry.push("llama", "theirs", FILES | {"config.json": b"1"})  # beside it, what may not be shown
    signed.sign(
        "llama", signed.registry.push("llama", "others", FILES | {"config.json": b"2"}), make_keys(tmp_path, "o")
    )
    assert mount.client.refresh()["errors"] == []
    assert mount.wait_for(lambda: mount.call(touching.read, f"{mount.path}/llama/prod/config.json") == b'{"new": 1}')
    assert_served(mount, "llama/prod", new)
    assert refusal(mount, "llama/theirs") == refusal(mount, "llama/others") == "EACCES"


def test_a_key_that_cannot_be_used_is_said_at_once(signed: Signed, tmp_path: Path) -> None:
    signed.keys.public.unlink()
    with pytest.raises(MountFailedError, match=f"ConfigError: key {signed.keys.public} cannot be read"):
        signed.mount()
    with pytest.raises(ConfigError, match="of a registry"):
        TestMount(tmp_path / "x", str(tmp_path), source={"require_signature": signed.keys.public})


def test_what_an_unsigned_mount_showed_is_not_shown_while_the_registry_is_away(
    tmp_path: Path, mounted: Mounted, swift: SwiftServer, s3_bucket: str, chaos: Callable[[str], ChaosProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = S3Place(swift, s3_bucket, monkeypatch)
    store = place.store()
    Registry(store).push("llama", "prod", {"config.json": b"{}"})
    store.close()
    place.close()
    proxy = chaos(swift.endpoint)
    source = {"endpoint_url": proxy.url, "region": swift.region}
    mount = mounted(place.url, source=source, timeout_s=4)
    assert_served(mount, "llama/prod", {"config.json": b"{}"})
    mount.wait_saved("llama/prod/config.json")
    mount.stop()
    proxy.set(stall_after_bytes=0)
    with pytest.raises(MountFailedError):
        mounted(place.url, source=source | {"require_signature": make_keys(tmp_path, "key").public}, timeout_s=4)
    mount = mounted(place.url, source=source, timeout_s=4)  # as it would have been without a key
    mount.alarms_expected.append(".")
    assert_served(mount, "llama/prod", {"config.json": b"{}"})
    proxy.clear()
