"""What a caller says of devices, as torch, transformers and accelerate take it, into names that the loader knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from gpuload.device import canonical_name, open_device
from gpuload.errors import DeviceError
from mfs.errors import UsageError
from mfs.safetensors import Header

DeviceName = str | int | torch.device
DeviceMap = DeviceName | Mapping[str, DeviceName]

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

FREE_SHARE = 0.9
"""Of a GPU's free memory that a strategy counts on, as accelerate does: the rest is for what computing needs."""

_BLOCK = re.compile(r".*?\.\d+(?=\.)|\d+(?=\.)")
"""A name up to its first number: one layer, which stays on one device."""


def check_there(name: str) -> None:
    """Raises: DeviceError, in one line, where torch has no such device here. name: a canonical one."""
    if name.startswith("cpu"):
        return
    if not torch.cuda.is_available():
        why = "sees no GPU" if torch.version.cuda else "is built without CUDA"
        raise DeviceError(f"{name} is not there: torch {torch.__version__} {why}; load to 'cpu'")
    count = torch.cuda.device_count()
    if int(name.partition(":")[2]) >= count:
        raise DeviceError(f"{name} is not there: torch sees {count} GPU{'s' if count > 1 else ''}, from cuda:0 on")


def explicit(given: DeviceMap | None) -> dict[str, str] | None:
    """The map that a `device_map` spells out; {} for none, None for a strategy: `by_strategy` makes a map of that.

    Raises: UsageError naming what is accepted.
    """
    if given is None:
        return {}
    if isinstance(given, str) and given in STRATEGIES:
        return None
    if isinstance(given, Mapping):
        wrong = [prefix for prefix in given if not isinstance(prefix, str)]
        if wrong:
            raise UsageError(f"device_map: {wrong[0]!r} is no module's name; expected texts such as 'model.layers.0'")
        return {prefix: _named(device, f"device_map: {prefix!r}") for prefix, device in given.items()}
    return {"": _named(given, "device_map")}


def by_strategy(strategy: str, headers: Sequence[Header], free_bytes: Mapping[str, int]) -> dict[str, str]:
    """A map by one of STRATEGIES, as accelerate means them, for these tensors. Pure.

    free_bytes: GPU -> free memory, in their order. The CPU takes what they cannot.

    Layers stay whole and follow each other over the devices in the order of their numbers. 'sequential' fills one GPU
    after the other; 'auto' and 'balanced' give each about the same; 'balanced_low_0' leaves the first as empty as it
    can.
    Source: accelerate/utils/modeling.py, get_balanced_memory and infer_auto_device_map.
    """
    blocks: dict[str, int] = {}
    for header in headers:
        for tensor in header.tensors:
            name = _block_of(tensor.name)
            blocks[name] = blocks.get(name, 0) + tensor.nbytes
    room = {device: int(free * FREE_SHARE) for device, free in free_bytes.items()}
    first, *others = room or [""]
    total, largest = sum(blocks.values()), max(blocks.values(), default=0)
    if strategy == "balanced_low_0" and others:
        for device in others[:-1]:
            room[device] = min(room[device], total // len(others) + largest)
        room[first] = min(room[first], max(0, total - sum(room[device] for device in others)))
    elif strategy != "sequential" and others:
        for device in list(room)[:-1]:
            room[device] = min(room[device], total // len(room) + largest)
    made: dict[str, str] = {}
    left = list(room)
    for name in sorted(blocks, key=_natural):
        while left and blocks[name] > room[left[0]]:
            left.pop(0)
        made[name] = left[0] if left else "cpu"
        if left:
            room[left[0]] -= blocks[name]
    devices = set(made.values())
    return {"": devices.pop()} if len(devices) == 1 else made


def free_bytes() -> dict[str, int]:
    """Every GPU that torch sees -> its free memory now."""
    found: dict[str, int] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = open_device(index)
        found[f"cuda:{index}"] = device.memory().free_bytes
        device.close()
    return found


def _named(given: object, what: str) -> str:
    if isinstance(given, str | torch.device) or type(given) is int:
        try:
            return canonical_name(given)
        except UsageError:
            pass
    strategies = ", ".join(repr(one) for one in STRATEGIES) + ", " if what == "device_map" else ""
    raise UsageError(f"{what}: {str(given)[:80]!r}; expected {strategies}'cpu', 'cuda:N', N or a torch.device of these")


def _block_of(name: str) -> str:
    found = _BLOCK.match(name)
    return found[0] if found else name.rpartition(".")[0] or name


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name)]
