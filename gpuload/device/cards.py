"""What cards there are, and what driver and bus say of them; no context is made, so none is taken from anybody.

Source: CUDA Driver API (cuDeviceGetAttribute); Documentation/ABI/testing/sysfs-bus-pci; NVML, where `nvidia-ml-py` is
installed, for what neither tells.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from ctypes import c_int
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuload.device import driver as cu
from gpuload.device.base import Holder
from gpuload.errors import DeviceError

_GT_S = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
_LANE_GB_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""Of one lane, after its coding. Source: PCI Express Base Specification."""


@dataclass(frozen=True)
class Bus:
    """A PCIe link: now and at most. It may run slower while nothing moves."""

    generation: int
    lanes: int
    generation_max: int
    lanes_max: int

    @property
    def gb_s(self) -> float:
        """One way, at the generation it can have and the lanes it has."""
        return _LANE_GB_S.get(self.generation_max, 0.0) * self.lanes


@dataclass(frozen=True)
class Card:
    """One card, by the driver's numbering."""

    index: int
    name: str
    capability: tuple[int, int]
    compute_mode: int
    """cu.COMPUTEMODE_…"""
    has_ecc: bool
    exports_descriptors: bool
    """Whether its memory can be given to other processes as descriptors, which is how arenas are shared."""
    pci: str
    """'0000:65:00.0', as sysfs calls it."""


def look(driver: cu.Driver) -> list[Card]:
    """All cards that this process may see (CUDA_VISIBLE_DEVICES). Raises: DeviceError."""
    return [_card(driver, index) for index in range(driver.number("cuDeviceGetCount", c_int))]


def identity_at(driver: cu.Driver, index: int) -> str:
    """Of the card that this process numbers so. Raises: DeviceError if it has none such."""
    count = driver.number("cuDeviceGetCount", c_int)
    if index >= count:
        raise DeviceError(f"no cuda:{index}: this process sees {count} CUDA devices")
    return driver.identity_of(driver.number("cuDeviceGet", c_int, index))


def index_of(driver: cu.Driver, identity: str) -> int:
    """How this process numbers a card. Raises: DeviceError naming those that it sees, if not that one."""
    seen = [identity_at(driver, index) for index in range(driver.number("cuDeviceGetCount", c_int))]
    if identity not in seen:
        raise DeviceError(
            f"{identity} is not among the cards that this process sees: {', '.join(seen) or 'none'}; is it left out of"
            " CUDA_VISIBLE_DEVICES, or not given to this container?"
        )
    return seen.index(identity)


def _card(driver: cu.Driver, index: int) -> Card:
    ordinal = driver.number("cuDeviceGet", c_int, index)

    def ask(attribute: int) -> int:
        return driver.number("cuDeviceGetAttribute", c_int, attribute, ordinal)

    name = ctypes.create_string_buffer(256)
    driver.call("cuDeviceGetName", name, len(name), ordinal)
    return Card(
        index=index,
        name=name.value.decode("utf-8", "replace"),
        capability=(ask(cu.ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR), ask(cu.ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)),
        compute_mode=ask(cu.ATTRIBUTE_COMPUTE_MODE),
        has_ecc=bool(ask(cu.ATTRIBUTE_ECC_ENABLED)),
        exports_descriptors=bool(ask(cu.ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)),
        pci=pci_of(driver, ordinal),
    )


def pci_of(driver: cu.Driver, ordinal: int) -> str:
    """'0000:65:00.0', as sysfs calls a card. Raises: DeviceError."""
    wanted = (cu.ATTRIBUTE_PCI_DOMAIN_ID, cu.ATTRIBUTE_PCI_BUS_ID, cu.ATTRIBUTE_PCI_DEVICE_ID)
    domain, bus, slot = (driver.number("cuDeviceGetAttribute", c_int, attribute, ordinal) for attribute in wanted)
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def bus_of(card: Card, root: Path = Path("/")) -> Bus | None:
    """What sysfs says of a card's link; None where it says nothing (a virtual machine may hide it)."""
    place = root / "sys/bus/pci/devices" / card.pci
    try:
        speeds = [float(_text(place / name).split()[0]) for name in ("current_link_speed", "max_link_speed")]
        lanes = [int(_text(place / name)) for name in ("current_link_width", "max_link_width")]
    except (OSError, ValueError, IndexError):
        return None
    return Bus(_GT_S.get(speeds[0], 0), lanes[0], _GT_S.get(speeds[1], 0), lanes[1]) if all(lanes) else None


def mps_is_there() -> bool:
    """Whether CUDA processes share cards through NVIDIA's Multi-Process Service here, as its control pipe tells."""
    return os.path.exists(os.path.join(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control"))


def driver_release(root: Path = Path("/")) -> str:
    """'550.54.14'; '' where the kernel's module does not say."""
    try:
        return _text(root / "sys/module/nvidia/version")
    except OSError:
        pass
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", _text(root / "proc/driver/nvidia/version"))
    except OSError:
        return ""
    return found[1] if found else ""


def _text(path: Path) -> str:
    return path.read_text().strip()


@dataclass(frozen=True)
class Managed:
    """What only NVML tells; None where it does not."""

    mig: bool | None
    persistence: bool | None
    uncorrected_errors: int | None
    """Of ECC, since the driver was loaded."""


def managed(card: Card) -> Managed | None:
    """Ask NVML; None where it, or its package nvidia-ml-py, is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no library, no driver: all mean that nobody can be asked
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(card.pci.encode())
        return Managed(
            _or_none(lambda: bool(pynvml.nvmlDeviceGetMigMode(handle)[0])),
            _or_none(lambda: bool(pynvml.nvmlDeviceGetPersistenceMode(handle))),
            _or_none(lambda: int(pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            ))),
        )  # fmt: skip
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def holders_of(identity: str) -> list[Holder]:
    """Processes that have memory of the card with this UUID, largest first. In a container NVML may see none, or only
    its own; empty where NVML is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # see `managed`
        return []
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(identity.encode())
        found = [
            *pynvml.nvmlDeviceGetComputeRunningProcesses(handle),
            *pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
        ]
        return sorted((Holder(p.pid, p.usedGpuMemory or 0) for p in found), key=lambda one: -one.nbytes)
    except Exception:  # a slice (MIG) goes by another name there
        return []
    finally:
        pynvml.nvmlShutdown()


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:  # this card has no such thing
        return None
