"""Started at interpreter start, by the .pth or by `gpuload run`. Costs nothing until somebody imports safetensors.

Imports neither torch nor the rest of gpuload: every Python process of a machine may run this line.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

VARIABLE = "GPULOAD_AUTO"
"""The hooks are on where this is set and not '0'."""

TARGET = "safetensors"


def is_asked_for() -> bool:
    return os.environ.get(VARIABLE, "0") not in ("", "0")


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the first import of safetensors, lets the others find it, and patches it once it is there.

    Stays until then: programs ask `find_spec` whether safetensors exists long before they import it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TARGET:
            return None
        for other in [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]:
            spec = other.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        patch_now()


def patch_now() -> None:
    """Patch safetensors; whatever goes wrong, the program goes on without us and says so once."""
    try:
        from gpuload.hooks import safetensors_patch

        safetensors_patch.install()
    except Exception as error:  # a hook must never break its host
        print(f"gpuload: not used here: {type(error).__name__}: {error}", file=sys.stderr)


def start() -> None:
    """Install the hook if the environment asks for it. Idempotent."""
    if not is_asked_for() or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    if TARGET in sys.modules:
        patch_now()
    else:
        sys.meta_path.insert(0, _Finder())


start()
