"""What names bytes in the SSD cache: content where a source can vouch for it, the place otherwise."""

from __future__ import annotations

import pytest

from mfs.types import ObjectId

DIGEST = "sha256:" + "1" * 64
HUB = "https://hub.example"


def cache_id(source: str, path: str = "m/w.safetensors", digest: str | None = DIGEST) -> str:
    return ObjectId(source, path, 100, "v1", digest).cache_id


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("hf://org/a", "hf://other/b"),
        ("hf://org/a", "hf://org/a#hub-cache"),
        (f"hf://org/a@{HUB}", f"hf://other/b@{HUB}#hub-cache"),
    ],
)
def test_a_hub_names_equal_bytes_of_all_its_repositories_alike(one: str, other: str) -> None:
    assert cache_id(one) == cache_id(other, "snapshots/1/renamed.safetensors")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://a.example/models", "https://b.example/models"),
        ("https://a.example/models", "hf://org/a"),
        ("hf://org/a", f"hf://org/a@{HUB}"),
    ],
)
def test_what_one_source_states_of_its_bytes_names_no_others(one: str, other: str) -> None:
    assert cache_id(one) != cache_id(other)


def test_one_web_folder_holds_equal_files_once() -> None:
    assert cache_id("https://a.example/models", "a/w.bin") == cache_id("https://a.example/models", "b/w.bin")


def test_without_a_digest_the_place_is_the_name() -> None:
    assert cache_id("hf://org/a", "a/config.json", None) != cache_id("hf://org/a", "b/config.json", None)
