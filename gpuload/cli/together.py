"""`gpuload plan` of several models: what they take in one arena, where blocks of equal content stand once.

Content is what digests say that were kept before (`gpuload digest`, or an earlier swap): no weights are read here. Of
what nobody has hashed every model counts its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpuload.cli.planning import examine
from gpuload.device.cuda import GRANULE_BYTES
from gpuload.fit import CARDS, CONTEXT_BYTES, Block, Fit, together_bytes
from gpuload.moving.model_files import open_model
from gpuload.moving.plan import Placement, plan_transfers
from gpuload.moving.shards import close_shards
from gpuload.server.digest_files import DigestFiles
from gpuload.server.digests import DigestCache, digest_block, geometry
from gpuload.server.layout import plan_blocks
from gpuload.server.versions import look
from mfs.units import format_size


def examine_all(
    models: Sequence[str], tokens: int, rules: Mapping[str, int | None], socket_path: str | None, *,
    memory_bytes: int | None, item_bytes: int | None, digests: str,
) -> dict[str, Any]:  # fmt: skip
    """What each model is, and whether all fit one card, each with a key-value cache of `tokens`.

    digests: folder of those that are kept. Raises: as `planning.examine`.
    """
    found = [
        examine(where, tokens, None, {}, rules, socket_path, memory_bytes=memory_bytes, item_bytes=item_bytes)
        for where in models
    ]
    known = DigestCache(DigestFiles(digests))
    blocks = [blocks_of(where, known) for where in models]
    alone = [together_bytes([own]) for own in blocks]
    together = together_bytes(blocks)
    kv = sum(one["kv_cache_bytes"] for one in found)
    fit = Fit(together, kv, CONTEXT_BYTES, 0, 0, 0, 0)
    cards = CARDS if memory_bytes is None else {format_size(memory_bytes): memory_bytes}
    return {
        "models": [
            {key: one[key] for key in ("model", "tensors_count", "shards_count", "bytes_total", "bytes_by_dtype",
                                       "kv_cache_bytes")}
            | {"arena_bytes": size, "unknown_bytes": sum(b.arena_bytes for b in own if b.content is None)}
            for one, size, own in zip(found, alone, blocks, strict=True)
        ],
        "kv_cache_tokens": tokens,
        "kv_cache_bytes": kv,
        "arena_bytes": together,
        "shared_bytes": sum(alone) - together,
        "targets": [_target(f"a card of {name}", replace(fit, device_bytes=nbytes)) for name, nbytes in cards.items()],
    }  # fmt: skip


def blocks_of(where: str, known: DigestCache, *, granule_bytes: int = GRANULE_BYTES) -> list[Block]:
    """The blocks of a model on one card, with their content as far as it is known. Raises: as opening the files."""
    shards = open_model(where)
    try:
        transfers = plan_transfers([shard.header for shard in shards], Placement())
        digests = []
        for shard in shards:
            with shard.opened() as fd:
                digests.append(known.find(look(fd)))
    finally:
        close_shards(shards)
    found = []
    for plan in plan_blocks(transfers, granule_bytes):
        parts = [
            (offset, piece.nbytes, digests[transfers[piece.transfer].shard].get(geometry(piece)))
            for offset, piece in plan.pieces
        ]
        hashed = [(offset, nbytes, digest) for offset, nbytes, digest in parts if digest is not None]
        content = digest_block(hashed) if len(hashed) == len(parts) else None
        found.append(Block(content, plan.granules_count(granule_bytes) * granule_bytes))
    return found


def _target(name: str, fit: Fit) -> dict[str, Any]:
    return {
        "target": name,
        "needed_bytes": fit.needed_bytes,
        "device_bytes": fit.device_bytes,
        "shortfall_bytes": fit.shortfall_bytes,
        "fits": not fit.shortfall_bytes,
        "kv_room_bytes": fit.room_bytes,
    }
