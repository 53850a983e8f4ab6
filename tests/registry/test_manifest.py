"""Manifests of strangers: what cannot be is refused in one line, before it costs much."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mfs.errors import AccessError, IntegrityError
from mfs.registry import layout, manifest
from mfs.registry.bases import candidates, chunk_keys
from mfs.registry.folder_store import FolderStore
from mfs.registry.manifest import Chunk, File, Manifest, Tensor, manifest_id, parse_manifest
from mfs.registry.revisions import Revisions
from mfs.testing.suite import deadline
from tests.registry.places import FolderPlace

D = "0" * 64
CHUNK = Chunk("1" * 64, 64, 64)


def tensor(name: str, start: int, stop: int, *, dtype: str = "U8", shape: tuple[int, ...] | None = None) -> Tensor:
    return Tensor(name, dtype, (stop - start,) if shape is None else shape, start, stop, D)


def body(
    *tensors: Tensor, created_at: str = "2026-11-29T12:00:00Z", paths: tuple[str, ...] = ("w",), **more: Any
) -> bytes:
    files = tuple(File(path, 64, D, (0,), tensors) for path in paths)
    return Manifest(created_at, (CHUNK,), files, **more).encode()


def test_tensors_in_their_order() -> None:
    good = [
        tensor("a", 0, 8),
        tensor("none", 8, 8),
        tensor("b", 8, 12, dtype="F32", shape=()),
        tensor("x", 12, 14, dtype="NEW"),
    ]
    assert len(parse_manifest(body(*good)).files[0].tensors) == 4


@pytest.mark.parametrize(
    "made",
    [
        body(tensor("a", 0, 8), tensor("b", 4, 12)),
        body(tensor("b", 8, 12), tensor("a", 0, 8)),
        body(tensor("a", 0, 8, dtype="F32")),
        body(tensor("a", 0, 8, shape=(2**63, 2**63))),
        body(tensor("a", 0, 1, shape=(1,) * 65)),
        body(created_at="2026-02-31T12:00:00Z"),
        body(created_at="2026-11-29T25:00:00Z"),
        body(annotations={"a": "x" * (2 << 20)}),
        body(annotations={"a": "\x1b[2J"}),
        body(annotations={"name": "!"}).replace(b"!", b"\\ud800"),
        body(annotations={"name": "!"}).replace(b"!", b"\xff"),
        body(tensor("!", 0, 8)).replace(b"!", b"\\udc80"),
        body(paths=("a", "a/b")),
        body(paths=("a/b", "a/b-c", "a/b/c")),
        b"[" * 100_000,
        b'{"format":"mfs-manifest","version":1,"chunks":[' + b"[]," * 2_100_000 + b"[]]}",
        b'{"format":"mfs-manifest","version":1,"chunks":[' + b"0," * 8_100_000 + b"0]}",
    ],
    ids=range(17),
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(made: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        parse_manifest(made, manifest_id(made))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_nothing_is_made_of_a_manifest_before_its_signature_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    place = FolderPlace(tmp_path)
    made = body()
    key = layout.manifest_key("llama", manifest_id(made))
    place.put(key, made)

    def refuse(model: str, found: bytes, deadline_s: float) -> None:
        raise AccessError("not signed")

    monkeypatch.setattr("mfs.registry.revisions.parse_manifest", lambda *_: pytest.fail("was parsed"))
    revisions = Revisions(lambda _: place.store(), refuse)
    with pytest.raises(AccessError):
        revisions.get("llama", manifest_id(made), deadline_s=deadline())
    place.put(key, made + b" ")
    with pytest.raises(IntegrityError):
        revisions.get("llama", manifest_id(made), deadline_s=deadline())


def test_folders_of_deep_paths_take_what_their_names_take() -> None:
    paths = tuple(sorted("/".join(["d"] * 400 + [f"{number:03}", "f"]) for number in range(500)))
    assert len(parse_manifest(body(paths=paths)).files) == 500


def test_chunks_of_one_byte_cost_one_look_each() -> None:
    looks = 0

    class Counted(int):
        def __lt__(self, other: int) -> bool:
            nonlocal looks
            looks += 1
            return int(self) < other

    tensors = [Tensor("t", "U8", (1,), Counted(start), Counted(start + 1), D) for start in range(2000)]
    list(chunk_keys("w", tensors, ((start, start + 1) for start in range(2000))))
    assert looks < 20 * 2000


def test_models_of_like_names_are_looked_at_first(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = FolderPlace(tmp_path)
    for name in ("aaa", "llama-7b", "phi", "tuned-llama", "zzz-7b"):
        place.put(layout.tag_key(name, "v1", 1), b"")
    asked: list[str] = []
    monkeypatch.setattr("mfs.registry.bases.MODELS_MAX", 2)
    monkeypatch.setattr("mfs.registry.bases.revisions_of", lambda store, tags, other, **_: asked.append(other) or [])
    assert list(candidates(FolderStore(str(tmp_path)), "llama-7b-tuned", [])) == []
    assert sorted(asked) == ["llama-7b", "tuned-llama"]


def test_a_manifest_fits_what_is_read_of_one() -> None:
    from mfs.registry.store import SMALL_BYTES_MAX

    assert manifest.BYTES_MAX == SMALL_BYTES_MAX
    row = [[CHUNK.id, 8 << 20, 8 << 20]] * 1000
    assert 5e12 / (8 << 20) * (len(json.dumps(row, separators=(",", ":"))) / 1000 + 7) < manifest.BYTES_MAX
