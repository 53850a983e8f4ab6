"""Torch tensors for tables of tensors: dtypes, storage shapes, memory to fill, views over memory that is there.

The only file of the loader that imports torch, besides the hooks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from mfs.errors import UsageError
from mfs.safetensors import DTYPE_BITS

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name)
    for name, torch_name in {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
        "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
        "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
    }.items()
    if hasattr(torch, torch_name)
}  # fmt: skip
"""Every dtype of the format that this torch has; F6 has none in any. F4 packs two elements in one byte."""


def torch_dtype(dtype: str, name: str) -> torch.dtype:
    """Raises: UsageError if this torch has no such dtype."""
    if dtype not in TORCH_DTYPES:
        raise UsageError(f"tensor {name!r} is {dtype}, which torch {torch.__version__} does not have")
    return TORCH_DTYPES[dtype]


def storage_shape(dtype: str, shape: Sequence[int], name: str) -> tuple[int, ...]:
    """The shape torch gives it: as stated, but with the last axis halved for F4. Raises: UsageError if that is odd."""
    if dtype != "F4":
        return tuple(shape)
    if not shape or shape[-1] % 2:
        raise UsageError(f"tensor {name!r} is F4 of shape {list(shape)}: torch needs an even last axis")
    return (*shape[:-1], shape[-1] // 2)


def empty(dtype: str, shape: Sequence[int], name: str, device: str) -> torch.Tensor:
    """Memory for one tensor, its bytes undefined. Raises: UsageError; torch.OutOfMemoryError as torch raises it."""
    made = torch.empty(storage_shape(dtype, shape, name), dtype=torch_dtype(dtype, name), device=device)
    _refuse_unless_real(made)
    return made


def has_memory() -> bool:
    """Whether torch makes tensors with memory in this thread just now: not so in FakeTensorMode and its like."""
    return _is_real(torch.empty(0, dtype=torch.uint8, device="cpu"))


def check_mode() -> None:
    """Raises: UsageError naming the mode in which tensors have no memory, so that nothing can be loaded into them."""
    _refuse_unless_real(torch.empty(0, dtype=torch.uint8, device="cpu"))


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor on the same memory, as if it were made just now: with a version counter of its own, and of the
    caller's mode. What was made in `torch.inference_mode` can never be trained, nor seen by who trains.
    """
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    # set_ counts as a change; `data` begins to count anew
    return made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()).data


def is_capturing() -> bool:
    """Whether this thread captures a CUDA graph just now."""
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]


def settle(device: str) -> None:
    """Wait for kernels queued by the caller: fresh memory may still be in use by one of them, on another stream."""
    if device.startswith("cuda"):
        torch.cuda.current_stream(torch.device(device)).synchronize()


def over_memory(owner: Any, address: int, nbytes: int, device: str) -> torch.Tensor:
    """Bytes [address, address + nbytes) as a flat uint8 tensor without a copy; it keeps `owner` alive."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.startswith("cpu"):
        buffer = (ctypes.c_ubyte * nbytes).from_address(address)
        buffer.owner = owner  # type: ignore[attr-defined]  # the storage holds the buffer, the buffer holds the owner
        return torch.frombuffer(buffer, dtype=torch.uint8)
    return torch.as_tensor(_CudaBytes(owner, address, nbytes), device=device)


def view_as(flat: torch.Tensor, dtype: str, shape: Sequence[int], name: str) -> torch.Tensor:
    """A flat uint8 tensor, in place, as what the table says it is. It must begin aligned for its dtype.

    Under a storage of its own, as safetensors' tensors have: torch.save and queues between processes take whole
    storages, and would drag all of a model along with one small tensor.
    """
    want = storage_shape(dtype, shape, name)
    kind = torch_dtype(dtype, name)
    if not flat.numel():
        return torch.empty(want, dtype=kind, device=flat.device)
    first = flat.storage_offset()
    storage = flat.untyped_storage()[first : first + flat.nbytes]
    return fresh(torch.empty(0, dtype=torch.uint8, device=flat.device).set_(storage).view(kind).reshape(want))


def element_bytes(dtype: str) -> int:
    """Alignment a tensor of this dtype needs."""
    return max(1, DTYPE_BITS[dtype] // 8)


def _is_real(made: torch.Tensor) -> bool:
    return type(made) is torch.Tensor and not made.is_meta


def _refuse_unless_real(made: torch.Tensor) -> None:
    if not _is_real(made):
        kind = type(made).__name__
        raise UsageError(
            f"torch makes tensors without memory here ({kind}: {kind}Mode is active), nothing can be loaded into them:"
            " load outside of that mode"
        )


class _CudaBytes:
    """Device memory as numba's CUDA array interface, version 2; torch keeps the object while the tensor lives.

    Not yet run on a GPU. Source: torch/csrc/utils/tensor_numpy.cpp, tensor_from_cuda_array_interface.
    """

    def __init__(self, owner: Any, address: int, nbytes: int) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),  # torch refuses read-only exports; the mapping itself is what forbids writes
            "version": 2,
        }
