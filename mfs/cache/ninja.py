"""mmap-ninja's numpy arrays, without what its package imports for other work.

`mmap_ninja` imports joblib and tqdm, which bring asyncio and multiprocessing, to write in parallel with a progress bar:
60 ms of each worker's start, of 170, and none of it is used here. So stand-ins are found under these names while it is
imported; whoever calls one, through mmap_ninja, gets the real thing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["ninja"]

_LATER = {"joblib": ("Parallel", "delayed"), "tqdm.auto": ("tqdm",)}


@contextmanager
def _imported_later() -> Iterator[None]:
    placed = [name for name in _LATER if name not in sys.modules]
    for name in placed:
        sys.modules[name] = stand_in = ModuleType(name)
        for function in _LATER[name]:
            setattr(stand_in, function, _later(name, function))
    try:
        yield
    finally:
        for name in placed:
            del sys.modules[name]


def _later(module: str, function: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: getattr(importlib.import_module(module), function)(*args, **kwargs)


with _imported_later():
    import mmap_ninja.numpy as ninja
