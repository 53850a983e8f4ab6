"""The vLLM plugin against a few lines in the shape of vLLM's loader registry. vLLM itself was never run here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gpuload.hooks import safetensors_patch, vllm
from gpuload.testing import ServerThread, assert_same, random_tensors, write


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """`vllm.model_executor.model_loader` as far as the plugin touches it: names and signatures of main at 00b5ad0."""
    found: dict[str, type] = {}
    loaders = ModuleType("vllm.model_executor.model_loader")
    default = ModuleType("vllm.model_executor.model_loader.default_loader")

    def register_model_loader(load_format: str) -> Any:
        def decorate(cls: type) -> type:
            assert load_format not in found, "vLLM warns when a format is registered twice"
            found[load_format] = cls
            return cls

        return decorate

    def safetensors_weights_iterator(files: list[str], *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        return iter([("the original", files)])

    class DefaultModelLoader:
        def __init__(self, load_config: Any) -> None:
            self.load_config = load_config
            self.local_expert_ids: set[int] | None = None

        def _get_weights_iterator(self, source: Any) -> Any:
            assert self.load_config.load_format == "safetensors", "_prepare_weights raises for names it does not know"
            weights = default.safetensors_weights_iterator(
                source.files, True, None, local_expert_ids=self.local_expert_ids
            )
            return ((source.prefix + name, tensor) for name, tensor in weights)

    loaders.register_model_loader = register_model_loader  # type: ignore[attr-defined]
    loaders.default_loader = default  # type: ignore[attr-defined]
    default.DefaultModelLoader = DefaultModelLoader  # type: ignore[attr-defined]
    default.safetensors_weights_iterator = safetensors_weights_iterator  # type: ignore[attr-defined]
    for name, module in {
        "vllm": ModuleType("vllm"),
        "vllm.model_executor": ModuleType("vllm.model_executor"),
        "vllm.model_executor.model_loader": loaders,
        "vllm.model_executor.model_loader.default_loader": default,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm, "_is_registered", False)
    return found


def test_it_registers_once(registry: dict[str, type]) -> None:
    vllm.register()
    vllm.register()
    assert list(registry) == ["gpuload"]


def test_without_vllm_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm.register()


@pytest.mark.parametrize("server", [True], indirect=True, ids=["direct"])
@pytest.mark.parametrize("has_server", [True, False])
def test_it_hands_on_the_files_tensors(
    registry: dict[str, type], server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_server: bool
) -> None:
    monkeypatch.setenv("GPULOAD_SOCKET", server.socket_path if has_server else "/nonexistent/s.sock")
    monkeypatch.setattr(safetensors_patch, "_away_until", 0.0)
    monkeypatch.setattr(safetensors_patch, "_has_logged", False)
    want = [random_tensors(i, {f"w.{i}": (30, 40)}) for i in range(2)]
    files = [str(write(tmp_path / f"{i}.safetensors", t)) for i, t in enumerate(want)]
    vllm.register()
    config = SimpleNamespace(load_format="gpuload")
    loader = registry["gpuload"](config)
    got = dict(loader._get_weights_iterator(SimpleNamespace(files=files, prefix="p.")))
    assert_same(got, {f"p.{n}": t for part in want for n, t in part.items()})
    assert config.load_format == "gpuload", "the caller's own config is left alone"
    monkeypatch.setattr(safetensors_patch, "_away_until", 0.0)


def test_an_expert_filter_stays_vllms(registry: dict[str, type]) -> None:
    vllm.register()
    loader = registry["gpuload"](SimpleNamespace(load_format="gpuload"))
    loader.local_expert_ids = {1}
    assert dict(loader._get_weights_iterator(SimpleNamespace(files=["x"], prefix=""))) == {"the original": ["x"]}


def test_the_entry_point_is_declared() -> None:
    declared = {e.name: e.value for e in entry_points(group="vllm.general_plugins")}
    assert declared.get("gpuload") == "gpuload.hooks.vllm:register"
