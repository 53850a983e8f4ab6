"""`gpuload plan`: reads headers and config.json, asks device and server, and hands numbers to `fit`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpuload.device import canonical_name, open_device
from gpuload.fit import CARDS, CONTEXT_BYTES, Fit, Sizes, arena_bytes, kv_cache_bytes, model_sizes, smallest_world
from gpuload.pipeline import Limits
from gpuload.plan import MEGATRON_RULES
from gpuload.shards import close_shards, find_shards, open_shards
from mfs.errors import IntegrityError, MfsError, UsageError

CONFIG_BYTES_MAX = 16 << 20


def examine(
    where: str, tokens: int, device: str | None, rules: dict[str, int | None], socket_path: str | None
) -> dict[str, Any]:
    """Everything `gpuload plan` prints. Loads nothing. Raises: as opening the files does; UsageError, DeviceError."""
    if tokens < 0:
        raise UsageError(f"--kv-cache {tokens}: expected a number of tokens")
    paths = find_shards(where)
    shards = open_shards(paths)
    close_shards(shards)
    headers = [s.header for s in shards]
    sizes = model_sizes(headers, rules or MEGATRON_RULES)
    config = _config(paths[0].parent)
    if tokens and config is None:
        raise UsageError(f"--kv-cache needs a config.json beside the weights; there is none in {paths[0].parent}")
    kv = kv_cache_bytes(config, tokens) if config is not None and tokens else 0
    staging = Limits().buffer_bytes * Limits().buffers_count
    empty = Fit(sizes.bytes_total, kv, CONTEXT_BYTES, 0, 0, 0, 0)
    targets = [
        _target(f"a card of {name}", replace(empty, device_bytes=n), sizes, config, tokens) for name, n in CARDS.items()
    ]
    if device is not None:
        name = canonical_name(device)
        opened = open_device(name)
        memory, granule = opened.memory(), opened.granule_bytes
        opened.close()
        resident, arena = _resident(name, socket_path)
        here = Fit(
            weights_bytes=arena_bytes(headers, granule),
            kv_cache_bytes=kv,
            context_bytes=0 if name == "cpu" else CONTEXT_BYTES,
            staging_bytes=0,  # the CPU reads straight into place; a GPU's staging is host memory
            resident_bytes=resident,
            others_bytes=max(0, memory.total_bytes - memory.free_bytes - arena),
            device_bytes=memory.total_bytes,
        )
        targets.append(_target(name, here, sizes, config, tokens))
    return {
        "model": os.path.abspath(where),
        **asdict(sizes),
        "kv_cache_tokens": tokens,
        "kv_cache_bytes": kv,
        "staging_bytes": staging,
        "targets": targets,
    }


def _target(name: str, fit: Fit, sizes: Sizes, config: dict[str, Any] | None, tokens: int) -> dict[str, Any]:
    return {
        "target": name,
        **asdict(fit),
        "needed_bytes": fit.needed_bytes,
        "shortfall_bytes": fit.shortfall_bytes,
        "fits": not fit.shortfall_bytes,
        "tensor_parallel": smallest_world(sizes, config, tokens, fit),
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


def _resident(device: str, socket_path: str | None) -> tuple[int, int]:
    """(bytes of weights, bytes of the arena they stand in) of a server on that device, if one answers."""
    from gpuload.asking import ask

    try:
        reply = ask({"op": "status"}, socket_path=socket_path, timeout_s=5)
    except MfsError:
        return 0, 0
    there = [d for d in reply["devices"] if d["device"] == device]
    return sum(d["arena_bytes"] - d["arena_free_bytes"] for d in there), sum(d["arena_bytes"] for d in there)
