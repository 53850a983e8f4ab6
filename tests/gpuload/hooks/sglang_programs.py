"""Programs around the real SGLang, run in processes of their own; see `programs`.

SGLang's loader imports torchvision, whose CPU build is not to be had beside every torch. Where it is missing an empty
one stands in, so that the import goes through: the loader itself never calls it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tests.gpuload.hooks.programs import Found, digests

STOOD_IN = "torchvision"


class _Empty(type):
    """A class all of whose attributes are there, and mean nothing."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Every module of one absent package, empty; every name in them is an empty class."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != STOOD_IN:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def absent(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Empty(name, (), {})

        module.__version__ = "0"  # type: ignore[attr-defined]  # transformers asks
        module.__getattr__ = absent  # type: ignore[method-assign]


def _loader_module() -> Any:
    if importlib.util.find_spec(STOOD_IN) is None:
        sys.meta_path.append(_StandIn())
    from sglang.srt.model_loader import loader

    return loader


def interface() -> Found:
    """What the hook touches, as the installed SGLang has it."""
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from gpuload.hooks import sglang as ours

    loader = _loader_module()
    return {
        "version": sglang.__version__,
        "stood in": [STOOD_IN] if STOOD_IN in sys.modules and not hasattr(sys.modules[STOOD_IN], "__file__") else [],
        "iterators": {
            name: [p.name for p in inspect.signature(getattr(loader, name)).parameters.values()]
            for name in ours.ITERATORS
        },
        "others": {target: _first_parameter(target) for target in ours.OF_LOADERS},
        "register": [p.name for p in inspect.signature(HookRegistry.register).parameters.values()],
        "around": HookType.AROUND.value,
    }


def _first_parameter(target: str) -> str:
    place, _, name = target.rpartition(".")
    return next(iter(inspect.signature(getattr(importlib.import_module(place), name)).parameters))


def iterated(*folders: str) -> list[Any]:
    """Every tensor that SGLang's loader makes of each folder, by threads (its default) and without."""
    loader = _loader_module()
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.plugins import hook_registry, load_plugins
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    from gpuload.hooks import sglang as ours
    from gpuload.hooks.counts import counts

    set_global_server_args_for_scheduler(ServerArgs(model_path=folders[0], device="cpu", skip_tokenizer_init=True))
    load_plugins()
    ours.register()
    hook_registry.HookRegistry.apply_hooks()
    found = []
    for folder in folders:
        for extra in ({}, {"enable_multithread_load": False}):
            before = [counts.served, counts.streamed, counts.left]
            made = loader.get_model_loader(LoadConfig(load_format="auto", model_loader_extra_config=extra))
            tensors = dict(made._get_weights_iterator(made.Source(folder, None, prefix="p.")))
            after = [counts.served, counts.streamed, counts.left]
            found.append([digests(tensors), [b - a for a, b in zip(before, after, strict=True)]])
    return found
