"""The vLLM plugin in the real vLLM, where it is installed (tools/hooks/run does that): loaders, engines on the CPU."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpuload.hooks import vllm as vllm_hook
from gpuload.testing import ServerThread
from mfs.testing.mounting import TestMount
from tests.gpuload.hooks import test_vllm as model_of_vllm
from tests.gpuload.hooks import test_vllm_sleep as model_of_sleep
from tests.gpuload.hooks.conftest import DEADLINE_S, Outcome, run_program

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: tools/hooks/run runs these"
)

ENGINE_S = 400
"""An engine starts in half a minute where nothing else runs."""

ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the worker for its counts by a function
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def vllm(
    name: str, *args: object, socket_path: str | None, on: bool = False, timeout_s: float = DEADLINE_S, **env: str
) -> Outcome:
    """One of `vllm_programs`. The plugin is there in any case; `on` sets GPULOAD_AUTO."""
    environment = env | {"GPULOAD_AUTO": "1" if on else "0"}
    return run_program(f"vllm_programs:{name}", *args, socket_path=socket_path, timeout_s=timeout_s, **environment)


@pytest.fixture(scope="module")
def interface() -> Any:
    return vllm("interface", socket_path=None).found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small Llamas of one shape and other weights, in several shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("registry") / f"llama-{seed}"
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
        folders.append(folder)
    return folders


@pytest.fixture
def mounted(llama: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The first of them on a mount."""
    with TestMount(tmp_path / "m", str(llama[0].parent)) as mount:
        monkeypatch.setenv("MFS_RUNTIME_DIR", str(tmp_path / "m" / "run"))
        yield mount.path / llama[0].name


def test_the_model_that_the_suite_runs_on_has_the_real_names_and_signatures(interface: Any) -> None:
    for name, parameters in interface["iterators"].items():
        modelled = inspect.signature(getattr(model_of_vllm, name)).parameters.values()
        assert parameters == [[p.name, p.kind.name] for p in modelled][: len(parameters)]
    assert set(interface["iterators"]) == set(vllm_hook.ITERATORS)
    assert [name for name, _ in interface["picks"]] == ["self", "source"]
    assert [name for name, _ in interface["runai picks"]][:3] == ["self", "model_or_path", "revision"]
    assert [name for name, _ in interface["makes"]] == ["self", "load_config"]


def test_vllm_finds_the_plugin_and_may_ask_it_again() -> None:
    off = vllm("plugins", socket_path=None).found
    assert off == {
        "gpuload": "GpuloadModelLoader",
        "GPULOAD": "GpuloadModelLoader",
        "auto": "DefaultModelLoader",
        "hf": "DefaultModelLoader",
        "safetensors": "DefaultModelLoader",
        "instanttensor": "DefaultModelLoader",
        "fastsafetensors": "DefaultModelLoader",
        "runai_streamer": "RunaiModelStreamerLoader",
        "dummy": "DummyModelLoader",
    }
    on = vllm("plugins", socket_path=None, on=True).found
    assert on == off | dict.fromkeys(set(off) - {"gpuload", "GPULOAD", "dummy"}, "MountedModelLoader")


@pytest.fixture(scope="module")
def plain(llama: list[Path]) -> list[Any]:
    """What vLLM's own loader makes of the first model, for each way of asking."""
    found = vllm("iterated", "safetensors", llama[0], socket_path=None).found
    assert all(counts == [0, 0, 0] for _, counts in found)
    assert all(tensors == found[0][0] for tensors, _ in found)
    return [tensors for tensors, _ in found]


def test_the_loader_yields_what_vllms_own_yields(resident: ServerThread, llama: list[Path], plain: list[Any]) -> None:
    """Lazy, eager, prefetched and by threads; with a server and without."""
    count = len(plain[0])
    served = vllm("iterated", "gpuload", llama[0], socket_path=resident.socket_path).found
    assert served == [[tensors, [count, 0, 0]] for tensors in plain]
    alone = vllm("iterated", "gpuload", llama[0], socket_path=None).found
    assert alone == [[tensors, [0, count, 0]] for tensors in plain]


def test_the_socket_may_come_by_the_extra_config_and_unknown_keys_are_refused(
    resident: ServerThread, llama: list[Path], plain: list[Any]
) -> None:
    words, counts = vllm("configured", llama[0], resident.socket_path, socket_path=None).found
    assert "nonsense" in words
    assert counts == [len(plain[0]), 0, 0]


def test_with_no_flag_a_mounted_model_is_ours_and_another_is_not(
    llama: list[Path], mounted: Path, plain: list[Any]
) -> None:
    """Elsewhere it is vLLM's own iterator; 'left' is counted by safetensors' hook below it, but for the eager way."""
    count = len(plain[0])
    found = vllm("iterated", "auto", mounted, llama[0], socket_path=None, on=True).found
    assert found[: len(plain)] == [[tensors, [0, count, 0]] for tensors in plain]
    lefts = [count, 0, count, count]
    assert found[len(plain) :] == [[tensors, [0, 0, left]] for tensors, left in zip(plain, lefts, strict=True)]


def test_formats_of_other_loaders_are_ours_on_a_mount(mounted: Path, plain: list[Any]) -> None:
    """Without their packages, which vLLM then does not ask for."""
    count = len(plain[0])
    found = vllm("iterated_as", mounted, "instanttensor", "fastsafetensors", socket_path=None, on=True).found
    assert found == [[plain[0], [0, count, 0]]] * 2


@pytest.mark.timeout(400)
def test_two_ranks_read_each_byte_once(llama: list[Path], plain: list[Any], tmp_path: Path) -> None:
    """vLLM's own tensor-parallel group, over gloo: all tensors on each, each handed over by whoever read it."""
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(vllm, "rank", llama[0], tmp_path / "rendezvous", n, socket_path=None, timeout_s=ENGINE_S)
            for n in range(2)
        ]
        found = [call.result().found for call in calls]
    assert [one["tensors"] for one in found] == [plain[0]] * 2
    assert [one["counts"] for one in found] == [[0, len(plain[0]), 0]] * 2
    assert all(one["read"] for one in found)
    assert sum(one["read"] for one in found) < sum(file.stat().st_size for file in llama[0].glob("*.safetensors"))


def test_its_sleep_mode_knows_our_backend() -> None:
    found = vllm("sleeps", socket_path=None).found
    assert (found["made"], found["is one"], found["state"]) == ("GpuloadBackend", True, "RUNNING")
    for name in ("suspend", "resume"):
        assert found[name] == list(inspect.signature(getattr(model_of_sleep.CuMemBackend, name)).parameters)
    assert found["allocation"] == list(inspect.signature(model_of_sleep.AllocationData).parameters)


@pytest.fixture(scope="module")
def engines(interface: Any) -> None:
    if interface["platform"] != "CpuPlatform":
        pytest.skip(f"vLLM {interface['version']} as installed has no CPU engine ({interface['platform']})")


def run_engine(
    model: Path, *, socket_path: str | None, on: bool = False, then: Path | str = "", **options: Any
) -> Outcome:
    given = json.dumps({"model": str(model), **options})
    return vllm("engine", given, then, socket_path=socket_path, on=on, timeout_s=ENGINE_S, **ENGINE_ENVIRONMENT)


@pytest.fixture(scope="module")
def said(llama: list[Path], engines: None) -> list[Any]:
    """What vLLM alone says from the first model, and from the second once its weights are loaded in place."""
    found = run_engine(llama[0], socket_path=None, then=llama[1]).found
    return [found["says"], found["after"]]


@pytest.mark.timeout(1000)
@pytest.mark.usefixtures("engines")
def test_an_engine_served_by_the_resident_server_says_the_same_and_swaps_its_weights(
    resident: ServerThread, llama: list[Path], said: list[Any]
) -> None:
    """`--load-format gpuload`: in the worker process, also for `reload_weights` of another checkpoint."""
    assert said[0] != said[1]
    outcome = run_engine(llama[0], socket_path=resident.socket_path, load_format="gpuload", then=llama[1])
    assert (outcome.found["says"], outcome.found["after"]) == (said[0], said[1])
    ((served, *others),) = outcome.found["worker"]
    ((after, *others_after),) = outcome.found["worker after"]
    assert (others, others_after) == ([0, 0], [0, 0])
    assert after == 2 * served > 0
    assert resident.gauges()["models"] == sum(len(list(f.glob("*.safetensors"))) for f in llama)
    assert resident.gauges()["leases"] == 0


@pytest.mark.timeout(1000)
@pytest.mark.usefixtures("engines")
def test_a_swap_at_the_server_reaches_a_running_engine_and_no_key_or_value_of_before_stays(
    resident: ServerThread, llama: list[Path]
) -> None:
    """As engines that began with those weights say; of a prompt whose keys and values were cached with others."""
    options = [json.dumps({"model": str(folder), "block_size": 32}) for folder in llama]

    def run(first: str, *folders: Path) -> Any:
        words = (first, resident.socket_path, *folders)
        return vllm("updated", *words, socket_path=None, timeout_s=ENGINE_S, **ENGINE_ENVIRONMENT).found["says"]

    found = run(options[0], llama[1], llama[0])
    (new, _), *_ = run(options[1], llama[1])
    (old, cached_first), (again, cached), (after, cached_after), _, (back, cached_back), _ = found
    assert (old, after, back) == (again, new, old)
    assert old != new
    assert (cached_first, cached_after, cached_back) == (0, 0, 0)
    assert cached > 0, "the cache was not in use at all"
    assert resident.gauges()["leases"] == 0


@pytest.mark.timeout(1000)
@pytest.mark.usefixtures("engines")
def test_an_engine_without_a_server_loads_by_our_pipeline(llama: list[Path], said: list[Any]) -> None:
    outcome = run_engine(llama[0], socket_path=None, load_format="gpuload")
    assert outcome.found["says"] == said[0]
    ((served, streamed, left),) = outcome.found["worker"]
    assert (served, left) == (0, 0)
    assert streamed > 0


@pytest.mark.timeout(1000)
@pytest.mark.usefixtures("engines")
def test_an_engine_under_gpuload_run_needs_no_flag(
    resident: ServerThread, llama: list[Path], mounted: Path, said: list[Any]
) -> None:
    """On a mount by the plugin, elsewhere by safetensors' hook; both from the server, as content, loaded once."""
    for model in (mounted, llama[0]):
        outcome = run_engine(model, socket_path=resident.socket_path, on=True)
        assert outcome.found["says"] == said[0]
        ((served, streamed, left),) = outcome.found["worker"]
        assert (streamed, left) == (0, 0)
        assert served > 0
        assert resident.gauges()["models"] == len(list(llama[0].glob("*.safetensors")))
