"""A revision read whole: what is not as its manifest or its signature says is found, and named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mfs.errors import IntegrityError
from mfs.registry import verifying
from mfs.registry.layout import chunk_key, manifest_key
from mfs.registry.manifest import manifest_id
from mfs.registry.signing import Signer, Verifier
from tests.registry.keys import make_keys
from tests.registry.made import put_revision, soon
from tests.registry.places import FolderPlace

FILES = {"config.json": b"{}", "empty": b"", "m.bin": random.Random(1).randbytes(4 << 20), "twice.bin": b"ab" * 70_000}


@pytest.fixture
def place(tmp_path: Path) -> FolderPlace:
    return FolderPlace(tmp_path / "reg")


def faults(place: FolderPlace, pushed: str) -> list[tuple[str, bool]]:
    """(path, whether a chunk of it is meant) of what `verify` finds."""
    store = place.store()
    _, manifest = verifying.read_manifest(store, "llama", pushed)
    steps = list(verifying.verify(store, "llama", pushed, manifest))
    assert steps[-1].done_bytes == manifest.nbytes
    return [(fault.path, bool(fault.chunk)) for step in steps for fault in step.faults]


def test_all_good(place: FolderPlace) -> None:
    assert faults(place, put_revision(place.store(), "llama", FILES)) == []


def test_a_changed_chunk_and_a_missing_one(place: FolderPlace) -> None:
    pushed = put_revision(place.store(), "llama", FILES)
    manifest = verifying.read_manifest(place.store(), "llama", pushed)[1]
    file = manifest.by_path["m.bin"]
    key = chunk_key(manifest.chunks[file.chunks[1]].id)
    content = bytearray(place.get(key) or b"")
    content[-1] ^= 1
    place.put(key, bytes(content))
    (place.root / chunk_key(manifest.chunks[manifest.by_path["config.json"].chunks[0]].id)).unlink()
    assert faults(place, pushed) == [("config.json", True), ("m.bin", True)]


def test_a_manifest_that_states_another_sha256(place: FolderPlace) -> None:
    body = json.loads(verifying.read_manifest(place.store(), "llama", put_revision(place.store(), "llama", FILES))[0])
    body["files"][0]["sha256"] = "0" * 64
    changed = json.dumps(body).encode()
    place.put(manifest_key("llama", manifest_id(changed)), changed)
    assert faults(place, manifest_id(changed)) == [(body["files"][0]["path"], False)]


def test_a_changed_manifest(place: FolderPlace) -> None:
    pushed = put_revision(place.store(), "llama", FILES)
    key = manifest_key("llama", pushed)
    place.put(key, (place.get(key) or b"").replace(b"config.json", b"konfig.json"))
    with pytest.raises(IntegrityError, match="it was changed where it lies"):
        verifying.read_manifest(place.store(), "llama", pushed)


def test_a_bundle_that_lists_other_files(tmp_path: Path, place: FolderPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two verifiers must not be told two things, be it by whoever signs."""
    store = place.store()
    pushed = put_revision(store, "llama", FILES)
    body, manifest = verifying.read_manifest(store, "llama", pushed)
    keys = make_keys(tmp_path, "key")
    signer, verifier = Signer(keys.private), Verifier(keys.public)
    signer.put(store, "llama", body, deadline_s=soon())
    assert verifying.check_signature(store, "llama", body, manifest, verifier)
    monkeypatch.setattr("mfs.registry.signing.signed_files", lambda manifest: [("config.json", "0" * 64)])
    signer.put(store, "llama", body, deadline_s=soon())
    monkeypatch.undo()
    with pytest.raises(IntegrityError, match="lists other files"):
        verifying.check_signature(store, "llama", body, manifest, verifier)
