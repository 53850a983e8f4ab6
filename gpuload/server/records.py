"""A model as bytes, for whoever serves it after this process, and back: its tables and digests, none of its weights.

A record is a map (msgpack): digest, label, retain, metadata of each shard, placements, tensors as rows of
`ResidentTensor`, and of each part: device, digest, blocks as (runs, nbytes, digest, pieces). What changes while a model
is served stands in the index (`estate`). Blocks that models share are in the record of each, told by their digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgpack

from gpuload.device.base import total_granules
from gpuload.moving.plan import Placement
from gpuload.server.catalog import Block, Catalog, Model, Part, ResidentTensor
from mfs.errors import IntegrityError


def packed(model: Model) -> bytes:
    """May take long for many tensors; for threads."""
    content = {
        "digest": model.digest,
        "label": model.label,
        "retain": model.retain,
        "metadata": model.metadata,
        "placements": [asdict(placement) for placement in model.placements],
        "tensors": model.tensors,
        "parts": [
            [part.catalog.device, part.digest, [[b.runs, b.nbytes, b.digest, b.pieces] for b in part.blocks]]
            for part in model.parts
        ],
    }
    return bytes(msgpack.packb(content))


def restored(content: bytes, catalogs: Mapping[str, Catalog]) -> Model:
    """The model of a record, with its granules taken and its blocks held: not served yet.

    Raises: IntegrityError if the record cannot be read, or does not agree with what is restored already; the catalogs
        are of no use then.
    """
    try:
        given = msgpack.unpackb(content)
        parts = [_part(catalogs[device], digest, blocks) for device, digest, blocks in given["parts"]]
        tensors = [
            ResidentTensor(name, dtype, tuple(shape), part, block, offset, nbytes)
            for name, dtype, shape, part, block, offset, nbytes in given["tensors"]
        ]
        for tensor in tensors:
            _check_inside(tensor, parts)
        return Model(
            name=None,
            digest=given["digest"],
            parts=parts,
            tensors=tensors,
            metadata=given["metadata"],
            placements=[Placement(**placement) for placement in given["placements"]],
            label=given["label"],
            retain=given["retain"],
        )
    except (KeyError, IndexError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise IntegrityError(f"the record of a resident model cannot be used: {error!r}") from None


def _part(catalog: Catalog, digest: str, rows: list[Any]) -> Part:
    blocks = []
    for runs, nbytes, block_digest, pieces in rows:
        runs = [(first, count) for first, count in runs]
        there = catalog.blocks.get(block_digest)
        if there is not None and there.runs == runs:
            catalog.hold(there)
            blocks.append(there)
            continue
        granules = total_granules(runs)
        if there is not None or -(-nbytes // catalog.granule_bytes) != granules:
            raise ValueError(f"a block of {nbytes} bytes in {granules} granules")
        catalog.granules.claim(runs)
        made = Block(runs, nbytes, holds=1)
        if not all(offset >= 0 and offset + size <= nbytes for offset, size, _ in pieces):
            raise ValueError("a piece outside of its block")
        blocks.append(catalog.complete(made, block_digest, [(offset, size, piece) for offset, size, piece in pieces]))
    return Part(catalog, digest, blocks)


def _check_inside(tensor: ResidentTensor, parts: list[Part]) -> None:
    if tensor.block < 0:
        return
    if tensor.offset < 0 or tensor.offset + tensor.nbytes > parts[tensor.part].blocks[tensor.block].nbytes:
        raise ValueError(f"tensor {tensor.name!r} outside of its block")
