"""Swaps into running engines, on models of vLLM's and SGLang's interfaces, with the caches that go stale in the real.

test_vllm_itself.py runs a whole vLLM; it and test_sglang.py hold these models to the real names and signatures.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpuload.client.asking import load_resident
from gpuload.errors import BusyError, GpuloadError
from gpuload.hooks import sglang_update, vllm_update
from gpuload.testing import ServerThread, assert_same, random_tensors, write
from mfs.errors import NotFoundError, UsageError

SHAPES = {"w": (30, 40), "b": (3,)}
OLD, NEW, LATER = (random_tensors(seed, SHAPES) for seed in (1, 2, 3))


@pytest.fixture
def swap(resident: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """`swap(tensors)`: they are what is resident as "llama" from now on."""
    monkeypatch.setenv("GPULOAD_SOCKET", resident.socket_path)

    def make(tensors: Any) -> None:
        file = write(tmp_path / f"{len(list(tmp_path.glob('*.safetensors')))}.safetensors", tensors)
        load_resident(file, "llama", "cpu", is_swap=True, socket_path=resident.socket_path)

    make(OLD)
    yield make
    gc.collect()


class Runner:
    """As vLLM's model runner, and SGLang's: parameters of its own, which loading copies into."""

    def __init__(self, before: Callable[[], None]) -> None:
        self.weights = {name: torch.zeros_like(tensor) for name, tensor in OLD.items()}
        self.before = before

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        self.before()
        for name, tensor in weights_iterator:
            self.weights[name].copy_(tensor)


class Worker(vllm_update.WorkerExtension):
    """As vLLM's worker with the extension mixed in."""

    def __init__(self, before: Callable[[], None]) -> None:
        self.model_runner = Runner(before)

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        self.model_runner.reload_weights(*args, **kwargs)


class LLM:
    """As `vllm.LLM`, of two ranks, one of which is a while behind: `between` is what happens meanwhile."""

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        self.workers = [Worker(lambda: None), Worker(between)]
        self.cache: list[str] = ["keys and values of the old weights"]
        self.is_idle = True
        self.said: list[str] = []
        self.llm_engine = SimpleNamespace(
            reset_mm_cache=lambda: self.said.append("mm"), reset_encoder_cache=lambda: self.said.append("encoder")
        )

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        assert timeout is not None
        return [getattr(worker, method)(*args, **(kwargs or {})) for worker in self.workers]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if self.is_idle:
            self.cache.clear()
        return self.is_idle


def test_all_ranks_get_one_content_in_place_and_the_caches_are_emptied(
    resident: ServerThread, swap: Callable[[Any], None]
) -> None:
    """A swap falls between two ranks."""
    llm = LLM(between=lambda: swap(LATER))
    addresses = [t.data_ptr() for worker in llm.workers for t in worker.model_runner.weights.values()]
    swap(NEW)
    digest = vllm_update.update(llm, "llama")
    for worker in llm.workers:
        assert_same(worker.model_runner.weights, NEW)
    assert addresses == [t.data_ptr() for worker in llm.workers for t in worker.model_runner.weights.values()]
    assert (llm.cache, llm.said) == ([], ["mm", "encoder"])
    assert vllm_update.update(llm, "llama") != digest
    gc.collect()
    assert resident.gauges()["leases"] == 0


def test_what_could_not_be_emptied_or_loaded_is_said(resident: ServerThread, swap: Callable[[Any], None]) -> None:
    llm = LLM()
    llm.is_idle = False
    with pytest.raises(BusyError, match="has the weights of 'llama', but its prefix cache is in use"):
        vllm_update.update(llm, "llama")
    with pytest.raises(NotFoundError):
        vllm_update.update(llm, "another")

    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(GpuloadError, match=r"neither the old nor the new ones: .* anew: out of memory"):
        vllm_update.update(LLM(between=fails), "llama")
    old = SimpleNamespace(model_runner=SimpleNamespace(reload_weights=lambda: None))
    with pytest.raises(UsageError, match=r"no reload_weights\(weights_iterator=...\); that of 0.32 has"):
        vllm_update.update_weights(old, "llama")
    gc.collect()
    assert resident.gauges()["leases"] == 0


class AsyncLLM:
    """As `vllm.AsyncLLM`."""

    def __init__(self, llm: LLM, *, hangs: bool = False) -> None:
        self.llm, self.hangs = llm, hangs
        self.calls: list[str] = []

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        import asyncio

        self.calls.append(f"pause {mode}")
        if self.hangs:
            await asyncio.sleep(3600)
        if clear_cache:
            self.llm.reset_prefix_cache()

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        self.calls.append(method)
        return self.llm.collective_rpc(method, timeout, args, kwargs)

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset")
        return self.llm.reset_prefix_cache()

    async def reset_mm_cache(self) -> None:
        self.llm.said.append("mm")

    async def reset_encoder_cache(self) -> None:
        self.llm.said.append("encoder")


def run(engine: AsyncLLM, model: str = "llama", **options: Any) -> str:
    """In an asyncio loop, as vLLM's is; in a thread, since tests of a browser leave a loop behind in this one."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(vllm_update.update_async(engine, model, **options))).result()


def test_an_engine_that_is_answering_is_paused_for_it(swap: Callable[[Any], None]) -> None:
    engine = AsyncLLM(LLM())
    swap(NEW)
    run(engine)
    assert engine.calls == ["pause wait", "gpuload_update", "reset", "resume"]
    assert_same(engine.llm.workers[1].model_runner.weights, NEW)
    assert engine.llm.cache == []


def test_it_goes_on_where_nothing_was_changed_and_stays_paused_where_something_was(swap: Callable[[Any], None]) -> None:
    engine = AsyncLLM(LLM(), hangs=True)
    with pytest.raises(BusyError, match="requests were still under way"):
        run(engine, timeout_s=0.01)
    assert engine.calls == ["pause wait", "resume"]
    engine = AsyncLLM(LLM())
    with pytest.raises(NotFoundError):
        run(engine, "another")
    assert engine.calls == ["pause wait", "resume"]

    def fails() -> None:
        raise RuntimeError("out of memory")

    engine = AsyncLLM(LLM(between=fails))
    with pytest.raises(GpuloadError, match="neither the old nor the new"):
        run(engine)
    assert engine.calls == ["pause wait", "gpuload_update"]


class Engine:
    """As `sglang.Engine`: its loader's iterator is hooked, its cache is emptied in the same call."""

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        self.ranks, self.is_idle = [Runner(lambda: None), Runner(between)], True

    def update_weights_from_disk(self, model_path: str, load_format: str | None = None) -> tuple[bool, str, int]:
        source = SimpleNamespace(model_or_path=model_path, prefix="")
        for rank in self.ranks:
            try:
                weights = sglang_update.iterate_named(lambda *_: iter(()), None, source)
            except Exception as error:  # as SGLang does
                return False, f"Failed to get weights iterator: {error}.", 0
            rank.reload_weights(weights)
        if not self.is_idle:
            return False, "Weights were updated, but the cache was not flushed because requests are still running", 0
        return True, "Succeeded to update model weights.", 0


def test_sglangs_ranks_get_one_content_too(resident: ServerThread, swap: Callable[[Any], None]) -> None:
    engine = Engine(between=lambda: swap(LATER))
    swap(NEW)
    sglang_update.update(engine, "llama")
    for rank in engine.ranks:
        assert_same(rank.weights, NEW)
    engine.is_idle = False
    with pytest.raises(GpuloadError, match=r"SGLang did not update to 'llama': .* cache was not flushed"):
        sglang_update.update(engine, "llama")
    with pytest.raises(NotFoundError):
        sglang_update.update(engine, "another")
    with pytest.raises(UsageError, match="cannot be part of a path"):
        sglang_update.update(engine, "a@b")
    gc.collect()
    assert resident.gauges()["leases"] == 0


def test_paths_that_are_not_ours_are_sglangs(swap: Callable[[Any], None]) -> None:
    source = SimpleNamespace(model_or_path="/models/llama", prefix="p.")
    seen = list(sglang_update.iterate_named(lambda *args, **more: iter([(args, more)]), "loader", source, resolved=1))
    assert seen == [(("loader", source), {"resolved": 1})]
    source.model_or_path = "gpuload:llama"
    assert set(dict(sglang_update.iterate_named(lambda *_: iter(()), None, source))) == {"p.w", "p.b"}
    source.model_or_path = f"gpuload:llama@{'0' * 64}"
    with pytest.raises(Exception, match="swapped in between"):
        sglang_update.iterate_named(lambda *_: iter(()), None, source)
