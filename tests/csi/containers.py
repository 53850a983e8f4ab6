"""What a container's processes do, called in a process outside (`mfs.testing.outside`)."""

from __future__ import annotations

import ctypes
import os

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19
_libc = ctypes.CDLL(None, use_errno=True)


def enter(target: str, inside: str) -> None:
    """Be in a mount namespace of one's own with `target` bound at `inside` (HostToContainer), as a runtime does it."""
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None))
    os.makedirs(inside, exist_ok=True)
    _check(_libc.mount(os.fsencode(target), os.fsencode(inside), None, _MS_BIND | _MS_REC, None))
    _check(_libc.mount(b"none", os.fsencode(inside), None, _MS_REC | _MS_SLAVE, None))


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
