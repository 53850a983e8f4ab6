"""SGLang: with GPULOAD_AUTO=1, models on an mfs mount come from gpuload. No flag: its load formats are a closed list.

Registered through the entry point group `sglang.srt.plugins`, which SGLang runs in every one of its processes. Around
its iterators over safetensors files, those of other loaders too, stands a function that hands over ours where all files
are mounted, and else calls SGLang's own. They are hooked where they are defined, and where its loader bound them.

HOOKS.md says which versions it ran with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gpuload.hooks.auto import is_asked_for
from gpuload.hooks.sglang_update import TARGET, iterate_named
from gpuload.hooks.weights import are_mounted, own_device, weights_of

if TYPE_CHECKING:
    from gpuload.hooks.ranks import Group

_MODULE = "sglang.srt.model_loader.loader"
ITERATORS = ("safetensors_weights_iterator", "buffered_multi_thread_safetensors_weights_iterator")
OF_LOADERS = (
    "sglang.srt.model_loader.loader.instanttensor_weights_iterator",
    "sglang.srt.model_loader.loader.fastsafetensors_weights_iterator",
    "sglang.srt.model_loader.weight_utils.runai_safetensors_weights_iterator",
)
"""Of `--load-format instanttensor`, fastsafetensors and runai_streamer, where its loaders find them."""

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
    for target in (*(f"{_MODULE}.{name}" for name in ITERATORS), *OF_LOADERS):
        HookRegistry.register(target, iterate, HookType.AROUND)
    HookRegistry.register(TARGET, iterate_named, HookType.AROUND)
    _is_registered = True


def iterate(original: Callable[..., Iterator[Any]], *args: Any, **kwargs: Any) -> Iterator[Any]:
    """In place of either iterator, whatever its further arguments say of how to read."""
    signature = inspect.signature(original)
    files = signature.bind(*args, **kwargs).arguments[next(iter(signature.parameters))]
    group = _ranks()
    if not are_mounted(files, group):
        return original(*args, **kwargs)
    return weights_of(files, device=own_device(), group=group)


def _ranks() -> Group | None:
    """This process's tensor-parallel group; None where it is alone."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    try:
        from sglang.srt.distributed import get_tp_group
    except ImportError:
        return None
    group = get_tp_group()
    if group is None or group.world_size == 1:
        return None
    from gpuload.hooks.ranks import Group

    return Group(group.device_group, group.cpu_group)
