"""The one tree of errors; every foreign exception is translated into it where it enters.

    MfsError
    ├── UsageError            the caller asked for something that has no meaning (exit status 2)
    ├── ConfigError           a setting or a machine that cannot work; raised at start only
    ├── NotFoundError         ENOENT   the source says there is no such thing
    ├── AccessError           EACCES   the source refuses us (401, 403, gated)
    ├── ChangedError          ESTALE   the object is no longer the version that was opened
    ├── RoomError             ENOSPC   what is to be kept whole does not fit into the cache
    ├── IntegrityError        EIO      bytes arrived that cannot be the object's
    └── StoreError            EIO      the source failed in another way
        └── TransientStoreError        ... and trying again may help; `fetch.retry` retries only this

errno values stand in `mfs.fuse.errnos` and nowhere else. Messages are one line: what, where, expected, got, what to do.
"""

from __future__ import annotations

from mfs.shown import clean, mask


class MfsError(Exception):
    """Root of all errors this project raises on purpose."""

    def __str__(self) -> str:
        return clean(mask(" ".join(super().__str__().split())))  # one line, whatever a server or a user put into it


class UsageError(MfsError):
    """Arguments that have no meaning together; the command exits with status 2."""


class ConfigError(MfsError):
    """A setting, or this machine, cannot work; raised before anything is mounted."""


class NotFoundError(MfsError):
    """The source has no such object, bucket, repository or revision."""


class AccessError(MfsError):
    """The source refuses these credentials, or wants some."""


class ChangedError(MfsError):
    """The source now holds another version than the one that was asked for."""


class RoomError(MfsError):
    """A file that is to be kept whole while it is open has no room in the cache."""


class IntegrityError(MfsError):
    """Bytes arrived whose length, range or checksum cannot be the object's."""


class StoreError(MfsError):
    """The source failed and trying again is not expected to help.

    is_slow: it sends, but not enough in time.
    """

    is_slow = False


class TransientStoreError(StoreError):
    """The source failed in a way that may pass: reset, timeout, 429, 5xx.

    retry_after_s: the server's own wish for the pause before the next attempt, or None.
    received_bytes: of a range that was asked for, what came before it broke off, in order and of the right version.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.received_bytes = 0


_BY_NAME = {
    cls.__name__: cls
    for cls in (
        MfsError, UsageError, ConfigError, NotFoundError, AccessError, ChangedError,
        IntegrityError, RoomError, StoreError, TransientStoreError,
    )
}  # fmt: skip


def to_wire(error: BaseException) -> tuple[str, str]:
    """The error as (class name, message), for another process; `from_wire` is the inverse."""
    if isinstance(error, MfsError):
        return type(error).__name__, str(error)
    return "StoreError", f"{type(error).__name__}: {error}"


def from_wire(name: str, message: str) -> MfsError:
    """The error another process described with `to_wire`; an unknown name becomes StoreError."""
    return _BY_NAME.get(name, StoreError)(message)
