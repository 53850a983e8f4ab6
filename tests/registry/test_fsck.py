"""fsck finds and names every missing or damaged object, and what needs it."""

from __future__ import annotations

import os

import pytest

from mfs.registry import layout
from mfs.registry.fsck import Damage, check
from mfs.registry.store import Store
from tests.registry.places import FolderPlace
from tests.registry.revisions import chunk_of, put_chunk, put_revision, put_simple, tag


def damage_of(store: Store, *, data: bool = False) -> Damage:
    (damage,) = check(store, data=data).damages
    return damage


@pytest.mark.parametrize("data", [False, True])
def test_a_registry_as_it_should_be(place: FolderPlace, store: Store, data: bool) -> None:
    tag(store, "llama", "v1", put_simple(place, "llama", {"a": b"a", "b": b"shared", "empty/c": b"c" * 300_000}))
    put_simple(place, "bert", {"b": b"shared"})
    put_chunk(place, b"needed by none")
    checked = check(store, data=data)
    assert checked.damages == []
    assert (checked.revisions_count, checked.chunks_count, checked.unneeded_count) == (2, 3, 1)


def test_a_missing_chunk_is_named_with_all_that_need_it(place: FolderPlace, store: Store) -> None:
    one = put_simple(place, "llama", {"a": b"a", "deep/b": b"shared"})
    other = put_simple(place, "bert", {"b": b"shared", "c": b"c"})
    tag(store, "llama", "v1", one)
    tag(store, "llama", "prod", one)
    (place.root / layout.chunk_key(chunk_of(b"shared"))).unlink()
    damage = damage_of(store)
    assert (damage.key, damage.what) == (layout.chunk_key(chunk_of(b"shared")), "missing")
    assert sorted(damage.revisions) == [
        f"bert@sha256:{other[:12]}", f"llama@sha256:{one[:12]} (llama:prod, llama:v1)",
    ]  # fmt: skip
    assert sorted(damage.files) == [f"bert@sha256:{other[:12]}/b", f"llama@sha256:{one[:12]}/deep/b"]


def test_a_damaged_chunk_is_found_by_its_bytes(place: FolderPlace, store: Store) -> None:
    content = os.urandom(400_000)
    revision = put_simple(place, "llama", {"w": content, "x": b"x"})
    key = layout.chunk_key(chunk_of(content))
    body = bytearray(place.get(key) or b"")
    body[-5] ^= 0x40
    place.put(key, bytes(body))
    assert check(store).damages == []
    damage = damage_of(store, data=True)
    assert damage.key == key
    assert "frame 3" in damage.what
    assert damage.files == [f"llama@sha256:{revision[:12]}/w"]


@pytest.mark.parametrize("nbytes", [0, 10, 200, 399_000])
def test_a_chunk_that_was_cut_short_is_found_without_reading_it(
    place: FolderPlace, store: Store, nbytes: int
) -> None:  # fmt: skip
    content = os.urandom(400_000)
    put_simple(place, "llama", {"w": content})
    key = layout.chunk_key(chunk_of(content))
    place.put(key, (place.get(key) or b"")[:nbytes])
    assert damage_of(store).key == key


def test_what_a_difference_stands_on(place: FolderPlace, store: Store) -> None:
    base = os.urandom(300_000)
    tuned = bytearray(base)
    tuned[100] ^= 1
    on = put_chunk(place, base)
    chunk = put_chunk(place, bytes(tuned), base)
    contents = {"w": bytes(tuned), "x": b"x"}
    files = {"w": [chunk], "x": [put_chunk(place, b"x")]}
    revision = put_revision(place, "llama", files, contents, requires=(on.id,))
    assert check(store, data=True).damages == []
    (place.root / layout.chunk_key(on.id)).unlink()
    damage = damage_of(store)
    assert (damage.key, damage.what) == (layout.chunk_key(on.id), "missing")
    assert damage.files == [f"llama@sha256:{revision[:12]}/w"]
    keys = {damage.key for damage in check(store, data=True).damages}
    assert keys == {layout.chunk_key(on.id), layout.chunk_key(chunk.id)}


def test_manifests_and_tags(place: FolderPlace, store: Store) -> None:
    damaged, missing = put_simple(place, "llama", {"a": b"a"}), "1" * 64
    place.put(layout.manifest_key("llama", damaged), b"{}")
    tag(store, "llama", "v1", damaged)
    tag(store, "llama", "v2", missing)
    place.put(layout.tag_key("llama", "v3", 1), b"damaged")
    found = {damage.key: damage for damage in check(store).damages}
    assert set(found) == {
        layout.manifest_key("llama", damaged), layout.manifest_key("llama", missing), layout.tag_key("llama", "v3", 1),
    }  # fmt: skip
    assert found[layout.manifest_key("llama", missing)].what == "missing"
    assert found[layout.manifest_key("llama", missing)].revisions == ["llama@sha256:111111111111 (llama:v2)"]
    assert "changed where it lies" in found[layout.manifest_key("llama", damaged)].what
