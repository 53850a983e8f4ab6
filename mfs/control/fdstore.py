"""A mount's descriptors from whoever kept them while holder and daemon were killed: systemd's FDSTORE, or `mfs.keeper`.

The holder gives copies of /dev/fuse, the lock and the journal to the manager (`mfs.manager`) each time a daemon says
that it serves. If the holder is killed too, the kernel's connection stays, and readers wait. Whoever is started next
with the same settings gets the copies: from systemd as LISTEN_FDS, from a keeper by asking for the name.

Source: sd_listen_fds(3), systemd.service(5) FileDescriptorStoreMax=.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path

from mfs import manager
from mfs.control.connecting import connect

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_FIRST_FD = 3
_PREFIX = "mfs-"
_ANSWER_S = 10.0
_NAME_BYTES_MAX = 255


def name_of(identity: str) -> str:
    """What a mount's descriptors are kept as. identity: `MountConfig.identity`."""
    return f"{_PREFIX}{identity}"


def received(name: str) -> list[int]:
    """/dev/fuse, lock and journal of the mount of this name, from the service manager that started us.

    Empty if there are none, or the mount has ended. What else of ours it kept, of another mount or other settings, it
    is told to keep no more: readers of that get ENOTCONN, and its lock is free when this returns.
    """
    found: dict[str, int] = {}
    others = set[str]()
    for fd, called in listened():
        stem, _, kind = called.rpartition(".")
        if stem == name and kind in manager.KINDS and kind not in found:
            found[kind] = fd
        else:
            if stem.startswith(_PREFIX):
                others.add(stem)
            os.close(fd)
    held = [found[kind] for kind in manager.KINDS if kind in found]
    if held and not _is_usable(held):
        for fd in held:
            os.close(fd)
        held = []
        others.add(name)
    for stem in others:
        manager.unstore(stem)
    if others:
        manager.barrier()
    return held


def ask_keeper(path: Path, name: str) -> list[int]:
    """The same from the keeper that listens there; empty also if it has ended."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        try:
            connect(sock, path.with_suffix(".take"), _ANSWER_S)
            sock.send(name.encode())
            _, fds, _, _ = socket.recv_fds(sock, _NAME_BYTES_MAX, len(manager.KINDS), socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return []
    if _is_usable(fds):
        return fds
    for fd in fds:
        os.close(fd)
    return []


def listened() -> list[tuple[int, str]]:
    """(descriptor, name) of what a service manager passed to this very process, the caller's from here on."""
    try:
        if int(os.environ.get("LISTEN_PID", "0")) != os.getpid():
            return []
        count = int(os.environ.get("LISTEN_FDS", "0"))
    except ValueError:
        return []
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = []
    for fd in range(_FIRST_FD, _FIRST_FD + count):
        try:
            os.set_inheritable(fd, False)
        except OSError:  # none there: whoever said so was wrong
            continue
        at = fd - _FIRST_FD
        found.append((fd, names[at] if at < len(names) else ""))
    return found


def _is_usable(held: Sequence[int]) -> bool:
    if len(held) != len(manager.KINDS):
        return False
    poll = select.poll()
    poll.register(held[0], 0)
    return not poll.poll(0)  # a connection that was ended polls as an error
