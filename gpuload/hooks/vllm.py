"""vLLM: `--load-format gpuload`, registered through the entry point group `vllm.general_plugins`.

NOT YET RUN with vLLM: its wheel is too large to install where this was written. It follows vLLM's public source (main
at 00b5ad0), and tests/gpuload/hooks/test_vllm.py runs it against a few lines in the shape of those interfaces, which
proves that it registers, is idempotent and hands the right tensors on, and no more.

The loader is vLLM's own DefaultModelLoader with one thing replaced: the iterator over the tensors of safetensors files,
for the length of the one call that picks it. So which files, prefixes, filters, get_all_weights and reload_weights stay
vLLM's, whatever their signatures are in the installed version. With an expert-parallel filter the original iterator is
used: skipping experts is vLLM's rule, not ours to guess.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LOAD_FORMAT = "gpuload"
_ITERATOR = "safetensors_weights_iterator"

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
    register_model_loader(LOAD_FORMAT)(_loader_class(default_loader))
    _is_registered = True


def _loader_class(module: Any) -> type:
    original: Callable[..., Iterator[Any]] = getattr(module, _ITERATOR)

    def iterate(files: Sequence[str], *args: Any, local_expert_ids: Any = None, **kwargs: Any) -> Iterator[Any]:
        if local_expert_ids is not None:
            return original(files, *args, local_expert_ids=local_expert_ids, **kwargs)
        return weights_of(files)

    class GpuloadModelLoader(module.DefaultModelLoader):  # type: ignore[misc]
        """DefaultModelLoader whose safetensors come from gpuload."""

        def __init__(self, load_config: Any) -> None:
            shown = copy.copy(load_config)
            shown.load_format = "safetensors"  # _prepare_weights knows no other name for these files
            super().__init__(shown)

        def _get_weights_iterator(self, source: Any) -> Any:
            with _swapping:  # the call below picks the iterator at once; it does not run it
                setattr(module, _ITERATOR, iterate)
                try:
                    return super()._get_weights_iterator(source)
                finally:
                    setattr(module, _ITERATOR, original)

    return GpuloadModelLoader


def weights_of(files: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Every (name, tensor) of these files on the CPU: the server's if one answers, else by our own pipeline."""
    from gpuload.hooks.safetensors_patch import attach_file
    from gpuload.load import stream

    for file in files:
        attached = attach_file(file, "cpu")
        yield from stream(file) if attached is None else attached.items()
