"""`gpuload plan`: reads headers and config.json, asks device and server, and hands numbers to `fit`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpuload.device import canonical_name, open_device
from gpuload.fit import CARDS, CONTEXT_BYTES, Fit, arena_bytes, model_sizes, smallest_world
from gpuload.kv_cache import kv_cache_bytes, tokens_that_fit
from gpuload.moving.model_files import read_tables
from gpuload.moving.pipeline import Limits
from gpuload.moving.plan import MEGATRON_RULES, Placement, Transfer, plan_transfers
from mfs.errors import IntegrityError, MfsError, UsageError
from mfs.units import format_size

CONFIG_BYTES_MAX = 16 << 20


def examine(
    where: str,
    tokens: int,
    device: str | None,
    device_map: Mapping[str, str],
    rules: Mapping[str, int | None],
    socket_path: str | None,
    *,
    memory_bytes: int | None = None,
    item_bytes: int | None = None,
) -> dict[str, Any]:
    """Everything `gpuload plan` prints of one model. Loads nothing.

    memory_bytes: of the card to plan for, instead of the usual ones. item_bytes: of a number in the key-value cache;
    None: as the config says.
    Raises: as opening the files does; UsageError, DeviceError.
    """
    if tokens < 0:
        raise UsageError(f"--kv-cache {tokens}: expected a number of tokens")
    headers = [shard.header for shard in read_tables(where)]
    sizes = model_sizes(headers, rules or MEGATRON_RULES)
    folder = Path(where) if Path(where).is_dir() else Path(where).parent
    config = _config(folder)
    if tokens and config is None:
        raise UsageError(f"--kv-cache needs a config.json beside the weights; there is none in {folder}")
    kv = kv_cache_bytes(config, tokens, 1, item_bytes) if config is not None and tokens else 0
    staging = Limits().buffer_bytes * Limits().buffers_count
    empty = Fit(sizes.bytes_total, kv, CONTEXT_BYTES, 0, 0, 0, 0)

    def with_worlds(name: str, fit: Fit) -> dict[str, Any]:
        world = smallest_world(sizes, config, tokens, fit, item_bytes)
        room = _room(replace(fit, weights_bytes=sizes.rank_bytes[world]) if world else None, config, world, item_bytes)
        return {**_target(name, fit), "may_be_cut": True, "tensor_parallel": world, **room}

    cards = CARDS if memory_bytes is None else {format_size(memory_bytes): memory_bytes}
    targets = [with_worlds(f"a card of {name}", replace(empty, device_bytes=n)) for name, n in cards.items()]
    placement = Placement(
        canonical_name(device) if device is not None else device_map.get("", ""),
        {prefix: canonical_name(name) for prefix, name in device_map.items()},
    )
    transfers = plan_transfers(headers, placement)
    for name in dict.fromkeys(t.device for t in transfers) if device is not None or device_map else ():
        if not name:
            raise UsageError("the device map leaves tensors without a device: add '' to it, or give --device")
        share = sum(t.nbytes for t in transfers if t.device == name) / max(1, sizes.bytes_total)
        here, arena = _on_device(name, transfers, int(kv * share), socket_path)
        fits = [(name, here), *([] if arena is None else [(f"the server's arena on {name}", arena)])]
        fits += _in_ram(name, here.weights_bytes, socket_path) if arena is not None else []
        if share == 1:
            targets += [with_worlds(*one) for one in fits[:1]]
        else:
            targets += [_whole(*one) for one in fits[:1]]
        targets += [_whole(*one) for one in fits[1:]]
    return {
        "model": os.path.abspath(where),
        **asdict(sizes),
        "kv_cache_tokens": tokens,
        "kv_cache_bytes": kv,
        "staging_bytes": staging,
        "targets": targets,
    }


def _on_device(name: str, transfers: Sequence[Transfer], kv: int, socket_path: str | None) -> tuple[Fit, Fit | None]:
    """The sum on one device beside all that is in use there; and in the arena of a server there, if one answers."""
    opened = open_device(name)
    memory, granule = opened.memory(), opened.granule_bytes
    opened.close()
    weights = arena_bytes(transfers, granule, name)
    there = _server_on(name, socket_path)
    others = max(0, memory.total_bytes - memory.free_bytes - (there["arena_committed_bytes"] if there else 0))
    here = Fit(
        weights_bytes=weights,
        kv_cache_bytes=kv,
        context_bytes=0 if name.startswith("cpu") else CONTEXT_BYTES,
        staging_bytes=0,  # the CPU reads straight into place; a GPU's staging is host memory
        resident_bytes=max(there["arena_used_bytes"], there["arena_floor_bytes"]) if there else 0,
        others_bytes=others,
        device_bytes=memory.total_bytes,
    )
    return here, _in_arena(weights, there) if there else None


def _in_arena(weights: int, there: Mapping[str, Any]) -> Fit:
    """In the server's arena: resident is what may not be evicted; what of its budget the device has no memory for,
    others have."""
    budget, stays = there["arena_bytes"], there["arena_used_bytes"] - there["arena_evictable_bytes"]
    return Fit(weights, 0, 0, 0, stays, max(0, budget - stays - there["arena_room_bytes"]), budget)


def _in_ram(name: str, weights: int, socket_path: str | None) -> list[tuple[str, Fit]]:
    """In the server's RAM tier, should it be evicted: all that stands there may go for it. None where there is none."""
    tiers = [tier for tier in _ask(socket_path).get("ram_tiers", ()) if name in tier["devices"]]
    return [(f"the server's RAM tier behind {name}", Fit(weights, 0, 0, 0, 0, 0, tier["bytes"])) for tier in tiers]


def _whole(name: str, fit: Fit) -> dict[str, Any]:
    """A target that takes a part that is settled, and no key-value cache of its own size."""
    return {**_target(name, fit), "may_be_cut": False, "tensor_parallel": None, **_room(None, None, None, None)}


def _room(
    fit: Fit | None, config: Mapping[str, Any] | None, world: int | None, item_bytes: int | None
) -> dict[str, int | None]:
    """For a key-value cache on each rank, in bytes and tokens; None where that is not known, or has no end."""
    if fit is None or world is None:
        return {"kv_room_bytes": None, "kv_room_tokens": None}
    tokens = None
    if config is not None:
        with contextlib.suppress(UsageError):  # who asks for tokens hears why; here it is extra
            tokens = tokens_that_fit(config, fit.room_bytes, world, item_bytes)
    return {"kv_room_bytes": fit.room_bytes, "kv_room_tokens": tokens}


def _target(name: str, fit: Fit) -> dict[str, Any]:
    return {
        "target": name,
        **asdict(fit),
        "needed_bytes": fit.needed_bytes,
        "shortfall_bytes": fit.shortfall_bytes,
        "fits": not fit.shortfall_bytes,
    }


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise IntegrityError(f"{path}: larger than {CONFIG_BYTES_MAX} bytes")
        found = json.loads(path.read_bytes())
    except OSError:
        return None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{path}: not JSON") from None
    return found if isinstance(found, dict) else None


def _server_on(device: str, socket_path: str | None) -> dict[str, Any] | None:
    """What a running server says of its arena on that device; None if none answers, or it has none there."""
    return next((d for d in _ask(socket_path).get("devices", ()) if d["device"] == device), None)


def _ask(socket_path: str | None) -> dict[str, Any]:
    """A server's status; empty if none answers."""
    from gpuload.client.asking import ask

    try:
        return ask({"op": "status"}, socket_path=socket_path, timeout_s=5)
    except MfsError:
        return {}
