"""`safe_open`, in the shape of safetensors' own: a file whose tensors are read when asked for, whole or in part."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch

from gpuload.client import rings
from gpuload.client.device_maps import DeviceName, check_there
from gpuload.client.door import run_inside
from gpuload.client.into_tensors import make_all, move_all
from gpuload.device import canonical_name, open_device
from gpuload.moving.pipeline import Limits, move_one_by_one
from gpuload.moving.plan import Piece, Transfer, cut_axis, plan_batches
from gpuload.moving.shards import close_shards, open_shards
from gpuload.moving.source import FileSource
from mfs.errors import NotFoundError, UsageError
from mfs.safetensors import Header, TensorInfo

OVERLAP_BYTES_MIN = 32 << 20
"""Above this a tensor is worth a pipeline; below, setting one up (about 1 ms) costs more than overlap gains."""


class safe_open:
    """Open a safetensors file; use it in a `with` block, or call `close`.

    framework: 'pt' (also 'torch', 'pytorch').
    Raises: as `gpuload.load_file`. After closing every method raises UsageError; tensors given out stay valid.
    """

    def __init__(self, filename: str | os.PathLike[str], framework: str = "pt", device: DeviceName = "cpu") -> None:
        if framework not in ("pt", "torch", "pytorch"):
            raise UsageError(f"framework {framework!r}: gpuload makes torch tensors ('pt') only")
        self._name = canonical_name(device)
        check_there(self._name)
        self._device = open_device(self._name)
        self._shards = open_shards([filename])
        self._path = os.fspath(filename)

    def keys(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._header.by_name)

    def offset_keys(self) -> list[str]:
        """All names, in the order of their bytes in the file."""
        return [t.name for t in self._header.tensors]

    def metadata(self) -> dict[str, str] | None:
        return self._header.metadata

    def get_tensor(self, name: str) -> torch.Tensor:
        """One tensor. Raises: NotFoundError."""
        t = self._info(name)
        return self._move(Transfer(name, t.dtype, t.shape, self._name, 0, t.start, t.nbytes, 1, t.nbytes))

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, in the order of `offset_keys`, in one overlapped load."""
        transfers = [
            Transfer(t.name, t.dtype, t.shape, self._name, 0, t.start, t.nbytes, 1, t.nbytes)
            for t in self._header.tensors
        ]
        made = make_all(transfers)
        run_inside(lambda: move_all(self._shards, transfers, made, Limits()))
        return {t.name: tensor for t, tensor in zip(transfers, made, strict=True)}

    def get_slice(self, name: str) -> Slice:
        """A tensor that is read when indexed. Raises: NotFoundError."""
        return Slice(self, self._info(name))

    def close(self) -> None:
        """Idempotent."""
        shards, self._shards = self._shards, []
        close_shards(shards)
        if shards:
            self._device.close()

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _header(self) -> Header:
        if not self._shards:
            raise UsageError(f"{self._path} is closed")
        return self._shards[0].header

    def _info(self, name: str) -> TensorInfo:
        info = self._header.by_name.get(name)
        if info is None:
            raise NotFoundError(f"{self._path} does not contain tensor {name!r}")
        return info

    def _move(self, transfer: Transfer) -> torch.Tensor:
        made = make_all([transfer])[0]
        limits = Limits()
        if transfer.nbytes > OVERLAP_BYTES_MIN:
            run_inside(lambda: move_all(self._shards, [transfer], [made], limits))
            return made
        address = made.data_ptr()

        def runs_of(piece: Piece) -> list[tuple[int, int]]:
            return [(address + piece.offset, piece.nbytes)]

        batches = plan_batches([transfer], buffer_bytes=limits.buffer_bytes)
        source = FileSource(self._shards)
        if self._device.is_direct:
            move_one_by_one(batches, source=source, device=self._device, runs_of=runs_of, limits=limits)
            return made
        with rings.lent(self._name, limits) as kept:
            move_one_by_one(
                batches, source=source, device=self._device, runs_of=runs_of, limits=limits, ring=kept.ring,
                stream=kept.stream(),
            )  # fmt: skip
        return made


class Slice:
    """Part of a tensor, as in `f.get_slice(name)[2:4, :]`: all that torch's indexing understands.

    A plain range along one axis, with whole axes before it, moves only its bytes; anything else moves the smallest
    such range that covers it and indexes the result.
    """

    def __init__(self, opened: safe_open, info: TensorInfo) -> None:
        self._opened = opened
        self._tensor = info

    def get_shape(self) -> list[int]:
        """Elements per axis, as the file says."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return self._tensor.dtype

    def __getitem__(self, key: Any) -> torch.Tensor:
        t = self._tensor
        keys = key if isinstance(key, tuple) else (key,)
        for axis, item in enumerate(keys[: len(t.shape)]):
            if not isinstance(item, slice):
                break
            first, last, step = item.indices(t.shape[axis])
            if (first, last, step) == (0, t.shape[axis], 1):
                continue
            if step != 1 or t.dtype == "F4":
                break
            part = cut_axis(t, 0, self._opened._name, axis, first, max(first, last))
            rest = keys[axis + 1 :]
            made = self._opened._move(part)
            return made[(*[slice(None)] * (axis + 1), *rest)] if rest else made
        return self._opened.get_tensor(t.name)[key]
