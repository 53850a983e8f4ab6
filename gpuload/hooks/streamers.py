"""Run:ai's SafetensorsStreamer and InstantTensor's safe_open, for programs that call them: served as safetensors is.

Both are classes of Python, so their methods are replaced in place, and names imported earlier see it. The library's own
object is made as ever where anything is left to it: files of an object store, ranks that read together, a choice of
tensors, buffers to be reused, files that nobody here serves, and whatever is wrong with the arguments or the files.

Served: local files, where a server has an arena on the device that was asked for, or where all stand on an mfs mount.
Source: runai-model-streamer 0.17.1, instanttensor 0.2.2.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from gpuload.hooks.resident import has_arena, is_away
from gpuload.hooks.weights import are_mounted, weights_of
from mfs.errors import MfsError, UsageError
from mfs.safetensors import Header

_OURS = "_gpuload"
"""Attribute of an object whose tensors come from us: a function that makes their iterator."""


def install_runai(module: ModuleType) -> None:
    """Replace the methods of `runai_model_streamer.SafetensorsStreamer`. Raises: AttributeError, ImportError."""
    streamer: Any = module.SafetensorsStreamer
    from runai_model_streamer.safetensors_streamer.safetensors_pytorch import SafetensorMetadata

    real = {name: getattr(streamer, name) for name in ("stream_files", "get_tensors", "__exit__")}
    signature = inspect.signature(real["stream_files"])

    @functools.wraps(real["stream_files"])
    def stream_files(self: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(self, _OURS, None)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        is_plain = not (given["is_distributed"] or given["s3_credentials"] or given["tensor_names"] is not None)
        files, device = given["paths"], str(given["device"] or "cpu")
        headers = _served(files, device) if is_plain else None
        if headers is None:
            return real["stream_files"](self, *args, **kwargs)
        self.files_to_tensors_metadata = {
            i: [SafetensorMetadata(name, entry) for name, entry in _entries(header)] for i, header in enumerate(headers)
        }
        self.total_size = sum(t.nbytes for header in headers for t in header.tensors)
        self.device_str, self.unaligned_copies = device, 0
        setattr(self, _OURS, lambda: weights_of(files, device=device, by_index=False))
        return None

    def get_tensors(self: Any) -> Iterator[Any]:
        ours = getattr(self, _OURS, None)
        yield from real["get_tensors"](self) if ours is None else ours()

    def __exit__(self: Any, *args: Any) -> Any:
        setattr(self, _OURS, None)
        return real["__exit__"](self, *args)

    streamer.stream_files, streamer.get_tensors, streamer.__exit__ = stream_files, get_tensors, __exit__


def install_instanttensor(module: ModuleType) -> None:
    """Replace the methods of `instanttensor.safe_open`. Raises: AttributeError if it is built otherwise."""
    opened: Any = module.safe_open
    real = {name: getattr(opened, name) for name in ("__init__", "__enter__", "__exit__", "tensors")}
    signature = inspect.signature(real["__init__"])

    @functools.wraps(real["__init__"])
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        setattr(self, _OURS, None)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        files, device = given["filename"], _cuda(given["device"])
        is_plain = (
            device is not None and given["framework"] == "pt"
            and given["process_group"] is None and given.get("tensor_filter") is None
            and given.get("tensor_name_match_mode", "glob") in ("exact", "glob", "regex")
        )  # fmt: skip
        files = [files] if isinstance(files, str) else files
        headers = _served(sorted(files), device) if is_plain and device is not None else None
        if (
            device is None
            or headers is None
            or any((header.metadata or {}).get("format", "pt") != "pt" for header in headers)
        ):
            real["__init__"](self, *args, **kwargs)
            return
        files.sort()  # as it does
        rows = [row for header in headers for row in _entries(header)]
        self.filename, self.framework, self.copy = files, "pt", given["copy"]
        self.device, self.process_group, self.world_size, self.rank = torch.device(str(device)), None, 1, 0
        self.ordered_tensor_metadatas = rows
        self.tensor_name_to_index = {name: i for i, (name, _) in enumerate(rows)}
        self.tensor_sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for _, entry in rows]
        self.total_tensor_size = sum(self.tensor_sizes)
        named = [header.metadata for header in headers if header.metadata is not None]
        self.file_metadata = named[-1] if named else None
        self.iterated = self._invalidated = False
        setattr(self, _OURS, lambda: weights_of(files, device=device, by_index=False))

    def __enter__(self: Any) -> Any:
        return real["__enter__"](self) if getattr(self, _OURS) is None else self

    def __exit__(self: Any, *args: Any) -> Any:
        if getattr(self, _OURS) is None:
            return real["__exit__"](self, *args)
        self._invalidated = True
        return None

    def tensors(self: Any) -> Iterator[Any]:
        if getattr(self, _OURS) is None:
            yield from real["tensors"](self)
            return
        if self._invalidated or self.iterated:
            raise RuntimeError("tensors() is to be called once, and before the safe_open context ends")
        self.iterated = True
        yield from getattr(self, _OURS)()

    opened.__init__, opened.__enter__, opened.__exit__, opened.tensors = __init__, __enter__, __exit__, tensors


INSTALLERS: dict[str, Callable[[ModuleType], None]] = {
    "runai_model_streamer": install_runai,
    "instanttensor": install_instanttensor,
}


def _served(files: Any, device: str) -> list[Header] | None:
    """The tables of files that are ours to give on that device, in the order of their bytes; None: the library's."""
    from gpuload.device import canonical_name
    from gpuload.moving.shards import read_shards

    try:
        if not files or not all(isinstance(file, str) and os.path.isfile(file) for file in files):
            return None
        if not (not is_away() and has_arena(canonical_name(device))) and not are_mounted(files):
            return None
        return [shard.header for shard in read_shards(files)]
    except (MfsError, OSError):  # it has its own words for them
        return None


def _entries(header: Header) -> list[tuple[str, dict[str, Any]]]:
    """As a file's table has them."""
    at = header.data_start
    return [
        (t.name, {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start - at, t.stop - at]})
        for t in header.tensors
    ]


def _cuda(device: Any) -> str | None:
    from gpuload.device import canonical_name

    try:
        name = canonical_name(device if isinstance(device, int) else str(device))
    except UsageError:
        return None
    return name if name.startswith("cuda") else None
