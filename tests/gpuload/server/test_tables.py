"""Large tables are read in a process of their own: the same tables, the same refusals, bounded."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuload.moving.shards import read_header
from gpuload.server import tables
from mfs.errors import IntegrityError, MfsError, UsageError


def _file(path: Path, header: bytes, data_bytes: int = 0) -> int:
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + data_bytes)
    return os.open(path, os.O_RDONLY)


def _u8(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [start, stop]}


HEADERS: dict[str, tuple[bytes, int]] = {
    "nothing": (b"{}", 0),
    "metadata": (json.dumps({"__metadata__": {"ключ": "значение", "": ""}, "w": _u8([2], 0, 2)}).encode(), 2),
    "shapes": (json.dumps({"a": _u8([], 0, 1), "b": _u8([0, 2**63], 1, 1), "c": _u8([1] * 9, 1, 2)}).encode(), 2),
    "odd": (b' {"x": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5], "more": 1}, "y": '
            + json.dumps(_u8([1], 0, 1)).encode() + b"}", 5),
    "many": (json.dumps({f"t{i}": _u8([1], i, i + 1) for i in range(2000)}).encode(), 2000),
    "no JSON": (b"{" * 50, 0),
    "deep": (b'{"a":' + b"[" * 100_000, 0),
    "a hole": (json.dumps({"w": _u8([2], 1, 3)}).encode(), 3),
    "cut short": (json.dumps({"w": _u8([2], 0, 2)}).encode(), 1),
    "no UTF-8": (b'{"\xff": 1}', 0),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_table_read_by_a_child_is_the_same_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PARSED_HERE_BYTES_MAX", 0)
    fd = _file(tmp_path / "x.safetensors", *HEADERS[name])
    try:
        want: object = read_header(fd, "x.safetensors")
    except MfsError as error:
        want = (type(error), str(error))
    try:
        got: object = tables.read_table(fd, "x.safetensors", who=1)
    except MfsError as error:
        got = (type(error), str(error))
    assert got == want
    os.close(fd)


@pytest.mark.parametrize(
    ("made", "data_bytes", "error", "match"),
    [  # made when needed: as parameters, 140 MB would stand in every process of a test run
        (lambda: b'{"w":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":[' + b"[]," * 20_000_000 + b"0]}}", 1,
         IntegrityError, "its header takes more than 1024 MiB to read"),
        (lambda: json.dumps({"__metadata__": {"": "x" * (17 << 20)}}).encode(), 0,
         UsageError, "characters of metadata"),
        (lambda: json.dumps({"x" * (65 << 20): _u8([], 0, 1)}).encode(), 1,
         UsageError, "characters of names and shapes"),
    ],
    ids=["memory", "metadata", "names"],
)  # fmt: skip
def test_a_legal_table_that_is_too_large_to_serve_is_one_line(
    made: Callable[[], bytes], data_bytes: int, error: type[MfsError], match: str, tmp_path: Path
) -> None:
    fd = _file(tmp_path / "x.safetensors", made(), data_bytes)
    with pytest.raises(error, match=match) as caught:
        tables.read_table(fd, "x.safetensors", who=1)
    assert str(caught.value).startswith("x.safetensors: ")
    assert tables._children.taken_count == 0
    os.close(fd)


@pytest.mark.parametrize("parsed_here", [0, 1 << 20], ids=["by a child", "here"])
def test_a_model_of_more_tensors_than_are_kept_is_refused(
    parsed_here: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PARSED_HERE_BYTES_MAX", parsed_here)
    monkeypatch.setattr(tables, "TENSORS_MAX", 1000)
    fd = _file(tmp_path / "x.safetensors", *HEADERS["many"])
    with pytest.raises(UsageError, match=r"2000 tensors.*1000.*gpuload\.load_file"):
        tables.read_table(fd, "x.safetensors", who=1, tensors_max=1000)
    os.close(fd)


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PARSED_HERE_BYTES_MAX", 0)
    monkeypatch.setattr(tables, "PARSE_S", 0.01)
    fd = _file(tmp_path / "x.safetensors", *HEADERS["many"])
    with pytest.raises(IntegrityError, match="too much memory or time"):
        tables.read_table(fd, "x.safetensors", who=1)
    os.close(fd)
