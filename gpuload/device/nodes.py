"""Memory nodes (NUMA): which one a card hangs at, and threads that stay beside it.

A reader that runs on a card's node fills memory of that node, since the kernel gives a page where it is first touched:
copies then do not cross the sockets. A policy that the program was started with (numactl) stays in force.
Source: Documentation/ABI/testing/sysfs-bus-pci; Documentation/ABI/stable/sysfs-devices-node; sched_setaffinity(2);
set_mempolicy(2), get_mempolicy(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/")
"""Where sysfs is mounted below."""

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}.get(platform.machine())
_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}.get(platform.machine())
_MPOL_PREFERRED = 1
_NODES_MAX = 1024
"""As many as the kernel can be built for."""

_libc = ctypes.CDLL(None, use_errno=True)


def node_of(pci: str, root: Path | None = None) -> int | None:
    """The node that a PCI device ('0000:65:00.0') hangs at; None where there is but one, or nobody says."""
    try:
        node = int(((root or ROOT) / "sys/bus/pci/devices" / pci / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def processors_of(node: int, root: Path | None = None) -> set[int]:
    """Of a node; empty where nobody says."""
    try:
        listed = ((root or ROOT) / f"sys/devices/system/node/node{node}/cpulist").read_text().strip()
        found: set[int] = set()
        for part in filter(None, listed.split(",")):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return set()
    return found


def process_nodes(root: Path | None = None) -> set[int]:
    """The nodes of the processors that this thread may use."""
    allowed, nodes = os.sched_getaffinity(0), set()
    for place in ((root or ROOT) / "sys/devices/system/node").glob("node[0-9]*"):
        node = int(place.name.removeprefix("node"))
        if allowed & processors_of(node, root):
            nodes.add(node)
    return nodes


@contextmanager
def beside(node: int | None) -> Iterator[None]:
    """Keep this thread on the processors of a node, of those that it may use; where there are none, where it is."""
    allowed = os.sched_getaffinity(0)
    wanted = processors_of(node) & allowed if node is not None else set()
    if not wanted or wanted == allowed:
        yield
        return
    with contextlib.suppress(OSError):  # a control group has just taken them away
        os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, allowed)


@contextmanager
def on_node(node: int | None) -> Iterator[bool]:
    """Pages that this thread touches first in here come to stand on `node`, if it has room; gives whether the kernel
    took that. None, a node that is not there, or another machine than those above: they stand anywhere. The thread's
    own policy (numactl's, say) is in force again afterwards.
    """
    before = _policy() if node is not None and 0 <= node < _NODES_MAX else None
    is_set = before is not None and node is not None and _set(_MPOL_PREFERRED, _mask(node))
    try:
        yield is_set
    finally:
        if is_set and before is not None:
            _set(*before)


def _mask(*nodes: int) -> ctypes.Array[ctypes.c_ulong]:
    word = ctypes.sizeof(ctypes.c_ulong) * 8
    mask = (ctypes.c_ulong * (_NODES_MAX // word))()
    for node in nodes:
        mask[node // word] |= 1 << node % word
    return mask


def _policy() -> tuple[int, ctypes.Array[ctypes.c_ulong]] | None:
    """This thread's mode and nodes; None where nobody says."""
    mode, mask = ctypes.c_int(), _mask()
    if _GET_MEMPOLICY is None:
        return None
    # one more than there are bits, here and below: the kernel takes the last one off (mm/mempolicy.c)
    is_told = _libc.syscall(_GET_MEMPOLICY, ctypes.byref(mode), mask, _NODES_MAX + 1, None, 0) == 0
    return (mode.value, mask) if is_told else None


def _set(mode: int, mask: ctypes.Array[ctypes.c_ulong]) -> bool:
    return _SET_MEMPOLICY is not None and bool(_libc.syscall(_SET_MEMPOLICY, mode, mask, _NODES_MAX + 1) == 0)
