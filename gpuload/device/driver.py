"""The CUDA driver library through ctypes: only the calls that `cuda.py` makes, declared exactly, always checked.

The driver API, not the runtime's: it alone has virtual memory management, needs no package, and shares the primary
context with torch. NOT YET RUN against a real driver: tests/gpuload/device/test_cuda_header.py holds prototypes,
structs and numbers against NVIDIA's cuda.h (12.9 and 13.0), and test_cuda_standin.py runs them against a stand-in
library that was compiled from the same prototypes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_ushort, c_void_p
from functools import cache
from typing import Any
from uuid import UUID

from gpuload.device.ranges import Ranges
from gpuload.errors import DeviceError, DeviceLostError

LIBRARY = "libcuda.so.1"

SUCCESS, ERROR_OUT_OF_MEMORY, ERROR_NOT_READY = 0, 2, 600
LOST = {
    "ECC_UNCORRECTABLE": 214, "NVLINK_UNCORRECTABLE": 220, "ILLEGAL_ADDRESS": 700, "LAUNCH_TIMEOUT": 702,
    "CONTEXT_IS_DESTROYED": 709, "ASSERT": 710, "HARDWARE_STACK_ERROR": 714, "ILLEGAL_INSTRUCTION": 715,
    "MISALIGNED_ADDRESS": 716, "INVALID_ADDRESS_SPACE": 717, "INVALID_PC": 718, "LAUNCH_FAILED": 719,
}  # fmt: skip
"""Errors after which a process gets nothing else until it ends. Source: cuda.h, at CUDA_ERROR_…"""
EVENT_DISABLE_TIMING = 0x2
STREAM_NON_BLOCKING = 0x1
STREAM_CAPTURE_MODE_RELAXED = 2
MEMHOSTALLOC_PORTABLE = 0x1
MEMHOSTREGISTER_PORTABLE, MEMHOSTREGISTER_READ_ONLY = 0x1, 0x8
ATTRIBUTE_COMPUTE_MODE, ATTRIBUTE_ECC_ENABLED = 20, 32
ATTRIBUTE_PCI_BUS_ID, ATTRIBUTE_PCI_DEVICE_ID, ATTRIBUTE_PCI_DOMAIN_ID = 33, 34, 50
ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 75, 76
ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103
ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED = 113
COMPUTEMODE_DEFAULT, COMPUTEMODE_PROHIBITED, COMPUTEMODE_EXCLUSIVE_PROCESS = 0, 2, 3
MEMORYTYPE_HOST, MEMORYTYPE_DEVICE = 0x1, 0x2
ALLOCATION_TYPE_PINNED = 0x1
HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 0x1
LOCATION_TYPE_DEVICE = 0x1
ACCESS_READ, ACCESS_READWRITE = 0x1, 0x3
GRANULARITY_MINIMUM = 0x0


class MemLocation(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _AllocFlags(ctypes.Structure):
    _fields_ = [
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class MemAllocationProp(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("requestedHandleTypes", c_int),
        ("location", MemLocation),
        ("win32HandleMetaData", c_void_p),
        ("allocFlags", _AllocFlags),
    ]


class MemAccessDesc(ctypes.Structure):
    _fields_ = [("location", MemLocation), ("flags", c_int)]


class Memcpy2D(ctypes.Structure):
    _fields_ = [
        ("srcXInBytes", c_size_t), ("srcY", c_size_t), ("srcMemoryType", c_int), ("srcHost", c_void_p),
        ("srcDevice", c_ulonglong), ("srcArray", c_void_p), ("srcPitch", c_size_t),
        ("dstXInBytes", c_size_t), ("dstY", c_size_t), ("dstMemoryType", c_int), ("dstHost", c_void_p),
        ("dstDevice", c_ulonglong), ("dstArray", c_void_p), ("dstPitch", c_size_t),
        ("WidthInBytes", c_size_t), ("Height", c_size_t),
    ]  # fmt: skip


class Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 16)]


_PROTOTYPES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDeviceGetUuid_v2": [POINTER(Uuid), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuCtxSynchronize": [],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuThreadExchangeStreamCaptureMode": [POINTER(c_int)],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamDestroy_v2": [c_void_p],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_ulonglong, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_ulonglong, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpyDtoH_v2": [c_void_p, c_ulonglong, c_size_t],
    "cuMemcpy2DAsync_v2": [POINTER(Memcpy2D), c_void_p],
    "cuMemGetAllocationGranularity": [POINTER(c_size_t), POINTER(MemAllocationProp), c_int],
    "cuMemAddressReserve": [POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong],
    "cuMemAddressFree": [c_ulonglong, c_size_t],
    "cuMemCreate": [POINTER(c_ulonglong), c_size_t, POINTER(MemAllocationProp), c_ulonglong],
    "cuMemRelease": [c_ulonglong],
    "cuMemMap": [c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong],
    "cuMemUnmap": [c_ulonglong, c_size_t],
    "cuMemSetAccess": [c_ulonglong, c_size_t, POINTER(MemAccessDesc), c_size_t],
    "cuMemExportToShareableHandle": [c_void_p, c_ulonglong, c_int, c_ulonglong],
    "cuMemImportFromShareableHandle": [POINTER(c_ulonglong), c_void_p, c_int],
}
"""Source: CUDA Driver API reference; the _v2 names are what cuda.h maps the plain ones to."""


_UNSAFE_IN_CAPTURE = frozenset(
    {"cuEventQuery", "cuMemFreeHost", "cuMemHostAlloc", "cuMemHostRegister_v2", "cuMemHostUnregister",
     "cuMemcpyDtoH_v2", "cuStreamSynchronize"}
)  # fmt: skip
"""What would end, in any thread, the capture of a graph in the default mode. Ours touch no stream of anybody's, so they
are made in the relaxed mode. cuCtxSynchronize is not here: it is wrong in every mode.
Source: CUDA C++ Programming Guide, Prohibited and Unhandled Operations; cuThreadExchangeStreamCaptureMode.
"""


class Driver:
    """The loaded library. Calls release the GIL."""

    def __init__(self, path: str = LIBRARY) -> None:
        try:
            library = ctypes.CDLL(path)
            self._functions = {name: getattr(library, name) for name in _PROTOTYPES}
        except OSError as error:
            raise DeviceError(f"no CUDA driver on this machine ({error})") from None
        except AttributeError as error:
            raise DeviceError(f"the CUDA driver is too old for virtual memory management: {error}") from None
        for name, function in self._functions.items():
            function.argtypes, function.restype = _PROTOTYPES[name], c_int
        self.path = path
        self._pid = os.getpid()
        self.registered = Ranges()
        """Host memory of others that is page-locked; one table, since it is so for every context of this process."""
        self.registering = threading.Lock()
        self.call("cuInit", 0)

    def call(self, name: str, *args: Any) -> None:
        """Raises: DeviceError naming the call and the driver's word for what went wrong; DeviceLostError if nothing
        else will come from now on.
        """
        result = self._result(name, *args)
        if result != SUCCESS:
            raise self._error(f"{name} failed", result)

    def is_ready(self, event: c_void_p) -> bool:
        result = self._result("cuEventQuery", event)
        if result not in (SUCCESS, ERROR_NOT_READY):
            raise self._error("a copy to the GPU failed", result)
        return result == SUCCESS

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child of the process that has it: a child may call nothing."""
        return os.getpid() != self._pid

    def _result(self, name: str, *args: Any) -> int:
        if self.is_inherited:
            raise DeviceError("CUDA does not survive a fork: start the process anew (multiprocessing: 'spawn')")
        if name not in _UNSAFE_IN_CAPTURE:
            return int(self._functions[name](*args))
        exchange, mode = self._functions["cuThreadExchangeStreamCaptureMode"], c_int(STREAM_CAPTURE_MODE_RELAXED)
        exchange(ctypes.byref(mode))
        try:
            return int(self._functions[name](*args))
        finally:
            exchange(ctypes.byref(mode))

    def _error(self, what: str, result: int) -> DeviceError:
        if result in LOST.values():
            text = f"{what}: {self._name_of(result)}; this process can no longer use the card"
            return DeviceLostError(text, code=result)
        return DeviceError(f"{what}: {self._name_of(result)}", code=result)

    def number(self, name: str, kind: Any, *args: Any) -> int:
        """A call whose first argument is where it writes one number, which is returned."""
        out = kind()
        self.call(name, ctypes.byref(out), *args)
        return int(out.value or 0)

    def identity_of(self, ordinal: int) -> str:
        """'GPU-' and the UUID of a card, or of the slice of one (MIG) that this process was given: the driver tells
        both alike. Needs no context.
        """
        found = Uuid()
        self.call("cuDeviceGetUuid_v2", ctypes.byref(found), ordinal)
        return f"GPU-{UUID(bytes=bytes(found.bytes))}"

    def _name_of(self, result: int) -> str:
        text = c_char_p()
        self._functions["cuGetErrorName"](result, ctypes.byref(text))
        return f"{text.value.decode() if text.value else 'unknown'} ({result})"


@cache
def load_driver() -> Driver:
    """The one driver of this process. Raises: DeviceError if there is none."""
    return Driver()
