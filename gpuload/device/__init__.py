"""Devices behind one protocol. `open_device` is the only place that knows their names."""

from __future__ import annotations

from gpuload.device.base import Device
from mfs.errors import UsageError


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


def open_device(name: str | int) -> Device:
    """The device of that name. Raises: UsageError for a name that means nothing, DeviceError if it is not there."""
    name = canonical_name(name)
    if name.startswith("cpu"):
        from gpuload.device.host import HostDevice

        return HostDevice(name=name)
    from gpuload.device.cuda import CudaDevice

    return CudaDevice(int(name.partition(":")[2]))
