"""Programs around the real vLLM, run in processes of their own; see `programs`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from tests.gpuload.hooks.programs import Found, digests

PROMPT = [1, 5, 9, 20, 33]


def interface() -> Found:
    """What the plugin touches, as the installed vLLM has it."""
    import vllm
    from vllm.model_executor.model_loader import default_loader
    from vllm.model_executor.model_loader import runai_streamer_loader as runai
    from vllm.platforms import current_platform

    from gpuload.hooks import vllm as ours

    def parameters(function: Any) -> list[list[str]]:
        return [[p.name, p.kind.name] for p in inspect.signature(function).parameters.values()]

    of_default = [name for name in ours.ITERATORS if hasattr(default_loader, name)]
    of_runai = [name for name in ours.ITERATORS if hasattr(runai, name)]
    return {
        "version": vllm.__version__,
        "platform": type(current_platform).__name__,
        "iterators": {name: parameters(getattr(default_loader, name)) for name in of_default}
        | {name: parameters(getattr(runai, name)) for name in of_runai},
        "runai picks": parameters(runai.RunaiModelStreamerLoader._get_weights_iterator),
        "picks": parameters(default_loader.DefaultModelLoader._get_weights_iterator),
        "makes": parameters(default_loader.DefaultModelLoader.__init__),
    }


def plugins() -> Found:
    """What vLLM's own loading of plugins makes of ours, also when it is asked again."""
    from vllm import plugins as vllm_plugins
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from gpuload.hooks import vllm as ours

    vllm_plugins.load_general_plugins()
    vllm_plugins.plugins_loaded = False
    vllm_plugins.load_general_plugins()
    ours.register()
    formats = ("gpuload", "GPULOAD", "auto", "hf", "safetensors", *ours.OF_LOADERS, "dummy")
    return {name: type(get_model_loader(LoadConfig(load_format=name))).__name__ for name in formats}


WAYS: list[dict[str, Any]] = [
    {},
    {"safetensors_load_strategy": "eager"},
    {"safetensors_load_strategy": "prefetch"},
    {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 2}},
]


def iterated(load_format: str, *folders: str) -> list[Any]:
    """Every tensor that the loader of this format makes of each folder, in each way, and what the hooks counted."""
    return [_iterated(folder, load_format, way) for folder in folders for way in WAYS]


def _iterated(folder: str, load_format: str, way: Mapping[str, Any]) -> list[Any]:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    from gpuload.hooks.counts import counts

    load_general_plugins()
    before = [counts.served, counts.streamed, counts.left]
    loader: Any = get_model_loader(LoadConfig(load_format=load_format, **way))
    found = list(loader._get_weights_iterator(loader.Source(folder, None, prefix="p.")))
    assert len(dict(found)) == len(found)
    after = [counts.served, counts.streamed, counts.left]
    return [digests(dict(found)), [b - a for a, b in zip(before, after, strict=True)]]


def configured(folder: str, socket_path: str) -> list[Any]:
    """Our own extra keys, and vLLM's words for one that nobody knows."""
    ours = {"model_loader_extra_config": {"socket": socket_path, "device": "cpu"}}
    try:
        _iterated(folder, "gpuload", {"model_loader_extra_config": {"nonsense": 1}})
        words = "not refused"
    except ValueError as error:
        words = str(error)
    return [words, _iterated(folder, "gpuload", ours)[1]]


def iterated_as(folder: str, *formats: str) -> list[Any]:
    """The same for formats of other loaders, whose packages are not there."""
    return [_iterated(folder, load_format, {}) for load_format in formats]


def rank(folder: str, rendezvous: str, number: str) -> Found:
    """The loader in one of two tensor-parallel ranks, as vLLM's own parallel state has them."""
    import os

    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2", "VLLM_DIST_IDENT": "test"}
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from gpuload.hooks.counts import counts

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, int(number), f"file://{rendezvous}", int(number), "gloo")
        initialize_model_parallel(2)
        tensors, counted = _iterated(folder, "gpuload", {})
    return {"tensors": tensors, "counts": counted, "read": counts.read_bytes}


def sleeps() -> Found:
    """What vLLM's registry makes of our backend of its sleep mode, and what that is made of."""
    from vllm.config.model import ModelConfig
    from vllm.device_allocator import AllocationData
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    made = SleepModeBackendFactory.get_backend_class("gpuload")
    return {
        "made": made.__name__,
        "is one": issubclass(made, SleepModeBackend),
        "state": made().state(),
        "suspend": list(inspect.signature(SleepModeBackend.suspend).parameters),
        "resume": list(inspect.signature(SleepModeBackend.resume).parameters),
        "allocation": list(inspect.signature(AllocationData).parameters),
        "default": ModelConfig.sleep_mode_backend,
    }


def engine(options: str, then: str = "") -> Found:
    """A whole engine on the CPU: what it says, what its worker's hooks counted, both again after a swap of weights."""
    from vllm import LLM, SamplingParams

    given: Mapping[str, Any] = json.loads(options)
    llm = LLM(
        skip_tokenizer_init=True, max_model_len=128, enforce_eager=True, dtype="bfloat16", max_num_seqs=4, **given
    )
    greedy = SamplingParams(temperature=0, max_tokens=24, detokenize=False)

    def says() -> list[int]:
        return list(llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)[0].outputs[0].token_ids)

    found: Found = {"says": says(), "worker": llm.collective_rpc(worker_counts)}
    if then:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": then})
        llm.reset_prefix_cache()
        found |= {"after": says(), "worker after": llm.collective_rpc(worker_counts)}
    return found


def updated(options: str, socket_path: str, *folders: str) -> Found:
    """A whole engine that serves the first folder; then each of the others is swapped in at the server under the name
    "llama" and put into the engine. What it says of one long prompt, whose keys and values its cache keeps."""
    from vllm import LLM, SamplingParams

    from gpuload.client.asking import load_resident
    from gpuload.hooks import vllm_update

    llm = LLM(
        skip_tokenizer_init=True, max_model_len=128, enforce_eager=True, dtype="bfloat16", max_num_seqs=4,
        enable_prefix_caching=True, worker_extension_cls=vllm_update.EXTENSION, **json.loads(options),
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=24, detokenize=False)

    def says() -> list[Any]:
        given = [(7 * i) % 251 + 1 for i in range(90)]
        made = llm.generate([{"prompt_token_ids": given}], greedy, use_tqdm=False)[0]
        return [list(made.outputs[0].token_ids), made.num_cached_tokens]

    found: list[Any] = [says(), says()]
    for folder in folders:
        load_resident(folder, "llama", "cpu", is_swap=True, socket_path=socket_path)
        digest = vllm_update.update(llm, "llama", socket_path=socket_path)
        found += [says(), says()]
    return {"says": found, "digest": digest}


def worker_counts(worker: Any) -> list[int]:
    """Runs inside vLLM's worker process."""
    from gpuload.hooks.counts import counts

    return [counts.served, counts.streamed, counts.left]
