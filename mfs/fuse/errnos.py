"""The one table from our errors to errno."""

from __future__ import annotations

import errno

from mfs.errors import AccessError, ChangedError, MfsError, NotFoundError, RoomError

_TABLE: tuple[tuple[type[MfsError], int], ...] = (
    (NotFoundError, errno.ENOENT),
    (AccessError, errno.EACCES),
    (ChangedError, errno.ESTALE),
    (RoomError, errno.ENOSPC),
    (MfsError, errno.EIO),
)


def errno_of(error: BaseException, *, opened: bool = False) -> int:
    """The errno a reader gets for an error of ours; EIO for anything unforeseen.

    opened: the reader holds the file open. An object that vanished is then a stale handle, not a missing name.
    """
    for kind, number in _TABLE:
        if isinstance(error, kind):
            return errno.ESTALE if opened and number == errno.ENOENT else number
    return errno.EIO
