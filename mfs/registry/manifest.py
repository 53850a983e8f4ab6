"""What one revision of a model is made of: its files, the chunks that they are cut into, its tensors. Pure.

A manifest is JSON in UTF-8, called by the sha256 of its bytes, and never changes. FORMAT.md, "Manifests".
Whoever reads one believes nothing: every name, number and reference is checked here, so that what a `Manifest` says
can be used as it is. (That chunks hold what their ids say is seen when they are read.)
"""

from __future__ import annotations

import calendar
import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from mfs.errors import IntegrityError
from mfs.registry.layout import is_id
from mfs.safetensors import DTYPE_BITS
from mfs.sources import bounds
from mfs.sources.base import name_fault

VERSION = 1
CHUNK_BYTES_MAX = 8 << 20
"""The longest chunk a manifest may name, in plain bytes."""
BYTES_MAX = 64 << 20
"""Of a manifest. Some 95 bytes are needed for a chunk of 8 MiB (its id, two sizes, its place in a file), and 200 for a
tensor: the manifest of 5 TB in large tensors."""
VALUES_MAX = 8_000_000
"""Commas in a manifest, about one for each value: each may become a Python object. 5 TB need 3 million."""
ANNOTATIONS_BYTES_MAX = 1 << 20
"""Of all annotations, names and texts together."""
AXES_MAX = 64
"""Of one tensor."""

_DTYPE = re.compile(r"[A-Z0-9_]{1,16}", re.ASCII)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a revision."""

    id: str
    """64 hex digits, see `chunk.chunk_id`."""
    plain_bytes: int
    """1 to CHUNK_BYTES_MAX."""
    stored_bytes: int
    """Of the object in the registry when the manifest was made: a hint, since an equal chunk may be stored otherwise
    later."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    name: str
    dtype: str
    """As in safetensors."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    stop: int
    blake3: str
    """64 hex digits, of the tensor's bytes: what it is by content, in any file of any model."""


@dataclass(frozen=True)
class File:
    """One file of a revision."""

    path: str
    """'/'-separated, inside the model."""
    size: int
    sha256: str
    """64 hex digits, of the whole file."""
    chunks: tuple[int, ...]
    """Indexes into `Manifest.chunks`; in this order they are the file's bytes."""
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """One revision."""

    created_at: str
    """UTC, 'YYYY-MM-DDTHH:MM:SSZ'."""
    chunks: tuple[Chunk, ...]
    """Each once."""
    files: tuple[File, ...]
    """In the order of their paths."""
    base: str | None = None
    """The id of the manifest of which most of this one's differences were taken; for people."""
    requires: tuple[str, ...] = ()
    """Ids of further chunks, which some of `chunks` are stored as a difference to, over all steps."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    """The author's own: what trained it, metrics, licence."""

    @cached_property
    def by_path(self) -> dict[str, File]:
        return {file.path: file for file in self.files}

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def starts(self, file: File) -> list[int]:
        """Where each of a file's chunks begins in it, and last the file's size."""
        return list(accumulate((self.chunks[index].plain_bytes for index in file.chunks), initial=0))

    def chunk_ids(self) -> Iterable[str]:
        """Every chunk that must be in the registry for this revision to be read."""
        yield from (chunk.id for chunk in self.chunks)
        yield from self.requires

    def encode(self) -> bytes:
        """The bytes that are stored. Equal manifests have equal bytes."""
        return json.dumps(
            {
                "format": "mfs-manifest",
                "version": VERSION,
                "created_at": self.created_at,
                "base": self.base,
                "annotations": dict(self.annotations),
                "chunks": [[chunk.id, chunk.plain_bytes, chunk.stored_bytes] for chunk in self.chunks],
                "requires": list(self.requires),
                "files": [
                    {
                        "path": file.path,
                        "size": file.size,
                        "sha256": file.sha256,
                        "chunks": list(file.chunks),
                        "tensors": [[t.name, t.dtype, list(t.shape), t.start, t.stop, t.blake3] for t in file.tensors],
                    }
                    for file in self.files
                ],
            },
            ensure_ascii=False, separators=(",", ":"), sort_keys=True,
        ).encode("utf-8") + b"\n"  # fmt: skip


def manifest_id(body: bytes) -> str:
    """What a manifest is called."""
    return hashlib.sha256(body).hexdigest()


def check_id(body: bytes, wanted_id: str) -> None:
    """See that these are the bytes of a manifest that was asked for, before anything is made of them.

    Raises: IntegrityError.
    """
    if (got := manifest_id(body)) != wanted_id:
        raise IntegrityError(f"manifest {wanted_id[:12]}: its bytes have sha256 {got}: it was changed where it lies")


def parse_manifest(body: bytes, wanted_id: str | None = None) -> Manifest:
    """Read and check a manifest. Raises: IntegrityError, one line, naming what is wrong.

    wanted_id: what it was asked by; None where nobody asked, or `check_id` was. Where a signature is required it is
    checked before.
    """
    if wanted_id is not None:
        check_id(body, wanted_id)
    where = f"manifest {(wanted_id or manifest_id(body))[:12]}"
    try:
        if len(body) > BYTES_MAX or (values_count := body.count(b",")) > VALUES_MAX:
            extent = f"{len(body)} bytes" if len(body) > BYTES_MAX else f"{values_count} values"
            raise ValueError(f"of {extent}, more than {BYTES_MAX} bytes or {VALUES_MAX} values")
        top = bounds.parse_json(body)
        if not isinstance(top, dict) or top.get("format") != "mfs-manifest":
            raise IntegrityError(f"{where}: not a manifest of a registry")
        if (stated := top.get("version")) != VERSION:
            raise IntegrityError(f"{where}: of version {stated!r:.40}, this mfs reads {VERSION}: upgrade it")
        return _checked(top)
    except IntegrityError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError) as error:
        raise IntegrityError(f"{where}: {type(error).__name__}: {str(error)[:200]}") from None


def _checked(top: dict[str, Any]) -> Manifest:
    chunks = tuple(Chunk(_id(item[0]), _int(item[1], 1, CHUNK_BYTES_MAX), _int(item[2], 1, 2**40))
                   for item in top["chunks"])  # fmt: skip
    if len({chunk.id for chunk in chunks}) != len(chunks):
        raise ValueError("names a chunk twice")
    files = tuple(_file(item, chunks) for item in top["files"])
    paths = [file.path for file in files]
    if paths != sorted(set(paths)):
        raise ValueError("its files are not in the order of their paths, each once")
    _check_folders(paths)
    annotations = top.get("annotations") or {}
    if fault := annotations_fault(annotations):
        raise ValueError(f"annotations: {fault}")
    created_at = top["created_at"]
    if not isinstance(created_at, str) or not _TIME.fullmatch(created_at):
        raise ValueError(f"created_at is {created_at!r:.40}")
    calendar.timegm(time.strptime(created_at, "%Y-%m-%dT%H:%M:%SZ"))  # 31 February is no time
    base = top.get("base")
    requires = tuple(_id(item) for item in top.get("requires") or ())
    return Manifest(created_at, chunks, files, None if base is None else _id(base), requires, annotations)


def annotations_fault(annotations: Mapping[Any, Any]) -> str | None:
    """Why these cannot be a revision's annotations, None if they can: the one rule for those given and read."""
    nbytes = 0
    for item in annotations.items():
        for text in item:
            if not isinstance(text, str):
                return f"expected texts, got {text!r:.80}"
            try:
                nbytes += len(text.encode("utf-8"))
            except UnicodeEncodeError:
                return f"{text!r:.80} is not valid UTF-8"
            if any(c not in "\t\n" and (ord(c) < 32 or 127 <= ord(c) < 160) for c in text):
                return f"{text!r:.80} contains control characters"
    return f"{nbytes} bytes, more than {ANNOTATIONS_BYTES_MAX}" if nbytes > ANNOTATIONS_BYTES_MAX else None


def _check_folders(paths: Iterable[str]) -> None:
    """That no file is a directory of another. Takes what the paths are long, however deep they lie."""
    folders: dict[tuple[int, str], int] = {}
    files: dict[tuple[int, str], str] = {}
    for path in paths:
        *parts, name = path.split("/")
        at = 0
        for part in parts:
            at = folders.setdefault((at, part), len(folders) + 1)
        if len(folders) > bounds.DIRECTORIES_MAX:
            raise ValueError(f"more than {bounds.DIRECTORIES_MAX} directories")
        files[at, name] = path
    if clash := folders.keys() & files.keys():
        raise ValueError(f"{min(files[key] for key in clash)!r} is both a file and a directory")


def _file(item: dict[str, Any], chunks: tuple[Chunk, ...]) -> File:
    path = item["path"]
    if fault := path_fault(path):
        raise ValueError(f"path {path!r:.100} {fault}")
    size = _int(item["size"], 0, bounds.FILE_BYTES_MAX)
    indexes = tuple(_int(index, 0, len(chunks) - 1) for index in item["chunks"])
    if (total := sum(chunks[index].plain_bytes for index in indexes)) != size:
        raise ValueError(f"{path}: of {size} bytes, its chunks have {total}")
    tensors = tuple(_tensor(tensor, size) for tensor in item.get("tensors") or ())
    if later := next((b for a, b in pairwise(tensors) if b.start < a.stop), None):
        raise ValueError(f"{path}: tensor {later.name!r:.100} begins before the end of the one named before it")
    return File(path, size, _id(item["sha256"]), indexes, tensors)


def _tensor(item: list[Any], size: int) -> Tensor:
    name, dtype, shape, start, stop, digest = item
    if not isinstance(name, str) or not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"tensor {name!r:.100} of dtype {dtype!r:.40}")
    name.encode("utf-8")  # raises for what is none
    if len(shape) > AXES_MAX:
        raise ValueError(f"tensor {name!r:.100} has {len(shape)} axes, more than {AXES_MAX}")
    start = _int(start, 0, size)
    stop = _int(stop, start, size)
    axes = tuple(_int(n, 0, 2**64 - 1) for n in shape)
    if (bits := DTYPE_BITS.get(dtype)) and bits * math.prod(axes) != 8 * (stop - start):
        raise ValueError(f"tensor {name!r:.100}: {dtype} of shape {list(axes)!s:.100} is not {stop - start} bytes")
    return Tensor(name, dtype, axes, start, stop, _id(digest))


def path_fault(path: object) -> str | None:
    """Why this cannot be the path of a file inside a model, None if it can: the one rule for names given and listed."""
    if not isinstance(path, str):
        return "is no text"
    faults = (name_fault(part) for part in path.split("/"))
    return bounds.path_fault(path) or next((fault for fault in faults if fault), None)


def _id(value: object) -> str:
    if not isinstance(value, str) or not is_id(value):
        raise ValueError(f"{value!r:.80} is not 64 hexadecimal digits")
    return value


def _int(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.40} where a whole number from {least} to {most} is expected")
    return value
