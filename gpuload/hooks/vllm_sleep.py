"""vLLM's sleep mode with the resident server as the place where weights sleep: `--sleep-mode-backend gpuload`.

vLLM's own backend keeps each engine's weights in page-locked memory of that engine. Here the server holds them: equal
engines share one copy, and what it holds goes by its own budget. What sleeps are the allocations of vLLM's pool, byte
by byte, and not tensors by name: converted weights hang on modules under names that no list of parameters has.

Where no server takes them (none, no room, no arena in host memory) it is vLLM's own backend, and one line says why.

vLLM makes a backend without telling it anything of its model, so what is committed is this process's alone, and goes
with it. Source: vllm/device_allocator/sleep_mode_backend.py and cumem.py of 0.32.0 and 0.33.0.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import vllm
from vllm.device_allocator import get_mem_allocator_instance
from vllm.device_allocator.sleep_mode_backend import CuMemBackend

from gpuload.client import tensors
from gpuload.client.committed import Identity, commit, fill
from gpuload.errors import first_error
from gpuload.hooks.resident import log

WEIGHTS = "weights"
"""vLLM's tag of the pool that models are made in."""


class GpuloadBackend(CuMemBackend):  # type: ignore[misc]
    """Level 1 by the server; level 2, and all that is not weights, as vLLM's own."""

    def __init__(self) -> None:
        super().__init__()
        self._identity = Identity(
            f"process {os.getpid()} {uuid.uuid4().hex}", f"vllm {vllm.__version__}", layout="allocations of its pool"
        )
        self._asleep: dict[str, Any] = {}
        """Name -> what vLLM knows of an allocation, as long as the server holds its bytes."""
        self._held: Any = None
        """The server's bytes, and the lease on them."""

    def suspend(self, level: int = 1) -> None:
        """Have the server hold the weights, then give up the memory of all that vLLM would."""
        if level == 1 and self._held is None:
            awake = _awake()
            try:
                if awake:
                    self._held = commit(self._identity, _bytes_of(awake), retain="lease")
                    self._asleep = awake
            except Exception as error:  # whatever it is, vLLM can still keep them itself
                log.warning("gpuload: sleeping by vLLM's own backend: %s", first_error(error))
        super().suspend(2 if self._held is not None else level)

    def resume(self, tags: list[str] | None = None) -> None:
        """Take the memory anew, and fill the weights' from the server.

        Raises: what the copies raise; the engine must not serve what is in its memory then. It may be asked again.
        """
        super().resume(tags)
        if self._held is not None and (tags is None or WEIGHTS in tags):
            awake = _awake()  # an address may be another allocation's by now
            back = {name: data for name, data in self._asleep.items() if awake.get(name) is data}
            fill(_bytes_of(back), {name: self._held[name] for name in back})
            self._held, self._asleep = None, {}


def _awake() -> dict[str, Any]:
    """Every allocation of the pool of weights that has memory now, by its address."""
    known = get_mem_allocator_instance().pointer_to_data.items()
    return {f"{address:#x}": data for address, data in known if data.tag == WEIGHTS and not data.is_asleep}


def _bytes_of(allocations: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tensors.over_memory(data, int(name, 16), data.handle[1], f"cuda:{data.handle[0]}")
        for name, data in allocations.items()
    }
