"""The vLLM plugin against a model of vLLM's loader registry: a few lines with the real one's names and signatures.

test_vllm_itself.py runs the real library, and holds this model to it, where vLLM is installed: tools/hooks/run
installs it somewhere and runs both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import gpuload.device
from gpuload.hooks import resident as resident_module
from gpuload.hooks import vllm, weights
from gpuload.hooks.counts import counts
from gpuload.hooks.ranks import Group
from gpuload.testing import ServerThread, assert_same, random_tensors, write
from mfs.errors import UsageError
from mfs.testing.mounting import TestMount
from tests.gpuload.hooks.conftest import NO_SOCKET


def safetensors_weights_iterator(
    hf_weights_files: list[str],
    use_tqdm_on_load: bool,
    safetensors_load_strategy: str | None = None,
    local_expert_ids: set[int] | None = None,
    *,
    safetensors_prefetch_num_threads: int = 8,
    safetensors_prefetch_block_size: int = 1 << 24,
) -> Iterator[tuple[str, Any]]:
    return iter([("the original", hf_weights_files)])


def multi_thread_safetensors_weights_iterator(
    hf_weights_files: list[str], use_tqdm_on_load: bool, max_workers: int = 4
) -> Iterator[tuple[str, Any]]:
    return iter([("the original, threaded", hf_weights_files)])


def instanttensor_weights_iterator(
    hf_weights_files: list[str],
    use_tqdm_on_load: bool,
    local_expert_ids: set[int] | None = None,
    *,
    load_engram_on_cpu: bool = False,
) -> Iterator[tuple[str, Any]]:
    return iter([("the original, instant", hf_weights_files)])


def fastsafetensors_weights_iterator(hf_weights_files: list[str], use_tqdm_on_load: bool) -> Iterator[tuple[str, Any]]:
    return iter([("the original, fast", hf_weights_files)])


def runai_safetensors_weights_iterator(
    hf_weights_files: list[str], use_tqdm_on_load: bool, is_distributed: bool = False
) -> Iterator[tuple[str, Any]]:
    return iter([("the original, streamed", hf_weights_files)])


class RunaiModelStreamerLoader:
    """As vLLM's, which has another door than the others."""

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config

    def _get_weights_iterator(self, model_or_path: Any, revision: str | None, is_unused_weight: Any = None) -> Any:
        module = sys.modules["vllm.model_executor.model_loader.runai_streamer_loader"]
        return module.runai_safetensors_weights_iterator(model_or_path.files, True, False)


class DefaultModelLoader:
    """As vLLM's, as far as the plugin touches it."""

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config
        self.local_expert_ids: set[int] | None = None
        unexpected = set(load_config.model_loader_extra_config) - {"enable_multithread_load", "num_threads"}
        if unexpected:
            raise ValueError(f"Unexpected extra config keys for load format {load_config.load_format}: {unexpected}")

    def _get_weights_iterator(self, source: Any) -> Any:
        module = sys.modules["vllm.model_executor.model_loader.default_loader"]
        config = self.load_config
        known = ("auto", "hf", "safetensors", "instanttensor", "fastsafetensors")
        assert config.load_format in known, "_prepare_weights raises for names it does not know"
        if config.load_format == "instanttensor":
            weights = module.instanttensor_weights_iterator(
                source.files, True, local_expert_ids=self.local_expert_ids, load_engram_on_cpu=False
            )
        elif config.load_format == "fastsafetensors":
            weights = module.fastsafetensors_weights_iterator(source.files, True)
        elif config.model_loader_extra_config.get("enable_multithread_load"):
            weights = module.multi_thread_safetensors_weights_iterator(source.files, True, max_workers=2)
        else:
            weights = module.safetensors_weights_iterator(
                source.files,
                True,
                config.safetensors_load_strategy,
                local_expert_ids=self.local_expert_ids,
                safetensors_prefetch_num_threads=8,
                safetensors_prefetch_block_size=1 << 24,
            )
        return ((source.prefix + name, tensor) for name, tensor in weights)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """`vllm.model_executor.model_loader`, with what was registered in it."""
    found: dict[str, type] = {}
    loaders = ModuleType("vllm.model_executor.model_loader")
    default = ModuleType("vllm.model_executor.model_loader.default_loader")

    def register_model_loader(load_format: str) -> Any:
        def decorate(cls: type) -> type:
            assert load_format not in found, "registered twice"
            found[load_format] = cls
            return cls

        return decorate

    loaders.register_model_loader = register_model_loader  # type: ignore[attr-defined]
    loaders.default_loader = default  # type: ignore[attr-defined]
    for member in (
        DefaultModelLoader, safetensors_weights_iterator, multi_thread_safetensors_weights_iterator,
        instanttensor_weights_iterator, fastsafetensors_weights_iterator,
    ):  # fmt: skip
        setattr(default, member.__name__, member)
    runai = ModuleType("vllm.model_executor.model_loader.runai_streamer_loader")
    loaders.runai_streamer_loader = runai  # type: ignore[attr-defined]
    for member in (RunaiModelStreamerLoader, runai_safetensors_weights_iterator):
        setattr(runai, member.__name__, member)
    for name, module in {
        "vllm": ModuleType("vllm"),
        "vllm.model_executor": ModuleType("vllm.model_executor"),
        "vllm.model_executor.model_loader": loaders,
        "vllm.model_executor.model_loader.default_loader": default,
        "vllm.model_executor.model_loader.runai_streamer_loader": runai,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm, "_is_registered", False)
    monkeypatch.setattr(resident_module, "_away_until", 0.0)
    monkeypatch.setattr(resident_module, "_has_logged", False)
    return found


def load_config(load_format: str = "gpuload", **given: Any) -> SimpleNamespace:
    values = {"load_format": load_format, "safetensors_load_strategy": None, "model_loader_extra_config": {}}
    return SimpleNamespace(**(values | given))


def test_it_registers_once_and_its_own_format_only(registry: dict[str, type]) -> None:
    vllm.register()
    vllm.register()
    assert list(registry) == ["gpuload"]


def test_without_vllm_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_is_registered", False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm.register()


@pytest.mark.parametrize("has_server", [True, False])
@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("strategy", [None, "lazy", "eager", "prefetch"])
def test_it_hands_on_the_files_tensors(
    registry: dict[str, type],
    resident: ServerThread,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_server: bool,
    threaded: bool,
    strategy: str | None,
) -> None:
    monkeypatch.setenv("GPULOAD_SOCKET", resident.socket_path if has_server else NO_SOCKET)
    want = [random_tensors(i, {f"w.{i}": (30, 40)}) for i in range(11)]
    files = [str(write(tmp_path / f"{i}.safetensors", t)) for i, t in enumerate(want)]
    vllm.register()
    extra = {"enable_multithread_load": True} if threaded else {}
    config = load_config(safetensors_load_strategy=strategy, model_loader_extra_config=extra)
    loader = registry["gpuload"](config)
    before = (counts.served, counts.streamed, counts.left)
    got = list(loader._get_weights_iterator(SimpleNamespace(files=sorted(files), prefix="p.")))
    after = (counts.served, counts.streamed, counts.left)
    assert_same(dict(got), {f"p.{n}": t for part in want for n, t in part.items()})
    assert [name for name, _ in got] == [f"p.w.{i}" for i in range(11)], "in the files' natural order"
    assert [b - a for a, b in zip(before, after, strict=True)] == ([11, 0, 0] if has_server else [0, 11, 0])
    assert config.load_format == "gpuload", "the caller's own config is left alone"


def test_its_own_extra_keys_do_not_reach_vllm_and_others_do(
    registry: dict[str, type], resident: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPULOAD_SOCKET", NO_SOCKET)
    vllm.register()
    file = str(write(tmp_path / "a.safetensors", random_tensors(1, {"w": (3,)})))
    extra = {"socket": resident.socket_path, "device": "cpu", "num_threads": 2}
    config = load_config(model_loader_extra_config=extra)
    loader = registry["gpuload"](config)
    assert loader.load_config.model_loader_extra_config == {"num_threads": 2}
    assert len(config.model_loader_extra_config) == 3, "the caller's own config is left alone"
    assert [n for n, _ in loader._get_weights_iterator(SimpleNamespace(files=[file], prefix=""))] == ["w"]
    assert resident.gauges()["models"] == 1, "the socket that was named is the one that was asked"
    with pytest.raises(ValueError, match="nonsense"):
        registry["gpuload"](load_config(model_loader_extra_config={"nonsense": 1}))
    with pytest.raises(UsageError, match="'device' must be a text, got int"):
        registry["gpuload"](load_config(model_loader_extra_config={"device": 0}))


@pytest.mark.parametrize(
    ("named", "extra", "expected"),
    [(None, None, "cuda:3"), ("cuda", None, "cuda:3"), ("cuda:1", None, "cuda:1"), ("cpu", None, "cpu"),
     ("xpu", None, "cpu"), (None, "cpu", "cpu")],
)  # fmt: skip
def test_tensors_come_to_stand_where_the_worker_computes(
    registry: dict[str, type],
    monkeypatch: pytest.MonkeyPatch,
    named: str | None,
    extra: str | None,
    expected: str,
) -> None:
    """The worker's current card, unless vLLM's own option, or ours, names another place; in the group of its ranks."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    of_ranks = SimpleNamespace(world_size=2, device_group="cards", cpu_group="hosts")
    distributed = ModuleType("vllm.distributed")
    distributed.get_tp_group = lambda: of_ranks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    asked: list[Any] = []
    monkeypatch.setattr(vllm, "weights_of", lambda files, **given: asked.append(given) or iter(()))
    vllm.register()
    loader = registry["gpuload"](
        load_config(device=named, model_loader_extra_config={} if extra is None else {"device": extra})
    )
    list(loader._get_weights_iterator(SimpleNamespace(files=["x"], prefix="")))
    of_ranks.world_size = 1
    list(loader._get_weights_iterator(SimpleNamespace(files=["x"], prefix="")))
    shared = {"device": expected, "socket_path": None}
    assert asked == [shared | {"group": Group("cards", "hosts")}, shared | {"group": None}]


def test_a_card_without_room_gets_its_weights_by_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has room for a model, and for nothing more, would fail in the middle of it."""
    want = random_tensors(1, {"w": (30, 40)})
    file = str(write(tmp_path / "a.safetensors", want))
    largest = want["w"].nbytes
    free = 2 * largest + weights.STAGED_BYTES
    monkeypatch.setattr(resident_module, "_has_logged", False)
    monkeypatch.setattr(resident_module, "_away_until", float("inf"))
    for missing, expected in ((0, "cuda:0"), (1, "cpu")):
        card = SimpleNamespace(memory=lambda n=free - missing: SimpleNamespace(free_bytes=n), close=lambda: None)
        monkeypatch.setattr(gpuload.device, "open_device", lambda _, card=card: card)
        assert weights._with_room([file], "cuda:0") == expected
    assert_same(dict(weights.weights_of([file], device="cuda:0")), want)
    assert [r.getMessage() for r in caplog.records] == [
        "gpuload: loading by host memory: cuda:0: 1024 MiB free, loading straight to it takes 1024 MiB"
    ]


@pytest.mark.parametrize("given", ["experts", "torchao"])
def test_what_vllm_makes_of_tensors_stays_vllms(registry: dict[str, type], given: str) -> None:
    vllm.register()
    loader = registry["gpuload"](load_config(safetensors_load_strategy="torchao" if given == "torchao" else None))
    loader.local_expert_ids = {1} if given == "experts" else None
    assert dict(loader._get_weights_iterator(SimpleNamespace(files=["x"], prefix=""))) == {"the original": ["x"]}


def test_a_file_that_the_pipeline_refuses_is_left_to_safetensors(
    registry: dict[str, type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import gpuload.client.load

    def refuse(*args: Any, **kwargs: Any) -> Iterator[Any]:
        raise UsageError("no such type in this torch")
        yield

    monkeypatch.setenv("GPULOAD_SOCKET", NO_SOCKET)
    monkeypatch.setattr(gpuload.client.load, "stream", refuse)
    monkeypatch.setattr(resident_module, "_away_until", float("inf"))
    want = random_tensors(1, {"w": (30, 40)})
    file = str(write(tmp_path / "a.safetensors", want))
    vllm.register()
    loader = registry["gpuload"](load_config())
    assert_same(dict(loader._get_weights_iterator(SimpleNamespace(files=[file], prefix=""))), want)
    assert [r.getMessage() for r in caplog.records] == [
        f"gpuload: loading {file} by safetensors itself: no such type in this torch"
    ]


@pytest.mark.parametrize(
    ("load_format", "original"),
    [("auto", ""), ("hf", ""), ("safetensors", ""), ("instanttensor", ", instant"), ("fastsafetensors", ", fast"),
     ("runai_streamer", ", streamed")],
)  # fmt: skip
def test_with_no_flag_models_on_a_mount_are_ours_and_others_are_not(
    registry: dict[str, type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_format: str, original: str
) -> None:
    """Formats of other loaders too, whose packages need not be there then."""
    monkeypatch.setenv("GPULOAD_AUTO", "1")
    monkeypatch.setenv("GPULOAD_SOCKET", NO_SOCKET)
    vllm.register()
    assert sorted(registry) == [
        "auto",
        "fastsafetensors",
        "gpuload",
        "hf",
        "instanttensor",
        "runai_streamer",
        "safetensors",
    ]
    folder = tmp_path / "registry" / "model"
    folder.mkdir(parents=True)
    want = random_tensors(1, {"w": (30, 40)})
    file = write(folder / "a.safetensors", want)
    loader = registry[load_format](load_config(load_format))
    more = (None,) if load_format == "runai_streamer" else ()
    elsewhere = dict(loader._get_weights_iterator(SimpleNamespace(files=[str(file)], prefix=""), *more))
    assert elsewhere == {f"the original{original}": [str(file)]}
    with TestMount(tmp_path / "m", str(folder.parent)) as mount:
        monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
        mounted = str(mount.path / "model" / "a.safetensors")
        got = dict(loader._get_weights_iterator(SimpleNamespace(files=[mounted], prefix=""), *more))
    assert_same(got, want)


def test_the_entry_point_is_declared() -> None:
    declared = {e.name: e.value for e in entry_points(group="vllm.general_plugins")}
    assert declared.get("gpuload") == "gpuload.hooks.vllm:register"
