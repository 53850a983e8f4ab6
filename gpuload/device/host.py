"""The CPU as a device: arenas are memfds, attaching is mmap, copies run in a stream's own thread.

For CPU inference servers it is the real thing; for tests it stands in for a GPU, having the same queues, events,
granules and processes. A client maps privately (copy on write): a framework which edits a weight in place edits its own
copy of that page.

Sharing is read-only: descriptors are handed out open for reading, and the file's mode lets no other user open it for
more. F_SEAL_FUTURE_WRITE would bind the server's own user and root as well, but no memory could go back then: the
kernel punches no hole into such a file (mm/shmem.c, shmem_fallocate). decisions/0009 weighs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import queue
import threading
from collections.abc import Callable, Sequence

from gpuload.device.base import Holder, Memory, Run, total_granules, whole
from gpuload.device.ranges import Ranges
from gpuload.errors import BusyError, DeviceError, FitError
from mfs import limits
from mfs.units import format_size

GRANULE_BYTES = 2 << 20
"""As on CUDA, so that layouts and waste are alike; a multiple of the page, which is all that mmap needs."""

QUEUE_LENGTH_MAX = 4096
"""Copies waiting in one stream. The ring of staging buffers binds long before."""

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 0x1, 0x2, 0x4  # linux/fcntl.h
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x1, 0x2  # linux/falloc.h
_MADV_POPULATE_WRITE = 23  # Linux 5.14

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def view_of(address: int, nbytes: int) -> memoryview:
    """Host memory at an address, writable. It does not keep that memory alive."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B") if nbytes else memoryview(bytearray())


class HostEvent:
    """See `base.Event`."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._error: BaseException | None = None

    def wait(self, timeout_s: float) -> None:
        if not self._reached.wait(timeout_s):
            raise BusyError(f"a copy in host memory was not done after {timeout_s:.0f} s")
        if self._error is not None:
            raise DeviceError(f"a copy in host memory failed: {self._error}")

    def reach(self, error: BaseException | None) -> None:
        self._error = error
        self._reached.set()


class HostStream:
    """See `base.Stream`. The first copy that fails fails every later event: what comes after it cannot be trusted."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Callable[[], object] | HostEvent | None] = queue.Queue(QUEUE_LENGTH_MAX)
        self._thread = threading.Thread(target=self._work, name="gpuload-host-stream", daemon=True)
        self._thread.start()

    def copy_in(self, dst: int, src: int, nbytes: int) -> None:
        self._queue.put(lambda: ctypes.memmove(dst, src, nbytes))

    def copy_all(self, copies: Sequence[tuple[int, int, int]]) -> None:
        for copy in copies:
            self.copy_in(*copy)

    def copy_in_rows(self, dst: int, src: int, *, row_bytes: int, rows_count: int, pitch_bytes: int) -> None:
        def copy() -> None:
            for row in range(rows_count):
                ctypes.memmove(dst + row * row_bytes, src + row * pitch_bytes, row_bytes)

        self._queue.put(copy)

    def copy_out(self, dst: int, src: int, nbytes: int) -> None:
        self.copy_in(dst, src, nbytes)

    def copy_within(self, dst: int, src: int, nbytes: int) -> None:
        self.copy_in(dst, src, nbytes)

    def record(self) -> HostEvent:
        event = HostEvent()
        self._queue.put(event)
        return event

    def close(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        error: BaseException | None = None
        while (item := self._queue.get()) is not None:
            if isinstance(item, HostEvent):
                item.reach(error)
            elif error is None:
                try:
                    item()
                except BaseException as failure:  # handed to whoever waits for the event
                    error = failure


class HostStaging:
    """See `base.Staging`. Ordinary memory; touched once, no page fault falls into a copy."""

    def __init__(self, nbytes: int, reached: Ranges, *, is_touched: bool) -> None:
        self._map, self._reached = mmap.mmap(-1, max(nbytes, 1)), reached
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if is_touched:
            ctypes.memset(self.address, 0, nbytes)
        reached.add(self.address, nbytes)

    def lock(self, nbytes: int) -> None:
        return None

    def close(self) -> None:
        self._reached.remove(self.address)
        self.view.release()
        with contextlib.suppress(BufferError):  # the traceback of a failed read may hold a part of it a while longer
            self._map.close()


class HostArena:
    """See `base.Arena`. Memory is taken when it is committed: a machine without room says so there, not in a load."""

    has_pieces = False

    def __init__(self, nbytes: int, granule_bytes: int, shared: int | None = None) -> None:
        self.granule_bytes = granule_bytes
        self.granules_count = self.places_count = nbytes // granule_bytes
        size = self.granules_count * granule_bytes
        self._fd = _made_file(size) if shared is None else shared
        try:
            if os.fstat(self._fd).st_size != size:
                raise ValueError(f"there is one of {os.fstat(self._fd).st_size}")
            self._map = mmap.mmap(self._fd, size or mmap.PAGESIZE, mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            os.close(self._fd)
            raise DeviceError(f"cannot reserve an arena of {size} bytes: {error}") from None
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def commit(self, runs: Sequence[Run]) -> None:
        nbytes = total_granules(runs) * self.granule_bytes
        free = limits.available().free_bytes
        if nbytes > free:
            raise FitError(
                f"{format_size(nbytes)} more do not fit host memory: {format_size(free)} are free",
                shortfall_bytes=nbytes - free,
                waits=True,
            )
        try:
            for start, size in self._ranges(runs):
                os.posix_fallocate(self._fd, start, size)
                with contextlib.suppress(OSError):  # an older kernel: pages are mapped one by one as they are written
                    self._map.madvise(_MADV_POPULATE_WRITE, start, size)
        except OSError as error:
            self.release(runs)
            raise FitError(
                f"{format_size(nbytes)} more of host memory: {error.strerror}", shortfall_bytes=1, waits=True
            ) from None

    def release(self, runs: Sequence[Run]) -> None:
        for start, size in self._ranges(runs):
            if _libc.fallocate(self._fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, start, size):
                raise DeviceError(f"memory of an arena cannot be given back: {os.strerror(ctypes.get_errno())}")

    def _ranges(self, runs: Sequence[Run]) -> list[tuple[int, int]]:
        return [(first * self.granule_bytes, count * self.granule_bytes) for first, count in runs]

    def export(self, runs: Sequence[Run]) -> list[int]:
        return [os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)]

    def shared(self) -> int | None:
        return self._fd

    def descriptors(self, runs: Sequence[Run]) -> Sequence[int]:
        return ()

    def adopt(self, runs: Sequence[Run], fds: Sequence[int]) -> None:
        return None

    def close(self) -> None:
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = -1


def _made_file(size: int) -> int:
    fd = os.memfd_create("gpuload-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.fchmod(fd, 0o400)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise DeviceError(f"cannot reserve an arena of {size} bytes: {error}") from None
    return fd


class HostMapping:
    """See `base.Mapping`. Private and writable: a write copies that page for this process alone."""

    waits_to_close = False
    is_hidden = False

    def __init__(self, fd: int, runs: Sequence[Run], granule_bytes: int) -> None:
        self.runs, self._unit = list(runs), granule_bytes
        self.nbytes = total_granules(runs) * granule_bytes
        self.address = 0
        if not self.nbytes:
            return
        self.address = self._mmap(None, self.nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        try:
            self.show(fd, self.runs)
        except BaseException:
            self.close()
            raise

    def show(self, fd: int, runs: list[Run]) -> None:
        """Map all of it anew; no address is ever without a mapping. Raises: DeviceError, with a part of it done."""
        at = self.address
        for first, count in runs:
            flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            self._mmap(at, count * self._unit, protection, flags, fd, first * self._unit)
            at += count * self._unit
        self.runs = runs

    def hide(self) -> None:
        self.is_hidden = True
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        self._mmap(self.address, self.nbytes, _PROT_NONE, flags, -1, 0)

    def prepare(self, fds: Sequence[int], runs: Sequence[Run], *, is_same: bool) -> HostChange:
        check_one(fds)
        if total_granules(runs) * self._unit != self.nbytes:
            raise ValueError(f"{runs} are not the {self.nbytes // self._unit} granules that are shown")
        HostMapping(fds[0], runs, self._unit).close()  # a rehearsal: the kernel has room for so many mappings
        return HostChange(self, fds[0], list(runs), is_same=is_same)

    def _mmap(self, at: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
        address = _libc.mmap(at, nbytes, protection, flags, fd, offset)
        if address == _MAP_FAILED:
            raise DeviceError(f"mmap of {nbytes} bytes of an arena: {os.strerror(ctypes.get_errno())}")
        return int(address)

    def close(self) -> None:
        if self.address:
            _libc.munmap(self.address, self.nbytes)
            self.address = 0


class HostChange:
    """See `base.Change`. All granules are mapped anew, equal ones too: what this process has written to its copies of
    pages is gone, everywhere."""

    waits_to_close = False

    def __init__(self, mapping: HostMapping, fd: int, runs: list[Run], *, is_same: bool) -> None:
        self._mapping, self._runs, self._is_same = mapping, runs, is_same
        self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        self._is_shown = False

    def exchange(self) -> None:
        before = self._mapping.runs
        try:
            self._show(self._runs, is_new=not self._is_shown)
        except Exception:
            try:
                self._show(before, is_new=self._is_shown)
            except Exception:
                self._mapping.hide()
            raise
        self._runs, self._is_shown = before, not self._is_shown

    def _show(self, runs: list[Run], *, is_new: bool) -> None:
        if not is_new and not self._is_same:
            raise DeviceError("there is no descriptor any more of the arena that was shown before")
        self._mapping.show(self._fd, runs)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def check_one(fds: Sequence[int]) -> None:
    """Raises: DeviceError."""
    if len(fds) != 1:
        raise DeviceError(f"an arena in host memory comes as one descriptor, got {len(fds)}")


class HostDevice:
    """See `base.Device`.

    is_direct=False makes it behave as a GPU does, with every byte going through a stream, out of staging or of memory
    that was registered; for tests. reaches_all: whether memory need not be registered; by default if it is direct.
    """

    def __init__(
        self,
        *,
        name: str = "cpu",
        granule_bytes: int = GRANULE_BYTES,
        is_direct: bool = True,
        reaches_all: bool | None = None,
    ) -> None:
        if granule_bytes % mmap.PAGESIZE:
            raise ValueError(f"granule of {granule_bytes} bytes: expected a multiple of {mmap.PAGESIZE}")
        self.name, self.granule_bytes, self.is_direct = name, granule_bytes, is_direct
        self.identity, self.exports_read_only = name, True
        self.node: int | None = None
        self._reaches_all = is_direct if reaches_all is None else reaches_all
        self._registered = Ranges()

    def memory(self) -> Memory:
        found = limits.available()
        return Memory(found.total_bytes, found.free_bytes)

    def open_stream(self) -> HostStream:
        return HostStream()

    def alloc_staging(self, nbytes: int, *, is_locked: bool = True) -> HostStaging:
        return HostStaging(nbytes, self._registered, is_touched=is_locked)

    def reserve_arena(self, nbytes: int, shared: int | None = None) -> HostArena:
        return HostArena(nbytes, self.granule_bytes, shared)

    def create_arena(self, nbytes: int) -> HostArena:
        return whole(self.reserve_arena(nbytes))

    def holders(self) -> Sequence[Holder]:
        return ()

    def attach(self, fds: Sequence[int], runs: Sequence[Run]) -> HostMapping:
        check_one(fds)
        return HostMapping(fds[0], runs, self.granule_bytes)

    def register(self, address: int, nbytes: int) -> None:
        self._registered.add(address, nbytes)

    def unregister(self, address: int) -> None:
        self._registered.remove(address)

    def reaches(self, address: int, nbytes: int) -> bool:
        return self._reaches_all or self._registered.holds(address, nbytes)

    def read_back(self, address: int, nbytes: int) -> bytes:
        return bytes(view_of(address, nbytes))

    def close(self) -> None:
        return None
