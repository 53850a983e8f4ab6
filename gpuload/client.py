"""Talking to the resident server, and its weights as tensors of this process without a copy.

A lease is a connection. It is held by the memory itself: as long as any tensor, or any view of one, stands on attached
memory, the connection stays open and the server keeps those bytes. In a forked child the same holds, since parent and
child share the connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpuload import tensors
from gpuload.device import open_device
from gpuload.device.base import Mapping as DeviceMapping
from gpuload.errors import AwayError, BusyError, ServerError, from_wire
from gpuload.paths import default_socket
from gpuload.server import wire
from gpuload.shards import find_shards, from_os_error
from mfs.errors import AccessError

CONNECT_S = 5.0
ATTACH_S = 60.0
LOAD_S = 3600.0
"""Deadlines. A load may wait for its turn behind others, and for an origin behind a mount."""


class Attached(dict[str, torch.Tensor]):
    """name -> tensor, on memory that the server holds for us.

    Tensors are zero-copy. On the CPU a write goes to this process's own copy of that page; on CUDA the driver maps the
    memory read-only and a kernel that writes to it fails.
    """

    model: str
    device: str
    digest: str
    """Of the whole content; equal digests are equal models."""
    generation: int
    """Counts the swaps of that name; a later `attach` with a higher one got newer weights."""
    metadata: Sequence[Mapping[str, str] | None]
    """Each shard's own strings."""
    report: Mapping[str, Any] | None
    """What the server had to do to have it resident; None if that was not asked."""

    def __init__(self, made: Mapping[str, torch.Tensor], reply: Mapping[str, Any], held: _Held) -> None:
        super().__init__(made)
        self.model, self.device, self.digest = reply["model"], reply["device"], reply["digest"]
        self.generation, self.metadata, self.report = reply["generation"], reply["metadata"], reply.get("report")
        self._held = held


class _Held:
    """The mapping and the connection that stands for its lease; unmapped first, released then."""

    def __init__(self, sock: socket.socket, mapping: DeviceMapping | None) -> None:
        self.sock, self.mapping = sock, mapping

    def __del__(self) -> None:
        if self.mapping is not None:
            self.mapping.close()
        self.sock.close()


def attach(
    model: str, device: str | int | None = None, *, socket_path: str | None = None, timeout_s: float = ATTACH_S
) -> Attached:
    """The tensors of a resident model, without a copy.

    device: only this one's model; None: whichever device has it.
    Raises: AwayError if no server answers, NotFoundError if it has no such model, AccessError, DeviceError.
    """
    request = {"op": "attach", "model": model}
    if device is not None:
        request["device"] = str(device) if not isinstance(device, int) else f"cuda:{device}"
    return _attach(request, (), socket_path, timeout_s)


def open_resident(
    fds: Sequence[int], labels: Sequence[str], device: str, *, socket_path: str | None = None, timeout_s: float = LOAD_S
) -> Attached:
    """The tensors of open safetensors files, made resident by content if they are not yet. For the hooks."""
    return _attach({"op": "open", "device": device, "files": list(labels)}, fds, socket_path, timeout_s)


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

    options: 'rank', 'world', 'rules', 'pinned', 'retain', 'allow_gap', 'label', as the protocol has them.
    Raises: FitError naming the shortfall, UsageError, AwayError, and what reading the files raises.
    Cancellation: closing the connection (an interrupt does) cancels the load; the old model keeps serving.
    """
    paths = [os.fspath(p) for p in find_shards(where)]
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
    with contextlib.closing(_connect(socket_path, timeout_s)) as sock:
        reply, got = _exchange(sock, request, fds)
        wire.close_all(got)
        return reply


def _attach(request: dict[str, Any], fds: Sequence[int], socket_path: str | None, timeout_s: float) -> Attached:
    sock = _connect(socket_path, timeout_s)
    try:
        reply, got = _exchange(sock, request, fds)
        try:
            runs = [(first, count) for first, count in reply["runs"]]
            device = open_device(reply["device"])
            mapping = device.attach(got, runs) if runs else None
        finally:
            wire.close_all(got)
    except BaseException:
        sock.close()
        raise
    held = _Held(sock, mapping)
    made: dict[str, torch.Tensor] = {}
    flat = tensors.over_memory(held, mapping.address, mapping.nbytes, reply["device"]) if mapping else None
    for name, dtype, shape, offset, nbytes in reply["tensors"]:
        part = (
            torch.empty(0, dtype=torch.uint8, device=reply["device"])
            if flat is None
            else flat[offset : offset + nbytes]
        )
        made[name] = tensors.view_as(part, dtype, shape, name)
    return Attached(made, reply, held)


def _connect(socket_path: str | None, timeout_s: float) -> socket.socket:
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
        raise AwayError(
            f"no gpuload server at {path} ({error.strerror or error}); start one with `gpuload serve`"
        ) from None
    sock.settimeout(timeout_s)
    return sock


def _exchange(sock: socket.socket, request: Mapping[str, Any], fds: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
    timeout_s = sock.gettimeout()
    try:
        wire.send_blocking(sock, dict(request), fds)
        reply, got = wire.receive_blocking(sock)
    except TimeoutError:
        raise BusyError(f"the gpuload server did not answer {request['op']!r} within {timeout_s} s") from None
    except OSError as error:
        raise AwayError(f"the gpuload server went away: {error.strerror or error}") from None
    if "error" in reply:
        wire.close_all(got)
        raise from_wire(reply)
    if not isinstance(reply, dict):
        raise ServerError("the gpuload server answered with something else than an object")
    return reply, got
