"""What the service manager named by NOTIFY_SOCKET is told: systemd, or `mfs.keeper`, which speaks the same.

Source: sd_notify(3), sd_pid_notify_with_fds(3), systemd's NOTIFY_SOCKET datagrams. Imported by the holder: nothing but
the standard library's small modules.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence

_TIMEOUT_S = 1.0  # a manager that does not read must not keep the mount from serving
_BARRIER_S = 5.0
KINDS = ("device", "lock", "journal")
"""Of the descriptors of a mount, in the order in which the holder has them."""


def notify(message: str, fds: Sequence[int] = (), *, address: str | None = None) -> bool:
    """Tell it, and give it copies of descriptors. Returns whether there is one and it took the message.

    address: of another one than NOTIFY_SOCKET.
    """
    address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(sock, [message.encode()], list(fds))
        except OSError:
            return False
    return True


def barrier(*, address: str | None = None) -> None:
    """Wait until it has done what it was told; for some seconds at most. address: as of `notify`."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        told = notify("BARRIER=1", [theirs], address=address)
        os.close(theirs)
        theirs = -1
        if told:
            select.select([ours], [], [], _BARRIER_S)
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def is_named() -> bool:
    """Whether there is to be one."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def store(name: str, held: Sequence[int]) -> bool:
    """Have the descriptors of a mount kept under this name. What it has already it keeps once. Returns whether it
    took them.
    """
    return all(notify(f"FDSTORE=1\nFDNAME={name}.{kind}", [fd]) for kind, fd in zip(KINDS, held, strict=True))


def unstore(name: str, *, address: str | None = None) -> None:
    """Have them kept no more. address: as of `notify`."""
    for kind in KINDS:
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}.{kind}", address=address)
