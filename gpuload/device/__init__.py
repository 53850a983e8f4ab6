"""Devices behind one protocol. `open_device` is the only place that knows their names."""

from __future__ import annotations

import re

from gpuload.device.base import Device
from mfs.errors import UsageError

_CARD = re.compile(r"(?:GPU|MIG)-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", re.IGNORECASE)


def canonical_name(name: object) -> str:
    """'cpu', 'cuda:0', ... from what torch accepts: 'cpu:0', 'cuda', 0, a torch.device. Raises: UsageError for others.

    'cpu:1' and so on are more devices in host memory, each with an arena of its own; to torch all are the CPU.
    """
    text = f"cuda:{name}" if isinstance(name, int) and not isinstance(name, bool) else str(name)
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (":" in text and not (index.isascii() and index.isdigit())):
        raise UsageError(f"no such device: {text[:80]!r}; expected 'cpu' or 'cuda:N'")
    number = int(index or 0)
    return "cpu" if kind == "cpu" and not number else f"{kind}:{number}"


def card_of(name: object) -> str | None:
    """A card's `identity`, from 'GPU-…' or 'MIG-…' as nvidia-smi prints them; None for any other name."""
    found = _CARD.fullmatch(str(name))
    return None if found is None else f"GPU-{found[1].lower()}"


def identity_of(name: str | int) -> str:
    """What every process of this machine calls the device that this one calls `name`. No context is made.

    Raises: UsageError, DeviceError, as `open_device`.
    """
    name = canonical_name(name)
    if name.startswith("cpu"):
        return name
    from gpuload.device import cards
    from gpuload.device.driver import load_driver

    return cards.identity_at(load_driver(), int(name.partition(":")[2]))


def open_device(name: str | int) -> Device:
    """The device of that name, or of that identity, here. Raises: UsageError for a name that means nothing, DeviceError
    if it is not there."""
    card = card_of(name)
    if card is not None:
        from gpuload.device import cards
        from gpuload.device.driver import load_driver

        name = cards.index_of(load_driver(), card)
    name = canonical_name(name)
    if name.startswith("cpu"):
        from gpuload.device.host import HostDevice

        return HostDevice(name=name)
    from gpuload.device.cuda import CudaDevice

    return CudaDevice(int(name.partition(":")[2]))
