"""SGLang's hook: against a model of its hook registry, and in the real library where it is installed.

tools/hooks/run installs SGLang somewhere and runs both there.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpuload.hooks import resident as resident_module
from gpuload.hooks import sglang
from gpuload.testing import ServerThread, assert_same, random_tensors, write
from mfs.testing.mounting import TestMount
from tests.gpuload.hooks.conftest import run_program


class HookType(Enum):
    """As SGLang's; the hook uses the one."""

    AROUND = "around"


class HookRegistry:
    """As SGLang's, as far as the hook touches it."""

    registered: list[tuple[str, Callable[..., Any], HookType]]

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType, *, source: Any = None) -> None:
        cls.registered.append((target, hook, hook_type))


def safetensors_weights_iterator(
    hf_weights_files: list[str],
    disable_mmap: bool = False,
    prefetch: bool = False,
    prefetch_num_threads: int = 4,
    drop_cache_after_load: bool = False,
) -> Iterator[Any]:
    return iter([("the original", hf_weights_files)])


def buffered_multi_thread_safetensors_weights_iterator(
    hf_weights_files: list[str],
    max_workers: int,
    disable_mmap: bool = False,
    prefetch: bool = False,
    prefetch_num_threads: int = 4,
    drop_cache_after_load: bool = False,
) -> Iterator[Any]:
    return iter([("the original, threaded", hf_weights_files)])


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> type[HookRegistry]:
    """SGLang as far as the hook touches it, and the hook not registered yet."""
    HookRegistry.registered = []
    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookRegistry, module.HookType = HookRegistry, HookType  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sglang, "_is_registered", False)
    monkeypatch.setattr(resident_module, "_away_until", 0.0)
    monkeypatch.setattr(resident_module, "_has_logged", False)
    return HookRegistry


def test_it_registers_once_and_only_if_asked(registry: type[HookRegistry], monkeypatch: pytest.MonkeyPatch) -> None:
    sglang.register()
    assert registry.registered == []
    monkeypatch.setenv("GPULOAD_AUTO", "1")
    sglang.register()
    sglang.register()
    names = [target.rpartition(".")[2] for target, _, _ in registry.registered]
    loaders = (target.rpartition(".")[2] for target in sglang.OF_LOADERS)
    assert names == [*sglang.ITERATORS, *loaders, "_get_weights_iterator"]


def test_without_sglang_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPULOAD_AUTO", "1")
    monkeypatch.setattr(sglang, "_is_registered", False)
    monkeypatch.setitem(sys.modules, "sglang", None)
    sglang.register()


def test_mounted_files_are_ours_in_the_order_given_and_others_sglangs(
    resident: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is SGLang's own: each rank may begin with another file."""
    folder = tmp_path / "registry" / "model"
    folder.mkdir(parents=True)
    want = [random_tensors(i, {f"w.{i}": (30, 40)}) for i in range(3)]
    files = [str(write(folder / f"{i}.safetensors", tensors)) for i, tensors in enumerate(want)]
    monkeypatch.setenv("GPULOAD_SOCKET", resident.socket_path)
    threaded = buffered_multi_thread_safetensors_weights_iterator
    assert list(sglang.iterate(safetensors_weights_iterator, files, disable_mmap=True)) == [("the original", files)]
    with TestMount(tmp_path / "m", str(folder.parent)) as mount:
        monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
        mounted = [str(mount.path / "model" / f"{i}.safetensors") for i in (2, 0, 1)]
        got = list(sglang.iterate(safetensors_weights_iterator, mounted, disable_mmap=True))
        by_threads = list(sglang.iterate(threaded, mounted, max_workers=2, drop_cache_after_load=True))
    for found in (got, by_threads):
        assert [name for name, _ in found] == ["w.2", "w.0", "w.1"]
        assert_same(dict(found), {n: t for part in want for n, t in part.items()})


def test_the_entry_point_is_declared() -> None:
    declared = {e.name: e.value for e in entry_points(group="sglang.srt.plugins")}
    assert declared.get("gpuload") == "gpuload.hooks.sglang:register"


real = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="SGLang is not installed: tools/hooks/run runs these"
)


@real
@pytest.mark.timeout(400)
def test_the_model_here_has_the_real_names_and_signatures() -> None:
    interface = run_program("sglang_programs:interface", socket_path=None).found
    for name, parameters in interface["iterators"].items():
        assert parameters == list(inspect.signature(globals()[name]).parameters)
    assert all(first == "hf_weights_files" for first in interface["others"].values())
    assert interface["register"] == list(inspect.signature(HookRegistry.register).parameters)
    assert interface["around"] == HookType.AROUND.value


@real
@pytest.mark.timeout(600)
def test_sglang_itself_loads_mounted_models_through_us(
    resident: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own plugin loading and loader: the bits of its own iterators, threaded and not; elsewhere its own."""
    folder = tmp_path / "registry" / "model"
    folder.mkdir(parents=True)
    want = [random_tensors(i, {f"w.{i}": (30, 40), f"b.{i}": (3,)}) for i in range(4)]
    for i, tensors in enumerate(want):
        write(folder / f"model-{i}.safetensors", tensors)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    plain = run_program("sglang_programs:iterated", folder, socket_path=None, GPULOAD_AUTO="0").found
    assert [counts for _, counts in plain] == [[0, 0, 0]] * 2
    with TestMount(tmp_path / "m", str(folder.parent)) as mount:
        monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
        mounted = mount.path / "model"
        alone = run_program("sglang_programs:iterated", mounted, folder, socket_path=None).found
        served = run_program("sglang_programs:iterated", mounted, folder, socket_path=resident.socket_path).found
    assert [tensors for tensors, _ in alone] == [tensors for tensors, _ in served] == [t for t, _ in plain] * 2
    assert [counts for _, counts in alone] == [[0, 8, 0], [0, 8, 0], [0, 0, 8], [0, 0, 8]]
    assert [counts for _, counts in served] == [[8, 0, 0]] * 4, "the last two by safetensors' hook"
