"""Driver, wheel and cards of this machine: do they fit each other, can a card be shared, is it fast."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence
from ctypes import c_int
from dataclasses import asdict, dataclass, field
from typing import Any

from gpuload import compat
from gpuload.device import cards as look_at
from gpuload.device import driver as cu
from gpuload.device import nodes
from gpuload.device.base import Device
from gpuload.device.cards import Card
from gpuload.errors import DeviceError
from mfs.errors import MfsError
from mfs.findings import Finding, Level, fault, note, ok, warning
from mfs.units import format_size

COPY_BYTES = 256 << 20
"""Moved to measure a copy, in pieces of PIECE_BYTES; a device with less free is measured with what it has."""
PIECE_BYTES = 16 << 20
COPY_TIMEOUT_S = 30.0
SLOW_SHARE = 0.6
"""Of what the bus can carry; page-locked copies usually reach 0.8."""


@dataclass
class Wheel:
    """What torch was built for."""

    torch: str = ""
    cuda: str = ""
    """'12.6'; '' for a build without CUDA."""
    archs: Sequence[str] = ()


@dataclass
class Compatibility:
    """What fits what: the table that `gpuload doctor` prints."""

    driver_cuda: str = ""
    """'12.4'; '' without a driver."""
    driver_release: str = ""
    wheel: Wheel = field(default_factory=Wheel)
    toolkits: list[dict[str, str]] = field(default_factory=list)
    """{toolkit, verdict, needs}."""
    cards: list[dict[str, Any]] = field(default_factory=list)
    """{device, name, capability, runs, by, reason}."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def wheel() -> Wheel:
    """Of the torch that is installed here."""
    try:
        import torch
    except (ImportError, OSError):  # a library that it links to is missing
        return Wheel()
    flags = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else None
    return Wheel(torch.__version__, torch.version.cuda or "", tuple((flags or "").split()))


def examine(found: Compatibility, wanted: Sequence[str]) -> Iterator[Finding]:
    """Look at driver, wheel and every card; fills in `found` on the way.

    wanted: devices that somebody means to use: what they lack is a fault, of others a note.
    """
    found.wheel = wheel()
    wants_cuda = any(name.startswith("cuda") for name in wanted)
    yield _torch(found.wheel, wants_cuda)
    if runtime := _runtime():
        yield ok("CUDA runtime", runtime)
    found.driver_release = look_at.driver_release()
    try:
        driver = cu.load_driver()
        number = driver.number("cuDriverGetVersion", c_int)
        there = look_at.look(driver)
    except DeviceError as error:
        yield from _without(error, found, wants_cuda)
        return
    version = compat.of_driver(number)
    found.driver_cuda = f"{version[0]}.{version[1]}"
    found.toolkits = [
        {
            "toolkit": f"{t[0]}.{t[1]}",
            "verdict": str(compat.toolkit_on_driver(t, version)),
            "needs": compat.driver_for(t),
        }
        for t in compat.TOOLKITS
    ]
    release = f" ({found.driver_release})" if found.driver_release else ""
    yield ok("driver", f"CUDA {found.driver_cuda}{release}")
    runs = compat.Runs.NO
    if toolkit := compat.parse_version(found.wheel.cuda):
        runs = compat.toolkit_on_driver(toolkit, version)
        yield _pairing(found, toolkit, runs)
    yield _visible(there, wanted)
    for card in there:
        yield from _card(card, found, runs, is_wanted=not wanted or f"cuda:{card.index}" in wanted)


def _without(error: DeviceError, found: Compatibility, wants_cuda: bool) -> Iterator[Finding]:
    advice = "install NVIDIA's driver; in a container run it with the NVIDIA runtime (docker: --gpus all)"
    if os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidiactl"):
        advice = "the kernel has a driver, this process no libcuda.so.1: mount the driver's libraries (--gpus all)"
    value = f"{error}; device 'cpu' works"
    yield Finding("driver", Level.FAULT if wants_cuda else Level.NOTE, value, advice)


def _torch(wheel: Wheel, wants_cuda: bool) -> Finding:
    if not wheel.torch:
        return fault("torch", "not installed, or cannot be loaded", "pip install 'mfs[gpuload]'")
    if wheel.cuda:
        return ok("torch", f"{wheel.torch}, built with CUDA {wheel.cuda} for {', '.join(wheel.archs)}")
    value = f"{wheel.torch}, built without CUDA"
    if wants_cuda:
        return fault("torch", value, "install a build with CUDA: https://pytorch.org/get-started/locally")
    return ok("torch", value)


def _runtime() -> str:
    """'12.6.77, of nvidia-cuda-runtime-cu12': the wheels that torch loads its runtime from; '' without one."""
    names = ("nvidia-cuda-runtime", *(f"nvidia-cuda-runtime-cu{major}" for major in compat.DRIVERS))
    there = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            there.append(f"{importlib.metadata.version(name)}, of {name}")
    return "; ".join(there)


def _pairing(found: Compatibility, toolkit: compat.Version, runs: compat.Runs) -> Finding:
    value = f"built with CUDA {found.wheel.cuda}, the driver has {found.driver_cuda}: {runs}"
    if runs is compat.Runs.NO:
        older = [t["toolkit"] for t in found.toolkits if t["verdict"] == compat.Runs.ALL]
        instead = f", or a torch built with CUDA {older[-1]}" if older else ""
        return fault("torch on this driver", value, f"needs {compat.driver_for(toolkit)}{instead}")
    if runs is compat.Runs.NO_JIT:
        return note(
            "torch on this driver", value,
            f"what compiles PTX on the way (some extensions, new cards) fails: driver of CUDA {found.wheel.cuda}",
        )  # fmt: skip
    return ok("torch on this driver", value)


def _visible(there: Sequence[Card], wanted: Sequence[str]) -> Finding:
    hidden = (
        f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']})" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
    )
    names = {f"cuda:{card.index}" for card in there}
    missing = [name for name in wanted if name.startswith("cuda") and name not in names]
    value = f"{len(there)} of CUDA{hidden}"
    if missing:
        return fault("cards", f"{value}: no {', '.join(missing)}", "check nvidia-smi -L and CUDA_VISIBLE_DEVICES")
    return ok("cards", value) if there else note("cards", value, "check nvidia-smi -L and CUDA_VISIBLE_DEVICES")


def _card(card: Card, found: Compatibility, runs: compat.Runs, *, is_wanted: bool) -> Iterator[Finding]:
    what = f"cuda:{card.index}"
    capability = f"{card.capability[0]}.{card.capability[1]}"
    family = compat.name_of(card.capability)
    yield ok(what, f"{card.name}, compute capability {capability}{f', {family}' if family else ''}")
    if found.wheel.cuda:
        yield _kernels(what, card, found, runs)
    yield _mode(what, card)
    yield _bus(what, card)
    yield _node(what, card)
    yield _sharing(what, card)
    yield from _managed(what, card)
    if is_wanted and card.compute_mode != cu.COMPUTEMODE_PROHIBITED:
        yield _copies(what, card)


def _kernels(what: str, card: Card, found: Compatibility, runs: compat.Runs) -> Finding:
    reach = compat.kernels_on_card(found.wheel.archs, card.capability, can_jit=runs is compat.Runs.ALL)
    found.cards.append({
        "device": what, "name": card.name, "capability": f"{card.capability[0]}.{card.capability[1]}",
        "runs": reach.runs, "by": reach.by, "reason": reach.reason,
    })  # fmt: skip
    title = f"{what}: kernels of torch"
    if reach.runs:
        if reach.reason:
            return note(title, f"by {reach.by}: {reach.reason}", "a torch built for this card starts at once")
        return ok(title, f"by {reach.by}")
    span = compat.toolkits_for(card.capability)
    if span is None:
        return fault(title, reach.reason, "install a torch whose list of architectures has this card's")
    first, last = (f"{v[0]}.{v[1]}" if v else "" for v in span)
    until = f" to {last}" if last else " or newer"
    return fault(title, reach.reason, f"install a torch built with CUDA {first}{until}")


def _mode(what: str, card: Card) -> Finding:
    title = f"{what}: compute mode"
    back = f"as root: nvidia-smi -i {card.index} -c DEFAULT"
    if card.compute_mode == cu.COMPUTEMODE_PROHIBITED:
        return fault(title, "prohibited: no program may use it", back)
    if card.compute_mode == cu.COMPUTEMODE_EXCLUSIVE_PROCESS:
        return fault(title, "exclusive: one process may use it, and a server and its clients are several", back)
    return ok(title, "default")


def _bus(what: str, card: Card) -> Finding:
    title, bus = f"{what}: PCIe", look_at.bus_of(card)
    if bus is None:
        return note(title, f"sysfs says nothing of {card.pci}: the measured copy tells")
    value = f"{bus.generation}.0 x{bus.lanes} now, {bus.generation_max}.0 x{bus.lanes_max} at most"
    if bus.lanes < bus.lanes_max:
        return warning(title, value, "seat the card anew, or give its slot all lanes (BIOS: bifurcation)")
    return ok(title, value)


def _node(what: str, card: Card) -> Finding:
    title, node = f"{what}: memory node", nodes.node_of(card.pci)
    if node is None:
        return ok(title, "one for all")
    mine = nodes.process_nodes()
    value = f"{node}; this process may run on {', '.join(map(str, sorted(mine)))}"
    if mine and node not in mine:
        return warning(title, value, f"copies cross the sockets: numactl --cpunodebind={node} --membind={node}")
    return ok(title, f"{value}; readers and their buffers stay on it")


def _sharing(what: str, card: Card) -> Finding:
    title = f"{what}: between processes"
    if not card.exports_descriptors:
        return fault(title, "its memory cannot be given out as descriptors", "this card or driver cannot serve arenas")
    return ok(title, "as descriptors over the server's socket: PID and IPC namespaces and /dev/shm do not matter")


def _managed(what: str, card: Card) -> Iterator[Finding]:
    found = look_at.managed(card)
    if found is None:
        yield note(
            f"{what}: NVML", "not asked: MIG, persistence and ECC errors are not known", "pip install nvidia-ml-py"
        )
        return
    if found.mig:
        yield note(f"{what}: MIG", "on: what is seen here is a part of the card", "sizes and speeds are the part's")
    if found.persistence is False:
        yield note(f"{what}: persistence", "off: the first use of an idle card takes seconds",
                   f"as root: nvidia-smi -i {card.index} -pm 1")  # fmt: skip
    if found.uncorrected_errors:
        yield warning(f"{what}: ECC", f"{found.uncorrected_errors} uncorrected errors since the driver was loaded",
                      f"drain it: nvidia-smi -i {card.index} -q -d ECC,ROW_REMAPPER")  # fmt: skip
    elif card.has_ecc:
        yield ok(f"{what}: ECC", "on, no uncorrected errors")


def _copies(what: str, card: Card) -> Finding:
    title = f"{what}: copies"
    from gpuload.device.cuda import CudaDevice

    try:
        device = CudaDevice(card.index)
        try:
            memory, rate = device.memory(), copy_speed(device)
        finally:
            device.close()
    except MfsError as error:
        return fault(title, f"cannot be used: {error}", "nvidia-smi shows who holds it, and its errors")
    bus = look_at.bus_of(card)
    free = f"{format_size(memory.free_bytes)} free of {format_size(memory.total_bytes)}"
    value = f"{rate / 1e9:.1f} GB/s from page-locked memory; {free}"
    if bus is not None and bus.gb_s and rate < SLOW_SHARE * bus.gb_s * 1e9:
        advice = "another program may be copying; else look at lanes, memory node and BIOS (ACS, IOMMU)"
        return warning(title, f"{value}; its link can carry {bus.gb_s:.0f}", advice)
    return ok(title, value)


def copy_speed(device: Device, nbytes: int = COPY_BYTES) -> float:
    """Bytes a second from page-locked memory into an arena of the device. Raises: FitError, DeviceError, BusyError."""
    unit = device.granule_bytes
    arena = device.create_arena(max(unit, min(nbytes, device.memory().free_bytes // 4) // unit * unit))
    try:
        whole = arena.granules_count * unit
        piece = min(PIECE_BYTES, whole)
        staging, stream = device.alloc_staging(piece), device.open_stream()
        try:
            best = 0.0
            for _ in range(2):  # the first touches memory, and wakes the link
                began = time.monotonic()
                for at in range(0, whole - piece + 1, piece):
                    stream.copy_in(arena.address + at, staging.address, piece)
                stream.record().wait(COPY_TIMEOUT_S)
                best = max(best, whole // piece * piece / max(time.monotonic() - began, 1e-9))
        finally:
            stream.close()
            staging.close()
    finally:
        arena.close()
    return best
