"""gpuload's errors; they hang in the same tree as mfs's, so one `except MfsError` catches both. One clear line each.

    MfsError
    └── GpuloadError
        ├── FitError       it does not fit; the message names the shortfall; nothing was evicted or changed
        ├── DeviceError    the device, or its driver, refused or failed
        │   └── DeviceLostError  and so will every later call of this process
        ├── ServerError    the resident server refused or failed; `code` says which way
        │   └── AwayError  no server answers at that socket
        └── BusyError      a bounded queue is full, or a deadline passed while waiting for a turn

From mfs.errors: bad arguments are UsageError, hostile files IntegrityError, files that changed under us ChangedError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mfs.errors import AccessError, ChangedError, IntegrityError, MfsError, NotFoundError, StoreError, UsageError


class GpuloadError(MfsError):
    """Root of the errors that only gpuload raises."""


class FitError(GpuloadError):
    """The bytes do not fit where they should go. Raised before anything is evicted or copied.

    shortfall_bytes: how much more room would have been needed. waits: whether it is there as soon as other processes
        give memory back; known where it is raised, not sent.
    """

    def __init__(self, message: str, *, shortfall_bytes: int = 0, waits: bool = False) -> None:
        super().__init__(message)
        self.shortfall_bytes, self.waits = shortfall_bytes, waits


class DeviceError(GpuloadError):
    """The device or its driver refused or failed. code: the driver's own, 0 where it is not the driver's."""

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class DeviceLostError(DeviceError):
    """The card failed, or this process's hold on it: until the process ends every call fails, and its memory stays
    taken."""


class ServerError(GpuloadError):
    """The resident server answered with an error that has no class of its own here, or broke the protocol."""


class AwayError(ServerError):
    """Nobody answers at the server's socket, or the connection ended in the middle."""


class BusyError(GpuloadError):
    """A bounded queue is full or a deadline passed: nothing was changed, trying later may help."""


_BY_NAME: dict[str, type[MfsError]] = {
    cls.__name__: cls
    for cls in (
        AccessError, AwayError, BusyError, ChangedError, DeviceError, DeviceLostError, FitError, GpuloadError,
        IntegrityError, MfsError, NotFoundError, ServerError, StoreError, UsageError,
    )
}  # fmt: skip


def to_wire(error: BaseException) -> dict[str, object]:
    """The error as the server sends it; `from_wire` is the inverse."""
    if isinstance(error, MfsError):
        wire: dict[str, object] = {"error": type(error).__name__, "message": str(error)}
        if isinstance(error, FitError):
            wire["shortfall_bytes"] = error.shortfall_bytes
        return wire
    return {"error": "ServerError", "message": f"{type(error).__name__}: {error}"}


def from_wire(wire: dict[str, object]) -> MfsError:
    """The error a server described; an unknown class becomes ServerError."""
    cls = _BY_NAME.get(str(wire.get("error")), ServerError)
    message = str(wire.get("message", "the server gave no reason"))
    if cls is FitError:
        shortfall = wire.get("shortfall_bytes", 0)
        return FitError(message, shortfall_bytes=shortfall if isinstance(shortfall, int) else 0)
    return cls(message)


def first_error(error: BaseException) -> BaseException:
    """The one error to tell of, out of all that a nursery collected: ours before foreign ones, cancellation last."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [first_error(e) for e in error.exceptions]
    ours = [e for e in leaves if isinstance(e, MfsError)]
    return next(iter([*ours, *(e for e in leaves if isinstance(e, Exception)), *leaves]))


@contextmanager
def one_error() -> Iterator[None]:
    """Around a nursery: what it raises rises as one plain error, so that callers can say `except FitError`."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_error(group)
        if not isinstance(error, Exception):  # a cancellation belongs to trio, as it is
            raise
        raise error from None
