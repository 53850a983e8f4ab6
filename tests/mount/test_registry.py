"""A registry of ours, mounted: models and tags as directories, read lazily, verified, and not fetched twice."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mfs.registry import layout
from mfs.registry.folder_store import FolderStore
from mfs.registry.signing import Signer
from mfs.testing import ramp
from mfs.testing.mounting import TestMount
from tests.mount import touching
from tests.mount.conftest import Mounted
from tests.registry import made
from tests.registry.keys import make_keys
from tests.servers.liar import LiarServer, Lie
from tests.servers.nginx import NginxServer

SIZE = (9 << 20) + 17
FILES = {"config.json": b"{}", "w.safetensors": ramp(SIZE), "sub/v.bin": ramp(300_000, 3)}


class Registry(made.Registry):
    """In a folder."""

    def __init__(self, root: Path) -> None:
        super().__init__(FolderStore(str(root)))
        self.root = root
        self.url = f"mfs+file://{root}"

    def chunks(self, pushed: str, model: str = "llama") -> list[Path]:
        """Where the chunks of a revision's largest file lie, in the file's order."""
        found = made.manifest_of(self.store, model, pushed)
        largest = max(found.files, key=lambda file: file.size)
        return [self.root / layout.chunk_key(found.chunks[index].id) for index in largest.chunks]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def read(mount: TestMount, path: str) -> bytes:
    content: bytes = mount.call(touching.read, str(mount.path / path))
    return content


def names(mount: TestMount, path: str = "") -> list[str]:
    found: list[str] = mount.call(touching.list_names, str(mount.path / path))
    return found


def overwrite(path: Path, content: bytes) -> None:
    """Objects are never written again by anybody honest, so their modes say."""
    path.unlink()
    path.write_bytes(content)


def refreshed(mount: TestMount) -> None:
    assert mount.client.refresh()["errors"] == []


class TestTree:
    def test_models_tags_and_files_are_there_and_only_what_is_read_is_fetched(
        self, registry: Registry, mounted: Mounted
    ) -> None:
        pushed = registry.push("llama", "v7", FILES)
        registry.move("llama", "prod", pushed)
        registry.push("phi", "v1", {"w.bin": b"phi"})
        mount = mounted(registry.url)
        assert names(mount) == ["llama", "phi"]
        assert names(mount, "llama") == ["prod", "v7"]
        assert names(mount, "llama/prod") == ["config.json", "sub", "w.safetensors"]
        path = str(mount.path / "llama/prod/sub/v.bin")
        assert mount.call(touching.pread, path, 4_096, 150_000) == ramp(300_000, 3)[150_000:154_096]
        mount.wait_quiet(prefetch=False)
        assert mount.origin_bytes < 1_000_000
        for tag in ("prod", "v7"):
            for name, content in FILES.items():
                assert read(mount, f"llama/{tag}/{name}") == content
        xattrs = mount.call(touching.attributes, str(mount.path / "llama/v7/w.safetensors"))
        assert xattrs["user.mfs.source"] == f"{registry.url}/llama/v7/w.safetensors"
        assert xattrs["user.mfs.digest"].startswith("sha256:")

    @pytest.mark.parametrize("below", ["llama", "llama:v7"])
    def test_a_model_or_a_tag_may_be_mounted_by_itself(self, registry: Registry, mounted: Mounted, below: str) -> None:
        registry.push("llama", "v7", FILES)
        mount = mounted(f"{registry.url}/{below}")
        prefix = "" if ":" in below else "v7/"
        assert read(mount, f"{prefix}sub/v.bin") == FILES["sub/v.bin"]
        assert read(mount, f"{prefix}w.safetensors") == FILES["w.safetensors"]


class TestTags:
    def test_a_tag_that_moves_shows_its_new_revision_whole_and_open_files_keep_theirs(
        self, registry: Registry, mounted: Mounted
    ) -> None:
        old = registry.push("llama", "prod", FILES)
        registry.move("llama", "v7", old)
        mount = mounted(registry.url)
        path = str(mount.path / "llama/prod/w.safetensors")
        inode = mount.call(touching.hold, "old", path)
        kept = mount.call(touching.stat, str(mount.path / "llama/v7/w.safetensors"))
        new = {**FILES, "w.safetensors": ramp(SIZE, 100), "added": b"+"}
        registry.push("llama", "prod", new)
        refreshed(mount)
        assert mount.wait_for(lambda: mount.call(touching.stat, path)["st_ino"] != inode)
        assert names(mount, "llama/prod") == ["added", "config.json", "sub", "w.safetensors"]
        assert read(mount, "llama/prod/w.safetensors") == new["w.safetensors"]
        for offset in range(0, SIZE, 1 << 20):
            got = mount.call(touching.held_read, "old", offset, 4_096)
            assert got == FILES["w.safetensors"][offset : offset + 4_096]
        assert mount.call(touching.stat, str(mount.path / "llama/v7/w.safetensors")) == kept
        times = mount.call(touching.stat, str(mount.path / "llama/prod"))["st_mtime_ns"]
        registry.move("llama", "prod", old)
        refreshed(mount)
        assert mount.wait_for(lambda: mount.call(touching.stat, path)["st_ino"] == inode), "a rollback brings it back"
        assert names(mount, "llama/prod") == ["config.json", "sub", "w.safetensors"]
        assert mount.call(touching.stat, str(mount.path / "llama/prod"))["st_mtime_ns"] > times

    def test_a_new_and_a_removed_tag(self, registry: Registry, mounted: Mounted) -> None:
        pushed = registry.push("llama", "v1", {"a": b"1"})
        mount = mounted(registry.url)
        assert names(mount, "llama") == ["v1"]
        registry.move("llama", "prod", pushed)
        registry.push("phi", "v1", {"b": b"2"})
        refreshed(mount)
        assert mount.wait_for(lambda: names(mount, "llama") == ["prod", "v1"] and names(mount) == ["llama", "phi"])
        assert read(mount, "llama/prod/a") == b"1"
        registry.remove("llama", "v1")
        registry.remove("phi", "v1")
        refreshed(mount)
        assert mount.wait_for(lambda: names(mount, "llama") == ["prod"] and names(mount, "phi") == [])
        assert names(mount) == ["llama", "phi"]

    def test_a_new_tag_that_is_refused_keeps_no_other_back(
        self, registry: Registry, mounted: Mounted, tmp_path: Path
    ) -> None:
        """An unsigned one, say: it is there and cannot be looked into."""
        keys = make_keys(tmp_path, "key")

        def push(tag: str, files: dict[str, bytes], *, is_signed: bool) -> None:
            pushed = made.put_revision(registry.store, "llama", files)
            if is_signed:
                body = registry.store.read(layout.manifest_key("llama", pushed), deadline_s=made.soon())
                Signer(keys.private).put(registry.store, "llama", body, deadline_s=made.soon())
            registry.move("llama", tag, pushed)

        push("prod", {"a": b"old"}, is_signed=True)
        mount = mounted(registry.url, source={"require_signature": keys.public})
        assert read(mount, "llama/prod/a") == b"old"
        push("dev", {"a": b"unsigned"}, is_signed=False)
        push("prod", {"a": b"newer"}, is_signed=True)
        refreshed(mount)
        assert mount.wait_for(lambda: read(mount, "llama/prod/a") == b"newer")
        assert names(mount, "llama") == ["dev", "prod"]
        assert mount.call(touching.failure, "listdir", str(mount.path / "llama/dev")) == "EACCES"

    def test_a_source_that_is_one_tag_changes_as_a_whole(self, registry: Registry, mounted: Mounted) -> None:
        """Also where its root holds nothing but directories, each of which might pass for a model."""
        registry.push("repo", "prod", {f"{model}/1/w": b"old" for model in "abcdefgh"})
        mount = mounted(f"{registry.url}/repo:prod")
        assert read(mount, "a/1/w") == b"old"
        assert set(mount.call(touching.tree, str(mount.path)).values()) == {3}
        registry.push("repo", "prod", {f"{model}/1/w": b"newer" for model in "abcdefgh"})
        reader = mount.outside()
        reader.start(_sizes_until, str(mount.path), 5)
        refreshed(mount)
        assert reader.finish() in ([{3}, {5}], [{5}])


def _sizes_until(path: str, last: int) -> list[set[int]]:
    """Which sizes all files below a path had together, each change of that once, until all have `last`."""
    seen: list[set[int]] = []
    while not seen or seen[-1] != {last}:
        # One look is no instant: what is published in its middle may show in its second half.
        first, second = (set(touching.tree(path).values()) for _ in range(2))
        if first == second and (not seen or seen[-1] != first):
            seen.append(first)
    return seen


class TestLives:
    def test_a_crash_and_a_handover_go_on_with_the_revision_that_was_open(
        self, registry: Registry, mounted: Mounted
    ) -> None:
        registry.push("llama", "prod", FILES)
        mount = mounted(registry.url)
        path = str(mount.path / "llama/prod/w.safetensors")
        inode = mount.call(touching.hold, "fd", path)
        registry.push("llama", "prod", {**FILES, "w.safetensors": ramp(SIZE, 77)})
        killed = mount.crash()
        assert mount.call(touching.held_read, "fd", 5_000_000, 1_000) == ramp(1_000, 5_000_000)
        mount.wait_successor(killed)
        mount.hand_over()
        assert mount.call(touching.held_read, "fd", 8_000_000, 1_000) == ramp(1_000, 8_000_000)
        refreshed(mount)
        assert mount.wait_for(lambda: mount.call(touching.stat, path)["st_ino"] != inode)
        assert mount.call(touching.held_read, "fd", 2_000_000, 1_000) == ramp(1_000, 2_000_000)
        assert read(mount, "llama/prod/w.safetensors") == ramp(SIZE, 77)

    def test_what_is_in_the_cache_is_there_after_a_remount_with_the_registry_gone(
        self, registry: Registry, mounted: Mounted, tmp_path: Path
    ) -> None:
        registry.push("llama", "prod", FILES)
        mount = mounted(registry.url)
        assert read(mount, "llama/prod/w.safetensors") == FILES["w.safetensors"]
        mount.wait_saved("llama/prod/w.safetensors")
        mount.stop()
        mount.start()
        registry.root.rename(tmp_path / "away")
        assert read(mount, "llama/prod/w.safetensors") == FILES["w.safetensors"]
        (tmp_path / "away").rename(registry.root)


class TestDamage:
    def test_a_chunk_that_is_not_right_is_an_error_with_its_line_and_never_a_wrong_byte(
        self, registry: Registry, mounted: Mounted
    ) -> None:
        pushed = registry.push("llama", "prod", {"w.bin": ramp(SIZE)}, chunk_bytes=2 << 20)
        chunks = registry.chunks(pushed)
        body = bytearray(chunks[1].read_bytes())
        body[-(1 << 20)] ^= 4
        overwrite(chunks[1], body)
        chunks[3].unlink()
        mount = mounted(registry.url)
        mount.alarms_expected.append("w.bin")
        file = str(mount.path / "llama/prod/w.bin")
        for offset in range(0, SIZE, 1 << 19):
            got = mount.call(touching.read_outcome, file, offset, 4_096)
            assert got in ("EIO", ramp(SIZE)[offset : offset + 4_096]), offset
        for offset, is_right in ((0, True), ((3 << 20) + 8_192, False), ((6 << 20) + 8_192, False), (8 << 20, True)):
            got = mount.call(touching.read_outcome, file, offset, 4_096)
            assert got == (ramp(4_096, offset) if is_right else "EIO"), offset
        for chunk, word in ((chunks[1], "other bytes"), (chunks[3], "fsck")):
            line = next(line for line in mount.log.splitlines() if chunk.name[:12] in line)
            assert f"llama@sha256:{pushed[:12]}/w.bin" in line
            assert word in line

    def test_a_manifest_that_was_changed_keeps_the_old_tree(self, registry: Registry, mounted: Mounted) -> None:
        registry.push("llama", "prod", {"w": b"old"})
        mount = mounted(registry.url)
        assert read(mount, "llama/prod/w") == b"old"
        pushed = registry.push("llama", "prod", {"w": b"new"})
        path = registry.root / layout.manifest_key("llama", pushed)
        body = path.read_bytes()
        overwrite(path, body.replace(b'"w"', b'"x"'))
        [error] = mount.client.refresh()["errors"]
        assert pushed[:12] in error
        assert "fsck" in error
        assert read(mount, "llama/prod/w") == b"old"
        overwrite(path, body)
        refreshed(mount)
        assert mount.wait_for(lambda: read(mount, "llama/prod/w") == b"new")


def family(seed: int, *, changed: Mapping[int, int]) -> bytes:
    """A model of 12 tensors of 1 MiB and some; changed: by number, what those of its own are made of."""
    size = (1 << 20) + 4_096
    return b"".join(random.Random(changed.get(number, seed * 100 + number)).randbytes(size) for number in range(12))


class TestSharing:
    CUTS = tuple(range((1 << 20) + 4_096, 12 * ((1 << 20) + 4_096), (1 << 20) + 4_096))

    def test_equal_content_is_fetched_and_kept_once(self, registry: Registry, mounted: Mounted) -> None:
        content = os.urandom(SIZE)
        registry.push("llama", "v7", {"w.bin": content})
        registry.push("llama", "prod", {"w.bin": content})
        registry.push("phi", "v1", {"other-name.bin": content})
        mount = mounted(registry.url)
        assert read(mount, "llama/v7/w.bin") == content
        mount.wait_saved("llama/v7/w.bin")
        used, fetched = mount.client.status()["ssd"]["used_bytes"], mount.origin_bytes
        assert read(mount, "llama/prod/w.bin") == read(mount, "phi/v1/other-name.bin") == content
        mount.wait_quiet(prefetch=False)
        assert mount.origin_bytes == fetched
        assert mount.client.status()["ssd"]["used_bytes"] == used

    def test_what_another_models_file_has_is_copied_from_there(self, registry: Registry, mounted: Mounted) -> None:
        base, tune = family(1, changed={}), family(1, changed={3: 31, 7: 71})
        registry.push("base", "v1", {"w.bin": base}, cuts={"w.bin": self.CUTS})
        registry.push("tune", "v1", {"x/w.bin": b"head" * 999 + tune},
                      cuts={"x/w.bin": [3_996, *(3_996 + cut for cut in self.CUTS)]})  # fmt: skip
        mount = mounted(registry.url)
        assert read(mount, "base/v1/w.bin") == base
        mount.wait_saved("base/v1/w.bin")
        fetched = mount.origin_bytes
        assert read(mount, "tune/v1/x/w.bin") == b"head" * 999 + tune
        mount.wait_quiet(prefetch=False)
        own = 3_996 + 2 * len(tune) // 12
        assert own <= mount.origin_bytes - fetched < 1.1 * own + 300_000
        origin = mount.client.status()["origin"]
        assert origin["shared_bytes"] >= len(tune) - own - 300_000

    def test_without_an_ssd_tier_everything_is_fetched(self, registry: Registry, mounted: Mounted) -> None:
        base, tune = family(1, changed={}), family(1, changed={3: 31})
        registry.push("base", "v1", {"w.bin": base}, cuts={"w.bin": self.CUTS})
        registry.push("tune", "v1", {"w.bin": tune}, cuts={"w.bin": self.CUTS})
        mount = mounted(registry.url, cache_dir=None)
        assert read(mount, "base/v1/w.bin") == base
        assert read(mount, "tune/v1/w.bin") == tune
        assert mount.client.status()["origin"]["shared_bytes"] == 0


class TestOnTheWeb:
    """Over servers that are pushed to from behind."""

    def test_a_second_fine_tune_moves_only_what_differs(
        self, nginx: NginxServer, mounted: Mounted, tmp_path: Path
    ) -> None:
        """Counted at the origin, in bodies of answers: tables, manifests and listings too."""
        folder = nginx.files / uuid.uuid4().hex
        registry = Registry(folder)
        cuts = {"w.bin": TestSharing.CUTS}
        base, tune = family(1, changed={}), family(1, changed={3: 31, 7: 71})
        registry.push("base", "v1", {"w.bin": base}, cuts=cuts)
        registry.push("tune", "v1", {"w.bin": tune}, cuts=cuts)
        mount = mounted(f"mfs+{nginx.url}{folder.name}")
        assert read(mount, "base/v1/w.bin") == base
        mount.wait_saved("base/v1/w.bin")
        nginx.forget_requests()
        assert read(mount, "tune/v1/w.bin") == tune
        mount.wait_quiet(prefetch=False)
        sent = sum(request.sent_bytes for request in nginx.requests() if folder.name in request.path)
        own = 2 * len(tune) // 12
        assert own <= sent < 1.1 * own + 300_000

    def test_a_difference_to_what_the_node_has_costs_no_more_than_itself(
        self, nginx: NginxServer, mounted: Mounted
    ) -> None:
        folder = nginx.files / uuid.uuid4().hex
        registry = Registry(folder)
        noise = np.random.default_rng(5).standard_normal(3 << 20).astype("<f4")
        base = (noise.view("<u4") >> 16).astype("<u2")
        tune = base + np.random.default_rng(6).integers(0, 2, len(base), np.uint16)
        plains = [base.tobytes(), tune.tobytes()]
        registry.push("base", "v1", {"w.bin": plains[0]}, chunk_bytes=2 << 20)
        registry.push("tune", "v1", {"w.bin": plains[1]}, chunk_bytes=2 << 20, element_bytes=2, base=plains[0])
        stored = sum(path.stat().st_size for path in registry.chunks(registry.meant("tune", "v1"), "tune"))
        assert stored < 0.4 * len(plains[1])
        mount = mounted(f"mfs+{nginx.url}{folder.name}")
        assert read(mount, "base/v1/w.bin") == plains[0]
        mount.wait_saved("base/v1/w.bin")
        nginx.forget_requests()
        assert read(mount, "tune/v1/w.bin") == plains[1]
        mount.wait_quiet(prefetch=False)
        sent = sum(request.sent_bytes for request in nginx.requests() if "/chunks/" in request.path)
        assert sent < 1.15 * stored + 300_000

    def test_a_server_that_lies_gives_errors_and_never_a_wrong_byte(self, liar: LiarServer, mounted: Mounted) -> None:
        lies = (Lie.WRONG_BYTES, Lie.OTHER_RANGE, Lie.TRUNCATED, Lie.GROWN, Lie.IGNORES_RANGE)
        files = {f"w{number}.bin": ramp(SIZE, 7 * number) for number in range(len(lies))}
        Registry(liar.files / "reg").push("llama", "v1", files, chunk_bytes=4 << 20)
        mount = mounted(f"mfs+{liar.url}reg", timeout_s=2.0)
        mount.alarms_expected.append(r"w\d.bin")
        mount.call(touching.tree, str(mount.path))
        for lie, (name, content) in zip(lies, files.items(), strict=True):
            path = str(mount.path / "llama/v1" / name)
            liar.lie(lie, pattern="*/chunks/*", count=3, after_bytes=5_000)
            for offset in range(0, SIZE, 3 << 20):
                got = mount.call(touching.read_outcome, path, offset, 4_096)
                assert got in ("EIO", content[offset : offset + 4_096]), (lie, offset)
            assert liar.lies_told, lie
            liar.tell_truth()
            assert mount.wait_for(lambda path=path: mount.call(touching.read_failure, path) == "")
            assert read(mount, f"llama/v1/{name}") == content, lie

    def test_a_store_that_stalls_costs_a_reader_his_time_and_no_more(self, liar: LiarServer, mounted: Mounted) -> None:
        content = ramp(SIZE)
        Registry(liar.files / "reg").push("llama", "v1", {"w.bin": content, "small": b"s"}, chunk_bytes=4 << 20)
        mount = mounted(f"mfs+{liar.url}reg", timeout_s=2.0)
        path = str(mount.path / "llama/v1/w.bin")
        assert read(mount, "llama/v1/small") == b"s"
        liar.lie(Lie.SILENCE, pattern="*/chunks/*")
        assert mount.call(touching.read_outcome, path, 5 << 20, 4_096) == "EIO"
        assert read(mount, "llama/v1/small") == b"s"
        liar.tell_truth()
        assert mount.wait_for(lambda: mount.call(touching.read_failure, path) == "")
        assert read(mount, "llama/v1/w.bin") == content
