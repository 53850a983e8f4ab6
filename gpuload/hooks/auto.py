"""Started at interpreter start, by the .pth or by `gpuload run`. Costs nothing until somebody imports what it patches.

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

TARGETS = ("safetensors", "runai_model_streamer", "instanttensor")
"""What is patched: `safetensors_patch`, and for the others `streamers`."""


def is_asked_for() -> bool:
    return os.environ.get(VARIABLE, "0") not in ("", "0")


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the first import of a target, lets the others find it, and patches it once it is there.

    Stays: programs ask `find_spec` whether a package exists long before they import it, or never do.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TARGETS or fullname in sys.modules:
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
        patch_now(module)


def patch_now(module: ModuleType) -> None:
    """Patch one of TARGETS; whatever goes wrong, the program goes on without us and says so once."""
    try:
        if module.__name__ == "safetensors":
            from gpuload.hooks import safetensors_patch

            safetensors_patch.install()
        else:
            from gpuload.hooks import streamers

            streamers.INSTALLERS[module.__name__](module)
    except Exception as error:  # a hook must never break its host
        print(f"gpuload: not used here: {type(error).__name__}: {error}", file=sys.stderr)


def start() -> None:
    """Install the hook if the environment asks for it. Idempotent."""
    if not is_asked_for() or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in TARGETS:
        if name in sys.modules:
            patch_now(sys.modules[name])


start()
