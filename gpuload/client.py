"""Talking to the resident server, and its weights as tensors of this process without a copy.

A lease is a connection. It is held by the memory itself: as long as any tensor, or any view of one, stands on attached
memory, the connection stays open and the server keeps those bytes. In a forked child the same holds, since parent and
child share the connection.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpuload import tensors
from gpuload.asking import ATTACH_S, LOAD_S, connect, exchange
from gpuload.device import open_device
from gpuload.device.base import Mapping as DeviceMapping
from gpuload.server import wire


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


def _attach(request: dict[str, Any], fds: Sequence[int], socket_path: str | None, timeout_s: float) -> Attached:
    sock = connect(socket_path, timeout_s)
    try:
        reply, got = exchange(sock, request, fds)
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
