"""gpuload: model weights into device memory at link speed, kept there, shared, swapped by difference.

    load_file(filename, device)          one file, as safetensors.torch.load_file
    safe_open(filename, 'pt', device)    tensors and slices when asked for, as safetensors.safe_open
    load_model(folder | index, device)   all shards, device maps, tensor-parallel ranks
    stream(folder | file, device)        (name, tensor) as they land
    attach(name, device)                 tensors that a resident server (`gpuload serve`) holds, without a copy; their
                                         `wait` and `refresh` follow what is swapped in, at the same addresses
    attach_arrays(name, device)          the same for numpy, JAX, CuPy, by DLPack; no torch
    let_go()                             gives back attached weights on GPUs whose last tensor is gone
    commit(Identity(...), tensors)       an engine's own weights, for the server to hold; committed, restore

Names are loaded when first used: `import gpuload` imports no torch. ARCHITECTURE.md beside this file is the map.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuload.client.arrays import attach_arrays
    from gpuload.client.attached import attach, let_go
    from gpuload.client.committed import Identity, commit, committed, restore
    from gpuload.client.load import load_file, load_model, stream
    from gpuload.client.opened import safe_open

__all__ = [
    "Identity", "attach", "attach_arrays", "commit", "committed", "include_dir", "let_go", "load_file", "load_model",
    "restore", "safe_open", "stream",
]  # fmt: skip

_HOMES = {
    "Identity": "gpuload.client.committed",
    "commit": "gpuload.client.committed",
    "committed": "gpuload.client.committed",
    "restore": "gpuload.client.committed",
    "attach": "gpuload.client.attached",
    "attach_arrays": "gpuload.client.arrays",
    "let_go": "gpuload.client.attached",
    "load_file": "gpuload.client.load",
    "load_model": "gpuload.client.load",
    "safe_open": "gpuload.client.opened",
    "stream": "gpuload.client.load",
}


def include_dir() -> str:
    """The folder of gpuload.h, the client for C and C++."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "include")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gpuload' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
