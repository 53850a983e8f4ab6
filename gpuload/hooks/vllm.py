"""vLLM: `--load-format gpuload`, and with GPULOAD_AUTO=1 no flag at all for models on an mfs mount.

Registered through the entry point group `vllm.general_plugins`, which vLLM runs in the engine and in every worker.

The loader is vLLM's own DefaultModelLoader with one thing replaced: the iterators over safetensors files, for as long
as the one call that picks them takes. So which files, prefixes, filters, get_all_weights, reload_weights stay vLLM's,
whatever their signatures are in the installed version. Where vLLM's iterator does more than iterate (an expert-parallel
filter, torchao's tensors put together again) it is vLLM's that runs.

Tensors come to stand where the worker computes, and the workers of one tensor-parallel group read each byte once.

HOOKS.md says which versions it ran with.
"""

from __future__ import annotations

import copy
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gpuload.hooks.auto import is_asked_for
from gpuload.hooks.weights import are_mounted, own_device, weights_of
from mfs.errors import UsageError

if TYPE_CHECKING:
    from gpuload.hooks.ranks import Group

LOAD_FORMAT = "gpuload"
FLAGLESS_FORMATS = ("auto", "hf", "safetensors")
"""Formats that GPULOAD_AUTO takes over, for files on a mount; and those of other loaders of safetensors, below."""

OF_LOADERS = {
    "instanttensor": "instanttensor_weights_iterator",
    "fastsafetensors": "fastsafetensors_weights_iterator",
    "runai_streamer": "runai_safetensors_weights_iterator",
}
"""Format -> its iterator, in the module where vLLM's loader of it finds it."""

ITERATORS = (
    "safetensors_weights_iterator", "multi_thread_safetensors_weights_iterator", *OF_LOADERS.values(),
)  # fmt: skip
_PLAIN_STRATEGIES = (None, "lazy", "eager", "prefetch")
"""Strategies that say how bytes are read, which we decide, and not what is made of them."""

_swapping = threading.Lock()
_is_registered = False


def register() -> None:
    """What vLLM calls in the engine and in every worker; idempotent, and silent where there is no vLLM."""
    global _is_registered
    if _is_registered:
        return
    try:
        from vllm.model_executor.model_loader import default_loader, register_model_loader
    except ImportError:
        return
    register_model_loader(LOAD_FORMAT)(_named_loader(default_loader))
    if is_asked_for():
        flagless = _flagless_loader(default_loader, default_loader.DefaultModelLoader)
        for load_format in FLAGLESS_FORMATS:
            register_model_loader(load_format)(flagless)
        _register_others(register_model_loader, default_loader, flagless)
    _register_sleep()
    _is_registered = True


def _register_others(register_model_loader: Any, default_loader: Any, flagless: type) -> None:
    """Formats of other loaders, as far as this vLLM has them."""
    for load_format, iterator in OF_LOADERS.items():
        if hasattr(default_loader, iterator):
            register_model_loader(load_format)(flagless)
    try:
        from vllm.model_executor.model_loader import runai_streamer_loader as runai
    except ImportError:
        return
    if hasattr(runai, OF_LOADERS["runai_streamer"]):
        register_model_loader("runai_streamer")(_flagless_loader(runai, runai.RunaiModelStreamerLoader))


def _register_sleep() -> None:
    """Our backend of its sleep mode, where this vLLM knows several: `vllm_sleep`, imported when it is asked for."""
    try:
        from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
    except ImportError:
        return
    SleepModeBackendFactory.register_backend("gpuload", "gpuload.hooks.vllm_sleep", "GpuloadBackend")


def _named_loader(module: Any) -> type:
    class GpuloadModelLoader(module.DefaultModelLoader):  # type: ignore[misc]
        """DefaultModelLoader whose safetensors come from gpuload.

        Of model_loader_extra_config it takes 'device' (where tensors come to stand and the server's arena to be served
        from; default: where this worker computes) and 'socket' (the server's socket); the other keys are vLLM's.
        """

        def __init__(self, load_config: Any) -> None:
            shown = copy.copy(load_config)
            shown.load_format = "safetensors"  # _prepare_weights knows no other name for these files
            extra = shown.model_loader_extra_config
            if isinstance(extra, dict):  # anything else is refused below, in vLLM's words
                extra = dict(extra)
                self._device = _text(extra.pop("device", None), "device")
                self._socket = _text(extra.pop("socket", None), "socket")
                shown.model_loader_extra_config = extra
            super().__init__(shown)

        def _get_weights_iterator(self, source: Any) -> Any:
            def ours(files: Sequence[str]) -> Iterator[Any]:
                device = self._device or _worker_device(self.load_config)
                return weights_of(files, device=device, socket_path=self._socket, group=_ranks())

            return _with_iterators(module, ours, lambda: super(GpuloadModelLoader, self)._get_weights_iterator(source))

    return GpuloadModelLoader


def _flagless_loader(module: Any, loader: Any) -> type:
    """One of vLLM's loaders, defined in `module`, for `--load-format` as it is."""

    class MountedModelLoader(loader):  # type: ignore[misc]
        """Its safetensors come from gpuload where they stand on an mfs mount."""

        def _get_weights_iterator(self, *args: Any, **kwargs: Any) -> Any:
            def ours(files: Sequence[str]) -> Iterator[Any] | None:
                group = _ranks()
                if not are_mounted(files, group):
                    return None
                return weights_of(files, device=_worker_device(self.load_config), group=group)

            def pick() -> Any:
                return super(MountedModelLoader, self)._get_weights_iterator(*args, **kwargs)

            return _with_iterators(module, ours, pick)

    return MountedModelLoader


def _with_iterators(module: Any, ours: Callable[[Sequence[str]], Iterator[Any] | None], pick: Callable[[], Any]) -> Any:
    """Run `pick`, which picks an iterator at once and does not run it, while ours stand in vLLM's places.

    ours: the iterator for these files, or None to leave them to vLLM.
    """
    with _swapping:
        originals = {name: getattr(module, name) for name in ITERATORS if hasattr(module, name)}
        try:
            for name, original in originals.items():
                setattr(module, name, _instead_of(original, ours))
            return pick()
        finally:
            for name, original in originals.items():
                setattr(module, name, original)


def _instead_of(original: Any, ours: Callable[[Sequence[str]], Iterator[Any] | None]) -> Any:
    signature = inspect.signature(original)
    files_name = next(iter(signature.parameters))

    def iterate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        given = signature.bind(*args, **kwargs).arguments
        is_plain = given.get("safetensors_load_strategy") in _PLAIN_STRATEGIES and not given.get("load_engram_on_cpu")
        if is_plain and given.get("local_expert_ids") is None:
            found = ours(sorted(given[files_name], key=_natural))  # as vLLM's iterator sorts them
            if found is not None:
                return found
        made: Iterator[Any] = original(*args, **kwargs)
        return made

    return iterate


def _worker_device(load_config: Any) -> str:
    """Where this worker's weights go: as its configuration says, else where it computes."""
    from gpuload.device import canonical_name

    own, named = own_device(), getattr(load_config, "device", None)
    if named is None or str(named) == "cuda":
        return own
    try:
        return canonical_name(str(named))
    except UsageError:  # a kind of device that we bring nothing to
        return "cpu"


def _ranks() -> Group | None:
    """This worker's tensor-parallel group; None where it is alone, or where vLLM is not one yet."""
    try:
        from vllm.distributed import get_tp_group

        group = get_tp_group()
    except (ImportError, AssertionError):  # a loader by itself: no group was made
        return None
    if group.world_size == 1:
        return None
    from gpuload.hooks.ranks import Group

    return Group(group.device_group, group.cpu_group)


def _text(value: Any, key: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UsageError(f"model_loader_extra_config: {key!r} must be a text, got {type(value).__name__}")
    return value


def _natural(path: str) -> list[Any]:
    """'x-10' after 'x-9'. Every second part is a number, so that like is compared with like."""
    return [int(part) if part.isascii() and part.isdecimal() else part for part in re.split(r"([0-9]+)", path)]
