"""vLLM's sleep mode by the resident server: against a model of vLLM's pool, whose memory is gone while it sleeps.

`vllm_programs:sleeps` runs the same on vLLM's own classes, where vLLM is installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from gpuload.client import tensors
from gpuload.hooks import resident as resident_module
from gpuload.testing import ServerThread, bits, random_tensors
from tests.gpuload.hooks.conftest import NO_SOCKET

GONE = 0xEE


@dataclass
class AllocationData:
    """As vLLM's."""

    handle: tuple[int, int, int, int]
    tag: str
    cpu_backup_tensor: torch.Tensor | None = None
    is_asleep: bool = False


class Pool:
    """As vLLM's CuMemAllocator, in host memory: what sleeps without a copy comes back as other bytes."""

    def __init__(self, made: dict[str, list[torch.Tensor]]) -> None:
        self.memory = {t.data_ptr(): t.view(-1).view(torch.uint8) for own in made.values() for t in own}
        self.pointer_to_data = {
            t.data_ptr(): AllocationData((0, t.nbytes, t.data_ptr(), 1), tag) for tag, own in made.items() for t in own
        }

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        for address, data in self.pointer_to_data.items():
            if not data.is_asleep:
                if data.tag in offload_tags:
                    data.cpu_backup_tensor = self.memory[address].clone()
                self.memory[address].fill_(GONE)
                data.is_asleep = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        for address, data in self.pointer_to_data.items():
            if data.is_asleep and (tags is None or data.tag in tags):
                data.is_asleep = False
                if data.cpu_backup_tensor is not None:
                    self.memory[address].copy_(data.cpu_backup_tensor)
                    data.cpu_backup_tensor = None


class CuMemBackend:
    """As vLLM's default backend."""

    def __init__(self) -> None:
        self._state = "RUNNING"

    def suspend(self, level: int = 1) -> None:
        self._state = "SUSPENDED"
        kept = ("runtime", "cudagraph")
        sys.modules["vllm.device_allocator"].get_mem_allocator_instance().sleep(
            offload_tags=("weights", *kept) if level == 1 else kept
        )

    def resume(self, tags: list[str] | None = None) -> None:
        sys.modules["vllm.device_allocator"].get_mem_allocator_instance().wake_up(tags)
        self._state = "RUNNING"


@pytest.fixture
def made() -> dict[str, list[torch.Tensor]]:
    weights = list(random_tensors(1, {f"w{i}": (300 + i, 1000) for i in range(5)}).values())
    return {"weights": weights, "kv_cache": [torch.ones(1000)], "runtime": [torch.full((100,), 3.0)]}


@pytest.fixture
def pool(made: dict[str, list[torch.Tensor]]) -> Pool:
    return Pool(made)


@pytest.fixture
def backend(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    over = tensors.over_memory
    monkeypatch.setattr(tensors, "over_memory", lambda owner, address, n, _: over(owner, address, n, "cpu"))
    monkeypatch.setattr(resident_module, "_has_logged", False)
    top, allocator = ModuleType("vllm"), ModuleType("vllm.device_allocator")
    module = ModuleType("vllm.device_allocator.sleep_mode_backend")
    top.__version__ = "0"  # type: ignore[attr-defined]
    allocator.get_mem_allocator_instance = lambda: pool  # type: ignore[attr-defined]
    module.CuMemBackend = CuMemBackend  # type: ignore[attr-defined]
    for one in (top, allocator, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    monkeypatch.delitem(sys.modules, "gpuload.hooks.vllm_sleep", raising=False)
    yield importlib.import_module("gpuload.hooks.vllm_sleep").GpuloadBackend()
    sys.modules.pop("gpuload.hooks.vllm_sleep", None)


def test_weights_sleep_in_the_server_and_come_back_bit_by_bit(
    backend: Any, pool: Pool, made: dict[str, list[torch.Tensor]], resident: ServerThread, monkeypatch: Any
) -> None:
    monkeypatch.setenv("GPULOAD_SOCKET", resident.socket_path)
    want = {tag: [bits(t) for t in own] for tag, own in made.items()}
    for _ in range(2):
        backend.suspend(1)
        backend.suspend(1)
        assert resident.gauges()["leases"] == 1
        assert all(data.cpu_backup_tensor is None for data in pool.pointer_to_data.values() if data.tag == "weights")
        assert all(set(bits(t)) == {GONE} for t in made["weights"]), "this memory is somebody else's meanwhile"
        backend.resume(["kv_cache"])
        assert set(bits(made["weights"][0])) == {GONE}
        backend.resume(["weights"])
        backend.resume()
        assert [bits(t) for t in made["weights"]] == want["weights"]
        assert [bits(t) for t in made["runtime"]] == want["runtime"]
        resident.settle()
        assert set(resident.gauges().values()) == {0}, "what was only lent is given back"


def test_engines_of_one_kind_share_what_sleeps(
    backend: Any, made: dict[str, list[torch.Tensor]], resident: ServerThread, monkeypatch: Any
) -> None:
    monkeypatch.setenv("GPULOAD_SOCKET", resident.socket_path)
    module = sys.modules["gpuload.hooks.vllm_sleep"]
    twins = Pool({"weights": [t.clone() for t in made["weights"]]})
    backend.suspend(1)
    used = resident.gauges()["granules_used"]
    monkeypatch.setattr(module, "get_mem_allocator_instance", lambda: twins)
    twin = module.GpuloadBackend()
    twin._held = module.commit(twin._identity, module._bytes_of(module._awake()), retain="lease")
    assert resident.gauges()["models"] == 2
    assert resident.gauges()["granules_used"] == used
    backend._held = twin._held = None
    resident.settle()


def test_level_2_and_a_server_that_is_away_are_vllms_own(
    backend: Any, pool: Pool, made: dict[str, list[torch.Tensor]], monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv("GPULOAD_SOCKET", NO_SOCKET)
    want = [bits(t) for t in made["weights"]]
    backend.suspend(1)
    backend.resume()
    assert [bits(t) for t in made["weights"]] == want, "by a copy of its own"
    assert ["sleeping by vLLM's own backend: no gpuload server" in r.getMessage() for r in caplog.records] == [True]
    backend.suspend(2)
    backend.resume()
    assert all(set(bits(t)) == {GONE} for t in made["weights"])


def test_an_address_that_is_another_allocations_by_now_is_left_alone(
    backend: Any, pool: Pool, made: dict[str, list[torch.Tensor]], resident: ServerThread, monkeypatch: Any
) -> None:
    """Weights that were freed while they slept, and whose addresses were given out again."""
    monkeypatch.setenv("GPULOAD_SOCKET", resident.socket_path)
    want = [bits(t) for t in made["weights"]]
    backend.suspend(1)
    first, second = (t.data_ptr() for t in made["weights"][:2])
    pool.pointer_to_data[first] = AllocationData(pool.pointer_to_data[first].handle, "weights")
    pool.memory[first].fill_(7)
    del pool.pointer_to_data[second]
    backend.resume()
    assert set(bits(made["weights"][0])) == {7}
    assert [bits(t) for t in made["weights"][2:]] == want[2:]
    resident.settle()


def test_a_wake_that_fails_is_an_error_and_may_be_tried_again(
    backend: Any, made: dict[str, list[torch.Tensor]], resident: ServerThread, monkeypatch: Any
) -> None:
    monkeypatch.setenv("GPULOAD_SOCKET", resident.socket_path)
    want = [bits(t) for t in made["weights"]]
    backend.suspend(1)
    module = sys.modules["gpuload.hooks.vllm_sleep"]

    def fails(*_: Any) -> None:
        raise RuntimeError("a copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "fill", fails)
        with pytest.raises(RuntimeError):
            backend.resume()
    backend.resume()
    assert [bits(t) for t in made["weights"]] == want
    resident.settle()
