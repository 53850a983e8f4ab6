"""Memory on a node of this machine. Source: set_mempolicy(2)."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}.get(platform.machine())
_MPOL_DEFAULT, _MPOL_PREFERRED = 0, 1
_NODES_MAX = 1024
"""As many as the kernel can be built for."""

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def on_node(node: int | None) -> Iterator[bool]:
    """Pages that this thread touches first in here come to stand on `node`, if it has room; gives whether the kernel
    took that. None, a node that is not there, or another machine than those above: they stand anywhere.
    """
    is_set = node is not None and 0 <= node < _NODES_MAX and _set(_MPOL_PREFERRED, node)
    try:
        yield is_set
    finally:
        if is_set:
            _set(_MPOL_DEFAULT, None)


def _set(policy: int, node: int | None) -> bool:
    if _SET_MEMPOLICY is None:
        return False
    word = ctypes.sizeof(ctypes.c_ulong) * 8
    mask = (ctypes.c_ulong * (_NODES_MAX // word))()
    if node is None:
        return bool(_libc.syscall(_SET_MEMPOLICY, policy, None, 0) == 0)
    mask[node // word] = 1 << node % word
    # one more than there are bits: the kernel takes the last one off (mm/mempolicy.c, get_nodes)
    return bool(_libc.syscall(_SET_MEMPOLICY, policy, mask, _NODES_MAX + 1) == 0)
