"""Taking a mount off the tree, whether or not anyone still serves it. Blocks; never stats the mount."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from mfs import children
from mfs.control import mountinfo, runtime
from mfs.control.mountinfo import Mount
from mfs.control.runtime import Record
from mfs.errors import ConfigError, StoreError

_HELPER_S = 20.0
_LETTING_GO_S = 5.0  # between the end of a daemon's lock and that of its process
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8  # umount(2)
_libc = ctypes.CDLL(None, use_errno=True)
_PROBE_S = 3.0
_DISCONNECTED = 9
_PROBE = f"""import errno, os, sys
try:
    os.stat(sys.argv[1])
except OSError as error:
    sys.exit({_DISCONNECTED} if error.errno == errno.ENOTCONN else 0)
"""


def unmount(mountpoint: str, *, lazy: bool) -> None:
    """Take the topmost mount at `mountpoint` away: as root by ourselves, else by fusermount3.

    lazy: detach at once also if files are open; they go with the last of them.
    Raises: StoreError if it is in use or not ours; ConfigError without fusermount3.
    """
    if os.geteuid() == 0 and _umount(mountpoint, lazy=lazy):
        return
    helper = shutil.which("fusermount3") or shutil.which("fusermount")
    if helper is None:
        raise ConfigError("fusermount3 not found: install the package fuse3")
    command = [helper, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_HELPER_S, check=False,
            cwd=children.CWD, env=children.environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StoreError(f"{mountpoint} could not be unmounted within {_HELPER_S:g} s; --force detaches it") from None
    if done.returncode == 0:
        return
    said = done.stderr.strip() or f"fusermount3 exited with {done.returncode}"
    if "busy" in said.lower():
        raise _in_use(mountpoint)
    raise StoreError(f"{mountpoint} could not be unmounted: {said}")


def _umount(mountpoint: str, *, lazy: bool) -> bool:
    """umount2(2), which needs no helper in a container. Whether it is done. Raises: StoreError if it is in use."""
    if _libc.umount2(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)) == 0:
        return True
    if ctypes.get_errno() == errno.EBUSY:
        raise _in_use(mountpoint)
    return False


def _in_use(mountpoint: str) -> StoreError:
    return StoreError(
        f"{mountpoint} is in use: a program has files open or stands in a directory there; "
        f"end it ('fuser -m {mountpoint}' names it), or use --force"
    )


def is_stale(mount: Mount, record: Record | None, *, is_listening: bool) -> bool:
    """Whether nobody serves this mount any more.

    Only a daemon that is known to have ended, or the kernel's own word (ENOTCONN), makes a mount stale: a daemon that
    merely does not answer may come back.
    """
    if is_listening or (record is not None and (record.is_alive or record.is_held)):
        return False
    return record is not None or _is_disconnected(mount.mountpoint)


def _is_disconnected(mountpoint: str) -> bool:
    """Ask the kernel by a stat in a process of its own: should the mount hang, only that one hangs."""
    process = subprocess.Popen(
        children.python("-I", "-S", "-c", _PROBE, mountpoint), start_new_session=True,
        cwd=children.CWD, env=children.environment(),
    )  # fmt: skip
    try:
        return process.wait(_PROBE_S) == _DISCONNECTED
    except subprocess.TimeoutExpired:
        process.kill()
        process.returncode = -signal.SIGKILL  # not waited for: it may be stuck in the kernel until the mount is gone
        return False


def wait_until_ended(record: Record, timeout_s: float) -> bool:
    """Wait for the process of a record to end. Returns whether it did."""
    try:
        fd = os.pidfd_open(record.pid)
    except OSError:
        return True
    try:
        if not record.is_alive:  # checked after the open: the number may belong to somebody else by now
            return True
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)


def end_daemon(record: Record, timeout_s: float, *, folder: Path | None = None, owner: int | None = None) -> None:
    """End a daemon that has lost its mount: politely first; see `runtime.serves` for whom that can be.

    folder: the runtime directory its record is from, owner: uid of the mount; None is ours.
    Raises: StoreError if it cannot be ended, or if the record names a process that is no such daemon.
    """
    owner = os.geteuid() if owner is None else owner
    try:
        fd = os.pidfd_open(record.pid)  # from here on the number cannot come to mean another process
    except OSError:
        return
    try:
        if not record.is_alive:
            return
        if not runtime.serves(record, folder or runtime.directory(), owner):
            if select.select([fd], [], [], min(timeout_s, _LETTING_GO_S))[0]:
                return
            raise StoreError(
                f"pid {record.pid} was not ended: it does not hold the lock of {record.mountpoint} as a process of uid "
                f"{owner}, or belongs to another user"
            )
        for number in (signal.SIGTERM, signal.SIGKILL):
            if number == signal.SIGKILL:
                _end_holder(record.pid)
            try:
                signal.pidfd_send_signal(fd, number)
            except ProcessLookupError:
                return
            except PermissionError:
                raise StoreError(f"daemon (pid {record.pid}) belongs to another user: it was not ended") from None
            if select.select([fd], [], [], timeout_s)[0]:
                return
    finally:
        os.close(fd)
    raise StoreError(f"daemon (pid {record.pid}) does not end")


def _end_holder(pid: int) -> None:
    """Before a daemon is killed that is meant to end: its holder would start the next one."""
    try:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("PPid:"))
        parent = int(line.split()[1])
        if b"mfs.holder" in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0"):
            os.kill(parent, signal.SIGKILL)
    except (OSError, StopIteration):
        pass


def forget(mountpoint: str) -> None:
    """Remove what a dead daemon left in the runtime directory."""
    file = runtime.socket_path(mountpoint)
    for left in (file, file.with_suffix(".json")):
        left.unlink(missing_ok=True)


def other_mounts(mount: Mount) -> list[str]:
    """Where else the same file system is mounted (bind mounts): it lives on there."""
    return [other.mountpoint for other in mountinfo.read() if other.device == mount.device]


def namespaces_with(mount: Mount) -> list[int]:
    """A process of each other mount namespace in which the same file system is mounted: a container, or `unshare`."""
    found: dict[str, int] = {}
    for entry in os.scandir("/proc"):
        with suppress(OSError, ValueError):  # it has ended, or is not ours to look at
            pid, namespace = int(entry.name), os.readlink(f"/proc/{entry.name}/ns/mnt")
            if namespace in found or namespace == os.readlink("/proc/self/ns/mnt"):
                continue
            mounts = mountinfo.parse(Path(f"/proc/{pid}/mountinfo").read_bytes())
            if any(other.device == mount.device for other in mounts):
                found[namespace] = pid
    return sorted(found.values())
