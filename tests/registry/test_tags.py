"""Tags: who moves them, from what to what, and that of many at once nobody's move is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mfs.errors import (
    ChangedError,
    IntegrityError,
    MfsError,
    NotFoundError,
    StoreError,
    TransientStoreError,
    UsageError,
)
from mfs.registry import layout, retag, tags
from mfs.registry.store import Store
from mfs.registry.tags import Tags
from mfs.testing.store_suite import Place, keys
from mfs.testing.suite import deadline
from tests.registry.places import FolderPlace, S3Place
from tests.servers.swift import SwiftServer

V1, V2, V3 = ("1" * 64, "2" * 64, "3" * 64)


def move(store: Store, manifest: str | None, tag: str = "prod", model: str = "llama") -> tags.Move:
    return tags.move(store, model, tag, manifest, how="tag", note="a test", deadline_s=deadline())


def current(store: Store, tag: str = "prod") -> str | None:
    found = tags.current(store, "llama", tag, deadline_s=deadline())
    return found and found.manifest


def meanings(store: Store) -> list[str | None]:
    return [moved.manifest for moved in tags.history(store, "llama", "prod", deadline_s=deadline())]


class TagsSuite:
    @pytest.fixture
    def store(self, place: Place) -> Iterator[Store]:
        store = place.store()
        yield store
        store.close()

    def test_a_move_says_who_when_how_and_from_what(self, store: Store) -> None:
        assert current(store) is None
        move(store, V1)
        move(store, V2)
        assert current(store) == V2
        last, first = tags.history(store, "llama", "prod", deadline_s=deadline())
        assert (last.manifest, last.previous, last.how, last.note) == (V2, V1, "tag", "a test")
        assert (first.manifest, first.previous) == (V1, None)
        assert "@" in last.by
        assert last.at.endswith("Z")
        assert last.token != first.token

    def test_compare_and_swap(self, store: Store) -> None:
        swap = lambda expected, new: tags.swap(  # noqa: E731
            store, "llama", "prod", expected, new, how="tag", deadline_s=deadline()
        )
        swap(None, V1)
        with pytest.raises(ChangedError) as caught:
            swap(None, V2)
        assert V1[:12] in str(caught.value)
        swap(V1, V2)
        with pytest.raises(ChangedError):
            swap(V1, V3)
        assert meanings(store) == [V2, V1]

    def test_back_by_steps_and_forward_again(self, store: Store, place: Place) -> None:
        for manifest in (V1, V2, V2, V3):
            move(store, manifest)
        for manifest in (V1, V2, V3):
            place.put(layout.manifest_key("llama", manifest), b"{}")
        back = lambda steps=1: retag.rollback(store, "llama", "prod", steps_count=steps)  # noqa: E731
        assert back().manifest == V2
        assert back().manifest == V1
        with pytest.raises(UsageError):
            back()
        assert meanings(store) == [V1, V2, V3, V2, V2, V1]
        move(store, V3)
        assert back().manifest == V1
        move(store, V2)
        move(store, V3)
        assert back(2).manifest == V1

    def test_removed_and_brought_back(self, store: Store, place: Place) -> None:
        move(store, V1)
        tags.remove(store, "llama", "prod", deadline_s=deadline())
        assert current(store) is None
        assert Tags(store).read("llama", deadline_s=deadline()) == {}
        with pytest.raises(NotFoundError):
            tags.remove(store, "llama", "prod", deadline_s=deadline())
        with pytest.raises(NotFoundError):
            retag.rollback(store, "llama", "prod")
        place.put(layout.manifest_key("llama", V1), b"{}")
        assert retag.rollback(store, "llama", "prod").manifest == V1
        assert meanings(store) == [V1, None, V1]

    def test_all_tags_are_read_and_what_was_read_is_not_read_again(self, store: Store, place: Place) -> None:
        move(store, V1)
        move(store, V2)
        move(store, V1, tag="v1")
        move(store, V3, tag="v1", model="bert")
        seen = Tags(store)
        found = {model: seen.read(model, deadline_s=deadline()) for model in ("llama", "bert")}
        assert {(model, tag): moved.manifest for model, its in found.items() for tag, moved in its.items()} == {
            ("llama", "prod"): V2, ("llama", "v1"): V1, ("bert", "v1"): V3,
        }  # fmt: skip
        for key in keys(store, "tags/bert/"):
            place.put(key, b"damaged")
        assert seen.read("bert", deadline_s=deadline()) == found["bert"]
        move(store, V3)
        assert seen.read("llama", deadline_s=deadline())["prod"].manifest == V3
        assert seen.read("bert", deadline_s=deadline()) == found["bert"]

    def test_an_entry_that_cannot_be_is_named_and_mended_by_a_move(self, store: Store, place: Place) -> None:
        move(store, V1, tag="other")
        newer = b'{"format":"mfs-tag","version":2}'
        for body in (
            b"[]",
            b"{}",
            b'{"format":"mfs-tag","version":1,"manifest":"x"}',
            b"\xff",
            b"",
            newer,
            b" " * 2**17,
        ):
            place.put(layout.tag_key("llama", "prod", 1), body)
            with pytest.raises(IntegrityError) as caught:
                current(store)
            assert "tags/llama/prod/0000000001" in str(caught.value)
            assert list(Tags(store).read("llama", deadline_s=deadline())) == ["other"]
        move(store, V2)
        assert current(store) == V2

    def test_a_damaged_move_of_the_past_keeps_nobody_from_the_others(self, store: Store, place: Place) -> None:
        for manifest in (V1, V2, V3):
            move(store, manifest)
        damaged = next(key for key in keys(store, "tags/") if "/0000000002" in key)
        place.put(damaged, b"damaged")
        assert meanings(store) == [V3, V1]
        shown = tags.entries(store, "llama", "prod", deadline_s=deadline())
        assert [getattr(item, "key", "") for item in shown] == ["", damaged, ""]
        place.put(layout.manifest_key("llama", V1), b"{}")
        assert retag.rollback(store, "llama", "prod").manifest == V1

    def test_back_from_a_move_that_is_damaged(self, store: Store, place: Place) -> None:
        move(store, V1)
        place.put(layout.manifest_key("llama", V1), b"{}")
        place.put(layout.tag_key("llama", "prod", 2), b"damaged")
        assert retag.rollback(store, "llama", "prod").manifest == V1
        assert current(store) == V1

    def test_a_number_that_no_move_made_stops_no_tag(self, store: Store, place: Place) -> None:
        move(store, V1)
        (key,) = keys(store, "tags/")
        body = place.get(key)
        assert body
        place.put(layout.tag_key("llama", "prod", 9_999_999_999), body.replace(V1.encode(), V3.encode()))
        assert current(store) == V1
        move(store, V2)
        assert current(store) == V2
        assert Tags(store).read("llama", deadline_s=deadline())["prod"].manifest == V2
        place.put(layout.tag_key("llama", "only", 9_999_999_999), body)
        with pytest.raises(StoreError) as caught:
            move(store, V2, tag="only")
        assert "tags/llama/only/9999999999" in str(caught.value)

    def test_what_was_read_before_the_deadline_is_kept(self, store: Store, place: Place) -> None:
        for number in range(40):
            move(store, V1, tag=f"v{number}")

        class Slow:
            """Answers 20 reads, then never before the deadline."""

            def __init__(self) -> None:
                self.left = 20

            def __getattr__(self, name: str) -> Any:
                return getattr(store, name)

            def read(self, key: str, **more: Any) -> bytes:
                self.left -= 1
                if self.left < 0:
                    raise TransientStoreError("not before the deadline")
                return store.read(key, **more)

        slow: Any = Slow()
        seen = Tags(slow)
        for _ in range(2):
            with contextlib.suppress(TransientStoreError):
                seen.read("llama", deadline_s=deadline())
            slow.left = 20
        assert len(seen.read("llama", deadline_s=deadline())) == 40

    def test_of_many_at_once_nobody_is_lost(self, place: Place, store: Store) -> None:
        others = [place.store() for _ in range(3)]
        wanted = [f"{number:064x}" for number in range(12)]
        try:
            with ThreadPoolExecutor(6) as pool:
                list(pool.map(lambda n: move([store, *others][n % 4], wanted[n]), range(12)))
        finally:
            for other in others:
                other.close()
        assert sorted(str(manifest) for manifest in meanings(store)) == wanted

    def test_of_many_who_swap_at_once_one_wins(self, place: Place, store: Store) -> None:
        move(store, V1)
        others = [place.store() for _ in range(3)]

        def swap(number: int) -> str | None:
            try:
                moved = tags.swap([store, *others][number % 4], "llama", "prod", V1, f"{number:064x}", how="tag",
                                  deadline_s=deadline())  # fmt: skip
            except ChangedError:
                return None
            return moved.manifest

        try:
            with ThreadPoolExecutor(6) as pool:
                won = [manifest for manifest in pool.map(swap, range(6)) if manifest]
        finally:
            for other in others:
                other.close()
        assert won in ([current(store)], [])
        assert len(won) == 1 or not self.is_conditional
        assert meanings(store) == [*won, V1]

    is_conditional = True

    def test_names_that_cannot_be(self, store: Store) -> None:
        for name in ("", "a/b", "..", "ä", "a b", "x" * 129):
            with pytest.raises(MfsError):
                move(store, V1, tag=name)
        assert keys(store) == []


class TestFolder(TagsSuite):
    @pytest.fixture
    def place(self, tmp_path: Path) -> FolderPlace:
        return FolderPlace(tmp_path / "reg")


class TestSwift(TagsSuite):
    """A store that refuses what is there, and does not decide between two at once."""

    is_conditional = False

    @pytest.fixture
    def place(self, swift: SwiftServer, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
        place = S3Place(swift, s3_bucket, monkeypatch)
        yield place
        place.close()
