"""`mfs umount`: take a mount away, also when its daemon is dead."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mfs.cli.page import Page
from mfs.cli.targets import TREE_PATH
from mfs.cli.text import clean
from mfs.errors import MfsError, NotFoundError, StoreError, UsageError
from mfs.units import parse_duration

_NAMED_MAX = 5


@click.command(
    cls=Page,
    short_help="Take a mount away.",
    sections={
        "Examples": """\
mfs umount /mnt/models
mfs umount --force /mnt/models     programs that have files open there get errors"""
    },
)
@click.argument("mountpoint", type=TREE_PATH)
@click.option("--force", is_flag=True, help="Detach also if it is in use, and end a daemon that hangs.")
@click.option("--timeout", default="30s", show_default=True, help="How long to wait for the daemon to end.")
def umount(mountpoint: str, force: bool, timeout: str) -> None:
    """Unmount MOUNTPOINT and wait until its daemon has ended; the SSD tier keeps its bytes.

    Also removes a mount whose daemon has crashed.
    """
    from mfs.cli.targets import is_listening
    from mfs.control import detach, runtime

    try:
        timeout_s = parse_duration(timeout)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from error
    try:
        served = runtime.find_mount(mountpoint)
    except NotFoundError:
        if _end_detached(mountpoint, timeout_s):
            return
        raise
    if served.place.path:
        raise UsageError(f"{mountpoint} lies inside a mount: name its mount point, {served.place.mount.mountpoint}")
    place, record = served.place.mount.mountpoint, served.record
    owner, folder = served.place.mount.user_id, served.socket.parent
    if record is not None and not (owner is not None and runtime.serves(record, folder, owner)):
        record = None  # old, or a lie: no process is waited for or ended for it
    is_dead = not is_listening(served) and record is None
    detach.unmount(place, lazy=force or is_dead)
    print(clean(f"{place} unmounted" + (" (its daemon had ended already)" if is_dead else "")))
    left = detach.other_mounts(served.place.mount)
    if left:
        print(clean(f"the same files are still mounted at {', '.join(left)}"))
        return
    if is_dead or record is None:
        return
    if force:
        _ask_to_stop(served.socket)
    if detach.wait_until_ended(record, timeout_s):
        return
    if not force:
        elsewhere = ", ".join(map(str, detach.namespaces_with(served.place.mount)[:_NAMED_MAX]))
        why = f": it is still mounted in the mount namespaces of processes {elsewhere}" if elsewhere else ""
        raise StoreError(
            f"unmounted, but the daemon (pid {record.pid}) still runs after {timeout}{why}; --force ends it"
        )
    detach.end_daemon(record, timeout_s, folder=folder, owner=owner)


def _end_detached(mountpoint: str, timeout_s: float) -> bool:
    """End a daemon whose mount somebody else has detached ('umount -l'). Returns whether there was one."""
    from mfs.control import detach, mountinfo, runtime

    real = mountinfo.real_mountpoint(mountpoint)
    record = runtime.read_record(real)
    if record is None or not runtime.serves(record, runtime.directory(), os.geteuid()):
        return False
    _ask_to_stop(runtime.socket_path(real))
    if not detach.wait_until_ended(record, timeout_s):
        detach.end_daemon(record, timeout_s)
    print(clean(f"{real} was detached already; its daemon (pid {record.pid}) has been ended"))
    return True


def _ask_to_stop(socket: Path) -> None:
    """A daemon whose mount was detached under open files does not notice by itself."""
    from mfs.control.client import Client

    try:
        Client(socket, timeout_s=5.0).shutdown()
    except MfsError:  # hung or just ending: the caller waits, and then ends it
        pass
