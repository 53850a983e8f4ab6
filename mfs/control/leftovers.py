"""What mounts that ended leave behind, in the tree and in the runtime directory, and who may take it away when.

A dead mount stays until the next one can stand in its place. Of a mount that is gone nothing stays in the runtime
directory, which is memory; only the log of one that did not end well is kept for a day, for whoever wants to know why.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mfs.control import detach, mountinfo, runtime
from mfs.errors import ConfigError

_STEM = re.compile(r"[0-9a-f]{16}")
_ENDINGS = (".sock", ".loans", ".next", ".page", ".json")
_LOG_S = 86_400.0


def dead_daemon(mountpoint: str) -> str | None:
    """The daemon of a mount of ours at this real path that nobody serves, in words; None where there is no such mount.

    The caller holds the mount's lock. Raises: ConfigError if somebody serves it.
    """
    mounted = mountinfo.mount_at(mountpoint)
    if mounted is None or not mounted.is_mfs:
        return None
    record = runtime.find_mount(mountpoint).record
    if not detach.is_stale(mounted, record, is_listening=False):  # who holds the lock knows that nobody of ours does
        raise living(mountpoint, record)
    return f"daemon (pid {record.pid})" if record else "daemon"


def living(mountpoint: str, record: runtime.Record | None) -> ConfigError:
    """What to say of a mount that is served already."""
    sources = f" of {', '.join(record.sources)} (pid {record.pid})" if record else ""
    return ConfigError(f"{mountpoint} is an mfs mount{sources} already: 'mfs umount {mountpoint}' first")


def take_dead_away(mountpoint: str) -> None:
    """Detach a dead mount (`dead_daemon`), and dead ones below it. Raises: StoreError if one cannot be; ConfigError."""
    while True:
        detach.unmount(mountpoint, lazy=True)
        below = mountinfo.mount_at(mountpoint)
        if below is None or not below.is_mfs:
            return
        if not detach.is_stale(below, None, is_listening=False):  # the record is ours by now: the kernel knows
            raise living(mountpoint, None)


@contextmanager
def forgotten_after(mountpoint: str, lock: int, is_ours: Callable[[], bool], log_file: Path | None) -> Iterator[None]:
    """Remove a mount's lock on leaving, unless it is another daemon's by then; and its log, if all went well.

    lock: held. log_file: where the daemon logs; one that a person has named stays.
    """
    is_well = False
    try:
        yield
        is_well = True
    finally:
        if is_ours():
            if log_file == runtime.log_path(mountpoint) and is_well:
                log_file.unlink(missing_ok=True)
            _unlink_lock(runtime.socket_path(mountpoint).with_suffix(".lock"), lock)


def sweep() -> None:
    """Remove what daemons left in the runtime directory that were killed and whose mounts are gone."""
    folder = runtime.create_directory()
    mounted = {runtime.mount_hash(mount.mountpoint) for mount in mountinfo.read() if mount.is_mfs}
    stems = {path.stem for path in folder.iterdir() if _STEM.fullmatch(path.stem)}
    for stem in stems - mounted:
        with suppress(OSError):
            _sweep_one(folder / stem)


def _sweep_one(place: Path) -> None:
    log, lock_file = place.with_suffix(".log"), place.with_suffix(".lock")
    try:
        lock = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        _remove_old(log)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its daemon lives
        for ending in _ENDINGS:
            place.with_suffix(ending).unlink(missing_ok=True)
        _remove_old(log)
        _unlink_lock(lock_file, lock)
    finally:
        os.close(lock)


def _remove_old(log: Path) -> None:
    with suppress(FileNotFoundError):
        if time.time() - log.lstat().st_mtime > _LOG_S:
            log.unlink()


def _unlink_lock(file: Path, held: int) -> None:
    """Remove a lock file by who holds it; one that is another file by now stays."""
    with suppress(OSError):
        if os.path.samestat(os.fstat(held), file.lstat()):
            file.unlink()
