"""A daemon's mount shown at a pod's path, by a bind mount; and what is mounted where. Never stats a mount.

Source: mount(2), mount_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from mfs.control import detach, mountinfo
from mfs.errors import MfsError, StoreError

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 32, 4096
_LAYERS_MAX = 64
_libc = ctypes.CDLL(None, use_errno=True)


def device_at(path: str) -> str | None:
    """The file system that is seen at this path, as 'major:minor', if a mount stands exactly there."""
    mounted = mountinfo.mount_at(path)
    return mounted.device if mounted else None


def is_ours(path: str) -> bool:
    """Whether a mount of mfs stands exactly there."""
    mounted = mountinfo.mount_at(path)
    return mounted is not None and mounted.is_mfs


def bind(source: Path, target: str) -> None:
    """Show the mount at `source` at `target` too, read-only; `target` is made if need be. Raises: StoreError."""
    if device_at(target) is None:  # else it is there, and may be dead: not to be touched
        try:
            os.makedirs(target, mode=0o750, exist_ok=True)
        except OSError as error:
            raise StoreError(f"target {target} cannot be made: {error.strerror}") from error
    _mount(str(source), target, _MS_BIND)
    try:
        _mount("none", target, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    except MfsError:
        detach.unmount(target, lazy=True)
        raise


def unbind(target: str) -> None:
    """Take away all that is mounted at `target`, also if it is dead or in use. Raises: StoreError."""
    for _ in range(_LAYERS_MAX):
        if device_at(target) is None:
            return
        detach.unmount(target, lazy=True)
    raise StoreError(f"{target} is still mounted after {_LAYERS_MAX} times of unmounting")


def remove(directory: str) -> None:
    """Remove an empty directory on which nothing is mounted; one that has gone is no fault. Raises: StoreError."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"target {directory} cannot be removed: {error.strerror}") from error


def _mount(source: str, target: str, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        why = os.strerror(ctypes.get_errno())
        raise StoreError(f"{source} cannot be bound to {target}: {why}; the driver must be root with CAP_SYS_ADMIN")
