"""A registry as a source: the suite on a folder and on S3, and what addresses show."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs.errors import IntegrityError, NotFoundError, StoreError, UsageError
from mfs.registry import layout
from mfs.sources import SourceOptions, open_source
from mfs.sources.base import Source
from mfs.testing import ramp
from mfs.testing.suite import SourceSuite, deadline, list_tree, object_of, read
from mfs.types import EntryKind, ObjectId
from tests.registry import made
from tests.registry.places import FolderPlace, S3Place
from tests.servers.nginx import NginxServer
from tests.servers.swift import SwiftServer


class Tag:
    """One tag of a model of its own, whose revision changes with every file."""

    def __init__(self, registry: made.Registry, url: str, options: SourceOptions | None = None) -> None:
        self.registry = registry
        self.model = f"m{uuid.uuid4().hex[:8]}"
        self.url = f"{url}/{self.model}:prod"
        self.options = options
        self.files: dict[str, bytes] = {}
        self._push()

    def source(self) -> Source:
        return open_source(self.url, self.options)

    def put(self, path: str, content: bytes) -> None:
        self.files[path] = content
        self._push()

    def delete(self, path: str) -> None:
        del self.files[path]
        self._push()

    def _push(self) -> None:
        self.registry.push(self.model, "prod", self.files)


class TestOnAFolder(SourceSuite):
    keeps_old_versions = True

    @pytest.fixture
    def origin(self, tmp_path: Path) -> Tag:
        place = FolderPlace(tmp_path / "registry")
        return Tag(made.Registry(place.store()), place.url)


@pytest.fixture(scope="module")
def on_s3(swift: SwiftServer) -> Iterator[tuple[made.Registry, S3Place]]:
    """One for all: making clients takes longer than the tests."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    swift.client().create_bucket(Bucket=bucket)
    with pytest.MonkeyPatch.context() as patch:
        place = S3Place(swift, bucket, patch)
        registry = made.Registry(place.store())
        yield registry, place
        registry.store.close()
        place.close()
    swift.remove_bucket(bucket)


class TestOnS3(SourceSuite):
    keeps_old_versions = True

    @pytest.fixture
    def origin(self, swift: SwiftServer, on_s3: tuple[made.Registry, S3Place], monkeypatch: pytest.MonkeyPatch) -> Tag:
        for name, value in swift.environ().items():
            monkeypatch.setenv(name, value)
        registry, place = on_s3
        return Tag(registry, place.url, place.options)


class TestOnTheWeb(SourceSuite):
    keeps_old_versions = True

    @pytest.fixture
    def origin(self, nginx: NginxServer) -> Tag:
        folder = nginx.files / uuid.uuid4().hex
        return Tag(made.Registry(FolderPlace(folder).store()), f"mfs+{nginx.url}{folder.name}")


class Shown:
    """A registry in a folder, and sources of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.registry = made.Registry(FolderPlace(root).store())
        self.sources: list[Source] = []

    def __call__(self, below: str = "") -> Source:
        self.sources.append(open_source(f"mfs+file://{self.root}{below}"))
        return self.sources[-1]


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    made_here = Shown(tmp_path / "registry")
    yield made_here
    for source in made_here.sources:
        source.close()


def names(source: Source, path: str = "") -> list[str]:
    pages = dict(source.list(path, deadline_s=deadline()))
    return [entry.name for entry in pages[path]]


def test_a_registry_shows_models_tags_and_files(shown: Shown) -> None:
    files = {"config.json": b"{}", "sub/w.bin": ramp(300_000)}
    pushed = shown.registry.push("llama", "v7", files)
    shown.registry.move("llama", "prod", pushed)
    shown.registry.push("phi", "v1", {"a": b"1"})
    root = shown()
    assert names(root) == ["llama", "phi"]
    assert names(root, "llama") == ["prod", "v7"]
    assert dict(root.list("llama/v7", deadline_s=deadline())).keys() == {"llama/v7", "llama/v7/sub"}
    assert names(root, "llama/v7/sub") == ["w.bin"]
    for source, prefix in (
        (root, "llama/prod/"),
        (shown("/llama"), "v7/"),
        (shown("/llama:prod"), ""),
        (shown(f"/llama@sha256:{pushed}"), ""),
    ):
        found = list_tree(source)
        for path, content in files.items():
            entry = found[prefix + path]
            assert (entry.digest or "").startswith("sha256:")
            assert entry.mtime_ns == 1_795_953_600 * 10**9
            assert read(source, object_of(source, prefix + path, entry)) == content


def test_equal_files_are_one_object_wherever_they_stand(shown: Shown, tmp_path: Path) -> None:
    content = ramp(300_000)
    shown.registry.push("llama", "v7", {"w.bin": content, "other": content[1:]})
    shown.registry.push("phi", "v1", {"sub/x.bin": content})
    mirror = Shown(tmp_path / "mirror")
    mirror.registry.push("copy", "v1", {"y.bin": content})
    found = {}
    for source in (shown(), shown("/llama:v7"), mirror()):
        for path, entry in list_tree(source).items():
            if entry.kind is EntryKind.FILE:
                found.setdefault(object_of(source, path, entry).cache_id, []).append(path)
        source.close()
    assert sorted(map(sorted, found.values())) == [
        ["copy/v1/y.bin", "llama/v7/w.bin", "phi/v1/sub/x.bin", "w.bin"], ["llama/v7/other", "other"]
    ]  # fmt: skip


def test_a_stated_sha256_names_no_bytes_of_others(shown: Shown) -> None:
    """Who may push one model must not decide what another's files are in the caches of its readers."""
    shown.registry.push("honest", "v1", {"w.bin": ramp(5_000)})
    honest = list_tree(shown("/honest:v1"))["w.bin"]
    assert honest.digest is not None
    stated = {"w.bin": honest.digest.removeprefix("sha256:")}
    shown.registry.push("forged", "v1", {"w.bin": ramp(5_000, 99)}, stated=stated)
    forged = list_tree(shown("/forged:v1"))["w.bin"]
    assert (forged.digest, forged.size) == (honest.digest, honest.size)
    objects = [object_of(shown(f"/{m}:v1"), "w.bin", e) for m, e in (("honest", honest), ("forged", forged))]
    assert objects[0].cache_id != objects[1].cache_id


def test_a_tag_that_moves_is_seen_by_the_next_listing_and_back(shown: Shown) -> None:
    old = shown.registry.push("llama", "prod", {"w": b"old"})
    source = shown()
    before = list_tree(source)["llama/prod/w"]
    shown.registry.push("llama", "prod", {"w": b"new!"})
    after = list_tree(source)["llama/prod/w"]
    assert read(source, object_of(source, "llama/prod/w", after)) == b"new!"
    assert read(source, object_of(source, "llama/prod/w", before)) == b"old"
    shown.registry.move("llama", "prod", old)
    assert list_tree(source)["llama/prod/w"] == before


def test_on_the_web_models_cost_one_request_and_those_without_tags_are_empty(nginx: NginxServer) -> None:
    folder = nginx.files / uuid.uuid4().hex
    registry = made.Registry(FolderPlace(folder).store())
    for number in range(5):
        registry.push(f"m{number}", "v1", {"a": b"1"})
        registry.push(f"m{number}", "v2", {"a": b"22"})
    for tag in ("v1", "v2"):
        registry.remove("m3", tag)
    source = open_source(f"mfs+{nginx.url}{folder.name}")
    assert names(source) == [f"m{number}" for number in range(5)]
    nginx.forget_requests()
    assert names(source) == [f"m{number}" for number in range(5)]
    assert len(nginx.requests()) == 1
    assert names(source, "m3") == []
    assert names(source, "m4") == ["v1", "v2"]
    assert read(source, object_of(source, "m4/v2/a", list_tree(source)["m4/v2/a"])) == b"22"
    with pytest.raises(NotFoundError):
        names(source, "m5")
    source.close()


@pytest.mark.parametrize("below", ["/nobody:v1", "/llama:v9", f"/llama@sha256:{'0' * 64}", "/nobody"])
def test_what_is_not_there_is_not_found_and_named(shown: Shown, below: str) -> None:
    shown.registry.push("llama", "v1", {"a": b"1"})
    with pytest.raises(NotFoundError, match=below.strip("/").partition(":")[0].partition("@")[0]):
        list(shown(below).list("", deadline_s=deadline()))


def test_no_directory_of_that_name_in_a_revision(shown: Shown) -> None:
    shown.registry.push("llama", "v1", {"a/b": b"1"})
    for source, path in ((shown(), "llama/v1/b"), (shown("/llama:v1"), "a/c"), (shown(), "llama/v2")):
        with pytest.raises(NotFoundError):
            list(source.list(path, deadline_s=deadline()))


def test_a_manifest_that_was_changed_is_refused_with_its_name(shown: Shown) -> None:
    pushed = shown.registry.push("llama", "v1", {"a": b"1"})
    path = shown.root / layout.manifest_key("llama", pushed)
    body = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(body.replace(b'"a"', b'"b"'))
    with pytest.raises(IntegrityError, match=rf"llama@sha256:{pushed[:12]}.*changed where it lies"):
        list(shown("/llama:v1").list("", deadline_s=deadline()))


def test_a_locator_or_version_that_no_listing_gave_is_an_error(shown: Shown) -> None:
    shown.registry.push("llama", "v1", {"a": b"12345"})
    source = shown("/llama:v1")
    entry = list_tree(source)["a"]
    obj = object_of(source, "a", entry)
    for locator in ("", "llama", "../llama/" + "0" * 64, f"llama/{'0' * 63}"):
        with pytest.raises(StoreError, match="locator"):
            read(source, ObjectId(obj.source, obj.path, obj.size, obj.version, obj.digest, locator))
    with pytest.raises(IntegrityError, match="no such file"):
        read(source, ObjectId(obj.source, obj.path, obj.size, "0" * 64, obj.digest, obj.locator))


def test_an_address_that_is_none_is_a_usage_error() -> None:
    for url in ("mfs+ftp://host/reg", "mfs+file:///reg/llama:", "mfs+file:///reg/llama@sha256:12"):
        with pytest.raises(UsageError):
            open_source(url, SourceOptions())
