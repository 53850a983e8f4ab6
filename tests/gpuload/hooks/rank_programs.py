"""Ranks of one group, each a process of its own over gloo, that load the same files; see `programs`."""

from __future__ import annotations

import datetime
import json
import threading
from pathlib import Path
from typing import Any

from tests.gpuload.hooks.programs import Found, digests

GROUP_S = 60


def ranks(folder: str, rank: str, world: str, *cases: str) -> Found:
    """What each case comes to on this rank: the tensors' digests in their order, or the error, and the bytes read."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=int(world),
        timeout=datetime.timedelta(seconds=GROUP_S),
    )
    try:
        return {case: _loaded(Path(folder), int(rank), json.loads(case)) for case in cases}
    finally:
        dist.destroy_process_group()


def _loaded(folder: Path, rank: int, case: dict[str, Any]) -> Found:
    import torch.distributed as dist

    from gpuload.hooks.counts import counts
    from gpuload.hooks.ranks import Group
    from gpuload.hooks.weights import weights_of
    from gpuload.moving.source import FileSource
    from mfs.errors import MfsError, StoreError

    read, lock, plain = [0], threading.Lock(), FileSource.read_into

    def counted(self: Any, shard: int, start: int, views: Any) -> None:
        with lock:
            read[0] += sum(map(len, views))
        if case.get("fails") == rank:
            raise StoreError("the disk of this rank is gone")
        plain(self, shard, start, views)

    before = (counts.served, counts.streamed)
    files = [str(folder / name) for name in case["files"][rank % len(case["files"])]]
    FileSource.read_into = counted  # type: ignore[method-assign]
    try:
        group = Group(dist.group.WORLD, dist.group.WORLD)
        device = case.get("devices", ["cpu", "cpu"])[rank]
        got = list(weights_of(files, device=device, socket_path=case.get("socket"), group=group))
        found: Found = {"names": [name for name, _ in got], "tensors": digests(dict(got))}
    except (MfsError, OSError, AssertionError, RuntimeError) as error:  # the latter two: torch's, of a card
        found = {"error": str(error)}
    finally:
        FileSource.read_into = plain  # type: ignore[method-assign]
    return found | {"read": read[0], "counts": [counts.served - before[0], counts.streamed - before[1]]}
