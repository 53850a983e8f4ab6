"""A CUDA device. With `cuda_memory.py`, `driver.py` and `cards.py` the only place that knows CUDA. NOT YET RUN ON A
GPU; see driver.py for what was.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from ctypes import c_int, c_size_t, c_ulonglong, c_void_p

from gpuload.device import driver as cu
from gpuload.device import nodes
from gpuload.device.base import Holder, Memory, Run, whole
from gpuload.device.cards import holders_of, mps_is_there, pci_of
from gpuload.device.cuda_memory import CudaArena, CudaMapping
from gpuload.errors import BusyError, DeviceError, DeviceLostError

GRANULE_BYTES = 8 << 20
"""What sizes of pieces are counted in. Four times the hardware's smallest: more blocks find a free piece of their size,
for a waste below one granule per block."""

LOCKED_BYTES = (2 << 20, 8 << 20)
"""Of staging that is page-locked as it is used: one huge page, 0.2 ms, for who loads little; what a load begins with,
`staging.FIRST_BYTES`; else all."""

CLOSE_S = 60.0
"""Longest wait for what is queued when a stream ends; no copy of ours takes a second."""

POLL_S, POLL_MOST_S = 50e-6, 400e-6
"""Between two looks at an event: at first, and after some. Four buffers of 32 MiB are 2.4 ms of a link of 55 GB/s, and
each look costs Python some 15 us that others wait for."""


class CudaEvent:
    """See `base.Event`. Asked rather than waited for, since cuEventSynchronize knows no deadline."""

    def __init__(self, device: CudaDevice, stream: c_void_p) -> None:
        self._device = device
        self._handle = c_void_p()
        device.call("cuEventCreate", ctypes.byref(self._handle), cu.EVENT_DISABLE_TIMING)
        device.call("cuEventRecord", self._handle, stream)

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        pause = POLL_S
        while not self._is_ready():
            if time.monotonic() > deadline:
                raise BusyError(f"a copy to {self._device.name} was not done after {timeout_s:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, POLL_MOST_S)

    def _is_ready(self) -> bool:
        with self._device.current():
            return self._device.driver.is_ready(self._handle)

    def __del__(self) -> None:
        if self._handle:
            with contextlib.suppress(DeviceError):  # the driver may be gone already when a process ends
                self._device.call("cuEventDestroy_v2", self._handle)


class CudaStream:
    """See `base.Stream`."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._handle: c_void_p | None = c_void_p()
        device.call("cuStreamCreate", ctypes.byref(self._handle), cu.STREAM_NON_BLOCKING)

    def copy_in(self, dst: int, src: int, nbytes: int) -> None:
        self._device.call("cuMemcpyHtoDAsync_v2", dst, src, nbytes, self._handle)

    def copy_all(self, copies: Sequence[tuple[int, int, int]]) -> None:
        with self._device.current():
            for dst, src, nbytes in copies:
                self._device.driver.call("cuMemcpyHtoDAsync_v2", dst, src, nbytes, self._handle)

    def copy_in_rows(self, dst: int, src: int, *, row_bytes: int, rows_count: int, pitch_bytes: int) -> None:
        copy = cu.Memcpy2D(
            srcMemoryType=cu.MEMORYTYPE_HOST,
            srcHost=src,
            srcPitch=pitch_bytes,
            dstMemoryType=cu.MEMORYTYPE_DEVICE,
            dstDevice=dst,
            dstPitch=row_bytes,
            WidthInBytes=row_bytes,
            Height=rows_count,
        )
        self._device.call("cuMemcpy2DAsync_v2", ctypes.byref(copy), self._handle)

    def copy_out(self, dst: int, src: int, nbytes: int) -> None:
        self._device.call("cuMemcpyDtoHAsync_v2", dst, src, nbytes, self._handle)

    def copy_within(self, dst: int, src: int, nbytes: int) -> None:
        self._device.call("cuMemcpyDtoDAsync_v2", dst, src, nbytes, self._handle)

    def record(self) -> CudaEvent:
        assert self._handle is not None
        return CudaEvent(self._device, self._handle)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            try:
                CudaEvent(self._device, handle).wait(CLOSE_S)
            except BusyError:  # its buffers can never be given back: the card still reads them
                raise DeviceLostError(f"{self._device.name} did not end its copies in {CLOSE_S:.0f} s") from None
            finally:
                self._device.give_back("cuStreamDestroy_v2", handle)


class CudaStaging:
    """See `base.Staging`. Huge pages, touched and then page-locked, for every context: a fifth of what cudaHostAlloc
    takes for as much (NVIDIA/cudf#23457: 1.55 s and 7.9 s for 16 GiB)."""

    def __init__(self, device: CudaDevice, nbytes: int, *, is_locked: bool) -> None:
        self._device = device
        self._bytes = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, self._bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._locked_bytes = 0
        if is_locked:
            ctypes.memset(self.address, 0, self._bytes)
            try:
                self.lock(self._bytes)
            except BaseException:
                self._map.close()
                raise
        self.view = memoryview(self._map)[:nbytes]

    def lock(self, nbytes: int) -> None:
        """See `base.Staging.lock`. A little of it at first, where that is enough; one range in any case, since no copy
        may cross two."""
        if nbytes <= self._locked_bytes:
            return
        wanted = min(self._bytes, next((most for most in LOCKED_BYTES if nbytes <= most), self._bytes))
        self._unlock()
        self._device.call("cuMemHostRegister_v2", self.address, wanted, cu.MEMHOSTREGISTER_PORTABLE)
        self._locked_bytes = wanted
        self._device.driver.registered.add(self.address, wanted)

    def _unlock(self) -> None:
        if self._locked_bytes:
            self._locked_bytes = 0
            self._device.driver.registered.remove(self.address)
            self._device.give_back("cuMemHostUnregister", self.address)

    def close(self) -> None:
        if self.address:
            self.view.release()
            self._unlock()
            self.address = 0
            with contextlib.suppress(BufferError):  # a failed read's traceback may hold a part of it a while longer
                self._map.close()


class CudaDevice:
    """See `base.Device`. Uses the primary context, which torch uses too."""

    is_direct = False
    exports_read_only = False

    def __init__(self, index: int, *, granule_bytes: int = GRANULE_BYTES, driver: cu.Driver | None = None) -> None:
        self.driver = driver or cu.load_driver()
        self.index, self.name = index, f"cuda:{index}"
        count = self.driver.number("cuDeviceGetCount", c_int)
        if index >= count:
            raise DeviceError(f"no {self.name}: this machine has {count} CUDA devices")
        self._ordinal = self.driver.number("cuDeviceGet", c_int, index)
        self.identity = self.driver.identity_of(self._ordinal)
        self.node = nodes.node_of(pci_of(self.driver, self._ordinal))
        self._context = c_void_p()
        self.driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._ordinal)
        self.properties = cu.MemAllocationProp(
            type=cu.ALLOCATION_TYPE_PINNED,
            requestedHandleTypes=cu.HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
            location=cu.MemLocation(cu.LOCATION_TYPE_DEVICE, self._ordinal),
        )
        properties = ctypes.byref(self.properties)
        smallest = self.number("cuMemGetAllocationGranularity", c_size_t, properties, cu.GRANULARITY_MINIMUM)
        self.granule_bytes = -(-granule_bytes // smallest) * smallest

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this device's context the calling thread's for a while. The thread may be one in which torch works with
        another device, so what was current is current again afterwards.
        """
        self.driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.driver.call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def call(self, name: str, *args: object) -> None:
        with self.current():
            self.driver.call(name, *args)

    def give_back(self, name: str, *args: object) -> None:
        """A call that ends something. After a DeviceLostError nothing is there any more that could be ended."""
        with contextlib.suppress(DeviceLostError):
            self.call(name, *args)

    def number(self, name: str, kind: type, *args: object) -> int:
        with self.current():
            return self.driver.number(name, kind, *args)

    def model_name(self) -> str:
        """What the card is called."""
        name = ctypes.create_string_buffer(256)
        self.driver.call("cuDeviceGetName", name, len(name), self._ordinal)
        return name.value.decode("utf-8", "replace")

    def memory(self) -> Memory:
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return Memory(total.value, free.value)

    def open_stream(self) -> CudaStream:
        return CudaStream(self)

    def alloc_staging(self, nbytes: int, *, is_locked: bool = True) -> CudaStaging:
        return CudaStaging(self, nbytes, is_locked=is_locked)

    def access(self, flags: int) -> object:
        """As cuMemSetAccess takes it: this card's own."""
        return ctypes.byref(cu.MemAccessDesc(cu.MemLocation(cu.LOCATION_TYPE_DEVICE, self.index), flags))

    def reserve_arena(self, nbytes: int, shared: int | None = None) -> CudaArena:
        if shared is not None:
            os.close(shared)
            raise DeviceError(f"an arena on {self.name} has a descriptor for each piece, not one for all")
        self._check_shared()
        return CudaArena(self, nbytes // self.granule_bytes)

    def create_arena(self, nbytes: int) -> CudaArena:
        return whole(self.reserve_arena(nbytes))

    def holders(self) -> Sequence[Holder]:
        return holders_of(self.identity)

    def _check_shared(self) -> None:
        """Raises: DeviceError if nobody could attach beside us."""
        mode = self.driver.number("cuDeviceGetAttribute", c_int, cu.ATTRIBUTE_COMPUTE_MODE, self._ordinal)
        if mode == cu.COMPUTEMODE_EXCLUSIVE_PROCESS and not mps_is_there():
            raise DeviceError(
                f"{self.name} ({self.identity}) is in exclusive-process mode: an arena there would lock every engine"
                f" out; run `nvidia-smi -i {self.identity} -c DEFAULT`, or NVIDIA's MPS"
            )

    def attach(self, fds: Sequence[int], runs: Sequence[Run]) -> CudaMapping:
        if len(fds) != len(runs):
            raise DeviceError(f"{len(fds)} pieces came, expected {len(runs)}")
        return CudaMapping(self, fds, runs)

    def import_piece(self, fd: int) -> int:
        """This device's context must be current."""
        kind = cu.HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return self.driver.number("cuMemImportFromShareableHandle", c_ulonglong, fd, kind)

    def release(self, handles: Sequence[int]) -> None:
        """Let go of pieces; what is mapped of them stays mapped."""
        with contextlib.suppress(DeviceLostError), self.current():
            for handle in handles:
                self.driver.call("cuMemRelease", handle)

    def register(self, address: int, nbytes: int) -> None:
        """See `base.Device.register`. As read-only memory, if the driver knows such; without that it refuses what this
        process may not write, as what a mount lends, and that goes by staging.
        """
        registered = self.driver.registered
        with self.driver.registering:
            if not registered.holds(address, nbytes):
                attribute = cu.ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
                knows_read_only = self.driver.number("cuDeviceGetAttribute", c_int, attribute, self._ordinal)
                flags = cu.MEMHOSTREGISTER_PORTABLE | (cu.MEMHOSTREGISTER_READ_ONLY if knows_read_only else 0)
                self.call("cuMemHostRegister_v2", address, nbytes, flags)
            registered.add(address, nbytes)

    def unregister(self, address: int) -> None:
        with self.driver.registering:
            if self.driver.registered.remove(address):
                self.give_back("cuMemHostUnregister", address)

    def reaches(self, address: int, nbytes: int) -> bool:
        return self.driver.registered.holds(address, nbytes)

    def read_back(self, address: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.call("cuMemcpyDtoH_v2", (ctypes.c_ubyte * nbytes).from_buffer(buffer), address, nbytes)
        return bytes(buffer)

    def close(self) -> None:
        """Give up this object's hold on the primary context; others' (torch's, another device object's) remain."""
        if self._context:
            with contextlib.suppress(DeviceLostError):
                self.driver.call("cuDevicePrimaryCtxRelease_v2", self._ordinal)
            self._context = c_void_p()
