"""Which process is the server: one below a holder, or below a service manager, or started beside another one."""

from __future__ import annotations

import os
import subprocess
import sys

from mfs import children
from mfs.cli.run import Failed

HOLDER_VARIABLE = "GPULOAD_HOLDER"
_READY_VARIABLE = "GPULOAD_READY_FD"
START_S = 600.0
"""Longest wait for a server to have taken over; its own deadlines are shorter."""


def store_address() -> str:
    """Where descriptors are kept for us."""
    return os.environ.get("NOTIFY_SOCKET", "")


def has_holder() -> bool:
    """Whether who keeps them is `gpuload.holder`."""
    return HOLDER_VARIABLE in os.environ


def has_manager() -> bool:
    """Whether somebody is there already who keeps them."""
    return bool(store_address())


def become_holder() -> None:
    """Go on as the holder, which starts this very command below itself. Does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = children.python("-m", "gpuload.holder", *sys.argv[1:])
    os.execv(command[0], command)


def is_child() -> bool:
    """Whether this process is to serve itself: below a holder, or as `start_child` made it."""
    return has_holder() or _READY_VARIABLE in os.environ


def start_child() -> None:
    """Start this very command beside us, to stay when we have returned: once it serves. Raises: Failed."""
    ready, theirs = os.pipe()
    environment = {**os.environ, _READY_VARIABLE: str(theirs)}
    command = children.python("-m", "gpuload", *sys.argv[1:])
    with subprocess.Popen(command, env=environment, pass_fds=[theirs], stdin=subprocess.DEVNULL) as child:
        os.close(theirs)
        if os.read(ready, 1):
            os._exit(0)  # it serves, and is nobody's child from here on
        status = child.wait(START_S)
    raise Failed("") if status else Failed("the server that was to take over has ended")


def tell_parent() -> None:
    """We serve: whoever started us to take over may return."""
    fd = os.environ.pop(_READY_VARIABLE, "")
    if fd:
        os.write(int(fd), b"1")
        os.close(int(fd))
