"""What the server tells Prometheus: loads and swaps by time and bytes, arenas, leases; models by name up to a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpuload.client import asking
from gpuload.errors import FitError
from gpuload.server.tally import CONTENT, MODELS_MAX, OTHER
from gpuload.testing import ServerThread
from gpuload.wire import close_all
from mfs.metrics.exposition import OPENMETRICS, parsed

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def save(path: Path, nbytes: int, seed: int) -> Path:
    save_file({"weights": np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)}, path)
    return path


def scraped(server: ServerThread) -> Samples:
    said = asking.ask({"op": "metrics"}, socket_path=server.socket_path)
    families: list[Any] = parsed(said["text"])
    return {(s["name"], frozenset(s["labels"].items())): s["value"] for f in families for s in f["samples"]}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_loads_swaps_and_leases_are_counted(server: ServerThread, tmp_path: Path) -> None:
    first, second = (save(tmp_path / f"{seed}.safetensors", 40_000, seed) for seed in (1, 2))
    before = scraped(server)
    assert value(before, "gpuload_load_seconds_count", operation="swap") == 0
    assert value(before, "gpuload_load_errors_total", operation="load", kind="fit") == 0
    asking.load_resident(first, "chat", None, socket_path=server.socket_path)
    sock = asking.connect(server.socket_path, 30)
    _, fds = asking.exchange(sock, {"op": "attach", "model": "chat"}, ())
    close_all(fds)
    assert value(scraped(server), "gpuload_model_leases", model="chat") == 1
    asking.load_resident(second, "chat", None, is_swap=True, socket_path=server.socket_path)
    large = save(tmp_path / "large.safetensors", 2 << 20, 3)
    with pytest.raises(FitError):
        asking.load_resident(large, "large", None, socket_path=server.socket_path)
    samples = scraped(server)
    for operation in ("load", "swap"):
        assert value(samples, "gpuload_load_seconds_count", operation=operation) == 1
        assert value(samples, "gpuload_load_seconds_sum", operation=operation) > 0
    assert value(samples, "gpuload_load_bytes_total", way="copied") == 80_000
    assert value(samples, "gpuload_load_errors_total", operation="load", kind="fit") == 1
    assert value(samples, "gpuload_model_generation", model="chat") == 2
    assert value(samples, "gpuload_model_leases", model="chat") == 0
    assert value(samples, "gpuload_leases") == value(samples, "gpuload_retired_models", device="cpu") == 1
    assert value(samples, "gpuload_arena_bytes", device="cpu") == 256 * 4096
    assert value(samples, "gpuload_arena_free_bytes", device="cpu") < 256 * 4096 - 80_000
    sock.close()
    server.settle()
    assert value(scraped(server), "gpuload_leases") == 0


@pytest.mark.parametrize("server", [True], indirect=True)
def test_models_have_names_up_to_a_bound(server: ServerThread, tmp_path: Path) -> None:
    count = MODELS_MAX + 20
    for number in range(count):
        path = save(tmp_path / f"{number}.safetensors", 8, number)
        asking.load_resident(path, f"model-{number}", None, socket_path=server.socket_path)
    paths = [str(save(tmp_path / "unnamed.safetensors", 8, count))]
    sock = asking.connect(server.socket_path, 30)
    _, fds = asking.exchange(sock, {"op": "open", "files": paths, "left_out": {}}, (), paths=paths)
    close_all(fds)
    samples = scraped(server)
    named = {dict(labels)["model"] for name, labels in samples if name == "gpuload_model_generation"}
    assert len(named) <= MODELS_MAX + 2
    assert {OTHER, "model-0"} <= named
    assert named & {CONTENT, OTHER}
    assert not any(name.startswith("content:") and name != CONTENT for name in named)
    total = sum(n for (name, _), n in samples.items() if name == "gpuload_model_bytes")
    assert total == 8 * (count + 1)
    sock.close()
    server.settle()


@pytest.mark.parametrize("server", [True], indirect=True)
def test_openmetrics_is_said_to_who_wants_it(server: ServerThread) -> None:
    said = asking.ask({"op": "metrics", "accept": "application/openmetrics-text"}, socket_path=server.socket_path)
    assert said["content_type"] == OPENMETRICS
    assert said["text"].endswith("# EOF\n")
    assert parsed(said["text"], openmetrics=True)
