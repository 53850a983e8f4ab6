"""Questions to the resident server: one connection, one question, one answer. No torch: the command starts fast."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from gpuload.errors import AwayError, BusyError, from_wire
from gpuload.paths import SOCKET_VARIABLE, default_socket
from gpuload.server import wire
from gpuload.shards import find_shards, from_os_error
from mfs.errors import AccessError

CONNECT_S = 5.0
ATTACH_S = 60.0
LOAD_S = 3600.0
"""Deadlines. A load may wait for its turn behind others, and for an origin behind a mount."""


def load_resident(
    where: str | os.PathLike[str],
    model: str,
    device: str | None,
    *,
    is_swap: bool = False,
    options: Mapping[str, Any] | None = None,
    socket_path: str | None = None,
    timeout_s: float = LOAD_S,
) -> dict[str, Any]:
    """Make a folder, index or file resident under a name (`is_swap`: in place of who has it); returns the report.

    device: where all of it goes, or what options['device_map'] (module prefix -> device) leaves out; None: the server's
        only device, and for a swap where the model stands that it replaces.
    options: 'device_map', 'ranks', 'rank', 'world', 'rules', 'pinned', 'retain', 'allow_gap', 'label', as the protocol
        has them (ARCHITECTURE.md).
    Raises: FitError naming the shortfall, UsageError, AwayError, and what reading the files raises.
    Cancellation: closing the connection (an interrupt does) cancels the load; the old model keeps serving.
    """
    paths = [os.path.abspath(p) for p in find_shards(where)]
    request = {"label": os.path.abspath(os.fspath(where)), **(options or {})}
    request |= {"op": "swap" if is_swap else "load", "model": model, "device": device, "files": paths}
    fds: list[int] = []
    try:
        for path in paths:
            try:
                fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise from_os_error(error, path) from None
        return ask(request, fds, socket_path=socket_path, timeout_s=timeout_s)
    finally:
        wire.close_all(fds)


def ask(
    request: Mapping[str, Any], fds: Sequence[int] = (), *, socket_path: str | None = None, timeout_s: float = ATTACH_S
) -> dict[str, Any]:
    """One question, one answer. Raises: AwayError, BusyError past `timeout_s`, and what the server says."""
    with contextlib.closing(connect(socket_path, timeout_s)) as sock:
        reply, got = exchange(sock, request, fds)
        wire.close_all(got)
        return reply


def connect(socket_path: str | None, timeout_s: float) -> socket.socket:
    """A connection with `timeout_s` for each step on it. Raises: AwayError, AccessError."""
    path = socket_path or default_socket()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(CONNECT_S)
    try:
        sock.connect(path)
    except PermissionError:
        sock.close()
        raise AccessError(f"the gpuload server's socket {path} is not for this user") from None
    except OSError as error:
        sock.close()
        why = "the one that was there has died" if error.errno == errno.ECONNREFUSED else error.strerror or error
        raise AwayError(f"no gpuload server at {path} ({why}); start one with `gpuload serve`") from None
    _, owner, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if socket_path is None and SOCKET_VARIABLE not in os.environ and owner not in (0, os.geteuid()):
        sock.close()  # nobody named this socket: whoever was first to make it could hand us any weights
        raise AccessError(
            f"the server at {path} belongs to user {owner}; if you trust it, name it with ${SOCKET_VARIABLE}"
        )
    sock.settimeout(timeout_s)
    return sock


def exchange(sock: socket.socket, request: Mapping[str, Any], fds: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    """Ask on an open connection; the caller closes the descriptors. Raises: AwayError, BusyError, what it says."""
    timeout_s = sock.gettimeout()
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused in the middle: the answer says why
            wire.send_blocking(sock, dict(request), fds)
        reply, got = wire.receive_blocking(sock)
    except TimeoutError:
        raise BusyError(f"the gpuload server did not answer {request['op']!r} within {timeout_s} s") from None
    except OSError as error:
        raise AwayError(f"the gpuload server went away: {error.strerror or error}") from None
    if "error" in reply:
        wire.close_all(got)
        raise from_wire(reply)
    return reply, got
