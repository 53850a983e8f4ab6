"""A resident model's tensors for any framework that takes DLPack: numpy, JAX, CuPy, torch. Imports none of them.

    arrays = gpuload.attach_arrays("llama")
    numpy.from_dlpack(arrays["model.norm.weight"])      # no copy; read-only

An array's memory is the server's, as of `attach`: it stays what it is as long as any array, or anything a framework has
made of one, lives; then the lease ends. On GPUs unmapping waits for the device, so it is not done by a finalizer: see
`attached.let_go`, `close_left` here.

DLPack's structs are written through ctypes, and its deleter is called by whoever consumed them, from any thread.
Source: dlpack.h 1.1 (DLManagedTensor, DLManagedTensorVersioned); the array API standard, `__dlpack__`.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from gpuload import wire
from gpuload.client.asking import ATTACH_S, attach_request, check_granules, connect, exchange, split
from gpuload.client.leaving import Lease, Left
from gpuload.descriptors import park, room_for
from gpuload.device import open_device
from gpuload.errors import ServerError
from mfs.safetensors import DTYPE_BITS

CPU, CUDA = 1, 2
"""DLDeviceType."""
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6
_TYPES: Mapping[str, tuple[int, int]] = {
    "BOOL": (_BOOL, 0), "U8": (_UINT, 0), "I8": (_INT, 0), "U16": (_UINT, 0), "I16": (_INT, 0), "F16": (_FLOAT, 0),
    "BF16": (_BFLOAT, 0), "U32": (_UINT, 0), "I32": (_INT, 0), "F32": (_FLOAT, 0), "U64": (_UINT, 0),
    "I64": (_INT, 0), "F64": (_FLOAT, 0), "C64": (_COMPLEX, 0),
    "F8_E4M3": (10, 1), "F8_E4M3FNUZ": (11, 1), "F8_E5M2": (12, 1), "F8_E5M2FNUZ": (13, 1), "F8_E8M0": (14, 1),
}  # fmt: skip
"""dtype -> (DLDataTypeCode, minor version of DLPack 1 that has it). F4 and F6 it packs otherwise, or has not."""

_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("dl_tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", _Tensor),
    ]


class Arrays(Mapping[str, "Array"]):
    """name -> array, on memory that the server holds for us."""

    def __init__(self, made: Mapping[str, Array], reply: Mapping[str, Any]) -> None:
        self._made = made
        self.model: str = reply["model"]
        self.digest: str = reply["digest"]
        """Of the whole content; equal digests are equal models."""
        self.generation: int = reply["generation"]
        self.metadata: Sequence[Mapping[str, str] | None] = reply["metadata"]
        """Each shard's own strings."""

    def __getitem__(self, name: str) -> Array:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


class Array:
    """One tensor: what it is, where it stands, and the DLPack protocol."""

    def __init__(
        self, held: Lease, address: int, dtype: str, shape: Sequence[int], nbytes: int, device: tuple[int, int]
    ) -> None:
        self._held, self._device = held, device
        self.address = address
        """Of its bytes, contiguous; 0 if it has none."""
        self.dtype, self.shape, self.nbytes = dtype, tuple(shape), nbytes
        """dtype: as safetensors writes it."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule. Its bytes were there before `attach_arrays` returned, so that no stream waits for them.

        max_version: of DLPack, that the consumer knows. From 1.0 on the array is marked read-only; before, that cannot
            be said: then on the CPU the consumer may write, to its own copy of a page, and on a GPU it gets none.
        Raises: BufferError for what cannot be had: a copy, another device, a type that DLPack does not have.
        """
        if copy or dl_device not in (None, self._device):
            raise BufferError("weights of a gpuload server are handed out where they stand, without a copy")
        if self.dtype not in _TYPES:
            raise BufferError(f"DLPack has no {self.dtype} as safetensors packs it")
        major, minor = max_version or (0, 0)
        code, minor_needed = _TYPES[self.dtype]
        if (minor_needed and (major, minor) < (1, minor_needed)) or (not major and self._device[0] != CPU):
            raise BufferError(
                f"{self.dtype}, read-only, needs DLPack 1.{minor_needed}; the consumer knows {max_version}"
            )
        shape = (ctypes.c_int64 * max(1, len(self.shape)))(*self.shape)
        strides = (ctypes.c_int64 * max(1, len(self.shape)))(
            *(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        )
        tensor = _Tensor(
            self.address, _Device(*self._device), len(self.shape), _Type(code, DTYPE_BITS[self.dtype], 1),
            ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)), ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)), 0,
        )  # fmt: skip
        managed: _Managed | _Versioned
        if major:
            managed = _Versioned(1, minor_needed, None, _deleter, _READ_ONLY, tensor)
            managed.manager_ctx = _keep(managed, self, shape, strides)
            return _capsule(ctypes.addressof(managed), b"dltensor_versioned", _destroy)
        managed = _Managed(tensor, None, _deleter)
        managed.manager_ctx = _keep(managed, self, shape, strides)
        return _capsule(ctypes.addressof(managed), b"dltensor", _destroy)


_numbers = itertools.count(1)
_live: dict[int, object] = {}
"""By the address of its struct: what a consumer has, and all that it stands on."""


def _keep(managed: _Managed | _Versioned, *what: object) -> int:
    _live[ctypes.addressof(managed)] = (managed, *what)
    return next(_numbers)


def _let_go(address: int) -> None:
    _live.pop(address, None)


_deleter = _Deleter(_let_go)


_api = ctypes.pythonapi
_capsule = _api.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]


def _destroy_capsule(capsule: int) -> None:
    """Of a capsule that nobody consumed: a consumer renames it."""
    for name in (b"dltensor_versioned", b"dltensor"):
        if _is_valid(capsule, name):
            _live.pop(_pointer(capsule, name), None)


_destroyer = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy_capsule)
_destroy = ctypes.cast(_destroyer, ctypes.c_void_p)
for _function in (_deleter, _destroyer):  # arrays may outlive this module, when the interpreter ends
    _api.Py_IncRef(ctypes.py_object(_function))


_left = Left()


def close_left() -> None:
    """Give back weights on GPUs whose last array is gone. Waits for the device: not while a graph is captured."""
    _left.close()


os.register_at_fork(after_in_child=close_left)


def attach_arrays(
    model: str,
    device: str | int | None = None,
    *,
    digest: str | None = None,
    socket_path: str | None = None,
    timeout_s: float = ATTACH_S,
) -> Arrays:
    """The tensors of a resident model, without a copy and without torch; see `attached.attach`, which has the same
    arguments and errors."""
    close_left()
    request = attach_request(model, device, digest)
    held = Lease(connect(socket_path, timeout_s), _left)
    try:
        with ExitStack() as room:
            reply, got = exchange(held.sock, request, (), admit=lambda count: room.enter_context(room_for(count)))
            room.callback(wire.close_all, got)
            places = _mapped(held, reply, got)
        held.sock = park(held.sock)
    except BaseException:
        held.close()  # at once: whoever keeps the error must not keep the lease
        raise
    made = {}
    for name, dtype, shape, part, offset, nbytes in reply["tensors"]:
        address, where = places[part]
        made[name] = Array(held, address + offset if nbytes else 0, dtype, shape, nbytes, where)
    return Arrays(made, reply)


def _mapped(held: Lease, reply: Mapping[str, Any], got: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """Of each part: where its memory begins here, and on which device."""
    if "parts" not in reply:
        raise ServerError("the gpuload server is of another version than this program: restart it")
    places: list[tuple[int, tuple[int, int]]] = []
    for part, own in zip(reply["parts"], split(reply, got), strict=True):
        runs = [(first, count) for first, count in part["runs"]]
        if not runs:  # another rank's, or one without bytes
            places.append((0, (CPU, 0)))
            continue
        device = open_device(part["device"])
        check_granules(part, device.granule_bytes)
        mapping = device.attach(own, runs)
        held.mappings.append(mapping)
        is_cpu = device.name.startswith("cpu")
        places.append((mapping.address, (CPU, 0) if is_cpu else (CUDA, int(device.name.partition(":")[2]))))
    return places
