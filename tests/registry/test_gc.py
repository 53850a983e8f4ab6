"""Collection: what no tag leads to goes, what somebody needs stays, beside pushes in any order."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mfs.errors import IntegrityError, NotFoundError, StoreError, TransientStoreError
from mfs.registry import gc, layout, retag, tags, work
from mfs.registry.gc import Collected, collect
from mfs.registry.manifest import manifest_id
from mfs.registry.store import Store
from mfs.registry.work import pushing
from mfs.testing.store_suite import keys
from mfs.testing.suite import deadline
from tests.registry.places import FolderPlace
from tests.registry.revisions import (
    age,
    chunk_at,
    chunk_of,
    encoded_of,
    manifest_of,
    put_chunk,
    put_revision,
    put_simple,
    tag,
)


def gone(found: Collected) -> tuple[int, int]:
    return len(found.revisions), len(found.chunks)


def there(place: FolderPlace, content: bytes) -> bool:
    return place.get(layout.chunk_key(chunk_of(content))) is not None


def test_what_no_tag_leads_to_goes_and_only_if_wanted(place: FolderPlace, store: Store) -> None:
    kept = put_simple(place, "llama", {"a": b"kept", "b": b"shared"})
    lost = put_simple(place, "llama", {"a": b"lost", "b": b"shared"})
    place.put(layout.signature_key("llama", lost, "k.sig"), b"s")
    place.put(layout.signature_key("llama", kept, "k.sig"), b"s")
    put_chunk(place, b"of a push that died")
    tag(store, "llama", "v1", kept)
    age(place.root)
    before = keys(store)
    found = collect(store)
    assert gone(found) == (1, 2)
    assert found.bytes == sum(stored.size for stored in found.chunks) > 0
    assert keys(store) == before
    collect(store, is_dry=False)
    assert set(before) - set(keys(store)) == {
        layout.manifest_key("llama", lost), layout.signature_key("llama", lost, "k.sig"),
        layout.chunk_key(chunk_of(b"lost")), layout.chunk_key(chunk_of(b"of a push that died")),
    }  # fmt: skip


def test_what_is_young_stays(place: FolderPlace, store: Store) -> None:
    put_simple(place, "llama", {"a": b"not tagged yet"})
    put_chunk(place, b"not named yet")
    found = collect(store, is_dry=False)
    assert gone(found) == (0, 0)
    assert (found.young_chunks_count, found.kept_chunks_count) == (1, 1)
    age(place.root)
    assert gone(collect(store, is_dry=False)) == (1, 2)
    assert keys(store) == [layout.MARKER_KEY]


def test_what_a_tag_meant_stays_as_long_as_its_history(place: FolderPlace, store: Store) -> None:
    revisions = [put_simple(place, "llama", {"a": b"v%d" % number}) for number in range(4)]
    for revision in revisions:
        tag(store, "llama", "prod", revision)
    age(place.root)
    assert gone(collect(store, is_dry=False)) == (0, 0)
    found = collect(store, is_dry=False, history_count=2)
    assert gone(found) == (2, 2)
    assert [key.rpartition("/")[2] for key in keys(store, "tags/")] == ["0000000003", "0000000004"]
    assert retag.rollback(store, "llama", "prod").manifest == revisions[2]


def test_a_removed_tag_keeps_its_revisions_for_the_grace(place: FolderPlace, store: Store) -> None:
    tag(store, "llama", "v1", put_simple(place, "llama", {"a": b"v1"}))
    tags.remove(store, "llama", "v1", deadline_s=deadline())
    for path in (place.root / "chunks").rglob("*"):
        os.utime(path, (0, 0))
    assert gone(collect(store, is_dry=False)) == (0, 0)
    age(place.root)
    assert gone(collect(store, is_dry=False)) == (1, 1)
    tag(store, "llama", "v1", "1" * 64)
    assert [key.rpartition("/")[2] for key in keys(store, "tags/")] == ["0000000002", "0000000003"]


def test_what_differences_stand_on_stays(place: FolderPlace, store: Store) -> None:
    base, tuned = bytes(range(256)) * 64, bytes(range(255)) + b"\0" + bytes(range(256)) * 63
    on = put_chunk(place, base)
    contents = {"w": tuned}
    revision = put_revision(place, "llama", {"w": [put_chunk(place, tuned, base)]}, contents, requires=(on.id,))
    tag(store, "llama", "v1", revision)
    age(place.root)
    assert gone(collect(store, is_dry=False)) == (0, 0)


def test_a_chunk_stored_otherwise_since_keeps_what_it_stands_on(place: FolderPlace, store: Store) -> None:
    """Its manifest does not know; its own table does."""
    base, tuned = os.urandom(20_000), bytearray(os.urandom(20_000))
    tuned[:] = base
    tuned[7] ^= 1
    alone = put_chunk(place, bytes(tuned))
    tag(store, "llama", "v1", put_revision(place, "llama", {"w": [alone]}, {"w": bytes(tuned)}))
    put_chunk(place, base)
    again = put_chunk(place, bytes(tuned), base)
    assert again.id == alone.id
    assert again.stored_bytes != alone.stored_bytes
    age(place.root)
    found = collect(store, is_dry=False)
    assert gone(found) == (0, 0)
    assert found.kept_chunks_count == 2


def test_nothing_goes_where_it_is_not_known_what_is_needed(place: FolderPlace, store: Store) -> None:
    revision = put_simple(place, "llama", {"a": b"a"})
    tag(store, "llama", "v1", revision)
    put_chunk(place, b"lost")
    place.put(layout.manifest_key("llama", revision), b"{}")
    age(place.root)
    with pytest.raises(IntegrityError) as caught:
        collect(store, is_dry=False)
    assert revision in str(caught.value)
    assert there(place, b"lost")


def test_a_damaged_move_keeps_its_model_and_stops_nobody(place: FolderPlace, store: Store) -> None:
    for name in ("llama", "phi"):
        put_simple(place, name, {"a": f"{name}, of no tag".encode()})
        for content in (b"1", b"2", b"3"):
            tag(store, name, "v1", put_simple(place, name, {"a": content}))
    place.put(layout.tag_key("llama", "v1", 2), b"damaged")
    age(place.root)
    found = collect(store, is_dry=False)
    assert gone(found) == (1, 1)
    assert there(place, b"llama, of no tag")
    assert not there(place, b"phi, of no tag")
    (line,) = found.damaged
    assert "tags/llama/v1/0000000002" in line


def test_a_revision_that_is_missing_is_said_and_holds_nothing_up(place: FolderPlace, store: Store) -> None:
    tag(store, "llama", "v1", "1" * 64)
    put_chunk(place, b"lost")
    age(place.root)
    found = collect(store, is_dry=False)
    assert found.missing == ["llama@sha256:111111111111 (llama:v1)"]
    assert gone(found) == (0, 1)


# -- beside pushes


def test_a_collection_that_sees_a_push_spares_what_it_names(place: FolderPlace, store: Store) -> None:
    """Race 1."""
    put_chunk(place, b"reused")
    put_chunk(place, b"lost")
    old = put_simple(place, "llama", {"a": b"old"})
    age(place.root)
    with pushing(store, manifests=[f"llama/{old}"], deadline_s=deadline()) as lease:
        lease.name([chunk_of(b"reused")], deadline_s=deadline())
        found = collect(store, is_dry=False)
        assert gone(found) == (0, 1)
        assert len(found.pushes) == 1
        assert there(place, b"reused")
    assert gone(collect(store, is_dry=False)) == (1, 2)


def test_a_push_waits_for_a_collection_and_looks_again(
    place: FolderPlace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Race 2: the collection did not see what the push names, and takes it; the push stores it again."""
    monkeypatch.setattr(work, "PAUSE_S", 0.01)
    put_chunk(place, b"reused")
    age(place.root)
    done: list[str] = []
    told = threading.Event()
    with work.collecting(store, deadline_s=deadline()) as collection:
        assert collection.look(deadline_s=deadline()).pushes == []

        def push() -> None:
            with pushing(place.store(), deadline_s=deadline()) as lease:
                lease.name([chunk_of(b"reused")], deadline_s=deadline())
                assert there(place, b"reused")

                def check() -> None:
                    if not there(place, b"reused"):
                        put_chunk(place, b"reused")
                        done.append("stored again")

                lease.settle(
                    check, lambda: done.append("published"), deadline_s=deadline(), tell=lambda _: told.set()
                )  # fmt: skip

        pusher = threading.Thread(target=push)
        pusher.start()
        assert told.wait(20)
        store.delete([layout.chunk_key(chunk_of(b"reused"))], deadline_s=deadline())
        assert done == []
    pusher.join(20)
    assert done == ["stored again", "published"]
    assert keys(store, "work/") == []


def test_a_collection_that_does_not_end_is_an_error_of_the_push(place: FolderPlace, store: Store) -> None:
    with work.collecting(store, deadline_s=deadline()), pushing(store, deadline_s=deadline()) as lease:
        with pytest.raises(TransientStoreError) as caught:
            lease.settle(lambda: None, lambda: None, deadline_s=time.monotonic() + 0.5)
        assert "collection by" in str(caught.value)


def test_who_goes_back_does_not_wait_for_a_collection(
    place: FolderPlace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Race 4: what a tag meant lately the collection keeps; what no tag meant waits."""
    monkeypatch.setattr(retag, "SETTLE_S", 0.5)
    revisions = [put_simple(place, "llama", {"a": b"v%d" % number}) for number in range(4)]
    for revision in revisions[:3]:
        tag(store, "llama", "prod", revision)
    with work.collecting(store, history_count=2, deadline_s=deadline()) as collection:
        assert retag.rollback(store, "llama", "prod").manifest == revisions[1]
        assert retag.retag(store, "llama", "other", revisions[2], how="tag").manifest == revisions[2]
        for manifest in (revisions[0], revisions[3]):  # further back than it keeps; never tagged
            with pytest.raises(TransientStoreError) as caught:
                retag.retag(store, "llama", "prod", manifest, how="tag")
            assert f"work/gc-{collection.token}" in str(caught.value)
    assert keys(store, "work/") == []


def test_what_a_collection_took_meanwhile_is_not_what_the_tag_means(
    place: FolderPlace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Race 4: a collection that keeps less than it says; the move is undone."""
    old, new = (put_simple(place, "llama", {"a": content}) for content in (b"old", b"new"))
    for revision in (old, new):
        tag(store, "llama", "prod", revision)
    real = tags.swap

    def swap(*args: Any, **more: Any) -> tags.Move:
        if more["note"] == "1 back":
            store.delete([layout.manifest_key("llama", old)], deadline_s=deadline())
        return real(*args, **more)

    monkeypatch.setattr(tags, "swap", swap)
    with work.collecting(store, history_count=20, deadline_s=deadline()), pytest.raises(NotFoundError):
        retag.rollback(store, "llama", "prod")
    now = tags.current(store, "llama", "prod", deadline_s=deadline())
    assert now is not None
    assert now.manifest == new


def test_a_collection_whose_process_is_gone_holds_nobody_up(
    place: FolderPlace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Race 9, on the machine where it was killed."""
    monkeypatch.setattr(work, "DELIVERED_S", 0.0)
    monkeypatch.setattr(work, "PAUSE_S", 0.01)
    if not (pid := os.fork()):
        work.Lease(place.store(), "gc", ()).beat(deadline_s=deadline())
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(keys(store, "work/")) == 1
    with pushing(store, deadline_s=deadline()) as lease:
        assert lease.settle(lambda: None, lambda: "published", deadline_s=deadline()) == "published"
    collect(store, is_dry=False)
    assert keys(store, "work/") == []


def test_a_record_of_the_future_counts_while_it_changes(
    place: FolderPlace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    place.put("work/gc-x", b"{}")
    ahead_s = time.time() + 10**6
    os.utime(place.root / "work/gc-x", (ahead_s, ahead_s))
    with pushing(store, deadline_s=deadline()) as lease:
        assert len(lease.look(deadline_s=deadline()).collections) == 1
        clock.slept_s += work.COLLECTION.stale_s / 2
        os.utime(place.root / "work/gc-x", (ahead_s + 1, ahead_s + 1))
        assert len(lease.look(deadline_s=deadline()).collections) == 1
        clock.slept_s += work.COLLECTION.stale_s
        assert lease.look(deadline_s=deadline()).collections == []


def test_two_collections_at_once_are_refused(store: Store) -> None:
    with work.collecting(store, deadline_s=deadline()), pytest.raises(StoreError) as caught:
        collect(store, is_dry=False)
    assert "is under way" in str(caught.value)
    assert "work/gc-" in str(caught.value)
    collect(store, is_dry=False)


def test_a_killed_push_counts_for_an_hour(place: FolderPlace, store: Store) -> None:
    put_chunk(place, b"named")
    age(place.root)
    lease = work.Lease(store, "push", ())
    lease.beat(deadline_s=deadline())
    lease.name([chunk_of(b"named")], deadline_s=deadline())
    assert gone(collect(store, is_dry=False)) == (0, 0)
    age(place.root / "work", work.PUSH.stale_s + 60)
    found = collect(store, is_dry=False)
    assert gone(found) == (0, 1)
    assert keys(store, "work/") == []


def test_what_the_dead_left_in_work_is_swept(place: FolderPlace, store: Store) -> None:
    old = ["work/tmp-1", "work/probe-2", "work/push-3", "work/push-3.1", "work/gc-4", "work/other"]
    for key in old:
        place.put(key, b"half")
    age(place.root / "work", work.PUSH.stale_s + 60)
    fresh = ["work/probe-6", "work/push-7", "work/push-7.1", "work/tmp-5"]
    for key in fresh:
        place.put(key, b"not JSON either")
    found = collect(store, is_dry=False)
    assert (sorted(found.records), found.pushes) == (sorted(old), ["somebody since somebody"])
    assert keys(store, "work/") == fresh


def test_a_killed_collection_holds_a_push_up_for_an_hour(place: FolderPlace, store: Store) -> None:
    work.Lease(store, "gc", ()).beat(deadline_s=deadline())
    age(place.root / "work", work.PUSH.stale_s + 60)
    with pushing(store, deadline_s=deadline()) as lease:
        assert lease.settle(lambda: None, lambda: "published", deadline_s=deadline()) == "published"


class Clock:
    """A clock of a machine that sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept_s = 0.0
        monkeypatch.setattr(work, "_awake_s", lambda: time.monotonic() + self.slept_s)


def test_a_push_that_slept_checks_again_and_names_its_chunks_again(
    place: FolderPlace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Race 6, asleep between the check and the tag: what a collection took meanwhile is stored again."""
    clock, done = Clock(monkeypatch), list[str]()
    with pushing(store, deadline_s=deadline()) as lease:
        lease.name([chunk_of(b"mine")], deadline_s=deadline())
        put_chunk(place, b"mine")

        def check() -> None:
            if not there(place, b"mine"):
                done.append("stored again")
                put_chunk(place, b"mine")

        def publish() -> None:
            clock.slept_s += 2 * work.PUSH.stale_s
            age(place.root)
            assert gone(collect(place.store(), is_dry=False)) == (0, 1)
            assert keys(store, "work/") == []
            done.append("published")

        lease.settle(check, publish, deadline_s=deadline())
        assert done == ["published", "stored again"]
        assert len(keys(store, "work/")) == 2
    assert keys(store, "work/") == []


def test_a_collection_that_slept_deletes_nothing_more(
    place: FolderPlace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Race 7."""
    clock = Clock(monkeypatch)
    put_chunk(place, b"lost")
    age(place.root)

    def told(what: str, count: int) -> None:
        clock.slept_s += 2 * work.PUSH.stale_s if what == "chunks" else 0

    with pytest.raises(TransientStoreError):
        collect(store, is_dry=False, told=told)
    assert there(place, b"lost")


def test_a_tag_is_moved_to_what_is_there_alone(place: FolderPlace, store: Store) -> None:
    with pytest.raises(NotFoundError) as caught:
        retag.retag(store, "llama", "prod", "1" * 64, how="tag")
    assert "is not there" in str(caught.value)
    revision = put_simple(place, "llama", {"a": b"a"})
    assert retag.retag(store, "llama", "prod", revision, how="tag").manifest == revision
    assert keys(store, "work/") == []


def test_pushes_and_collections_without_any_grace(place: FolderPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushers that reuse what nothing names any more, beside collections that take all they can: what was published is
    whole, then and two collections later."""
    monkeypatch.setattr(work, "PAUSE_S", 0.005)
    monkeypatch.setattr(gc, "MANIFEST_GRACE_S", 0.0)
    collected, collections_count = threading.Condition(), 0

    def push(number: int) -> list[str]:
        store, order, lost = place.store(), random.Random(number), list[str]()
        for turn in range(8):
            name = f"p{number}-{turn}"
            contents = {str(path): b"content %d" % path for path in order.sample(range(6), 2)}
            body = manifest_of({path: [chunk_at(content)] for path, content in contents.items()}, contents)
            its_id = manifest_id(body)

            def missing(contents: dict[str, bytes] = contents) -> list[bytes]:
                keys = {layout.chunk_key(chunk_of(content)): content for content in contents.values()}
                return [keys[key] for key in keys if store.size(key, deadline_s=deadline()) is None]

            def check(missing: Callable[[], list[bytes]] = missing) -> None:
                for content in missing():
                    store.create(layout.chunk_key(chunk_of(content)), encoded_of(content), deadline_s=deadline())

            def publish(name: str = name, its_id: str = its_id, body: bytes = body) -> None:
                store.create(layout.manifest_key("llama", its_id), body, deadline_s=deadline())
                tag(store, "llama", name, its_id)

            with pushing(store, manifests=[f"llama/{its_id}"], deadline_s=deadline()) as lease:
                lease.name([chunk_of(content) for content in contents.values()], deadline_s=deadline())
                check()
                lease.settle(check, publish, deadline_s=deadline(60))
            lost += [f"{name} at once" for _ in missing()]
            with collected:
                until = collections_count + 2
                assert collected.wait_for(lambda until=until: collections_count >= until, timeout=60)
            lost += [f"{name} later" for _ in missing()]
            tags.remove(store, "llama", name, deadline_s=deadline())
        return lost

    deleted_count = 0
    with ThreadPoolExecutor(4) as pool:
        pushers = [pool.submit(push, number) for number in range(3)]
        while not all(pusher.done() for pusher in pushers):
            deleted_count += len(collect(place.store(), is_dry=False, grace_s=0).chunks)
            with collected:
                collections_count += 1
                collected.notify_all()
        assert [pusher.result() for pusher in pushers] == [[], [], []]
    assert deleted_count > 6
    assert keys(place.store(), "work/") == []
