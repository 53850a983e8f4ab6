"""Questions to the resident server: one connection, one question, one answer. No torch: the command starts fast."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from gpuload import wire
from gpuload.device import identity_of
from gpuload.errors import AwayError, BusyError, ServerError, from_wire
from gpuload.moving.model_files import find_shards, left_out
from gpuload.moving.shards import open_file, spare_descriptors
from gpuload.paths import SOCKET_VARIABLE, default_socket
from mfs.errors import AccessError
from mfs.tracing.settings import inherited

CONNECT_S = 30.0
ATTACH_S = 60.0
LOAD_S = 3600.0
"""Deadlines. Hundreds of programs may connect at once. A load may wait for its turn behind others, and for an origin
behind a mount."""

START_S = 10.0
"""Until the door of a server that was started just before: 2.5 s after `gpuload serve` where others want two cores
four times over."""

START_POLL_S = 0.05

_TIMEVAL = struct.Struct("ll")


def load_resident(
    where: str | os.PathLike[str],
    model: str,
    device: str | None,
    *,
    is_swap: bool = False,
    options: Mapping[str, Any] | None = None,
    socket_path: str | None = None,
    timeout_s: float = LOAD_S,
    on_wait: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Make a folder, index or file resident under a name (`is_swap`: in place of who has it); returns the report.

    device: where all of it goes, or what options['device_map'] (module prefix -> device) leaves out; None: the server's
        only device, and for a swap where the model stands that it replaces.
    options: 'device_map', 'ranks', 'rank', 'world', 'rules', 'pinned', 'retain', 'allow_gap', 'label', 'explain', as
        the protocol has them (PROTOCOL.md).
    on_wait: called if no server is there, and START_S given to one that was started just before; None: none is given.
    Raises: FitError naming the shortfall, UsageError, AwayError, and what reading the files raises.
    Cancellation: closing the connection (an interrupt does) cancels the load; the old model keeps serving.
    """
    found = find_shards(where)
    paths = [os.path.abspath(p) for p in found.paths]
    request = {"label": os.path.abspath(os.fspath(where)), **(options or {}), "left_out": left_out(found)}
    request |= {"op": "swap" if is_swap else "load", "model": model, "device": device, "files": paths}
    request |= {"traceparent": traceparent} if (traceparent := inherited()) else {}
    with contextlib.closing(_connect_to_new(socket_path, timeout_s, on_wait)) as sock:
        reply, got = exchange(sock, request, (), paths=paths)
        wire.close_all(got)
        return reply


def wait_resident(
    model: str,
    *,
    after: int = 0,
    unlike: str = "",
    device: str | None = None,
    socket_path: str | None = None,
    timeout_s: float,
) -> dict[str, Any]:
    """Wait until the server serves a later generation of `model` than `after`, or content whose digest is not `unlike`.

    after: 0 waits until there is any.
    Returns what is served then: 'generation', 'digest', ...; 'changed' is False if `timeout_s` passed before.
    Raises: BusyError if too many wait, ChangedError if the server never gave out `after`, AwayError if it ends.
    """
    until, left_s = time.monotonic() + timeout_s, timeout_s
    while True:
        asked = {"op": "wait", "model": model, "device": device, "after": after, "unlike": unlike, "timeout_s": left_s}
        reply = ask(asked, socket_path=socket_path, timeout_s=left_s + ATTACH_S)
        left_s = until - time.monotonic()
        if reply["changed"] or left_s <= 0:
            return reply
        # A server that gives its place to another one ends waits early; the next question is the other's.


def ask(
    request: Mapping[str, Any], fds: Sequence[int] = (), *, socket_path: str | None = None, timeout_s: float = ATTACH_S
) -> dict[str, Any]:
    """One question, one answer. Raises: AwayError, BusyError past `timeout_s`, and what the server says."""
    with contextlib.closing(connect(socket_path, timeout_s)) as sock:
        reply, got = exchange(sock, request, fds)
        wire.close_all(got)
        return reply


def _connect_to_new(socket_path: str | None, timeout_s: float, on_wait: Callable[[], object] | None) -> socket.socket:
    """See `load_resident`. Raises: as `connect`."""
    until_s: float | None = None
    while True:
        try:
            return connect(socket_path, timeout_s)
        except AwayError:
            if on_wait is None or (until_s is not None and time.monotonic() > until_s):
                raise
        if until_s is None:
            until_s = time.monotonic() + START_S
            on_wait()
        time.sleep(START_POLL_S)


def connect(socket_path: str | None, timeout_s: float) -> socket.socket:
    """A connection with `timeout_s` for each step on it. Raises: AwayError, AccessError, BusyError."""
    path = socket_path or default_socket()
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise BusyError(f"cannot ask the gpuload server: {error.strerror or error}") from None
    connect_s = min(CONNECT_S, timeout_s)
    try:
        # Blocking, with the kernel's own deadline: it waits for room among those whom the server has yet to accept,
        # in turn, where a socket that does not block is told EAGAIN (net/unix/af_unix.c, unix_stream_connect).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(connect_s))
        sock.connect(path)
    except PermissionError:
        sock.close()
        raise AccessError(f"the gpuload server's socket {path} is not for this user") from None
    except BlockingIOError:
        sock.close()
        raise BusyError(
            f"the gpuload server at {path} is busy: it accepted no more connections for {connect_s:.0f} s; try later"
        ) from None
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
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0))
    sock.settimeout(timeout_s)
    return sock


def exchange(
    sock: socket.socket,
    request: Mapping[str, Any],
    fds: Sequence[int],
    *,
    paths: Sequence[str] = (),
    admit: Callable[[int], object] = lambda count: None,
) -> tuple[dict[str, Any], list[int]]:
    """Ask on an open connection; the caller closes the descriptors. Raises: AwayError, BusyError, what it says.

    paths: files to open and send in place of `fds`, no more at once than this process may have open.
    admit: see `wire.receive_blocking`.
    """
    timeout_s = sock.gettimeout()
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused in the middle: the answer says why
            if paths:
                wire.send_groups(sock, dict(request), len(paths), _opened(paths))
            else:
                wire.send_blocking(sock, dict(request), fds)
        reply, got = wire.receive_blocking(sock, admit)
    except TimeoutError:
        raise BusyError(f"the gpuload server did not answer {request['op']!r} within {timeout_s} s") from None
    except OSError as error:
        raise AwayError(f"the gpuload server went away: {error.strerror or error}") from None
    if "error" in reply:
        wire.close_all(got)
        raise from_wire(reply)
    return reply, got


def check_granules(part: Mapping[str, Any], granule_bytes: int) -> None:
    """Whether a part of an answer counts in granules of this size, as this program's devices do.

    Raises: ServerError; the runs would lead to other bytes.
    """
    if part.get("granule_bytes") != granule_bytes:
        raise ServerError(
            f"the gpuload server has granules of {part.get('granule_bytes')} bytes on {part['device']}, this program"
            f" expects {granule_bytes}: they are of different versions; restart the older one"
        )


def _timeval(seconds: float) -> bytes:
    """As SO_SNDTIMEO takes it; 0: none."""
    return _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1_000_000))


def _opened(paths: Sequence[str]) -> Iterator[Sequence[int]]:
    """Descriptors of the files, some at a time, each group open until the next is asked for."""
    step = max(1, min(wire.FDS_PER_MESSAGE, spare_descriptors() // 2))
    for at in range(0, len(paths), step):
        fds: list[int] = []
        try:
            fds.extend(open_file(path) for path in paths[at : at + step])
            yield fds
        finally:
            wire.close_all(fds)


def split(reply: Mapping[str, Any], got: Sequence[int]) -> list[Sequence[int]]:
    """Which of the descriptors are each part's."""
    at = list(accumulate((part["fds"] for part in reply["parts"]), initial=0))
    return [got[begin:end] for begin, end in pairwise(at)]


def attach_request(model: str, device: str | int | None, digest: str | None) -> dict[str, Any]:
    """What `attach` asks. Raises: as `identity_of`."""
    request = {"op": "attach", "model": model}
    if device is not None:
        request["device"] = identity_of(device)
    if digest is not None:
        request["digest"] = digest
    return request
