"""What others push, as they push it, and what strangers would: files, or one clear line of what is not."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import random
import tarfile
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mfs.errors import (
    AccessError,
    ChangedError,
    IntegrityError,
    MfsError,
    NotFoundError,
    StoreError,
    TransientStoreError,
)
from mfs.oci import artifact, unpacked
from mfs.sources import SourceOptions, open_source
from mfs.sources.base import Source
from mfs.testing import ramp
from mfs.testing.suite import deadline, list_tree, object_of, read
from mfs.types import EntryKind
from tests.oci.artifacts import INDEX, MANIFEST, MODEL, RAW, Repository, digest_of, packed, tar_of
from tests.servers.docker_registry import DockerRegistry

DOCKER = "application/vnd.docker.ai"


def contents(repository: Repository, tag: str = ":v1", **options: Any) -> dict[str, bytes]:
    source = open_source(f"{repository.url}{tag}", SourceOptions(**options))
    try:
        return {path: read(source, object_of(source, path, entry)) for path, entry in list_tree(source).items()
                if entry.kind is EntryKind.FILE}  # fmt: skip
    finally:
        source.close()


def failure(repository: Repository, tag: str = ":v1") -> MfsError:
    source = open_source(f"{repository.url}{tag}")
    try:
        with pytest.raises(MfsError) as caught:
            list(source.list("", deadline_s=deadline(5)))
    finally:
        source.close()
    assert "\n" not in str(caught.value)
    return caught.value


class TestFormats:
    def test_modelpack_states_digests_and_times(self, repository: Repository) -> None:
        repository.manifest([repository.file("a/w.bin", ramp(1000)), repository.file("./b.json", b"{}")])
        source = open_source(f"{repository.url}:v1")
        found = list_tree(source)
        assert set(found) == {"a", "a/w.bin", "b.json"}
        entry = found["a/w.bin"]
        assert (entry.digest, entry.version) == (digest_of(ramp(1000)),) * 2
        assert entry.mtime_ns == 1_777_863_721 * 10**9
        assert source.identity == repository.url
        source.close()

    def test_older_annotations_and_media_types(self, repository: Repository) -> None:
        old = "application/vnd.cnai.model"
        repository.manifest(
            [repository.file("w.bin", b"123", f"{old}.weight.v1.raw", legacy=True),
             repository.layer(tar_of({"x/doc.md": b"#"}), f"{old}.layer.v1.tar", **{"org.cnai.model.filepath": "doc"})],
            config_type=f"{old}.config.v1+json", artifact_type=f"{old}.manifest.v1+json",
        )  # fmt: skip
        assert contents(repository) == {"w.bin": b"123", "x/doc.md": b"#"}

    def test_dockers_models_without_names_and_with_them(self, repository: Repository) -> None:
        kinds = ["gguf.v3", "license", "chat.template.jinja", "mmproj", "safetensors", "safetensors"]
        layers = [repository.layer(b"%d" % number, f"{DOCKER}.{kind}") for number, kind in enumerate(kinds)]
        layers.append(repository.layer(tar_of({"config.json": b"{}"}), f"{DOCKER}.vllm.config.tar"))
        layers.append(repository.layer(b"!", f"{DOCKER}.unheard.of"))
        repository.manifest(layers, config_type=f"{DOCKER}.model.config.v0.1+json", artifact_type="")
        assert contents(repository) == {
            "model.gguf": b"0", "LICENSE": b"1", "template.jinja": b"2", "model.mmproj": b"3",
            "model-00001-of-00002.safetensors": b"4", "model-00002-of-00002.safetensors": b"5", "config.json": b"{}",
        }  # fmt: skip
        layer = repository.layer(b"5", f"{DOCKER}.model.file", **{"org.cncf.model.filepath": "text_encoder/c.json"})
        repository.manifest([layer], "v2", config_type=f"{DOCKER}.model.config.v0.2+json", artifact_type="")
        assert contents(repository, ":v2") == {"text_encoder/c.json": b"5"}
        repository.manifest(
            [repository.layer(b"6", f"{MODEL}.weight.v1.gguf", **{"org.cncf.model.filepath": "m.gguf"})]
        )
        assert contents(repository) == {"m.gguf": b"6"}

    def test_tar_and_raw_layers_side_by_side(self, repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
        link = tarfile.TarInfo("to-config")
        link.type, link.linkname = tarfile.SYMTYPE, "deep/config.json"
        twin, gone, out = tarfile.TarInfo("twin"), tarfile.TarInfo("gone"), tarfile.TarInfo("out")
        twin.type, twin.linkname = tarfile.LNKTYPE, "deep/config.json"
        gone.type, gone.linkname = tarfile.SYMTYPE, "nowhere"
        out.type, out.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        config = tarfile.TarInfo("deep/config.json")
        config.size = 2
        repository.manifest([
            repository.file("w.bin", b"raw"),
            repository.layer(tar_of([(config, b"{}"), link, twin, gone, out]), f"{MODEL}.weight.config.v1.tar"),
            repository.layer(packed(tar_of({"z.txt": b"zstd"}), "zstd"), f"{MODEL}.doc.v1.tar+zstd"),
        ])  # fmt: skip
        with caplog.at_level(logging.WARNING):
            assert contents(repository) == {
                "w.bin": b"raw", "deep/config.json": b"{}", "twin": b"{}", "z.txt": b"zstd"}  # fmt: skip
        assert "left out 2 names" in caplog.text
        assert "is compressed (zstd): it is unpacked whole" in caplog.text
        source = open_source(f"{repository.url}:v1")
        assert list_tree(source)["to-config"].version == "deep/config.json"
        source.close()

    def test_links_through_links_are_followed_inside(
        self, repository: Repository, caplog: pytest.LogCaptureFixture
    ) -> None:
        def link(path: str, target: str) -> tarfile.TarInfo:
            info = tarfile.TarInfo(path)
            info.type, info.linkname = tarfile.SYMTYPE, target
            return info

        good = {"current": "versions/1", "deep": "current/up", "versions/1/up": "../1/w", "w": "current/w",
                "folder": "current"}  # fmt: skip
        bad = {"out": "../x", "to-out": "out", "through-out": "out/passwd", "round": "about", "about": "round",
               "below-a-file": "versions/1/w/x"}  # fmt: skip
        file = tarfile.TarInfo("versions/1/w")
        file.size = 1
        members = [link(path, target) for path, target in {**good, **bad}.items()]
        repository.manifest([repository.layer(tar_of([(file, b"1"), *members]), f"{MODEL}.weight.v1.tar")])
        source = open_source(f"{repository.url}:v1")
        found = list_tree(source)
        source.close()
        assert {path for path, entry in found.items() if entry.kind is EntryKind.SYMLINK} == set(good)
        assert f"left out {len(bad)} names" in caplog.text

    @pytest.mark.parametrize("suffix", ["raw+xz", "tar+xz", "raw+encrypted", "tar+gzip+encrypted", "raw+gzip"])
    def test_what_is_packed_in_an_unknown_way_is_left_out(
        self, repository: Repository, suffix: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        layer = repository.layer(b"1", f"{MODEL}.weight.v1.{suffix}", **{"org.cncf.model.filepath": "w.bin"})
        repository.manifest([layer, repository.file("x", b"1")])
        assert contents(repository) == {"x": b"1"}
        assert "in a way that is not known" in caplog.text
        repository.manifest([layer], "v2")
        assert "in a way that is not known" in str(failure(repository, ":v2"))
        titled = repository.layer(b"1", f"x/y.{suffix}", **{"org.opencontainers.image.title": "as-it-is"})
        repository.manifest([titled], "v3")
        assert contents(repository, ":v3") == {"as-it-is": b"1"}

    def test_a_model_of_an_index_comes_first_by_its_older_type_too(self) -> None:
        entries = [{"digest": "sha256:" + "1" * 64, "size": 1, "platform": {"os": "linux", "architecture": "amd64"}},
                   {"digest": "sha256:" + "2" * 64, "size": 1,
                    "artifactType": "application/vnd.cnai.model.manifest.v1+json"}]  # fmt: skip
        found = artifact.parse_document(json.dumps({"schemaVersion": 2, "manifests": entries}).encode(), "x")
        assert isinstance(found, artifact.Index)
        assert artifact.choose(found, "x").digest == "sha256:" + "2" * 64

    @pytest.mark.parametrize("media_type", ["application/vnd.oci.image.layer.v1.tar+gzip",
                                            "application/vnd.docker.image.rootfs.diff.tar.gzip",
                                            "application/vnd.oci.image.layer.v1.tar"])  # fmt: skip
    def test_a_modelcar_shows_what_its_layers_make_together(self, repository: Repository, media_type: str) -> None:
        layers = [
            tar_of(
                {"etc/passwd": b"root", "models/a": b"1", "models/b/x": b"2", "models/b/y": b"3", "models/c/z": b"4"}
            ),
            tar_of({"models/.wh.a": b"", "models/b/.wh..wh..opq": b"", "models/b/new": b"5"}),
            tar_of({"./models/d": b"6", "models/.wh.c": b"", "models/c": b"a file now", ".wh.etc": b""}),
        ]
        how = "gzip" if media_type.endswith("gzip") else ""
        repository.image([packed(layer, how) if how else layer for layer in layers], media_type=media_type)
        assert contents(repository) == {"b/new": b"5", "d": b"6", "c": b"a file now"}

    def test_an_index_gives_what_fits_this_machine(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entries = []
        for architecture in ("amd64", "arm64", "s390x"):
            digest = repository.image([tar_of({f"models/{architecture}": b"1"})], "", architecture=architecture)
            size = len(repository.request("GET", f"{repository.api}/manifests/{digest}",
                                          headers={"Accept": MANIFEST}).content)  # fmt: skip
            entries.append({"mediaType": MANIFEST, "digest": digest, "size": size,
                            "platform": {"os": "linux", "architecture": architecture}})  # fmt: skip
        body = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
        repository.put_manifest(body, "v1", INDEX)
        for machine, expected in (("aarch64", "arm64"), ("x86_64", "amd64"), ("s390x", "s390x"), ("mips", "amd64")):
            monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
            assert contents(repository) == {expected: b"1"}

    def test_without_a_tag_the_tags_are_directories(self, registry: DockerRegistry, repository: Repository) -> None:
        for number in range(5):
            repository.manifest([repository.file("d/w.bin", b"%d" % number)], f"v{number}")
        repository.manifest([repository.file("hidden", b"")], f"sha256-{'0' * 64}")
        assert contents(repository, "") == {f"v{number}/d/w.bin": b"%d" % number for number in range(5)}
        source = open_source(repository.url)
        assert dict(source.list("v3/d", deadline_s=deadline())).keys() == {"v3/d"}
        for missing in ("v9", "v3/nowhere", "not a tag"):
            with pytest.raises(NotFoundError):
                list(source.list(missing, deadline_s=deadline()))
        source.close()


class TestVersions:
    def test_a_moved_tag_shows_with_the_next_listing_for_one_head(
        self, registry: DockerRegistry, repository: Repository
    ) -> None:
        repository.manifest([repository.file("w.bin", ramp(1000))])
        source = open_source(f"{repository.url}:v1")
        old = object_of(source, "w.bin", list_tree(source)["w.bin"])
        before = len(registry.requests())
        list_tree(source)
        assert _of(registry, repository, before) == [f"HEAD /v2/{repository.name}/manifests/v1"]
        repository.manifest([repository.file("w.bin", ramp(1000, 5))])
        new = object_of(source, "w.bin", list_tree(source)["w.bin"])
        assert (read(source, old), read(source, new)) == (ramp(1000), ramp(1000, 5))
        source.close()

    def test_by_digest_it_stays(self, repository: Repository) -> None:
        digest = repository.manifest([repository.file("w.bin", b"1")])
        repository.manifest([repository.file("w.bin", b"2")])
        assert contents(repository, f"@{digest}") == {"w.bin": b"1"}
        assert contents(repository, f":v1@{digest}") == {"w.bin": b"1"}

    def test_a_layer_is_one_object_in_all_repositories_of_its_registry(self, registry: DockerRegistry) -> None:
        found = []
        for _ in range(2):
            repository = Repository(registry)
            repository.manifest([repository.file("w.bin", ramp(1000))])
            source = open_source(f"{repository.url}:v1")
            found.append(object_of(source, "w.bin", list_tree(source)["w.bin"]))
            source.close()
            repository.close()
        assert found[0].source != found[1].source
        assert found[0].cache_id == found[1].cache_id
        elsewhere = dataclasses.replace(found[0], source="oci://other.example/team/m")
        assert elsewhere.cache_id != found[0].cache_id

    def test_reads_cost_one_request_each(self, registry: DockerRegistry, repository: Repository) -> None:
        repository.manifest([repository.file("w.bin", ramp(100_000))])
        source = open_source(f"{repository.url}:v1")
        before = len(registry.requests())
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        assert b"".join(read(source, obj, at, at + 10_000) for at in range(0, 100_000, 10_000)) == ramp(100_000)
        assert len(_of(registry, repository, before)) == 1 + 10
        source.close()


def _led_to(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except FileNotFoundError:
        return ""


def _of(registry: DockerRegistry, repository: Repository, first: int) -> list[str]:
    return [line for line in registry.requests()[first:] if repository.name in line]


class TestStrangers:
    """One bad entry costs itself; what cannot be believed at all is one clear line."""

    def test_paths_that_lead_out_or_clash(self, repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
        bad = ["/etc/passwd", "../up", "a/../../up", "a//b", "nul\0", "esc\x1b[2J", "x" * 300, "d/" * 600 + "x"]
        good = repository.file("good/w.bin", b"1")
        layers = [repository.file(path, b"%d" % number) for number, path in enumerate(bad)]
        layers += [
            good,
            repository.file("good", b"clash"),
            repository.file("twice", b"1"),
            repository.file("twice", b"2"),
        ]
        repository.manifest(layers)
        with caplog.at_level(logging.WARNING):
            assert contents(repository) == {"good/w.bin": b"1", "twice": b"2"}
        assert f"left out {len(bad)} names" in caplog.text
        assert "\x1b" not in caplog.text.replace("\\x1b", "")

    def test_paths_in_tars_too(self, repository: Repository) -> None:
        body = tar_of({"../up": b"1", "a/../../up": b"2", "/abs": b"3", "ok": b"4", "d/" * 600 + "x": b"5"})
        repository.manifest([repository.layer(body, f"{MODEL}.weight.v1.tar")])
        assert contents(repository) == {"abs": b"3", "ok": b"4"}

    def test_a_tar_that_is_none_costs_itself(self, repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
        layers = [repository.layer(ramp(5000), f"{MODEL}.weight.v1.tar"),
                  repository.layer(ramp(5000), f"{MODEL}.code.v1.tar+gzip"),
                  repository.file("w.bin", b"1")]  # fmt: skip
        repository.manifest(layers[:2], "v2")
        assert "nothing of it can be shown: left out 2 names" in str(failure(repository, ":v2"))
        repository.manifest(layers)
        assert contents(repository) == {"w.bin": b"1"}
        assert "no tar" in caplog.text
        assert "cannot be unpacked" in caplog.text

    def test_a_layer_that_cannot_be_had_now_fails_the_listing_and_hides_nothing(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repository.manifest([repository.layer(tar_of({"a": b"1"}), f"{MODEL}.weight.v1.tar"),
                             repository.file("w.bin", b"1")])  # fmt: skip

        for error in (AccessError, NotFoundError, ChangedError, IntegrityError, StoreError):

            def refuse(*_: Any, error: type[MfsError] = error, **__: Any) -> None:
                raise error("token expired, or whatever")

            with monkeypatch.context() as patched:
                patched.setattr("mfs.oci.client.RegistryClient.read_blob", refuse)
                assert type(failure(repository)) is error
        assert contents(repository) == {"a": b"1", "w.bin": b"1"}

    def test_an_image_with_a_layer_that_cannot_be_read_is_not_shown(self, repository: Repository) -> None:
        repository.image([tar_of({"models/a": b"1"}), ramp(2000)])
        assert "no tar" in str(failure(repository))
        repository.image([tar_of({"app/run": b"1"})])
        assert "without /models" in str(failure(repository))

    def test_what_is_no_model_says_so(self, repository: Repository) -> None:
        repository.manifest([])
        assert "without layers" in str(failure(repository))

    @pytest.mark.parametrize(
        "body",
        [b"", b"[]", b"{}", b'{"schemaVersion": 1}', b'{"schemaVersion": 2}', b"\xff\xfe", b"[" * 100_000,
         b'{"schemaVersion": 2, "layers": {}}', b'{"schemaVersion": 2, "manifests": 7}',
         b'{"schemaVersion": 2, "manifests": []}', b'{"schemaVersion": 2, "manifests": [], "layers": []}',
         b'{"schemaVersion": 2, "layers": [' + b"{}," * 1_900_000 + b"{}]}",
         b'{"schemaVersion": 2, "layers": [' + b"1," * 60_000 + b"1]}", b'{"schemaVersion": 9' + b"9" * 5000 + b"}"],
    )  # fmt: skip
    def test_what_is_no_manifest(self, body: bytes) -> None:
        with pytest.raises(StoreError) as caught:
            _read(body)
        assert str(caught.value).startswith("oci://x/y:z: ")

    def test_layers_that_are_none_are_left_out(self) -> None:
        zeros = "sha256:" + "0" * 64
        odd: list[Any] = [7, None, {}, {"digest": "md5:1", "size": 1}, {"digest": "../../x", "size": 5}]
        odd += [{"digest": zeros, "size": size} for size in (-1, 1e99, True, "x", None)]
        good = {"mediaType": RAW, "digest": "sha256:" + "1" * 64, "size": 5, "annotations": {"a": 1, "b": "c"}}
        body = json.dumps({"schemaVersion": 2, "config": 7, "layers": [*odd, good]}).encode()
        found = artifact.parse_document(body, "x")
        assert isinstance(found, artifact.Manifest)
        assert (len(found.layers), len(found.faults), found.faults_count) == (1, 3, len(odd))
        assert found.layers[0].annotations == {"b": "c"}

    def test_generated_damage_is_an_error_of_ours_or_a_manifest(self) -> None:
        layer = {"mediaType": RAW, "digest": "sha256:" + "1" * 64, "size": 5, "annotations": {"a": "b"}}
        body = json.dumps({"schemaVersion": 2, "config": {"mediaType": "x"}, "layers": [layer] * 3}).encode()
        generator = random.Random(7)
        for _ in range(3000):
            damaged = bytearray(body)
            for _ in range(generator.randrange(1, 6)):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            with contextlib.suppress(StoreError):
                artifact.parse_document(bytes(damaged), "x")

    def test_more_directories_than_any_tree_has(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mfs.sources.bounds.DIRECTORIES_MAX", 50)
        body = tar_of({f"{number}/x": b"" for number in range(60)})
        repository.manifest([repository.layer(body, f"{MODEL}.weight.v1.tar"), repository.file("w.bin", b"1")])
        assert "more than 50 directories" in str(failure(repository))


def _read(body: bytes) -> None:
    found = artifact.parse_document(body, "oci://x/y:z")
    assert isinstance(found, artifact.Index)
    artifact.choose(found, "oci://x/y:z")


class TestChangedInStorage:
    """The registry's own disk lies. Ranges of a layer cannot be checked against the digest of the whole: sizes are, by
    every answer; bytes by `mfs verify`, and of manifests and compressed layers at once."""

    @pytest.fixture
    def listed(self, repository: Repository) -> Any:
        layer = repository.file("w.bin", ramp(100_000))
        digest = repository.manifest([layer])
        source = open_source(f"{repository.url}:v1")
        yield source, layer["digest"], digest
        source.close()

    def test_a_blob_of_another_size(self, registry: DockerRegistry, listed: tuple[Source, str, str]) -> None:
        source, layer, _ = listed
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        for content in (ramp(90_000), ramp(110_000)):
            registry.blob_file(layer).write_bytes(content)
            with pytest.raises(IntegrityError, match=r"w\.bin: not the blob that its digest names"):
                read(source, obj, 0, 1000, deadline_s=deadline(3))
            with pytest.raises(IntegrityError, match=r"w\.bin"):
                read(source, obj, 95_000, 100_000, deadline_s=deadline(3))

    def test_a_blob_that_is_gone(self, registry: DockerRegistry, listed: tuple[Source, str, str]) -> None:
        source, layer, _ = listed
        obj = object_of(source, "w.bin", list_tree(source)["w.bin"])
        registry.blob_file(layer).unlink()
        with pytest.raises(NotFoundError, match=r"w\.bin: the registry answered 404 BLOB_UNKNOWN"):
            read(source, obj, 0, 1000)

    def test_a_manifest_that_is_another(self, registry: DockerRegistry, listed: tuple[Source, str, str]) -> None:
        source, _, digest = listed
        path = registry.blob_file(digest)
        path.write_bytes(path.read_bytes().replace(b"w.bin", b"v.bin"))
        with pytest.raises(IntegrityError, match="expected bytes of the digest"):
            list(source.list("", deadline_s=deadline(3)))

    def test_a_compressed_layer_of_other_bytes(self, registry: DockerRegistry, repository: Repository) -> None:
        body = packed(tar_of({"w.bin": ramp(100_000)}), "zstd")
        layer = repository.layer(body, f"{MODEL}.weight.v1.tar+zstd")
        repository.manifest([layer, repository.file("other", b"1")])
        other = packed(tar_of({"w.bin": ramp(100_000, 1)}), "zstd")
        registry.blob_file(layer["digest"]).write_bytes(other.ljust(len(body), b"\0")[: len(body)])
        assert contents(repository) == {"other": b"1"}


class TestUnpacked:
    FILES: ClassVar = {"a/w.bin": ramp(3_000_000, 4), "config.json": b"{}"}

    @pytest.fixture
    def packed_repository(self, repository: Repository) -> Repository:
        repository.manifest([self.layer(repository)])
        return repository

    def layer(self, repository: Repository) -> dict[str, Any]:
        return repository.layer(packed(tar_of(self.FILES), "gzip"), f"{MODEL}.weight.v1.tar+gzip")

    def test_is_kept_in_the_cache_for_all(
        self, registry: DockerRegistry, packed_repository: Repository, tmp_path: Path
    ) -> None:
        assert contents(packed_repository, cache_directory=str(tmp_path)) == self.FILES
        [name] = [path.name for path in (tmp_path / "v2/layers").iterdir() if path.suffix == ".tar"]
        assert name.startswith("sha256-")
        before = len(registry.requests())
        assert contents(packed_repository, cache_directory=str(tmp_path)) == self.FILES
        assert not [line for line in _of(registry, packed_repository, before) if "/blobs/" in line]

    def test_the_longest_unused_makes_room(
        self, packed_repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(unpacked, "LAYERS_BYTES_MAX", 4_000_000)
        folder = tmp_path / "v2/layers"
        folder.mkdir(mode=0o700, parents=True)
        (folder / "sha256-old.tar").write_bytes(bytes(2_000_000))
        assert contents(packed_repository, cache_directory=str(tmp_path)) == self.FILES
        assert not (folder / "sha256-old.tar").exists()

    def test_what_is_larger_than_allowed_is_left_out(
        self, packed_repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(unpacked, "MEMORY_BYTES_MAX", 1_000_000)
        monkeypatch.setattr(unpacked, "LAYERS_BYTES_MAX", 2_000_000)
        packed_repository.manifest([self.layer(packed_repository), packed_repository.file("other", b"1")])
        for cache in ("", str(tmp_path)):
            assert contents(packed_repository, cache_directory=cache) == {"other": b"1"}
        assert "more than 1000000 bytes when unpacked; with --cache-dir larger ones can be" in caplog.text
        assert "more than 2000000 bytes when unpacked" in caplog.text
        assert not [path for path in (tmp_path / "v2/layers").iterdir() if path.suffix != ".lock"]

    def test_what_is_known_to_be_bad_is_fetched_once(
        self, registry: DockerRegistry, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = repository.layer(ramp(5000), f"{MODEL}.weight.v1.tar+gzip")
        large = repository.layer(packed(tar_of({"w": bytes(3_000_000)}), "gzip"), f"{MODEL}.weight.v1.tar+gzip")
        larger = repository.layer(random.Random(1).randbytes(2_000_001), f"{MODEL}.weight.v1.tar+gzip")
        repository.manifest([bad, large, larger, repository.file("w.bin", b"1")])
        monkeypatch.setattr(unpacked, "LAYERS_BYTES_MAX", 2_000_000)
        monkeypatch.setattr(unpacked, "MEMORY_BYTES_MAX", 2_000_000)
        for cache in ("", str(tmp_path)):
            source = open_source(f"{repository.url}:v1", SourceOptions(cache_directory=cache))
            before = len(registry.requests())
            for _ in range(3):
                assert list_tree(source).keys() == {"w.bin"}
            asked = [line for line in _of(registry, repository, before) if "/blobs/" in line]
            assert [len([line for line in asked if layer["digest"] in line]) for layer in (bad, large, larger)] == [
                1, 1, 0]  # fmt: skip
            source.close()

    def test_a_layer_of_other_bytes_is_fetched_again(self, registry: DockerRegistry, repository: Repository) -> None:
        body = packed(tar_of({"w.bin": b"1"}), "gzip")
        layer = repository.layer(body, f"{MODEL}.weight.v1.tar+gzip")
        repository.manifest([layer, repository.file("other", b"1")])
        registry.blob_file(layer["digest"]).write_bytes(bytes(len(body)))
        source = open_source(f"{repository.url}:v1")
        assert list_tree(source).keys() == {"other"}
        registry.blob_file(layer["digest"]).write_bytes(body)
        assert list_tree(source).keys() == {"other", "w.bin"}
        source.close()

    def test_what_a_killed_one_left_is_removed_and_what_is_unpacked_counts(
        self, packed_repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(unpacked, "LAYERS_BYTES_MAX", 4_000_000)
        folder = tmp_path / "v2/layers"
        folder.mkdir(mode=0o700, parents=True)
        left, lives = folder / "sha256-left.tmp", folder / "sha256-lives.tmp"
        left.write_bytes(bytes(4_000_000))
        with lives.open("wb") as file:
            file.truncate(2_000_000)
            fcntl.flock(file, fcntl.LOCK_EX)
            source = open_source(f"{packed_repository.url}:v1", SourceOptions(cache_directory=str(tmp_path)))
            with pytest.raises(TransientStoreError, match="are being unpacked into"):
                list(source.list("", deadline_s=deadline(10)))
            assert {path.name for path in folder.iterdir()} == {"room.lock", lives.name}
        assert set(list_tree(source)) >= set(self.FILES)
        assert not lives.exists()
        source.close()

    def test_a_layer_that_was_removed_gives_its_room_back(self, packed_repository: Repository, tmp_path: Path) -> None:
        source = open_source(f"{packed_repository.url}:v1", SourceOptions(cache_directory=str(tmp_path)))
        obj = object_of(source, "a/w.bin", list_tree(source)["a/w.bin"])
        for path in (tmp_path / "v2/layers").glob("*.tar"):
            path.unlink()
        assert not [link for fd in Path("/proc/self/fd").iterdir() if str(tmp_path) in (link := _led_to(fd))]
        assert read(source, obj) == self.FILES["a/w.bin"]
        source.close()

    def test_one_that_takes_longer_than_the_listing_goes_on(
        self, packed_repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go = threading.Event()
        following = unpacked._LayerStream._next

        def slow(stream: Any) -> bool:
            assert go.wait(60)
            return following(stream)

        monkeypatch.setattr(unpacked._LayerStream, "_next", slow)
        source = open_source(f"{packed_repository.url}:v1", SourceOptions(cache_directory=str(tmp_path)))
        with pytest.raises(TransientStoreError, match=r"still being unpacked \(0 %\)"):
            list(source.list("", deadline_s=deadline(0.3)))
        go.set()
        found = list_tree(source)
        assert read(source, object_of(source, "config.json", found["config.json"])) == b"{}"
        source.close()


def test_what_is_not_there_is_named(registry: DockerRegistry, repository: Repository) -> None:
    assert isinstance(failure(repository), NotFoundError | AccessError)
    repository.manifest([repository.file("w.bin", b"1")])
    error = failure(repository, ":v9")
    assert isinstance(error, NotFoundError)
    assert f"{repository.name}:v9" in str(error)
