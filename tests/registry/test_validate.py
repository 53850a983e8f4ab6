"""What may not be published is refused before anything is sent, in one line: file, place, reason, what to do."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mfs.errors import MfsError, UsageError
from mfs.registry.scan import scan
from mfs.registry.validate import Checked, validate
from mfs.sources.fence import CACHE_MARKER


def checked(folder: Path, *, allow_pickle: bool = False) -> Checked:
    return validate(scan(str(folder)), allow_pickle=allow_pickle)


def refusal(folder: Path, *, allow_pickle: bool = False) -> str:
    with pytest.raises(MfsError) as raised:
        checked(folder, allow_pickle=allow_pickle)
    assert isinstance(raised.value, UsageError)
    line = str(raised.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


def safetensors(*entries: tuple[str, dict[str, object]], data: bytes, text: str | None = None) -> bytes:
    header = (text or json.dumps(dict(entries))).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = safetensors(("a", entry("U8", [4], 0, 4)), ("b", entry("U8", [2], 4, 6)), data=bytes(6))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes, expected at least 8"),
        (b"\xff" * 9, "a header of"),
        (GOOD[:-1], "file cut short"),
        (GOOD + b"\0", "longer than its tensors"),
        (safetensors(("a", entry("U8", [4], 0, 4)), ("b", entry("U8", [2], 5, 7)), data=bytes(7)), "a hole"),
        (safetensors(("a", entry("U8", [4], 0, 4)), ("b", entry("U8", [2], 3, 5)), data=bytes(5)), "an overlap"),
        (safetensors(("a", entry("F32", [2], 0, 4)), data=bytes(4)), "8 bytes, its data_offsets say 4"),
        (safetensors(("a", entry("F33", [2], 0, 4)), data=bytes(4)), "dtype"),
        (safetensors(("a", entry("F4", [3], 0, 2)), data=bytes(2)), "not a whole number of bytes"),
        (safetensors(("a", entry("U8", [2**40, 2**40], 0, 2)), data=bytes(2)), "more than 2^64"),
        (safetensors(text=' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', data=b"x"), "does not begin"),
        (safetensors(text='{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                          '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', data=b"x"), "more than once"),
        (safetensors(("x is not aligned: U8 at byte 1", entry("U8", [1], 0, 1) | {"more": 1}), data=b"x"),
         "unknown keys"),
        (safetensors(text="[1]", data=b""), "not a JSON object"),
        (safetensors(text='{"__metadata__":{"a":1}}', data=b""), "expected a string"),
    ],
)  # fmt: skip
def test_a_safetensors_file_that_is_not_clean_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/model.safetensors").write_bytes(content)
    line = refusal(tmp_path)
    assert line.startswith("deep/model.safetensors: header, bytes 0 to ")
    assert reason in line
    assert line.endswith("save it again with the safetensors library")


def test_what_is_only_not_aligned_is_warned_of(tmp_path: Path) -> None:
    content = safetensors(("a", entry("U8", [1], 0, 1)), ("b", entry("F32", [1], 1, 5)), data=bytes(5))
    (tmp_path / "model.safetensors").write_bytes(content)
    found = checked(tmp_path)
    assert "model.safetensors" in found.headers
    assert any("not aligned" in warning for warning in found.warnings)


def index(folder: Path, weight_map: object, total: int = 6) -> None:
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "model-1.safetensors", "b": "model-2.safetensors"}, "'model-2.safetensors', which is not there"),
        ({"a": "model-1.safetensors", "z": "model-1.safetensors"}, "holds 'z', which it does not"),
        ({"a": "../model-1.safetensors"}, "empty, '.' or '..'"),
        ({"a": "/model-1.safetensors"}, "empty, '.' or '..'"),
        ({"a": 7}, "is no text"),
        ([], "expected an object"),
    ],
)
def test_an_index_that_promises_too_much_is_refused(tmp_path: Path, weight_map: object, reason: str) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(GOOD)
    index(tmp_path, weight_map)
    line = refusal(tmp_path)
    assert line.startswith("model.safetensors.index.json: ")
    assert reason in line


def test_an_index_is_compared_with_its_shards(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(GOOD)
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-1.safetensors"})
    assert checked(tmp_path).warnings == ()
    index(tmp_path, {"a": "model-1.safetensors"}, total=7)
    unnamed, size = checked(tmp_path).warnings
    assert "does not name 'b' of model-1.safetensors" in unnamed
    assert "total_size is 7" in size
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "no JSON" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"what": "ever"}')
    assert checked(tmp_path).warnings == ()


def archive(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, content in members:
            made.writestr(name, content)
    return out.getvalue()


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


PICKLES: list[tuple[str, bytes]] = [
    *((f"model{protocol}.bin", pickle.dumps({"a": list(range(99))}, protocol)) for protocol in range(6)),
    ("harmless.txt", pickle.dumps({"a": [1, 2, 3]}, 4)),
    ("large.dat", pickle.dumps(np.zeros(200_000), 4)),
    ("pytorch_model.bin", archive(("archive/data.pkl", pickle.dumps({})), ("archive/data/0", bytes(99)))),
    ("model.pt", archive(("x/data.pkl", b""))),
    ("renamed.safetensor", archive(("data.PKL", b"x"))),
    ("model.ckpt", archive(("a", b"b"))[:-10]),
    ("objects.npy", saved(np.array([{}], dtype=object))),
    ("objects.npz", archive(("arr_0.npy", saved(np.array([{}], dtype=object))))),
]


@pytest.mark.parametrize(("name", "content"), PICKLES, ids=[name for name, _ in PICKLES])
def test_a_pickle_is_refused_wherever_it_hides(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    line = refusal(tmp_path)
    assert line.startswith(f"{name}: ")
    assert "pickle" in line
    assert "--allow-pickle" in line
    checked(tmp_path, allow_pickle=True)


def test_a_pickle_of_torch_is_refused(tmp_path: Path) -> None:
    import torch

    for new in (True, False):
        torch.save({"w": torch.zeros(50)}, tmp_path / "weights.data", _use_new_zipfile_serialization=new)
        assert "pickle" in refusal(tmp_path)


FINE: list[tuple[str, bytes]] = [
    ("tokenizer.bin", bytes(range(256)) * 40),
    ("zeros.bin", bytes(1000)),
    ("empty.pt", b""),
    ("ggml.bin", b"lmgg" + np.random.default_rng(1).bytes(5000)),
    ("words.bin", b"the quick brown fox"),
    ("array.npy", saved(np.zeros(9))),
    ("arrays.npz", archive(("a.npy", saved(np.zeros(9))))),
    ("docs.zip", archive(("README.md", b"hello"))),
    ("broken.zip", b"PK\x03\x04" + bytes(100)),
    ("noise.dat", b"\x80\x04" + np.random.default_rng(2).bytes(99_999)),
]


@pytest.mark.parametrize(("name", "content"), FINE, ids=[name for name, _ in FINE])
def test_what_is_no_pickle_is_fine(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert checked(tmp_path).warnings == ()


def make_pipe(place: Path) -> None:
    os.mkfifo(place / "pipe")


def make_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(place / "socket"))


def make_cache(place: Path) -> None:
    (place / "cache").mkdir()
    (place / "cache" / CACHE_MARKER).write_text("{}")


SPECIAL: list[tuple[Callable[[Path], object], str]] = [
    (make_pipe, "pipe: neither a file nor a directory"),
    (make_socket, "socket: neither a file nor a directory"),
    (make_cache, "cache: the cache of a mount"),
    (lambda place: (place / "link").symlink_to("nowhere"), "link: a link that leads nowhere"),
    (lambda place: (place / "loop").symlink_to("loop"), "loop: a link that leads nowhere"),
    (lambda place: (place / "up").symlink_to(".."), "up: a link to a directory"),
    (lambda place: (place / "a\x1b[1mb").write_text(""), "control characters"),
    (lambda place: (place / os.fsdecode(b"\xff")).write_text(""), "not valid UTF-8"),
    (lambda place: (place / "a\nb").mkdir(), "control characters"),
]


@pytest.mark.parametrize(("make", "reason"), SPECIAL, ids=[reason[:9] for _, reason in SPECIAL])
def test_what_no_revision_can_hold_is_refused(
    tmp_path: Path, make: Callable[[Path], object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    make(tmp_path)
    assert reason in refusal(tmp_path)


def test_names_with_a_dot_are_left_out_and_said(tmp_path: Path) -> None:
    for name in (".git", ".cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    assert "holds no file to push but those whose names begin with a dot: .DS_Store, .cache, .git" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    found = scan(str(tmp_path))
    assert [file.path for file in found.files] == ["config.json"]
    assert found.left_out == (".DS_Store", ".cache", ".git")


def test_the_hubs_cache_can_be_pushed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    (tmp_path / "blobs/1").write_bytes(GOOD)
    (tmp_path / "snapshots/abc/model.safetensors").symlink_to("../../blobs/1")
    found = checked(tmp_path / "snapshots/abc")
    assert found.headers["model.safetensors"].file_bytes == len(GOOD)


def test_what_is_no_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "nothing"):
        with pytest.raises(MfsError, match="not a directory of files to push"):
            scan(str(tmp_path / name))
