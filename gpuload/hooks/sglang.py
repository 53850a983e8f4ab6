"""SGLang: with GPULOAD_AUTO=1, models on an mfs mount come from gpuload. No flag: its load formats are a closed list.

Registered through the entry point group `sglang.srt.plugins`, which SGLang runs in every one of its processes. Around
its two iterators over safetensors files stands a function that hands over ours where all files are mounted, and else
calls SGLang's own. They are hooked where they are defined and where the loader bound them by name.

HOOKS.md says which versions it ran with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from gpuload.hooks.auto import is_asked_for
from gpuload.hooks.weights import are_mounted, weights_of

_MODULE = "sglang.srt.model_loader.loader"
ITERATORS = ("safetensors_weights_iterator", "buffered_multi_thread_safetensors_weights_iterator")

_is_registered = False


def register() -> None:
    """What SGLang calls in each process, before it applies the hooks; idempotent, and silent where there is none."""
    global _is_registered
    if _is_registered or not is_asked_for():
        return
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    except ImportError:
        return
    for name in ITERATORS:
        HookRegistry.register(f"{_MODULE}.{name}", iterate, HookType.AROUND)
    _is_registered = True


def iterate(original: Callable[..., Iterator[Any]], *args: Any, **kwargs: Any) -> Iterator[Any]:
    """In place of either iterator, whatever its further arguments say of how to read."""
    signature = inspect.signature(original)
    files = signature.bind(*args, **kwargs).arguments[next(iter(signature.parameters))]
    return weights_of(files) if are_mounted(files) else original(*args, **kwargs)
