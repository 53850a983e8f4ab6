"""Small models on disk, and revisions read back by hand."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from blake3 import blake3
from safetensors.numpy import save_file

from mfs.registry import layout, opening, push, tags
from mfs.registry.chunk_io import read_chunk
from mfs.registry.manifest import Manifest, parse_manifest
from mfs.registry.push import Options, Pushed, Told
from mfs.registry.store import Store
from mfs.sources.options import SourceOptions

Tensors = dict[str, np.ndarray]


def soon() -> float:
    return time.monotonic() + 60


def tensors(seed: int = 1, scale: float = 0.05) -> Tensors:
    """Some 3 MB: an embedding of its own chunks, small ones that are grouped, one that is empty, indexes."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * scale).astype(ml_dtypes.bfloat16)

    made: Tensors = {"embedding": weights(3400, 160)}
    for layer in range(4):
        made[f"layer.{layer}.weight"] = weights(160, 600)
        made[f"layer.{layer}.bias"] = weights(160)
    made["head"] = weights(160, 3400)
    made["nothing"] = weights(0, 4)
    made["positions"] = np.arange(512, dtype=np.int64)
    return made


def trained(before: Tensors, seed: int, names: str = "") -> Tensors:
    """The same after some steps: bf16 words moved by a few units, of tensors whose names begin with `names`."""
    rng = np.random.default_rng(seed)

    def moved(tensor: np.ndarray) -> np.ndarray:
        words = tensor.view(np.uint16)
        return (words + rng.integers(-2, 3, words.shape).astype(np.uint16)).view(tensor.dtype)

    return {
        name: moved(tensor) if name.startswith(names) and tensor.dtype == ml_dtypes.bfloat16 else tensor
        for name, tensor in before.items()
    }


def write_model(folder: Path, content: Tensors | Mapping[str, Tensors], **files: str) -> Path:
    """A directory with `model.safetensors`, or several shards by name, a config and other files."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = content if all(isinstance(value, dict) for value in content.values()) else {"model.safetensors": content}
    for name, shard in shards.items():
        save_file(dict(shard), folder / name, metadata={"format": "pt"})  # type: ignore[arg-type]
    (folder / "config.json").write_text('{"hidden_size": 160}')
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def do_push(url: str, folder: Path, options: Options | None = None, told: Told = lambda step: None) -> Pushed:
    """Push as the command does. url: 'mfs+…://…/model:tag'."""
    return push_to(url, folder, SourceOptions(), options or Options(), told)


def push_to(url: str, folder: Path, reach: SourceOptions, options: Options, told: Told = lambda step: None) -> Pushed:
    place = opening.open_or_create(layout.parse_address(url), reach, deadline_s=soon())
    try:
        return push.push(place, *push.examine(str(folder), options), options, told)
    finally:
        place.store.close()


def read_manifest(store: Store, model: str, tag: str) -> Manifest:
    move = tags.current(store, model, tag, deadline_s=soon())
    assert move is not None
    assert move.manifest is not None
    return parse_manifest(store.read(layout.manifest_key(model, move.manifest), deadline_s=soon()), move.manifest)


def check_revision(store: Store, manifest: Manifest, folder: Path) -> None:
    """That a revision is the directory, byte for byte, and that all it says is so."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {file.path for file in manifest.files} == {name for name in names if not name.startswith(".")}
    ids = {chunk.id for chunk in manifest.chunks}
    stood_on: set[str] = set()
    for file in manifest.files:
        body = b""
        for index in file.chunks:
            chunk = manifest.chunks[index]
            plain = read_chunk(store, chunk.id, chunk.plain_bytes)
            stood_on.update(plain.bases)
            body += plain.data
        assert body == (folder / file.path).read_bytes()
        assert hashlib.sha256(body).hexdigest() == file.sha256
        for tensor in file.tensors:
            assert blake3(body[tensor.start : tensor.stop]).hexdigest() == tensor.blake3
    assert stood_on - ids <= set(manifest.requires)


def keys_below(root: Path, prefix: str) -> set[str]:
    """Objects of a registry in a folder."""
    return {str(path.relative_to(root)) for path in (root / prefix).rglob("*") if path.is_file()}
