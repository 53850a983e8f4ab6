"""Memory of a CUDA device: arenas of pieces, and what another process maps of them. NOT YET RUN ON A GPU.

A piece is physical memory (cuMemCreate), made in the size in which it is needed, given back when it is not, and mapped
for its owner. A client imports the pieces of its model as file descriptors and maps them side by side, read-only, in
the order of its layout: no address has to match between processes, no legacy IPC handle is involved, and PID namespaces
do not matter.
Source: CUDA Driver API, chapter Virtual Memory Management.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from ctypes import c_int, c_ulonglong
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from gpuload.device import driver as cu
from gpuload.device.base import Run, total_granules
from gpuload.errors import DeviceError, DeviceLostError, FitError
from mfs.units import format_size

if TYPE_CHECKING:
    from gpuload.device.cuda import CudaDevice

PLACES = 4
"""Addresses of an arena for each granule that it may have, so that runs of them are free for pieces of any size."""


class _Mapped:
    """Pieces side by side in this process's address space. Places and sizes are counted in granules."""

    def __init__(self, device: CudaDevice, count: int) -> None:
        self._device, self._unit = device, device.granule_bytes
        self.nbytes = count * self._unit
        self.address = device.number("cuMemAddressReserve", c_ulonglong, self.nbytes, 0, 0, 0)
        self.shown: dict[int, Piece] = {}
        """By where it begins, what is mapped; whose the handles are is the caller's business."""

    def put(self, piece: Piece) -> None:
        """Map it where nothing is. The context is current, here and below. Raises: DeviceError."""
        at, size = self._range(piece)
        self._device.driver.call("cuMemMap", at, size, 0, piece.handle, 0)
        self.shown[piece.place] = piece

    def take(self, piece: Piece) -> None:
        """Unmap it, if it is what is mapped there."""
        if self.shown.get(piece.place) == piece:
            self._device.driver.call("cuMemUnmap", *self._range(piece))
            del self.shown[piece.place]

    def allow(self, pieces: Sequence[Piece]) -> None:
        """Reading, of all of these, which are in order."""
        access = self._device.access(cu.ACCESS_READ)
        for first, count in _joined([(piece.place, piece.count) for piece in pieces]):
            self._device.driver.call("cuMemSetAccess", self.address + first * self._unit, count * self._unit, access, 1)

    def _range(self, piece: Piece) -> tuple[int, int]:
        return self.address + piece.place * self._unit, piece.count * self._unit

    def close(self) -> None:
        if not self.address:
            return
        for piece in self.shown.values():
            self._device.give_back("cuMemUnmap", *self._range(piece))
        self._device.give_back("cuMemAddressFree", self.address, self.nbytes)
        self.address, self.shown = 0, {}


@dataclass(frozen=True)
class Piece:
    """What is shown, or to be shown."""

    place: int
    run: Run
    """Its granules' numbers in the arena."""
    handle: int

    @property
    def count(self) -> int:
        return self.run[1]


def _joined(runs: Sequence[Run]) -> list[Run]:
    """The same, those that follow each other as one."""
    joined: list[Run] = []
    for first, count in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


class CudaArena:
    """See `base.Arena`."""

    has_pieces = True

    def __init__(self, device: CudaDevice, granules_count: int) -> None:
        self._device = device
        self.granule_bytes, self.granules_count = device.granule_bytes, granules_count
        self.places_count = PLACES * granules_count
        self._handles: dict[Run, int] = {}
        """Of the pieces that are mapped."""
        self._fds: dict[Run, int] = {}
        """Where somebody wanted one: kept, since it costs a call, and nothing says that what was imported may be
        exported again."""
        self.address = device.number("cuMemAddressReserve", c_ulonglong, self._nbytes, 0, 0, 0)

    @property
    def _nbytes(self) -> int:
        return self.places_count * self.granule_bytes

    def commit(self, runs: Sequence[Run]) -> None:
        nbytes = total_granules(runs) * self.granule_bytes
        free = self._device.memory().free_bytes
        if nbytes > free:
            raise FitError(
                f"{format_size(nbytes)} more do not fit {self._device.name}: {format_size(free)} are free",
                shortfall_bytes=nbytes - free,
                waits=True,
            )
        driver, properties = self._device.driver, ctypes.byref(self._device.properties)
        try:
            with self._device.current():
                for run in runs:
                    size = run[1] * self.granule_bytes
                    self._map(run, driver.number("cuMemCreate", c_ulonglong, size, properties, 0))
                self._allow(runs)
        except BaseException as error:
            self.release(runs)
            if isinstance(error, DeviceError) and error.code == cu.ERROR_OUT_OF_MEMORY:
                text = (
                    f"{format_size(nbytes)} more of {self._device.name}: {error}, though {format_size(free)} were free"
                )
                raise FitError(text, shortfall_bytes=1, waits=True) from None
            raise

    def _range(self, run: Run) -> tuple[int, int]:
        return self.address + run[0] * self.granule_bytes, run[1] * self.granule_bytes

    def _map(self, run: Run, handle: int) -> None:
        at, size = self._range(run)
        try:
            self._device.driver.call("cuMemMap", at, size, 0, handle, 0)
        except BaseException:
            self._device.give_back("cuMemRelease", handle)
            raise
        self._handles[run] = handle

    def _allow(self, runs: Sequence[Run]) -> None:
        access = self._device.access(cu.ACCESS_READWRITE)
        for run in _joined(sorted(runs)):
            self._device.driver.call("cuMemSetAccess", *self._range(run), access, 1)

    def shared(self) -> int | None:
        return None

    def descriptors(self, runs: Sequence[Run]) -> Sequence[int]:
        return [self._descriptor(run) for run in runs]

    def _descriptor(self, run: Run) -> int:
        if run not in self._fds:
            kind = cu.HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            made = self._device.number("cuMemExportToShareableHandle", c_int, self._handles[run], kind, 0)
            if self._fds.setdefault(run, made) != made:  # another thread was first
                os.close(made)
        return self._fds[run]

    def adopt(self, runs: Sequence[Run], fds: Sequence[int]) -> None:
        """Not known before a GPU was seen: whether a driver keeps pieces whose maker has died for as long as one of
        their descriptors is open, as its documentation has it of handles, and gives them with their bytes."""
        self._fds |= dict(zip(runs, fds, strict=True))
        with self._device.current():
            for run, fd in zip(runs, fds, strict=True):
                self._map(run, self._device.import_piece(fd))
            self._allow(runs)

    def release(self, runs: Sequence[Run]) -> None:
        refused: list[DeviceError] = []
        with self._device.current():
            for run in runs:
                handle = self._handles.pop(run, None)
                if handle is not None:
                    self._release(run, handle, refused)
        if refused:
            raise refused[0]

    def _release(self, run: Run, handle: int, refused: list[DeviceError]) -> None:
        fd = self._fds.pop(run, None)
        if fd is not None:
            os.close(fd)
        for name, args in (("cuMemUnmap", self._range(run)), ("cuMemRelease", (handle,))):
            try:
                self._device.driver.call(name, *args)
            except DeviceLostError:  # nothing is there any more that could be ended
                pass
            except DeviceError as error:  # the others go back all the same
                refused.append(error)

    def export(self, runs: Sequence[Run]) -> list[int]:
        from gpuload.wire import close_all

        fds: list[int] = []
        try:
            fds.extend(os.dup(self._descriptor(run)) for run in runs)
        except OSError as error:
            close_all(fds)
            raise DeviceError(f"cannot hand out memory of {self._device.name}: {error.strerror}") from None
        except BaseException:
            close_all(fds)
            raise
        return fds

    def close(self) -> None:
        if self.address:
            self.release(list(self._handles))
            self._device.give_back("cuMemAddressFree", self.address, self._nbytes)
            self.address = 0


class CudaMapping:
    """See `base.Mapping`. Read-only: a kernel that writes fails, and with it its process's use of the card."""

    waits_to_close = True
    is_hidden = False

    def __init__(self, device: CudaDevice, fds: Sequence[int], runs: Sequence[Run]) -> None:
        self._device = device
        self.pieces: list[Piece] = []
        """What is shown, in order. Handles are kept: a change that fails half-way maps them again."""
        self._mapped = _Mapped(device, total_granules(runs))
        self.address, self.nbytes = self._mapped.address, self._mapped.nbytes
        try:
            with device.current():
                for (place, run), fd in zip(_placed(runs), fds, strict=True):
                    self.pieces.append(Piece(place, run, device.import_piece(fd)))
                    self._mapped.put(self.pieces[-1])
                self._mapped.allow(self.pieces)
        except BaseException:
            self._end()
            raise

    def prepare(self, fds: Sequence[int], runs: Sequence[Run], *, is_same: bool) -> CudaChange:
        after, count = _placed(runs), total_granules(runs)
        if count * self._device.granule_bytes != self.nbytes or len(fds) != len(runs):
            shown = self.nbytes // self._device.granule_bytes
            raise ValueError(f"{len(fds)} descriptors of {runs} are not the {shown} granules that are shown")
        before = {(piece.place, piece.run): piece for piece in self.pieces if is_same}
        made: list[Piece] = []
        try:
            with self._device.current():
                for (place, run), fd in zip(after, fds, strict=True):
                    if (place, run) not in before:
                        made.append(Piece(place, run, self._device.import_piece(fd)))
        except BaseException:
            self._device.release([piece.handle for piece in made])
            raise
        kept = {before[key] for key in after if key in before}
        return CudaChange(self, [piece for piece in self.pieces if piece not in kept], made)

    def exchange(self, gone: Sequence[Piece], come: Sequence[Piece]) -> None:
        """See `base.Change`: show some pieces in place of others, which have as many granules at the same places."""
        self._device.call("cuCtxSynchronize")  # what is queued reads the old bytes
        try:
            self._show(gone, come)
        except Exception:
            try:
                self._show(come, gone)
            except Exception:
                self.hide()
            raise
        self.pieces = sorted({*self.pieces} - {*gone} | {*come}, key=lambda piece: piece.place)

    def _show(self, gone: Sequence[Piece], come: Sequence[Piece]) -> None:
        lacking = []
        with self._device.current():
            for piece in gone:
                self._mapped.take(piece)
            for piece in come:
                if self._mapped.shown.get(piece.place) != piece:
                    self._mapped.put(piece)
                    lacking.append(piece)
            self._mapped.allow(lacking)

    def hide(self) -> None:
        self.is_hidden = True
        with contextlib.suppress(DeviceError), self._device.current():
            for piece in list(self._mapped.shown.values()):
                self._mapped.take(piece)

    def close(self) -> None:
        if self._device.driver.is_inherited:  # it is the parent's, and stays so
            return
        if self._mapped.address:
            self._device.give_back("cuCtxSynchronize")  # a kernel that reads these weights may still be queued
        self._end()

    def _end(self) -> None:
        self._mapped.close()
        pieces, self.pieces = self.pieces, []
        self._device.release([piece.handle for piece in pieces])


class CudaChange:
    """See `base.Change`. Only pieces that differ are mapped anew."""

    waits_to_close = True

    def __init__(self, mapping: CudaMapping, shown: Sequence[Piece], held: Sequence[Piece]) -> None:
        self._mapping, self._shown, self._held = mapping, shown, held

    def exchange(self) -> None:
        self._mapping.exchange(self._shown, self._held)
        self._shown, self._held = self._held, self._shown

    def close(self) -> None:
        held, self._held = self._held, ()
        if not self._mapping._device.driver.is_inherited:
            self._mapping._device.release([piece.handle for piece in held])


def _placed(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """Where each stands among them, side by side."""
    return list(zip(accumulate((count for _, count in runs), initial=0), runs, strict=False))
