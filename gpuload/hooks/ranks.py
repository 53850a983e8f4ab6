"""Ranks that load the same files, tensor-parallel ones above all: each reads a part of the bytes, all get all of them.

    rank 0   reads turns 0, 2, ... ─┐
    rank 1   reads turns 1, 3, ...  ├─ turn 0, 1, 2, ... in order: broadcast by the rank that read it
    every rank hands each turn's tensors to its own loader, which cuts out what it wants of them

An engine's loaders cut for themselves, so every rank must see whole tensors; but none has to be read twice, nor to
cross the bus of a card twice: between cards it goes the engine's own way (NCCL). Each rank reads ahead of the turns
while others broadcast, so all their links are at work.

Whether it is done at all is agreed on before the first byte: what one rank cannot do, none does. What fails later fails
on every rank with the same words, since the rank that reads a turn sends it all the same, with the reason in front. How
long a rank waits for one that is gone is the group's own deadline.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gpuload.client import tensors
from gpuload.client.streaming import stream_transfers
from gpuload.hooks.counts import counts
from gpuload.moving.model_files import without
from gpuload.moving.pipeline import Limits
from gpuload.moving.plan import Placement, Transfer, plan_transfers
from gpuload.moving.shards import Shard, close_shards, open_shards
from mfs.errors import StoreError

TURN_BYTES = 64 << 20
"""Of tensors in one broadcast at most, unless a single one is larger: at 50 GB/s a millisecond, some twenty times what
it costs to begin one."""

TURN_BYTES_MIN = 1 << 20

TURNS_MIN = 4
"""For each rank, where the model has the bytes: so that all have about as much to read, and none waits long."""

HEAD_BYTES = 512
"""In front of a turn: 0, or the UTF-8 bytes of what went wrong."""

ALIGN_BYTES = 256
"""Where tensors begin in a turn: what kernels expect of memory of their own."""


@dataclass(frozen=True)
class Group:
    """The ranks that load together, as torch.distributed knows them."""

    device_group: Any
    """Over which tensors go."""
    cpu_group: Any
    """Over which plain objects go; may be the same where tensors stand in host memory."""

    @property
    def rank(self) -> int:
        return int(dist.get_rank(self.device_group))

    @property
    def world(self) -> int:
        return int(dist.get_world_size(self.device_group))

    def carries(self, device: str) -> bool:
        """Whether tensors on `device` can be broadcast in it."""
        return ("nccl" in str(dist.get_backend(self.device_group))) == device.startswith("cuda")

    def exchange(self, said: Any) -> list[Any]:
        """What every rank said, in their order."""
        heard: list[Any] = [None] * self.world
        dist.all_gather_object(heard, said, group=self.cpu_group)
        return heard

    def broadcast(self, flat: torch.Tensor, rank: int) -> None:
        dist.broadcast(flat, src=dist.get_global_rank(self.device_group, rank), group=self.device_group)


@dataclass(frozen=True)
class Turn:
    """Tensors that follow each other, and the rank that reads them."""

    rank: int
    members: tuple[int, ...]
    """Indices into the list of transfers."""
    offsets: tuple[int, ...]
    """Of each, from the beginning of what is broadcast."""
    nbytes: int
    """Of that."""


def plan_turns(transfers: Sequence[Transfer], world: int) -> list[Turn]:
    """All transfers, in order, in turns that give every rank about as much to read. Pure."""
    total = sum(t.nbytes for t in transfers)
    turn_bytes = max(TURN_BYTES_MIN, min(TURN_BYTES, total // (TURNS_MIN * world)))
    turns: list[Turn] = []
    loads = [0] * world
    members: list[int] = []
    offsets: list[int] = []
    reached = HEAD_BYTES

    def close() -> None:
        nonlocal members, offsets, reached
        if members:
            rank = loads.index(min(loads))
            loads[rank] += reached
            turns.append(Turn(rank, tuple(members), tuple(offsets), reached))
        members, offsets, reached = [], [], HEAD_BYTES

    for index, t in enumerate(transfers):
        if members and reached + t.nbytes > turn_bytes:
            close()
        offset = -(-reached // ALIGN_BYTES) * ALIGN_BYTES
        members.append(index)
        offsets.append(offset)
        reached = offset + t.nbytes
    close()
    return turns


def shared_weights(
    files: Sequence[str],
    left_out: Sequence[set[str]],
    device: str,
    group: Group,
    *,
    fault: str = "",
    is_served: bool = False,
    limits: Limits | None = None,
    tell: Callable[[str], object] = lambda why: None,
) -> Iterator[tuple[str, torch.Tensor]] | None:
    """(name, tensor) of every file, on `device` and in the same order on every rank; None where they do not agree, or
    where none has to read.

    Every rank of the group calls it, at the same point of its work and whatever its own device is, since all of them
    exchange once before the first byte. left_out: of each file, what it is not to give.
    fault: why this rank will not take part, if it will not. is_served: whether it has all of it in memory that ranks
    share. tell: told why it came to None, where that is somebody's fault.
    """
    shards: list[Shard] = []
    plan = b""
    transfers: list[Transfer] = []
    try:
        if not fault:
            shards = open_shards(files)
            shards = without(shards, dict(enumerate(left_out)))
            transfers = plan_transfers([shard.header for shard in shards], Placement(device=device))
            for t in transfers:
                tensors.torch_dtype(t.dtype, t.name)
                tensors.storage_shape(t.dtype, t.shape, t.name)
            plan = fingerprint(shards, transfers)
    except Exception as error:  # whatever it is, the others wait to hear of it
        fault = str(error) or type(error).__name__
    try:
        heard = group.exchange({"fault": fault, "plan": plan, "is_served": is_served})
    except BaseException:
        close_shards(shards)
        raise
    if all(one["is_served"] for one in heard):
        close_shards(shards)
        return None
    faults = [f"rank {rank}: {one['fault']}" for rank, one in enumerate(heard) if one["fault"]]
    if not faults and any(one["plan"] != plan for one in heard):
        faults = ["the ranks see different files"]
    if faults:
        close_shards(shards)
        tell(faults[0])
        return None
    return _in_turns(shards, transfers, device, group, limits or Limits())


def fingerprint(shards: Sequence[Shard], transfers: Sequence[Transfer]) -> bytes:
    """Equal on two ranks only if they read the very same files: parts of two revisions must not be mixed."""
    hasher = hashlib.sha256()
    for shard in shards:
        with shard.opened() as fd:
            hasher.update(repr(_identity(fd)).encode())
    for t in transfers:
        hasher.update(repr((t.name, t.dtype, t.shape, t.shard, t.start, t.nbytes)).encode())
    return hasher.digest()


def _identity(fd: int) -> tuple[int, int, int, bytes]:
    """The last: which revision a mount of ours says that it is, since two mounts number and date their files alike."""
    status = os.fstat(fd)
    try:
        revision = os.getxattr(fd, "user.mfs.revision")
    except OSError:
        revision = b""
    return status.st_ino, status.st_size, status.st_mtime_ns, revision


def _in_turns(
    shards: Sequence[Shard], transfers: Sequence[Transfer], device: str, group: Group, limits: Limits
) -> Iterator[tuple[str, torch.Tensor]]:
    turns = plan_turns(transfers, group.world)
    own = [transfers[i] for turn in turns if turn.rank == group.rank for i in turn.members]
    landing = stream_transfers(shards, own, limits)
    try:
        begun = _begun(landing)
        for turn in turns:
            flat = torch.empty(turn.nbytes, dtype=torch.uint8, device=device)
            failure = _fill(flat, turn, begun) if turn.rank == group.rank else None
            group.broadcast(flat, turn.rank)
            if failure is not None:
                raise failure
            _check(flat, turn)
            for index, offset in zip(turn.members, turn.offsets, strict=True):
                t = transfers[index]
                whole = tensors.view_as(flat[offset : offset + t.nbytes], t.dtype, t.shape, t.name)
                yield t.name, whole if len(turn.members) == 1 else whole.clone()  # one that is kept keeps no others
    finally:
        landing.close()  # type: ignore[attr-defined]
        close_shards(shards)


def _begun(landing: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, at work by now; what went wrong comes with the first, when the others listen."""
    try:
        return itertools.chain([next(landing)], landing)
    except StopIteration:
        return landing
    except Exception as error:
        return _failing(error)


def _failing(error: Exception) -> Iterator[tuple[str, torch.Tensor]]:
    raise error
    yield


def _fill(flat: torch.Tensor, turn: Turn, landing: Iterator[tuple[str, torch.Tensor]]) -> Exception | None:
    """Put this rank's next tensors in their places; what went wrong, if it did, which is then said in front."""
    flat[:HEAD_BYTES] = 0
    try:
        for offset in turn.offsets:
            _, tensor = next(landing)
            counts.add(read_bytes=tensor.nbytes)
            flat[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
            del tensor
        return None
    except Exception as error:  # every rank must hear of it: they all wait for this turn
        said = str(error).encode()[:HEAD_BYTES] or b"?"
        flat[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8).to(flat.device)
        return error


def _check(flat: torch.Tensor, turn: Turn) -> None:
    """Raises: StoreError with the words of the rank that failed."""
    head = bytes(flat[:HEAD_BYTES].tolist()) if int(flat[0]) else b""
    if head:
        said = head.rstrip(b"\0").decode(errors="replace")
        raise StoreError(f"rank {turn.rank} could not read its part: {said}")
