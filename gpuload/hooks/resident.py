"""The resident server as the hooks see it: a file's tensors, or None with the reason logged once per process.

Whatever goes wrong here, the program can still load the file without us.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

log = logging.getLogger("gpuload.hooks")

ZERO_COPY_VARIABLE = "GPULOAD_ZERO_COPY"

RETRY_S = 30.0
"""After a server did not answer, how long it is not asked again."""

PING_S = 5.0
"""Longest wait for its first sign of life. A load may take long; a server that is stopped must not hold a program."""

_away_until = 0.0
_has_logged = False


def is_away() -> bool:
    """True for RETRY_S after nobody answered."""
    return time.monotonic() < _away_until


def is_copied(device: str) -> bool:
    """Whether programs get copies of what the server holds there.

    They write to what they have loaded: they merge adapters, quantise in place. On the CPU the page is copied then; on
    a GPU a kernel that writes to shared memory costs its program the card. ZERO_COPY_VARIABLE says that this one only
    reads.
    """
    return device.startswith("cuda") and os.environ.get(ZERO_COPY_VARIABLE) != "1"


def has_arena(device: str, socket_path: str | None = None) -> bool:
    """Whether a server answers that has an arena on this device. Nothing is logged."""
    if is_away():
        return False
    from mfs.errors import MfsError

    try:
        from gpuload.client.asking import ask
        from gpuload.device import identity_of

        wanted = identity_of(device)
        status = ask({"op": "status"}, socket_path=socket_path, timeout_s=PING_S)
        return any(wanted in (one["device"], one["identity"]) for one in status["devices"])
    except (MfsError, LookupError, TypeError):  # whoever loads says what is wrong
        return False


def attach_file(
    path: str, device: str, *, seen: os.stat_result | None = None, socket_path: str | None = None
) -> Any | None:
    """The file's tensors from the server, made resident if they are not, or None.

    seen: what `path` was when the library opened it; another file of that name is not mixed with it.
    """
    global _away_until
    if is_away():
        return None
    from gpuload.errors import AwayError, BusyError

    try:
        from gpuload.client.asking import ask
        from gpuload.client.attached import open_resident
        from gpuload.descriptors import may_keep_one
        from mfs.errors import ChangedError, StoreError

        if not may_keep_one():
            raise StoreError("the weights would take more than half of this program's descriptors (ulimit -n)")
        try:
            ask({"op": "ping"}, socket_path=socket_path, timeout_s=PING_S)
        except (AwayError, BusyError):
            _away_until = time.monotonic() + RETRY_S
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            now = os.fstat(fd)
            if seen is not None and (not os.path.samestat(seen, now) or seen.st_ctime_ns != now.st_ctime_ns):
                raise ChangedError("the file was replaced since it was opened")
            return open_resident([fd], [os.path.abspath(path)], device, socket_path=socket_path)
        finally:
            os.close(fd)
    except Exception as error:  # whatever it is, the library can still load the file
        if isinstance(error, AwayError):
            _away_until = time.monotonic() + RETRY_S
        tell_once(f"loading {path} without the server", error)
        return None


def tell_once(what: str, error: BaseException) -> None:
    """One line per process: a server that is away is away for every file."""
    global _has_logged
    from gpuload.errors import first_error

    if not _has_logged:
        _has_logged = True
        log.warning("gpuload: %s: %s", what, first_error(error))
