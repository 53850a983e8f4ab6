"""Whether what is in a directory may be published: said before anything is sent.

safetensors   exactly as the format's text has them; what is only not aligned is warned of
indexes       *.index.json names shards that are there and hold what it says
pickles       refused wherever they hide, see `pickles`
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfs.errors import IntegrityError, UsageError
from mfs.registry import pickles
from mfs.registry.hashing import read_span
from mfs.registry.manifest import path_fault
from mfs.registry.scan import Scan
from mfs.safetensors import LENGTH_BYTES, Header, header_bytes_needed, parse_header
from mfs.sources import Source
from mfs.sources.bounds import parse_json
from mfs.types import ObjectId

INDEX_BYTES_MAX = 256 << 20
"""Of an index of shards; those of the largest models have some 10 MB."""

_NAMED_MAX = 3
_MISALIGNED = re.compile(r" is not aligned: [A-Z0-9_]+ at byte \d+$", re.ASCII)


@dataclass(frozen=True)
class Checked:
    """What was found good."""

    headers: Mapping[str, Header]
    """By path, of every safetensors file."""
    warnings: tuple[str, ...]
    """One line each: what is allowed and better otherwise."""


def validate(found: Scan, *, allow_pickle: bool) -> Checked:
    """Look into every file of a scan. Raises: UsageError naming file, place, reason and what to do."""
    source, warnings = found.source(), list[str]()
    headers = {obj.path: _header(source, obj, warnings) for obj in found.files if _is_safetensors(obj.path)}
    by_path = {obj.path: obj for obj in found.files}
    for obj in found.files:
        if obj.path.endswith(".index.json"):
            _check_index(source, obj, by_path, headers, warnings)
        elif obj.path not in headers and not allow_pickle and (fault := pickles.fault(source, obj)):
            raise UsageError(
                f"{obj.path}: {fault}, which runs code in whoever loads it; save it as safetensors, remove it, or "
                "push it all the same with --allow-pickle"
            )
    return Checked(headers, tuple(warnings))


def _is_safetensors(path: str) -> bool:
    return path.lower().endswith(".safetensors")


def _header(source: Source, obj: ObjectId, warnings: list[str]) -> Header:
    end = min(LENGTH_BYTES, obj.size)
    try:
        first = read_span(source, obj, 0, end, memoryview(bytearray(LENGTH_BYTES)))
        end = min(header_bytes_needed(first), obj.size)
        header = parse_header(read_span(source, obj, 0, end, memoryview(bytearray(end))), obj.size)
    except IntegrityError as error:
        raise UsageError(f"{obj.path}: header, bytes 0 to {end}: {error}; {_AGAIN}") from None
    for oddity in header.oddities:
        if not _MISALIGNED.search(oddity):  # by its end, since the names in it are strangers'
            raise UsageError(f"{obj.path}: header, bytes 0 to {end}: {oddity}; {_AGAIN}")
        warnings.append(f"{obj.path}: {oddity}; loaders copy such tensors, {_AGAIN}")
    return header


_AGAIN = "save it again with the safetensors library"


def _check_index(
    source: Source, obj: ObjectId, by_path: Mapping[str, ObjectId], headers: Mapping[str, Header], warnings: list[str]
) -> None:
    """What an index of shards promises, against the shards."""
    index = _index(source, obj)
    if index is None:
        return
    folder = f"{obj.path.rpartition('/')[0]}/" if "/" in obj.path else ""
    promised: dict[str, set[str]] = {}
    for tensor, shard in index["weight_map"].items():
        if not isinstance(shard, str) or (fault := path_fault(shard)):
            why = fault if isinstance(shard, str) else "is no text"
            raise UsageError(f"{obj.path}: weight_map[{tensor!r:.100}] is {shard!r:.100}, which {why}; mend the index")
        promised.setdefault(folder + shard, set()).add(tensor)
    if absent := sorted(promised.keys() - by_path.keys()):
        raise UsageError(
            f"{obj.path}: names {_some(absent)}, which {'is' if len(absent) == 1 else 'are'} not there; add the "
            "missing files or mend the index"
        )
    total = 0
    for shard, tensors in sorted(promised.items()):
        if (header := headers.get(shard)) is None:
            continue  # shards of pickles: their tensors are not ours to look for
        has = header.by_name.keys()
        if lacking := sorted(tensors - has):
            raise UsageError(f"{obj.path}: says that {shard} holds {_some(lacking)}, which it does not; mend the index")
        if unnamed := sorted(has - tensors):
            warnings.append(f"{obj.path}: does not name {_some(unnamed)} of {shard}; loaders may miss them")
        total += header.data_bytes
    stated = index["metadata"].get("total_size") if isinstance(index.get("metadata"), dict) else None
    if promised.keys() <= headers.keys() and isinstance(stated, int | float) and stated != total:
        warnings.append(f"{obj.path}: total_size is {stated}, its shards hold {total} bytes of tensors")


def _index(source: Source, obj: ObjectId) -> dict[str, Any] | None:
    """An index of shards; None for JSON that is something else. Raises: UsageError."""
    if obj.size > INDEX_BYTES_MAX:
        raise UsageError(f"{obj.path}: an index of {obj.size} bytes, more than {INDEX_BYTES_MAX}; name it otherwise")
    try:
        body = bytes(read_span(source, obj, 0, obj.size, memoryview(bytearray(obj.size)))) if obj.size else b""
        said = parse_json(body)
    except (json.JSONDecodeError, ValueError) as error:
        raise UsageError(f"{obj.path}: no JSON: {error}; mend or remove it") from None
    if not isinstance(said, dict) or "weight_map" not in said:
        return None
    if not isinstance(said["weight_map"], dict):
        raise UsageError(f"{obj.path}: weight_map is {said['weight_map']!r:.80}, expected an object; mend the index")
    return said


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(f"{name!r:.120}" for name in names[:_NAMED_MAX]) + more
