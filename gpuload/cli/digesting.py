"""`gpuload digest`: the digests of a model's files, computed ahead of need and kept where servers of this user look.

Uses no server and no device: the bytes are read and hashed as a swap would, and go nowhere.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from gpuload.client.door import run_inside
from gpuload.device.host import HostDevice
from gpuload.moving.model_files import open_model
from gpuload.moving.pipeline import Limits, move_batches
from gpuload.moving.plan import MEGATRON_RULES, Piece, Placement, pack_pieces, plan_transfers
from gpuload.moving.pool import open_source
from gpuload.moving.shards import Shard, close_shards
from gpuload.server.digest_files import Digest, DigestFiles, Geometry
from gpuload.server.digests import SETTLED_S, DigestCache, digest_views, geometry, now_ns
from gpuload.server.layout import cut_all
from gpuload.server.versions import Version, look, stamp_of
from mfs.errors import ChangedError

NOT_TRUSTED = "nothing that can be told of this file names its bytes for sure (see gpuload/server/versions.py)"
BEING_WRITTEN = "somebody has it open for writing"


def digest_model(
    where: str | os.PathLike[str],
    world: int = 1,
    rules: Mapping[str, int | None] | None = None,
    *,
    folder: str | os.PathLike[str],
    again: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Hash what is not known yet of every file of a model, and remember it in `folder`; file by file, so that what was
    done before an interrupt is done.

    world, rules: for the parts of every tensor-parallel rank; see `plan.Placement`. Without rules: MEGATRON_RULES.
    again: read everything anew. tell: called with (bytes done, bytes in all), from threads.
    Returns 'files', each with 'path', 'bytes_known' from before, 'bytes_hashed' now, and the 'reason' why nothing of it
        is remembered, else ''; and their sums.
    Raises: as opening the files does; ChangedError if one changes meanwhile; UsageError.
    """
    began = time.monotonic()
    shards = open_model(where)
    try:
        cache = DigestCache(DigestFiles(folder))
        pieces = _pieces(shards, world, rules or MEGATRON_RULES)
        versions = [_look(shard) for shard in shards]
        files: list[dict[str, Any]] = []
        wanted: list[list[Piece]] = []
        for shard, version, own in zip(shards, versions, pieces, strict=True):
            if again:
                cache.forget(version)
            known = cache.find(version)
            missing = [piece for where_, piece in own.items() if where_ not in known]
            bytes_known = sum(piece.nbytes for where_, piece in own.items() if where_ in known)
            reason = "" if version.key is not None else NOT_TRUSTED
            files.append({"path": shard.path, "bytes_known": bytes_known, "bytes_hashed": 0, "reason": reason})
            wanted.append([] if reason else missing)
        counter = _Counter(sum(piece.nbytes for missing in wanted for piece in missing), tell)
        for file, shard, version, missing in zip(files, shards, versions, wanted, strict=True):
            if missing and not _digest_file(shard, version, missing, cache, limits or Limits(), counter):
                file["reason"] = BEING_WRITTEN
            file["bytes_hashed"] = sum(piece.nbytes for piece in missing)
    finally:
        close_shards(shards)
    sums = {key: sum(file[key] for file in files) for key in ("bytes_known", "bytes_hashed")}
    return {"model": os.path.abspath(where), **sums, "files": files, "seconds": time.monotonic() - began}


def _pieces(shards: Sequence[Shard], world: int, rules: Mapping[str, int | None]) -> list[dict[Geometry, Piece]]:
    """What a load of any rank would cut out of each file, in the order of the bytes."""
    found: list[dict[Geometry, Piece]] = [{} for _ in shards]
    for rank in range(max(world, 1)):
        placement = Placement(rank=rank, world=world, rules=rules)
        transfers = plan_transfers([s.header for s in shards], placement)
        for _, _, pieces in cut_all(transfers):
            for piece in pieces:
                found[transfers[piece.transfer].shard].setdefault(geometry(piece), piece)
    return [dict(sorted(own.items())) for own in found]


def _look(shard: Shard) -> Version:
    with shard.opened() as fd:
        return look(fd)


def _digest_file(
    shard: Shard, version: Version, pieces: Sequence[Piece], cache: DigestCache, limits: Limits, counter: _Counter
) -> bool:
    """Hash and remember; whether it could be remembered."""
    settled_ns = version.changed_ns + int(SETTLED_S * 1e9)
    time.sleep(min(SETTLED_S, max(0, settled_ns - now_ns()) / 1e9))  # just written: its clock must tick before we read
    began_ns = now_ns()
    found: list[tuple[Geometry, Digest]] = []

    def check(piece: Piece, views: Sequence[memoryview]) -> None:
        found.append((geometry(piece), digest_views(views)))
        counter.add(piece.nbytes)

    batches = pack_pieces(((0, piece) for piece in pieces), buffer_bytes=limits.buffer_bytes)
    with closing(open_source([shard])) as source:
        nowhere = HostDevice(is_direct=False, reaches_all=True)
        run_inside(
            lambda: move_batches(
                batches, source=source, device=nowhere, runs_of=lambda _: [], limits=limits, check=check
            )
        )
    with shard.opened() as fd:
        if stamp_of(os.fstat(fd)) != version.stamp:
            raise ChangedError(f"{shard.path} changed while it was read; try again")
        return cache.add(version, fd, began_ns, found)


class _Counter:
    """Bytes done, told as they come."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self._total, self._tell, self._lock = total, tell, threading.Lock()
        self._done = 0
        tell(0, total)

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._tell(self._done, self._total)
