"""Which files a model is: transformers' and diffusers' rules, an index's promises, and strangers' names in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gpuload
from gpuload.cli.digesting import digest_model
from gpuload.cli.planning import examine
from gpuload.client.asking import load_resident
from gpuload.client.attached import attach
from gpuload.hooks.weights import weights_of
from gpuload.moving import model_files
from gpuload.moving.model_files import find_shards
from gpuload.moving.shards import close_shards, open_shards
from gpuload.testing import ServerThread
from mfs.errors import ChangedError, IntegrityError, MfsError, NotFoundError, StoreError, UsageError

INDEX = "model.safetensors.index.json"
SIDE = bytes.fromhex("0005160700020000") + bytes(4088)
"""What a Mac leaves beside a file on a foreign file system, as '._NAME'."""


def tensors(names: str, value: float = 1) -> dict[str, torch.Tensor]:
    return {name: torch.full((3,), value) for name in names.split()}


def lay(folder: Path, files: dict[str, Any]) -> Path:
    """Name -> names of its tensors, bytes, or the weight map of an index."""
    for number, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            save_file(tensors(content, number), path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps({"metadata": {}, "weight_map": content}))
    return folder


FOUND: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an index": ({INDEX: {"a": "x.safetensors"}, "x.safetensors": "a", "y.safetensors": "a"}, ["x.safetensors"]),
    "an index of another day": ({"model.safetensors": "a", INDEX: {"b": "gone.safetensors"}}, ["model.safetensors"]),
    "one that is none, of another day": ({"model.safetensors": "a", INDEX: b"[]"}, ["model.safetensors"]),
    "diffusers has the index first": (
        {"diffusion_pytorch_model.safetensors": "a", "d.safetensors": "a",
         "diffusion_pytorch_model.safetensors.index.json": {"a": "d.safetensors"}}, ["d.safetensors"],
    ),
    "model's of two": ({INDEX: {"a": "x.safetensors"}, "o.safetensors.index.json": {"a": "y.safetensors"}},
                       ["x.safetensors"]),
    "the maker's own form": ({"model-1.safetensors": "a", "consolidated.safetensors": "z"}, ["model-1.safetensors"]),
    "the maker's own index": (
        {"net.safetensors.index.json": {"a": "n.safetensors"}, "consolidated.safetensors.index.json": {"a": "c"}},
        ["n.safetensors"],
    ),
    "the maker's own form alone": (
        {"consolidated.00.safetensors": "a", "consolidated.01.safetensors": "b"},
        ["consolidated.00.safetensors", "consolidated.01.safetensors"],
    ),
    "an adapter beside": ({"model-1.safetensors": "a", "adapter_model.safetensors": "q"}, ["model-1.safetensors"]),
    "an adapter alone": ({"adapter_model.safetensors": "q"}, ["adapter_model.safetensors"]),
    "a variant beside": ({"ae.safetensors": "a", "ae.fp16.safetensors": "a"}, ["ae.safetensors"]),
    "a variant beside, diffusers": (
        {"diffusion_pytorch_model.safetensors": "a", "diffusion_pytorch_model.non_ema.safetensors": "a"},
        ["diffusion_pytorch_model.safetensors"],
    ),
    "a variant alone": ({"model.fp16.safetensors": "a"}, ["model.fp16.safetensors"]),
    "shards of a variant": (
        {"model.fp16-00001-of-00001.safetensors": "a",
         "model.safetensors.index.fp16.json": {"a": "model.fp16-00001-of-00001.safetensors"}},
        ["model.fp16-00001-of-00001.safetensors"],
    ),
    "shards of a variant, as diffusers once wrote them": (
        {"d-00001-of-00001.fp16.safetensors": "a",
         "d.safetensors.fp16.index.json": {"a": "d-00001-of-00001.fp16.safetensors"}},
        ["d-00001-of-00001.fp16.safetensors"],
    ),
    "shards of both, no index": (
        {"n-00001-of-00002.safetensors": "a", "n-00002-of-00002.safetensors": "b",
         "n.fp16-00001-of-00001.safetensors": "a b", "n.safetensors.index.fp16.json": {"a": "x"}},
        ["n-00001-of-00002.safetensors", "n-00002-of-00002.safetensors"],
    ),
    "no variant: it holds others": ({"a.safetensors": "a", "a.b.safetensors": "b"},
                                    ["a.b.safetensors", "a.safetensors"]),
    "side files": ({"n.safetensors": "a", "._n.safetensors": SIDE, ".x.safetensors": SIDE, f"._{INDEX}": SIDE},
                   ["n.safetensors"]),
    "folders": ({"n.safetensors": "a", "old.safetensors/x": b"", f"{INDEX}/x": b""}, ["n.safetensors"]),
    "below": ({INDEX: {"e": "e.safetensors", "l": "./layers.0/l.safetensors"}},
              ["e.safetensors", "layers.0/l.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_files_are_found_as_the_libraries_find_them(name: str, tmp_path: Path) -> None:
    files, want = FOUND[name]
    found = find_shards(lay(tmp_path, files))
    assert sorted(str(path.relative_to(tmp_path)) for path in found.paths) == want


@pytest.mark.parametrize(
    ("files", "error", "why"),
    [
        ({"a.safetensors.index.json": {}, "b.safetensors.index.json": {}}, UsageError, "2 indexes"),
        ({"n.safetensors": "a b", "m.safetensors": "b"}, UsageError, "n.safetensors"),
        ({"m.fp16.safetensors": "a", "m.bf16.safetensors": "a"}, UsageError, "m.fp16.safetensors"),
        ({"m-00001-of-00003.safetensors": "a", "m-00003-of-00003.safetensors": "b"}, IntegrityError, "2 of the 3"),
        ({INDEX: {"a": "gone.safetensors"}}, NotFoundError, "gone.safetensors"),
        ({INDEX: {"a": "x.safetensors", "b": None}, "x.safetensors": "a"}, IntegrityError, "None"),
        ({INDEX: {"a": ["x.safetensors"]}, "x.safetensors": "a"}, IntegrityError, "['x.safetensors']"),
        ({"readme.txt": b""}, NotFoundError, "no .safetensors"),
    ],
)
def test_what_does_not_say_which_is_refused(
    files: dict[str, Any], error: type[MfsError], why: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        gpuload.load_model(lay(tmp_path, files))
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_are_followed_and_a_broken_one_is_not_passed_over(tmp_path: Path) -> None:
    """A snapshot in the Hub's cache is links out of its folder."""
    lay(tmp_path, {"blobs/1": "a", "snapshot/x": b"", "snapshot/" + INDEX: {"a": "w/m.safetensors"}})
    (tmp_path / "snapshot" / "w").mkdir()
    (tmp_path / "snapshot" / "w" / "m.safetensors").symlink_to("../../blobs/1")
    assert list(gpuload.load_model(tmp_path / "snapshot")) == ["a"]
    for goal, error in ("gone", NotFoundError), ("n.safetensors", StoreError):
        (tmp_path / "blobs" / "n.safetensors").unlink(missing_ok=True)
        (tmp_path / "blobs" / "n.safetensors").symlink_to(goal)
        with pytest.raises(error, match=r"n\.safetensors"):
            gpuload.load_model(tmp_path / "blobs")


@pytest.mark.parametrize("goal", ["gone", "model.safetensors", "x.safetensors/y"])
@pytest.mark.parametrize("stem", ["model", "net"])
def test_a_link_that_leads_nowhere_is_not_before_its_index(stem: str, goal: str, tmp_path: Path) -> None:
    lay(tmp_path, {"x.safetensors": "a", f"{stem}.safetensors.index.json": {"a": "x.safetensors"}})
    (tmp_path / f"{stem}.safetensors").symlink_to(goal.replace("model", stem))
    assert list(gpuload.load_model(tmp_path)) == ["a"]
    (tmp_path / f"{stem}.safetensors.index.json").unlink()
    with pytest.raises(MfsError, match=rf"{stem}\.safetensors: "):
        gpuload.load_model(tmp_path)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="is not a file"):
        gpuload.load_file(tmp_path / "x.safetensors")


def test_an_index_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "INDEX_BYTES_MAX", 100)
    lay(tmp_path, {INDEX: {"a" * 200: "x.safetensors"}})
    with pytest.raises(IntegrityError, match="more than 100 bytes"):
        gpuload.load_model(tmp_path)


BROKEN = {"m-1.safetensors": "a", "m-2.safetensors": "b", INDEX: {"a": "m-1.safetensors", "lm_head": "m-2.safetensors"}}
"""The index promises what the second file does not hold."""

OVERLAID = {
    "base.safetensors": "a b c", "over.safetensors": "b c d",
    INDEX: {"a": "base.safetensors", "b": "over.safetensors", "c": "base.safetensors"},
}  # fmt: skip
"""Two files hold 'b' and 'c', each in its own value: 0 the base's, 1 the other's. 'd' the index does not name."""

DOORS: dict[str, Callable[[Path], object]] = {
    "load_model": gpuload.load_model,
    "of the index": lambda folder: gpuload.load_model(folder / INDEX),
    "stream": lambda folder: list(gpuload.stream(folder)),
    "plan": lambda folder: examine(str(folder), 0, None, {}, {}, "/nonexistent/s.sock"),
    "digest": lambda folder: digest_model(folder, folder=folder / "digests"),
    "load": lambda folder: load_resident(folder, "m", "cpu", socket_path="/nonexistent/s.sock"),
    "engines' plugins": lambda folder: list(weights_of(sorted(map(str, folder.glob("*.safetensors"))))),
}


@pytest.mark.parametrize("door", DOORS)
def test_an_index_is_held_to_its_promises(door: str, tmp_path: Path) -> None:
    lay(tmp_path, BROKEN)
    with pytest.raises(IntegrityError, match=r"'m-2\.safetensors' holds tensor 'lm_head', which it does not") as caught:
        DOORS[door](tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("server", [True], indirect=True)
@pytest.mark.parametrize("swapped", [False, True], ids=["base first", "base last"])
def test_the_index_decides_who_gives_a_tensor(swapped: bool, tmp_path: Path, server: ServerThread) -> None:
    names = {"base.safetensors": "z.safetensors", "over.safetensors": "o.safetensors"} if swapped else {}
    files: dict[str, Any] = {names.get(name, name): content for name, content in OVERLAID.items()}
    files[INDEX] = {tensor: names.get(name, name) for tensor, name in OVERLAID[INDEX].items()}  # type: ignore[union-attr]
    lay(tmp_path, files)
    want = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}

    def values(made: Any) -> dict[str, float]:
        return {name: float(tensor[0]) for name, tensor in dict(made).items()}

    assert values(gpuload.load_model(tmp_path)) == want
    assert values(gpuload.stream(tmp_path)) == want
    picked = sorted(map(str, tmp_path.glob("*.safetensors")))
    assert sorted(name for name, _ in weights_of(picked)) == ["a", "b", "c", "d"]
    assert values(weights_of(picked)) == want
    load_resident(tmp_path, "m", "cpu", socket_path=server.socket_path)
    assert values(attach("m", socket_path=server.socket_path)) == want


def test_what_no_index_names_is_the_last_files(tmp_path: Path) -> None:
    """As transformers reads them one after the other."""
    lay(tmp_path, {"1.safetensors": "a x", "2.safetensors": "b x", INDEX: {"a": "1.safetensors", "b": "2.safetensors"}})
    assert float(gpuload.load_model(tmp_path)["x"][0]) == 1


FEW = """
import resource, subprocess, sys, threading
from pathlib import Path
import gpuload
from gpuload.cli.digesting import digest_model
from gpuload.cli.planning import examine
from gpuload.client.asking import load_resident
folder, socket_path, soft, hard = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard)))
print(len(gpuload.load_model(folder)))
print(sum(1 for _ in gpuload.stream(folder)))
print(examine(folder, 0, None, {}, {}, "/nonexistent/s.sock")["tensors_count"])
print(len(digest_model(folder, folder=Path(folder, "digests"))["files"]))
print(load_resident(folder, "m", "cpu", socket_path=socket_path)["tensors_count"])
print(subprocess.run(["sh", "-c", "ulimit -S -n"], capture_output=True, text=True).stdout.strip())
"""


@pytest.mark.parametrize("server", [True], indirect=True)
@pytest.mark.parametrize(("count", "hard"), [(70, 4096), (200, 64)])
def test_many_files_and_few_descriptors(count: int, hard: int, tmp_path: Path, server: ServerThread) -> None:
    """And the limit is what it was, for children too."""
    for i in range(count):
        save_file({f"t{i}": torch.ones(3)}, tmp_path / f"m-{i:05}.safetensors")
    command = [sys.executable, "-c", FEW, str(tmp_path), server.socket_path, "64", str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(count)] * 5 + ["64"], done.stderr


def test_a_file_that_could_not_stay_open_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuload.moving.shards.spare_descriptors", lambda: 0)
    path = lay(tmp_path, {"x.safetensors": "a"}) / "x.safetensors"
    (shard,) = shards = open_shards([path])
    with shard.opened() as fd:
        assert os.fstat(fd).st_ino == shard.inode
    save_file(tensors("a", 7), tmp_path / "y")
    (tmp_path / "y").replace(path)
    with pytest.raises(ChangedError, match=r"x\.safetensors changed"), shard.opened():
        pass
    close_shards(shards)
