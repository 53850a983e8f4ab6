"""Weights as an engine has made them ready (quantised, fused, repacked), kept by the resident server and brought back.

    commit(identity, tensors)      the server holds them from now on, under what makes them interchangeable
    committed(identity)            the same, without a copy, in any process
    restore(identity, into)        the same, copied into tensors that are there: one pass, at link speed

An engine that sleeps, or starts anew, need not load and convert again what it, or another one like it, has made before.
Equal bytes are kept once, whoever committed them: engines of one kind share all of it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gpuload.client import tensors as torch_tensors
from gpuload.client.asking import ATTACH_S, LOAD_S
from gpuload.client.attached import Attached, attach, commit_file
from gpuload.client.door import run_inside
from gpuload.client.into_tensors import batches_of, move_to_addresses
from gpuload.device import canonical_name
from gpuload.moving.pipeline import Limits
from gpuload.moving.plan import Transfer
from gpuload.moving.source import Loan, copy_out
from mfs.errors import ChangedError, UsageError

_WANT = struct.Struct("<QQ")
_KEY = "gpuload.identity"
_FORM = "gpuload.form"


@dataclass(frozen=True)
class Identity:
    """What makes two engines' weights interchangeable. Equal in every field, or they are not."""

    source: str
    """Of what they were made: a content digest (`gpuload digest`, `Attached.digest`), never a path or a name."""
    engine: str
    """Name and version of what made them: 'vllm 0.33.0'."""
    quantization: str = ""
    """How: method and settings."""
    layout: str = ""
    """Which part of the model, and how it is laid out: 'tp 1/8, pp 0/1'."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Whatever else decides the bytes: kernels chosen, types, versions of libraries."""

    @property
    def name(self) -> str:
        """What the server calls them."""
        return f"engine:{hashlib.sha256(self.text.encode()).hexdigest()[:32]}"

    @property
    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def commit(
    identity: Identity,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: str = "cpu",
    retain: str = "lru",
    socket_path: str | None = None,
    timeout_s: float = LOAD_S,
) -> Attached:
    """Have the server hold these tensors from now on; whoever had the identity is replaced once all of it is there.

    device: the server's arena that is to hold them; host memory unless told otherwise.
    retain: 'lru': until their room is needed; 'lease': until the last process that holds what `commit` or `committed`
        gave it has let go.
    Returns them as `committed` does; its `report` says what was new to the server.
    Memory: as much as the server reads at once, whatever the size. Nobody may write to the tensors meanwhile; where the
        server notices, it refuses.
    Raises: FitError naming the shortfall; UsageError for a tensor without memory, or of a type that safetensors does
        not have; AwayError.
    """
    form = _Form.of(tensors)
    for place in {str(tensor.device) for tensor in form.flats if tensor.device.type == "cuda"}:
        torch_tensors.settle(place)
    header = form.header(identity)
    with ExitStack() as held:
        fd = os.memfd_create("gpuload-commit", os.MFD_CLOEXEC)
        held.callback(os.close, fd)
        os.ftruncate(fd, len(header) + form.nbytes)
        os.pwrite(fd, header, 0)
        ours, theirs = socket.socketpair()
        held.enter_context(theirs)
        giving = threading.Thread(target=_give, args=(ours, fd, len(header), form), name="gpuload-commit", daemon=True)
        giving.start()

        def end() -> None:
            with suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
            giving.join()
            ours.close()

        held.callback(end)
        request = {"op": "commit", "model": identity.name, "device": device, "files": [identity.name], "retain": retain}
        request["label"] = f"{identity.engine}, {identity.layout or 'whole'}"
        made = commit_file(request, [fd, theirs.fileno()], socket_path, timeout_s)
    return _as_they_were(made, identity)


def committed(
    identity: Identity, *, device: str | None = None, socket_path: str | None = None, timeout_s: float = ATTACH_S
) -> Attached:
    """What was committed under this identity, on memory of the server's, to be read; see `attach`. What was evicted
    comes back from the server's RAM tier, if all of it is there: `report` says so.

    Raises: NotFoundError if nothing is, or nothing is any more; FitError if it cannot come back; ChangedError if it is
        another identity's; AwayError.
    """
    return _as_they_were(attach(identity.name, device, socket_path=socket_path, timeout_s=timeout_s), identity)


def restore(
    identity: Identity,
    into: Mapping[str, torch.Tensor],
    *,
    socket_path: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Fill these tensors with what was committed under this identity, bit by bit.

    into: as committed: the same names, types and shapes, on any device.
    Raises: as `committed`; UsageError naming the first tensor that differs, before a byte moves. After another error
        the tensors' bytes are undefined: load them anew.
    """
    fill(into, committed(identity, socket_path=socket_path), limits=limits)


def fill(into: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], *, limits: Limits | None = None) -> None:
    """`restore` from tensors that `commit` or `committed` gave."""
    _check_same(into, held)
    limits = limits or Limits()
    moves: list[tuple[int, torch.Tensor]] = []
    with torch.no_grad():
        for name, target in into.items():
            source = held[name]
            flat, given = _in_memory_order(target), _in_memory_order(source)
            if flat is None or given is None or _strides(target) != _strides(source) or source.device.type != "cpu":
                target.copy_(source)
            elif flat.nbytes:
                moves.append((given.data_ptr(), flat))
    moves.sort(key=lambda move: move[0])
    transfers, shard, reached = [], 0, 0
    for start, flat in moves:
        if not reached <= start < reached + mmap.PAGESIZE:  # what lies between may be nobody's memory
            shard += 1
        reached, n = start + flat.nbytes, flat.nbytes
        transfers.append(Transfer("", "U8", (n,), canonical_name(str(flat.device)), shard, start, n, 1, n))
    for place in dict.fromkeys(t.device for t in transfers):
        torch_tensors.settle(place)
    batches, addresses = batches_of(transfers, limits), [flat.data_ptr() for _, flat in moves]
    run_inside(lambda: move_to_addresses((), batches, addresses, limits, source=_Memory()))


class _Memory:
    """Memory of this process as a source: a shard's byte n is the byte at address n."""

    def borrow(self, shard: int, start: int, stop: int) -> Loan | None:
        return None

    def read_into(self, shard: int, start: int, views: Sequence[memoryview]) -> None:
        copy_out([(start, sum(len(view) for view in views))], views)

    def interrupt(self) -> None:
        return None

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class _Form:
    """Tensors as one file of safetensors: each one's memory once, as it lies there, and how it is to be looked at."""

    rows: Sequence[tuple[str, str, tuple[int, ...]]]
    """Name, dtype, shape in the order of memory."""
    flats: Sequence[torch.Tensor]
    """Of each row: its bytes."""
    views: Mapping[str, Any]
    """Of each name that is not a row of its own as it stands: [row's name, order of axes]."""

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self.flats)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> _Form:
        """Raises: UsageError."""
        names = {dtype: name for name, dtype in torch_tensors.TORCH_DTYPES.items()}
        found: list[tuple[str, str, tuple[int, ...], torch.Tensor]] = []
        views: dict[str, Any] = {}
        seen: dict[Any, str] = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            if tensor.dtype not in names or tensor.layout != torch.strided or tensor.is_meta:
                kind = "has no memory" if tensor.is_meta else f"is {tensor.dtype}, {tensor.layout}"
                raise UsageError(f"tensor {name!r} {kind}, which no file of safetensors can hold")
            flat = _in_memory_order(tensor)
            order = _axes(tensor) if flat is not None else list(range(tensor.dim()))
            if flat is None:
                flat = _in_memory_order(tensor.contiguous())
            assert flat is not None
            shape = tuple(tensor.shape[axis] for axis in order)
            dtype = names[tensor.dtype]
            if dtype == "F4":
                shape = (*shape[:-1], 2 * shape[-1]) if shape else shape
            key = (flat.device, flat.data_ptr(), flat.nbytes, dtype, shape) if flat.nbytes else name
            row = seen.setdefault(key, name)
            if row == name:
                found.append((name, dtype, shape, flat))
            if row != name or order != sorted(order):
                views[name] = [row, order]
        found.sort(key=lambda one: -torch_tensors.element_bytes(one[1]))  # so that each begins aligned
        return cls([one[:3] for one in found], [one[3] for one in found], views)

    def header(self, identity: Identity) -> bytes:
        at, entries = 0, dict[str, Any]()
        entries["__metadata__"] = {_KEY: identity.text, _FORM: json.dumps(self.views)}
        for (name, dtype, shape), flat in zip(self.rows, self.flats, strict=True):
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + flat.nbytes]}
            at += flat.nbytes
        text = json.dumps(entries).encode()
        text += b" " * (-(8 + len(text)) % 256)
        return struct.pack("<Q", len(text)) + text

    def write(self, window: memoryview, start: int, stop: int) -> None:
        """Put bytes [start, stop), counted from the first tensor's first, where they belong in the file's memory."""
        at = 0
        for flat in self.flats:
            first, last = max(start, at), min(stop, at + flat.nbytes)
            if first < last:
                place = torch.frombuffer(window, dtype=torch.uint8, count=last - first, offset=first)
                place.copy_(flat[first - at : last - at])
            at += flat.nbytes
            if at >= stop:
                return


def _give(asked: socket.socket, fd: int, data_start: int, form: _Form) -> None:
    """Write every range that the server asks for, until it closes."""
    with mmap.mmap(fd, data_start + form.nbytes) as mapped, memoryview(mapped)[data_start:] as window:
        try:
            while len(want := asked.recv(_WANT.size, socket.MSG_WAITALL)) == _WANT.size:
                start, stop = _WANT.unpack(want)
                try:
                    form.write(window, start - data_start, stop - data_start)
                    said = b"\0"
                except Exception:  # the server refuses, and its words reach the caller
                    said = b"\1"
                asked.sendall(said)
        except OSError:
            return


def _as_they_were(made: Attached, identity: Identity) -> Attached:
    """The server's rows under the names that were committed, each as it was looked at."""
    strings = made.metadata[0] if made.metadata else None
    if strings is None or strings.get(_KEY) != identity.text:
        raise ChangedError(f"{made.model!r} is not what was committed as {identity.text}")
    views = json.loads(strings[_FORM])
    rows = dict(made)
    for name, (row, order) in views.items():
        back = [order.index(axis) for axis in range(len(order))]
        made[name] = rows[row].permute(back)
    return made


def _check_same(into: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    if missing := sorted(into.keys() ^ held.keys()):
        where = "committed" if missing[0] in held else "to be filled"
        raise UsageError(f"{len(missing)} names differ: {missing[0]!r} is {where} only; nothing was changed")
    for name, target in into.items():
        source = held[name]
        if (target.dtype, target.shape) != (source.dtype, source.shape):
            raise UsageError(
                f"tensor {name!r} is {target.dtype} {list(target.shape)}, committed was {source.dtype}"
                f" {list(source.shape)}; nothing was changed"
            )


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of the axes that are walked along."""
    return tuple(step for step, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)


def _axes(tensor: torch.Tensor) -> list[int]:
    """Its axes in the order of memory, outermost first."""
    return sorted(range(tensor.dim()), key=lambda axis: -int(tensor.stride()[axis]))  # of equals, the first first


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor | None:
    """Its bytes, flat, as they lie in memory; None where there is memory between them, or one is shown twice."""
    straight = tensor.detach().permute(_axes(tensor))
    if not straight.is_contiguous():
        return None
    return straight.reshape(-1).view(torch.uint8)
