"""Talking to the resident server, and its weights as tensors of this process without a copy.

A lease is a connection. It is held by the memory itself: as long as any tensor, or any view of one, stands on attached
memory, the connection stays open and the server keeps those bytes. In a forked child the same holds, since parent and
child share the connection. A refresh (`refreshing`) takes a second lease, shows its bytes under the first one's
addresses, and keeps that connection in place of the first.
"""

from __future__ import annotations

import copy
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from gpuload import wire
from gpuload.client import arrays, rings, tensors
from gpuload.client.asking import (
    ATTACH_S,
    LOAD_S,
    attach_request,
    check_granules,
    connect,
    exchange,
    split,
    wait_resident,
)
from gpuload.client.leaving import Lease, Left
from gpuload.descriptors import park, room_for
from gpuload.device import identity_of, open_device
from gpuload.device.base import Mapping as DeviceMapping
from gpuload.errors import DeviceError, ServerError
from mfs.errors import UsageError

if TYPE_CHECKING:
    from gpuload.client.refreshing import Refresh


class Attached(dict[str, torch.Tensor]):
    """name -> tensor, on memory that the server holds for us.

    Tensors are zero-copy. On the CPU a write goes to this process's own copy of that page; on CUDA the driver maps the
    memory read-only, and a kernel that writes to it ends this process's use of the card: clone what is to be changed.
    What is served later under the name is shown by `refresh`, at the same addresses; until then the old content stays.
    Copies of it (`copy`, `torch.save`, `pickle`) are plain dictionaries, as of what `load_file` gives; deep ones and
    saved ones stand on memory of their own.
    """

    model: str
    device: str
    """Where it stands; several devices joined by ','."""
    devices: Sequence[str]
    """As this process calls them; a card of which nothing was asked for, by its UUID."""
    digest: str
    """Of the whole content; equal digests are equal models."""
    generation: int
    """The server's number for it; what is served later has a higher one."""
    metadata: Sequence[Mapping[str, str] | None]
    """Each shard's own strings."""
    report: Mapping[str, Any] | None
    """What the server had to do to have it resident; None if that was not asked."""

    def __init__(self, made: Mapping[str, torch.Tensor], reply: Mapping[str, Any], held: Held) -> None:
        super().__init__(made)
        self.devices = tuple(part["device"] for part in reply["parts"])
        self.device = ",".join(self.devices)
        self._held = held
        self.become(reply)

    def become(self, reply: Mapping[str, Any]) -> None:
        """Say of itself what the server's answer says of its content. Not for programs."""
        self.model, self.digest = reply["model"], reply["digest"]
        self.generation, self.metadata, self.report = reply["generation"], reply["metadata"], reply.get("report")

    def wait(self, after: int | None = None, *, timeout_s: float = 60.0) -> bool:
        """Wait until the name is served with other content than this, and say whether that came in `timeout_s`.

        after: wait for a later generation than this one instead.
        Raises: AwayError if the server ends, BusyError if too many wait, ChangedError if it never gave out `after`,
            UsageError for what has no name or for more than an hour.
        """
        asked = self._held.asked()
        reply = wait_resident(
            asked["model"],
            after=self.generation if after is None else after,
            unlike=self.digest if after is None else "",
            device=asked.get("device"),
            socket_path=self._held.socket_path,
            timeout_s=timeout_s,
        )
        return bool(reply["changed"])

    def prepare(self, *, digest: str | None = None, timeout_s: float = ATTACH_S) -> Refresh:
        """Hold what is served now, ready to be shown by `Refresh.apply`; nothing changes yet.

        For several ranks: one prepares, the others with its `digest`, and only when all have, all apply. Whoever could
        not tells the others, who `close` theirs: so all get the same content, or none changes.
        digest: as for `attach`.
        Raises: as `attach`; ChangedError too where names, types, shapes or places differ, which only a new `attach` can
            follow; BusyError while another refresh of this is under way; UsageError while this thread captures a graph.
        """
        from gpuload.client.refreshing import prepare

        return prepare(self, digest, timeout_s)

    def refresh(self, *, digest: str | None = None, timeout_s: float = ATTACH_S) -> bool:
        """Show what is served now, in these very tensors: their addresses stay, so do captured graphs. Says whether
        anything was new.

        Call it where nothing uses the tensors: no other thread reads them, captures a graph or queues a kernel, and no
        backward pass is to come. Kernels that are queued are waited for. On the CPU, what this process wrote to them is
        gone, wherever it wrote. Old memory is given back.
        Raises: as `prepare` and `Refresh.apply`.
        """
        with self.prepare(digest=digest, timeout_s=timeout_s) as ready:
            return ready.apply()

    def __missing__(self, name: str) -> torch.Tensor:
        if self._held.fault:
            raise DeviceError(self._held.fault)
        raise KeyError(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # An OrderedDict, as torch's state dicts are: the one dictionary by name that torch.load takes by default.
        return OrderedDict, (), None, None, iter(self.items())

    def __copy__(self) -> dict[str, torch.Tensor]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, torch.Tensor]:
        return copy.deepcopy(dict(self), memo)


LEFT = Left()


class Held(Lease):
    """A lease, with what is shown of it."""

    def __init__(self, sock: socket.socket, socket_path: str | None) -> None:
        super().__init__(sock, LEFT)
        self.socket_path = socket_path
        self.request: Mapping[str, Any] = {}
        self.shown: dict[str, Any] = {}
        """Of the answer: 'parts' and 'tensors', as they stand here now."""
        self.by_part: dict[int, DeviceMapping] = {}
        self.refreshing = threading.Lock()
        """Held by the one refresh that may be under way."""
        self.fault = ""
        """Why nothing is shown here any more."""

    def asked(self) -> Mapping[str, Any]:
        """The request that it came from. Raises: UsageError if that named no model, DeviceError if all is lost."""
        if self.fault:
            raise DeviceError(self.fault)
        if self.request.get("op") != "attach":
            raise UsageError("only what was attached by a name follows it: these were opened as files, or committed")
        return self.request


def let_go() -> None:
    """Give back the weights on GPUs whose last tensor is gone, and the rings that loads are done with. Waits for
    kernels that are queued on those GPUs.

    Their memory goes neither with the last tensor nor by a timer: to unmap it has to wait for the device, which would
    break a CUDA graph that is being captured. So it goes here, at the next `attach`, or when the process ends. While
    this thread captures a graph nothing is done; do not call it while another does.
    """
    close_left()
    if not tensors.is_capturing():
        arrays.close_left()
        rings.let_go()


def close_left() -> None:
    """The weights alone, as `let_go`; nothing while this thread captures a graph."""
    if tensors.is_capturing():
        return
    LEFT.close()


os.register_at_fork(after_in_child=close_left)  # what was left is the parent's: the child only lets go of the lease


def attach(
    model: str,
    device: str | int | None = None,
    *,
    digest: str | None = None,
    socket_path: str | None = None,
    timeout_s: float = ATTACH_S,
) -> Attached:
    """The tensors of a resident model, without a copy.

    device: only what stands on this one, which is how a rank is attached; None: all of it, wherever it stands (of
        several models with that name, the one on the server's first device).
    digest: that content and no other: what is served, or what somebody attached before it was swapped out. Several
        ranks attach one after the other, and a swap may fall between: the first attaches, tells the others its
        `Attached.digest`, and holds on until all have attached. It is the same for all ranks of a model that was loaded
        as one (`ranks`, `device_map`).
    Raises: AwayError if no server answers, NotFoundError if it has no such model, ChangedError if it has no content
        `digest` of that name, AccessError, DeviceError.
    """
    return _attach(attach_request(model, device, digest), (), socket_path, timeout_s)


def open_resident(
    fds: Sequence[int],
    labels: Sequence[str],
    device: str | None,
    *,
    device_map: Mapping[str, str] | None = None,
    left_out: Mapping[int, Sequence[str]] | None = None,
    socket_path: str | None = None,
    timeout_s: float = LOAD_S,
) -> Attached:
    """The tensors of open safetensors files, made resident by content if they are not yet. For the hooks.

    device_map: see `load.load_model`; what it leaves out goes to `device`.
    left_out: see `model_files.left_out`.
    """
    request: dict[str, Any] = {
        "op": "open",
        "device": None if device is None else identity_of(device),
        "device_map": {prefix: identity_of(one) for prefix, one in (device_map or {}).items()},
        "files": list(labels),
    }
    request["left_out"] = dict(left_out or {})
    return _attach(request, fds, socket_path, timeout_s)


def commit_file(request: dict[str, Any], fds: Sequence[int], socket_path: str | None, timeout_s: float) -> Attached:
    """The answer to a commit; see `committed`."""
    return _attach(request, fds, socket_path, timeout_s)


def _attach(request: dict[str, Any], fds: Sequence[int], socket_path: str | None, timeout_s: float) -> Attached:
    tensors.check_mode()
    let_go()
    held = Held(connect(socket_path, timeout_s), socket_path)
    held.request = request
    try:
        reply, flat = _mapped(held, request, fds)
        held.sock = park(held.sock)
    except BaseException:
        held.close()  # at once: whoever keeps the error must not keep the lease
        raise
    made = {
        name: tensors.view_as(flat[part][offset : offset + nbytes], dtype, shape, name)
        for name, dtype, shape, part, offset, nbytes in reply["tensors"]
    }
    return Attached(made, reply, held)


def _mapped(held: Held, request: dict[str, Any], fds: Sequence[int]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Ask, and map every part of the answer: the answer, and the memory of each part as bytes."""
    with ExitStack() as room:
        # A model of 100 GB on CUDA comes as 1000 descriptors, for as long as it takes to map them: the usual limit.
        reply, got = exchange(held.sock, request, fds, admit=lambda count: room.enter_context(room_for(count)))
        room.callback(wire.close_all, got)
        return reply, _flat(held, reply, got)


def _flat(held: Held, reply: dict[str, Any], got: Sequence[int]) -> list[torch.Tensor]:
    flat: list[torch.Tensor] = []
    if "parts" not in reply:
        raise ServerError("the gpuload server is of another version than this program: restart it")
    for name, dtype, shape, *_ in reply["tensors"]:  # before anything stands on what an error would unmap
        tensors.torch_dtype(dtype, name)
        tensors.storage_shape(dtype, shape, name)
    used = {part for _, _, _, part, _, _ in reply["tensors"]}
    held.shown = {"parts": [dict(part) for part in reply["parts"]], "tensors": reply["tensors"]}
    for index, (part, own) in enumerate(zip(reply["parts"], split(reply, got), strict=True)):
        if index not in used:  # another rank's, on a card that this process may not even see
            flat.append(torch.empty(0, dtype=torch.uint8))
            continue
        if part["device"].startswith("cuda"):  # a number, which here may be another card's
            raise ServerError("the gpuload server is older than this program: restart it")
        device = open_device(part["device"])
        part["device"] = device.name
        runs = [(first, count) for first, count in part["runs"]]
        if not runs:
            flat.append(torch.empty(0, dtype=torch.uint8, device=part["device"]))
            continue
        check_granules(part, device.granule_bytes)
        mapping = device.attach(own, runs)
        held.mappings.append(mapping)
        held.by_part[index] = mapping
        flat.append(tensors.over_memory(held, mapping.address, mapping.nbytes, part["device"]))
    return flat
