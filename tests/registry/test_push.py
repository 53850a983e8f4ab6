"""A directory becomes a revision: exact, stored once, all at once or not at all, and again after every interruption."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mfs.errors import ChangedError, NotFoundError, UsageError
from mfs.registry import fsck, gc, layout, tags
from mfs.registry.chunk import DEPTH_MAX
from mfs.registry.chunk_io import read_table
from mfs.registry.encode import Effort
from mfs.registry.push import Options, Step
from tests.registry.models import (
    Tensors,
    check_revision,
    do_push,
    keys_below,
    push_to,
    read_manifest,
    soon,
    tensors,
    trained,
    write_model,
)
from tests.registry.places import FolderPlace, S3Place
from tests.registry.revisions import age
from tests.servers.swift import SwiftServer


@pytest.fixture
def reg(tmp_path: Path) -> FolderPlace:
    (tmp_path / "reg").mkdir()
    return FolderPlace(tmp_path / "reg")


@pytest.mark.parametrize("effort", Effort)
def test_what_is_pushed_comes_back(reg: FolderPlace, tmp_path: Path, effort: Effort) -> None:
    folder = write_model(tmp_path / "m", tensors(), README="words " * 99)
    (folder / "sub").mkdir()
    (folder / "sub/empty").write_bytes(b"")
    (folder / "sub/link").symlink_to("../config.json")
    done = do_push(f"{reg.url}/llama:v1", folder, Options(effort, annotations={"dataset": "none"}))
    manifest = read_manifest(reg.store(), "llama", "v1")
    assert (done.revision.manifest, done.is_new, done.is_moved) == (manifest, True, True)
    assert dict(manifest.annotations) == {"dataset": "none"}
    check_revision(reg.store(), manifest, folder)
    stored = sum(len(reg.get(key) or b"") for key in keys_below(reg.root, "chunks"))
    assert stored == done.sent.stored_bytes
    assert (stored < 0.75 * manifest.nbytes) == (effort is not Effort.NONE)
    assert keys_below(reg.root, "work") == set()


def test_on_s3_too(swift: SwiftServer, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = S3Place(swift, s3_bucket, monkeypatch)
    base = write_model(tmp_path / "base", tensors())
    tuned = write_model(tmp_path / "tuned", trained(tensors(), 2))
    push_to(f"{place.url}/llama:v1", base, place.options, Options())
    done = push_to(f"{place.url}/tuned:v1", tuned, place.options, Options())
    store = place.store()
    assert done.sent.differences_count
    check_revision(store, read_manifest(store, "llama", "v1"), base)
    check_revision(store, read_manifest(store, "tuned", "v1"), tuned)
    store.close()
    place.close()


def test_the_same_again_is_the_same_revision(reg: FolderPlace, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tensors())
    first = do_push(f"{reg.url}/llama:v1", folder)
    before = keys_below(reg.root, "")
    again = do_push(f"{reg.url}/llama:v1", folder)
    assert keys_below(reg.root, "") == before
    assert (again.is_new, again.is_moved, again.sent.chunks_count) == (False, False, 0)
    other = do_push(f"{reg.url}/llama:v2", folder)
    assert (other.is_new, other.is_moved) == (False, True)
    assert first.revision.manifest_id == again.revision.manifest_id == other.revision.manifest_id
    assert do_push(f"{reg.url}/llama:v1", folder, Options(annotations={"a": "b"})).is_new


def test_equal_tensors_are_stored_once_wherever_they_stand(reg: FolderPlace, tmp_path: Path) -> None:
    whole = tensors()
    do_push(f"{reg.url}/llama:v1", write_model(tmp_path / "a", whole))
    # Another model, other shards, another order, something new before the large ones.
    shards: dict[str, Tensors] = {
        "model-00001-of-00002.safetensors": {"aaa": tensors(7)["layer.0.bias"], "head": whole["head"]},
        "model-00002-of-00002.safetensors": {"embedding": whole["embedding"]},
    }
    folder = write_model(tmp_path / "b", shards)
    done = do_push(f"{reg.url}/other:v1", folder)
    check_revision(reg.store(), done.revision.manifest, folder)
    assert done.sent.plain_bytes < 2000  # two headers and the new tensor
    assert done.as_json()["reused_bytes"] == done.revision.manifest.nbytes - done.sent.plain_bytes


@pytest.mark.parametrize("named", [True, False])
def test_a_fine_tune_is_stored_as_differences(reg: FolderPlace, tmp_path: Path, named: bool) -> None:
    base = write_model(tmp_path / "base", tensors())
    do_push(f"{reg.url}/llama:v3", base)
    do_push(f"{reg.url}/unlike:v1", write_model(tmp_path / "unlike", tensors(9)))
    tuned = write_model(tmp_path / "tuned", trained(tensors(), 2))
    done = do_push(f"{reg.url}/tuned:v1", tuned, Options(base="llama:v3" if named else None))
    assert done.base is not None
    assert (done.base.model, done.revision.manifest.base) == ("llama", done.base.manifest_id)
    assert done.sent.stored_bytes < 0.3 * done.sent.plain_bytes
    assert 0.6 < done.sent.alone_bytes / done.sent.plain_bytes < 0.72
    manifest = read_manifest(reg.store(), "tuned", "v1")
    check_revision(reg.store(), manifest, tuned)
    assert manifest.requires
    # Who pushes the same bytes elsewhere has the differences, and says what they stand on.
    other = do_push(f"{reg.url}/copy:v1", tuned, Options(base=""))
    assert (other.sent.chunks_count, other.revision.manifest.requires) == (0, manifest.requires)


def test_only_what_is_smaller_is_a_difference(reg: FolderPlace, tmp_path: Path) -> None:
    do_push(f"{reg.url}/llama:v1", write_model(tmp_path / "a", tensors(1)))
    mixed = trained(tensors(1), 2) | {"head": tensors(5)["head"]}
    folder = write_model(tmp_path / "b", mixed)
    manifest = do_push(f"{reg.url}/llama:v2", folder, Options(base="llama:v1")).revision.manifest
    check_revision(reg.store(), manifest, folder)
    file = manifest.by_path["model.safetensors"]
    head = next(tensor for tensor in file.tensors if tensor.name == "head")
    depths = {}
    for start, index in zip(manifest.starts(file), file.chunks, strict=False):
        table = read_table(reg.store(), manifest.chunks[index].id, manifest.chunks[index].plain_bytes)
        assert table is not None
        depths[start] = table.depth
    assert depths[head.start] == 0
    assert sum(depths.values()) >= 2


def test_no_base_is_used_where_none_helps_or_none_is_wanted(reg: FolderPlace, tmp_path: Path) -> None:
    do_push(f"{reg.url}/llama:v1", write_model(tmp_path / "a", tensors(1)))
    assert do_push(f"{reg.url}/llama:v2", write_model(tmp_path / "b", tensors(2))).base is None
    tuned = write_model(tmp_path / "c", trained(tensors(1), 2))
    done = do_push(f"{reg.url}/llama:v3", tuned, Options(base=""))
    assert (done.base, done.sent.differences_count) == (None, 0)


def test_differences_to_differences_are_bounded(reg: FolderPlace, tmp_path: Path) -> None:
    content, folders = tensors(), list[Path]()
    for number in range(DEPTH_MAX + 3):
        folders.append(write_model(tmp_path / str(number), content))
        base = f"llama:v{number - 1}" if number else None
        done = do_push(f"{reg.url}/llama:v{number}", folders[-1], Options(base=base))
        assert (done.sent.differences_count > 0) == (number > 0)
        content = trained(content, number)
    deepest = 0
    for number, folder in enumerate(folders):
        manifest = read_manifest(reg.store(), "llama", f"v{number}")
        check_revision(reg.store(), manifest, folder)
        tables = [read_table(reg.store(), chunk.id, chunk.plain_bytes) for chunk in manifest.chunks]
        deepest = max(deepest, *(table.depth for table in tables if table))
    assert deepest == DEPTH_MAX


@pytest.mark.parametrize("damage", ["lost", "cut", "changed", "base lost"])
def test_pushing_again_mends_what_was_lost(reg: FolderPlace, tmp_path: Path, damage: str) -> None:
    base = write_model(tmp_path / "base", tensors())
    do_push(f"{reg.url}/llama:v1", base)
    folder = write_model(tmp_path / "m", trained(tensors(), 2))
    manifest = do_push(f"{reg.url}/llama:v2", folder).revision.manifest
    largest = max(manifest.chunks, key=lambda chunk: chunk.plain_bytes)
    key = layout.chunk_key(largest.id)
    body = reg.get(key)
    assert body is not None
    if damage == "base lost":
        table = read_table(reg.store(), largest.id, largest.plain_bytes)
        assert table is not None
        assert table.base is not None
        (reg.root / layout.chunk_key(table.base)).unlink()
    elif damage == "lost":
        (reg.root / key).unlink()
    else:
        reg.put(key, body[:-1] if damage == "cut" else body[:70] + bytes([body[70] ^ 1]) + body[71:])
    do_push(f"{reg.url}/llama:v2", folder)
    check_revision(reg.store(), read_manifest(reg.store(), "llama", "v2"), folder)


@pytest.mark.parametrize("phase", ["hashing", "sending"])
@pytest.mark.parametrize("change", ["write", "remove", "add"])
def test_a_directory_that_changes_is_not_published(reg: FolderPlace, tmp_path: Path, phase: str, change: str) -> None:
    folder = write_model(tmp_path / "m", tensors())
    done = threading.Event()

    def told(step: Step) -> None:
        if step.phase == phase and not done.is_set():
            done.set()
            if change == "write":
                with open(folder / "model.safetensors", "r+b") as file:
                    file.seek(-1000, os.SEEK_END)
                    file.write(b"\x55" * 1000)
            elif change == "remove":
                (folder / "config.json").unlink()
            else:
                (folder / "new.json").write_text("{}")

    with pytest.raises((ChangedError, NotFoundError)):
        do_push(f"{reg.url}/llama:v1", folder, told=told)
    assert done.is_set()
    assert tags.current(reg.store(), "llama", "v1", deadline_s=soon()) is None
    assert keys_below(reg.root, "manifests") == set()
    assert keys_below(reg.root, "work") == set()


def test_a_killed_push_leaves_nothing_visible_and_is_finished_by_the_next(reg: FolderPlace, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tensors())
    do_push(f"{reg.url}/llama:v1", base)
    had = len(keys_below(reg.root, "chunks"))
    folder = write_model(tmp_path / "m", trained(tensors(), 2) | {f"extra.{i}": tensors(i)["head"] for i in range(4)})
    command = [sys.executable, "-m", "mfs", "push", str(folder), f"{reg.url}/llama:v2"]
    killed = 0
    for more in (0, 1, 5):  # chunks there when it is killed; 0: as soon as its record is
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                there = len(keys_below(reg.root, "chunks")) - had
                if there >= more and (more or keys_below(reg.root, "work")):
                    process.send_signal(signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.01)
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break  # it was quicker than we
        assert tags.current(reg.store(), "llama", "v2", deadline_s=soon()) is None
        check_revision(reg.store(), read_manifest(reg.store(), "llama", "v1"), base)
    assert killed
    done = do_push(f"{reg.url}/llama:v2", folder)
    assert done.as_json()["reused_bytes"]
    check_revision(reg.store(), read_manifest(reg.store(), "llama", "v2"), folder)


def test_two_pushes_to_one_tag_are_both_right(reg: FolderPlace, tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(i), trained(tensors(), i, "layer")) for i in (1, 2)]
    do_push(f"{reg.url}/llama:v0", write_model(tmp_path / "0", tensors()))
    both, failed = threading.Barrier(2, timeout=60), list[BaseException]()

    def one(folder: Path) -> None:
        def told(step: Step) -> None:
            if step.phase == "sending" and not step.path:
                both.wait()

        try:
            do_push(f"{reg.url}/llama:prod", folder, told=told)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    moves = tags.history(reg.store(), "llama", "prod", deadline_s=soon())
    assert [move.how for move in moves] == ["push", "push"]
    assert moves[0].previous == moves[1].manifest
    found = set()
    for move in moves:
        tags.move(reg.store(), "llama", "look", move.manifest, how="tag", deadline_s=soon())
        manifest = read_manifest(reg.store(), "llama", "look")
        size = next(f.sha256 for f in manifest.files if f.path == "model.safetensors")
        found.add(size)
        folder = next(f for f in folders if _sha256(f / "model.safetensors") == size)
        check_revision(reg.store(), manifest, folder)
    assert len(found) == 2
    assert not fsck.check(reg.store(), data=True).damages


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_is_signed_before_the_tag_moves(reg: FolderPlace, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tensors())
    seen: list[bytes] = []

    def sign(store: object, model: str, body: bytes) -> None:
        assert tags.current(reg.store(), model, "v1", deadline_s=soon()) is None
        seen.append(body)

    done = do_push(f"{reg.url}/llama:v1", folder, Options(sign=sign))
    assert seen == [reg.get(layout.manifest_key("llama", done.revision.manifest_id))]


def test_a_base_that_is_not_there_is_said_before_anything_is_sent(reg: FolderPlace, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tensors())
    wrong: list[tuple[str, type[Exception]]] = [
        ("llama", UsageError), ("llama:v9", NotFoundError), ("../x:v1", UsageError), ("a@sha256:12", UsageError),
    ]  # fmt: skip
    for base, kind in wrong:
        with pytest.raises(kind, match="--base"):
            do_push(f"{reg.url}/llama:v1", folder, Options(base=base))
    assert keys_below(reg.root, "chunks") == set()


def test_progress_adds_up(reg: FolderPlace, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tensors())
    steps: list[Step] = []
    done = do_push(f"{reg.url}/llama:v1", folder, told=steps.append)
    total = done.revision.manifest.nbytes
    count: Callable[[str], int] = lambda phase: sum(step.done for step in steps if step.phase == phase)  # noqa: E731
    assert count("hashing") == total
    assert count("sending") == done.sent.plain_bytes == total
    per_file = {step.path: step.of_file for step in steps if step.phase == "hashing" and step.path}
    assert per_file == {file.path: file.size for file in done.revision.manifest.files}


def test_a_base_that_does_not_help_is_said(reg: FolderPlace, tmp_path: Path) -> None:
    do_push(f"{reg.url}/llama:v1", write_model(tmp_path / "a", tensors(1)))
    done = do_push(f"{reg.url}/llama:v2", write_model(tmp_path / "b", tensors(2)), Options(base="llama:v1"))
    assert done.base is None
    assert done.warnings == ("--base llama:v1: nothing came smaller as a difference to it",)
    check_revision(reg.store(), read_manifest(reg.store(), "llama", "v2"), tmp_path / "b")


def test_a_directory_in_a_link_or_read_only_is_pushed(reg: FolderPlace, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", tensors())
    (tmp_path / "link").symlink_to("m")
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    manifest = do_push(f"{reg.url}/llama:v1", tmp_path / "link").revision.manifest
    check_revision(reg.store(), manifest, folder)


def test_what_differences_stand_on_outlives_its_own_tag(
    reg: FolderPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "MANIFEST_GRACE_S", 0.0)
    base = write_model(tmp_path / "base", tensors())
    tuned = write_model(tmp_path / "tuned", trained(tensors(), 2))
    other = write_model(tmp_path / "other", tensors(8))
    do_push(f"{reg.url}/llama:v1", base)
    do_push(f"{reg.url}/llama:v2", other)
    assert do_push(f"{reg.url}/tuned:v1", tuned).sent.differences_count
    for tag in ("v1", "v2"):
        tags.remove(reg.store(), "llama", tag, deadline_s=soon())
    age(reg.root)
    collected = gc.collect(reg.store(), is_dry=False, history_count=1)
    assert collected.chunks
    check_revision(reg.store(), read_manifest(reg.store(), "tuned", "v1"), tuned)
    assert not fsck.check(reg.store(), data=True).damages
    # And what is pushed again comes back, though part of it is there and part is not.
    do_push(f"{reg.url}/llama:v1", base)
    check_revision(reg.store(), read_manifest(reg.store(), "llama", "v1"), base)
    assert not fsck.check(reg.store(), data=True).damages
