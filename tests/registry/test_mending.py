"""What was lost or damaged comes back by pushing, and all who read a registry agree on what is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfs.errors import MfsError
from mfs.registry import fsck, gc, layout, tags, verifying, work
from mfs.registry.chunk import Table, assemble, parse_table
from mfs.registry.chunk_io import read_chunk, read_frame
from mfs.registry.folder_store import FolderStore
from mfs.registry.frames import FrameReader
from mfs.registry.manifest import Chunk
from mfs.registry.presence import Presence
from mfs.registry.push import Options
from mfs.registry.revisions import Part
from mfs.registry.store import Store
from mfs.types import ByteRange
from tests.registry.models import check_revision, do_push, read_manifest, soon, tensors, trained, write_model
from tests.registry.places import FolderPlace
from tests.registry.revisions import age, chunk_of, put_chunk, put_revision, put_simple


@pytest.fixture
def reg(tmp_path: Path) -> FolderPlace:
    place = FolderPlace(tmp_path / "reg")
    place.put(layout.MARKER_KEY, layout.MARKER_BODY)
    return place


def faults(store: Store, model: str, tag: str) -> list[verifying.Fault]:
    """What `mfs verify` finds: as a mount reads it, frame by frame."""
    manifest = read_manifest(store, model, tag)
    return [fault for step in verifying.verify(store, model, "0" * 64, manifest) for fault in step.faults]


def damage(place: FolderPlace, chunk_id: str, at: int = -5) -> None:
    key = layout.chunk_key(chunk_id)
    body = bytearray(place.get(key) or b"")
    body[at] ^= 0x40
    place.put(key, bytes(body))


def put_on(place: FolderPlace, chunk_id: str, plain_bytes: int, base: str) -> None:
    """Let a stored chunk say that it stands on another."""
    body = place.get(layout.chunk_key(chunk_id)) or b""
    table = parse_table(body, chunk_id, plain_bytes)
    changed = Table(chunk_id, plain_bytes, table.element_bytes, table.depth or 1, base, table.frames)
    place.put(layout.chunk_key(chunk_id), assemble(changed, [body[table.stored_range(0, 1).start :]]))


@pytest.mark.parametrize("is_tag_left", [True, False])
def test_mending_a_base_leaves_what_stands_on_it_whole(reg: FolderPlace, tmp_path: Path, is_tag_left: bool) -> None:
    base = write_model(tmp_path / "base", tensors())
    tuned = write_model(tmp_path / "tuned", trained(tensors(), 2))
    store = reg.store()
    do_push(f"{reg.url}/llama:v1", base)
    assert do_push(f"{reg.url}/llama-ft:v1", tuned, Options(base="llama:v1")).sent.differences_count
    do_push(f"{reg.url}/other:v1", write_model(tmp_path / "other", trained(tensors(), 3)), Options(base=""))
    for chunk in read_manifest(store, "llama", "v1").chunks:
        if chunk.plain_bytes > 100_000:
            (reg.root / layout.chunk_key(chunk.id)).unlink()
    # Where its own tag is gone nobody may know that something stands on it: then it may be a difference itself.
    name = "llama:v1" if is_tag_left else "anew:v1"
    done = do_push(f"{reg.url}/{name}", base, Options(base="other:v1"))
    if is_tag_left:
        assert done.sent.chunks_count
        assert not done.sent.differences_count, "what some manifest names is stored alone"
    assert not fsck.check(store, data=True).damages
    assert faults(store, "llama-ft", "v1") == faults(store, "llama", "v1") == []
    if is_tag_left:
        check_revision(store, read_manifest(store, "llama-ft", "v1"), tuned)
    # What a base stands on now is in nobody's `requires`; a collection asks the base.
    tags.remove(store, "other", "v1", deadline_s=soon())
    age(reg.root)
    assert gc.collect(store, is_dry=False, history_count=1).revisions
    assert faults(store, "llama-ft", "v1") == []


@pytest.mark.parametrize("what", ["itself", "two", "base not there"])
def test_a_circle_ends_everywhere_and_pushing_mends_it(reg: FolderPlace, tmp_path: Path, what: str) -> None:
    folder, store = write_model(tmp_path / "m", tensors()), reg.store()
    manifest = do_push(f"{reg.url}/llama:v1", folder).revision.manifest
    one, other = [c for c in manifest.chunks if c.plain_bytes == 3400 * 160 * 2][:2]
    put_on(reg, one.id, one.plain_bytes, {"itself": one.id, "two": other.id, "base not there": "1" * 64}[what])
    if what == "two":
        put_on(reg, other.id, other.plain_bytes, one.id)
    reader, out = FrameReader(lambda deadline_s: store), bytearray(10)
    if what == "base not there":  # its frames are no differences: what needs no base is not hindered by one
        reader.read(Part(one, ByteRange(0, 10)), memoryview(out), deadline_s=soon())
    for data in (False, True):
        found = fsck.check(store, data=data).damages
        if data:
            assert layout.chunk_key(one.id) in {damage.key for damage in found}
    said = "not in the registry" if what == "base not there" else "stands on itself"
    with pytest.raises(MfsError, match=said):
        read_chunk(store, one.id, one.plain_bytes)
    with pytest.raises(MfsError, match=said):
        read_frame(store, one.id, one.plain_bytes, 0)
    assert Presence(store, {one.id: one.stored_bytes}).look(one.id, one.plain_bytes) is None
    do_push(f"{reg.url}/llama:v1", folder)
    assert not fsck.check(store, data=True).damages
    check_revision(store, read_manifest(store, "llama", "v1"), folder)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("what", ["corrupted", "cut", "cut, named by no other"])
def test_what_only_a_difference_needs_is_looked_at(reg: FolderPlace, is_first: bool, what: str) -> None:
    base, store = os.urandom(300_000), reg.store()
    tuned = base[:100] + b"abc" + base[103:]
    on = put_chunk(reg, base)
    files = {"w": [put_chunk(reg, tuned, base)]}
    # Manifests are looked at in the order of their models.
    put_revision(reg, "b", files, {"w": tuned}, requires=(on.id,))
    if "other" not in what:
        put_simple(reg, "a" if is_first else "c", {"w": base})
    assert not fsck.check(store, data=True).damages
    key = layout.chunk_key(on.id)
    if what == "corrupted":
        damage(reg, on.id)
    else:
        reg.put(key, (reg.get(key) or b"")[:-1])
        assert key in {damage.key for damage in fsck.check(store).damages}
    (found,) = [damage for damage in fsck.check(store, data=True).damages if damage.key == key]
    assert any(name.startswith("b@") for name in found.revisions)


@pytest.mark.parametrize("which", ["base", "difference"])
def test_damaged_frames_are_dropped_and_pushed_anew(reg: FolderPlace, tmp_path: Path, which: str) -> None:
    base, store = write_model(tmp_path / "base", tensors()), reg.store()
    tuned = write_model(tmp_path / "tuned", trained(tensors(), 2))
    manifest = do_push(f"{reg.url}/llama:v1", base).revision.manifest
    needing = do_push(f"{reg.url}/tuned:v1", tuned).revision.manifest
    largest = max((manifest if which == "base" else needing).chunks, key=lambda chunk: chunk.plain_bytes)
    damage(reg, largest.id)
    do_push(f"{reg.url}/llama:v1", base)
    do_push(f"{reg.url}/tuned:v1", tuned)
    checked = fsck.check(store, data=True)
    assert checked.damages, "a push does not read all that is there"
    assert fsck.drop(store, checked) == [layout.chunk_key(largest.id)], "what only stands on it is good"
    assert fsck.drop(store, checked) == []
    do_push(f"{reg.url}/llama:v1", base)
    do_push(f"{reg.url}/tuned:v1", tuned)
    assert not fsck.check(store, data=True).damages
    check_revision(store, read_manifest(store, "tuned", "v1"), tuned)


def test_what_a_push_relies_on_or_somebody_mended_is_not_dropped(reg: FolderPlace) -> None:
    store, content = reg.store(), os.urandom(300_000)
    put_simple(reg, "llama", {"w": content})
    key = layout.chunk_key(chunk_of(content))
    good = reg.get(key) or b""
    damage(reg, chunk_of(content))
    checked = fsck.check(store, data=True)
    assert len(checked.damages) == 1
    with work.pushing(store, deadline_s=soon()) as lease:
        lease.name([chunk_of(content)], deadline_s=soon())
        assert fsck.drop(store, checked) == []
    reg.put(key, good)
    assert fsck.drop(store, checked) == []
    assert reg.get(key) == good


def test_a_manifest_that_lies_of_a_chunk_has_no_good_chunk_dropped(reg: FolderPlace) -> None:
    store, content = reg.store(), os.urandom(300_000)
    put_simple(reg, "llama", {"w": content})
    lie = Chunk(chunk_of(content), 299_999, 300_100)
    put_revision(reg, "a", {"w": [lie]}, {"w": content[:-1]})
    checked = fsck.check(store, data=True)
    assert checked.damages
    assert fsck.drop(store, checked) == []


class Counting(FolderStore):
    asked = 0

    def read_range(self, key: str, span: ByteRange, *, size: int, out: memoryview, deadline_s: float) -> None:
        Counting.asked += 1
        super().read_range(key, span, size=size, out=out, deadline_s=deadline_s)

    def size(self, key: str, *, deadline_s: float) -> int | None:
        Counting.asked += 1
        return super().size(key, deadline_s=deadline_s)


def test_a_chunk_that_is_known_costs_one_request(reg: FolderPlace, tmp_path: Path) -> None:
    manifest = do_push(f"{reg.url}/llama:v1", write_model(tmp_path / "m", tensors())).revision.manifest
    presence = Presence(Counting(str(reg.root)), {chunk.id: chunk.stored_bytes for chunk in manifest.chunks})
    Counting.asked = 0
    for chunk in manifest.chunks:
        found = presence.look(chunk.id, chunk.plain_bytes)
        assert found is not None
        assert found.stored_bytes == chunk.stored_bytes
    assert Counting.asked == len(manifest.chunks)


def test_ctrl_c_ends_work_that_does_not() -> None:
    code = """
import os, signal, threading
from mfs.registry.parallel import for_each
def work(item):
    if item == 1:
        os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()
try:
    for_each(range(9), work, at_once=2)
except KeyboardInterrupt:
    print("ended", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert (ended.stdout, ended.returncode) == (b"ended\n", 0)
