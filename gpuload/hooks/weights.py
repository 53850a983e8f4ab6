"""Every tensor of a model's safetensors files, for loaders that walk over them: what vLLM's and SGLang's plugins share.

Per file: the resident server's tensors if one answers; else this process's own pipeline, which takes a mounted file out
of the daemon's RAM; and where that cannot even begin, safetensors itself. So a plugin is never worse off than the
loader it replaces. An error in the middle of a file is raised: what was handed out cannot be taken back.

Ranks that load together read each byte once among them (`ranks`), unless a server has all of it in memory that they
share: then nobody reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gpuload.hooks.counts import counts
from gpuload.hooks.resident import attach_file, has_arena, is_copied, tell_once
from gpuload.moving.model_files import picked_by_others
from mfs.errors import MfsError, StoreError

if TYPE_CHECKING:
    from gpuload.hooks.ranks import Group

STAGED_BYTES = 1 << 30
"""Of a card's memory that a load takes beside its largest tensor, which stands there twice for a moment: the tensors a
stream makes ahead, a turn between ranks, and what the engine's own loaders make on the way."""


def own_device() -> str:
    """Where this process computes: the card that torch has as its current one, if it has begun to use any."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "cpu"
    return f"cuda:{torch.cuda.current_device()}"


def weights_of(
    files: Sequence[str],
    *,
    device: str = "cpu",
    socket_path: str | None = None,
    group: Group | None = None,
    by_index: bool = True,
) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor), file by file in the order given; a file's tensors in no promised order.

    device: where the tensors come to stand, and the server's arena to be served from. On a card that has no room for
        what loading takes they come to stand in host memory.
    group: the ranks that call this together, each with the same files; None: this process alone.
    by_index: whether the index beside the files counts: see `model_files.picked_by_others`.
    Raises: IntegrityError before the first, for an index that is not kept.
    """
    left_out = picked_by_others(files) if by_index else [set[str]() for _ in files]
    device = _with_room(files, device)
    if group is not None and group.world > 1:
        shared = _shared(files, left_out, device, socket_path, group)
        if shared is not None:
            for item in shared:
                counts.add(streamed=1)
                yield item
                del item
            return
    for file, others in zip(files, left_out, strict=True):
        attached = attach_file(file, device, socket_path=socket_path)
        if attached is not None:
            for name in [name for name in attached if name not in others]:
                counts.add(served=1)
                yield name, attached[name].clone() if is_copied(device) else attached[name]
            del attached
            from gpuload.client.attached import close_left

            close_left()
        else:
            yield from (item for item in _streamed(file, device) if item[0] not in others)


def _shared(
    files: Sequence[str], left_out: Sequence[set[str]], device: str, socket_path: str | None, group: Group
) -> Iterator[tuple[str, Any]] | None:
    from gpuload.hooks.ranks import shared_weights

    is_on_card = device.startswith("cuda")
    return shared_weights(
        files,
        left_out,
        device,
        group,
        fault="" if group.carries(device) else f"{device} is not what its group carries tensors on",
        is_served=not is_on_card and has_arena(device, socket_path),
        tell=lambda why: tell_once("every rank reads for itself", StoreError(why)),
    )


def _with_room(files: Sequence[str], device: str) -> str:
    """`device`, or 'cpu' where its free memory does not hold what a load needs for a moment."""
    if not device.startswith("cuda"):
        return device
    from gpuload.device import open_device
    from gpuload.moving.shards import read_shards

    try:
        largest = max((t.nbytes for shard in read_shards(files) for t in shard.header.tensors), default=0)
        opened = open_device(device)
        try:
            free = opened.memory().free_bytes
        finally:
            opened.close()
    except MfsError:  # whoever loads the files has words for what is wrong with them
        return device
    if 2 * largest + STAGED_BYTES <= free:
        return device
    tell_once(
        f"loading by host memory: {device}",
        StoreError(f"{free >> 20} MiB free, loading straight to it takes {(2 * largest + STAGED_BYTES) >> 20} MiB"),
    )
    return "cpu"


def _streamed(file: str, device: str) -> Iterator[tuple[str, Any]]:
    from gpuload.client.load import stream

    landing = stream(file, device)
    try:
        first = next(landing, None)
    except (
        Exception
    ) as error:  # a type that we do not know, say: safetensors may, or has its own words for what is wrong
        tell_once(f"loading {file} by safetensors itself", error)
        yield from _by_library(file, device)
        return
    if first is None:
        return
    counts.add(streamed=1, read_bytes=first[1].nbytes)
    yield first
    for item in landing:
        counts.add(streamed=1, read_bytes=item[1].nbytes)
        yield item


def _by_library(file: str, device: str) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt", device=device) as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            counts.add(left=1)
            yield name, opened.get_tensor(name)


def are_mounted(files: Sequence[str], group: Group | None = None) -> bool:
    """True if there are files and all stand on mfs mounts that lend to us; with a group, on every rank of it."""
    from mfs.control import borrowing

    mounted = bool(files) and all(borrowing.find(os.path.abspath(file)) is not None for file in files)
    return mounted if group is None else all(group.exchange(mounted))
