"""Sums of `gpuload plan`, against sums done by hand."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gpuload.cli.planning import examine
from gpuload.fit import CARDS, Fit, kv_cache_bytes, model_sizes, smallest_world
from gpuload.moving.plan import MEGATRON_RULES
from gpuload.testing import random_tensors, write
from mfs.errors import UsageError
from mfs.safetensors import Header, TensorInfo

LLAMA_8B = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def header(**sizes: tuple[str, tuple[int, ...]]) -> Header:
    tensors, at = [], 8
    for name, (dtype, shape) in sizes.items():
        n = {"BF16": 2, "F32": 4}[dtype]
        for d in shape:
            n *= d
        tensors.append(TensorInfo(name.replace("__", "."), dtype, shape, at, at + n))
        at += n
    return Header(tuple(tensors), None, 8, at, ())


def test_a_key_value_cache() -> None:
    assert kv_cache_bytes(LLAMA_8B, 1) == 32 * 2 * 8 * 128 * 2  # 128 KiB a token
    assert kv_cache_bytes(LLAMA_8B, 1, world=4) == 32 * 2 * 2 * 128 * 2
    assert kv_cache_bytes(LLAMA_8B, 1, world=16) == 32 * 2 * 1 * 128 * 2, "a rank has one head at least"
    assert kv_cache_bytes({"text_config": LLAMA_8B}, 3) == 3 * kv_cache_bytes(LLAMA_8B, 1)
    assert kv_cache_bytes({**LLAMA_8B, "head_dim": 64}, 1) == kv_cache_bytes(LLAMA_8B, 1) // 2
    assert kv_cache_bytes({"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 1) == 61 * 576 * 2


@pytest.mark.parametrize(
    "config", [{}, {"num_hidden_layers": "x"}, {**LLAMA_8B, "num_attention_heads": 0, "num_key_value_heads": 1}]
)
def test_a_config_that_does_not_say(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"config\.json does not say"):
        kv_cache_bytes(config, 1)


def test_sizes_per_rank() -> None:
    table = header(
        l__q_proj__weight=("BF16", (64, 10)), l__o_proj__weight=("BF16", (10, 64)), norm=("F32", (10,)),
        odd__q_proj__weight=("BF16", (6, 1)),
    )  # fmt: skip
    sizes = model_sizes([table], MEGATRON_RULES)
    assert sizes.bytes_by_dtype == {"BF16": 2572, "F32": 40}
    assert sizes.rank_bytes[1] == 2612
    assert sizes.rank_bytes[2] == 1280 + 40 + 6
    assert sizes.rank_bytes[4] == 640 + 40 + 12, "what cannot be cut in four stays whole"
    assert sizes.whole == {4: 1, 8: 1, 16: 1}


def test_a_sum_and_its_shortfall() -> None:
    fit = Fit(100, 20, 5, 3, 40, 30, 200)
    assert (fit.needed_bytes, fit.shortfall_bytes) == (128, 0)
    assert replace(fit, weights_bytes=103).shortfall_bytes == 1


def test_the_smallest_tensor_parallel_size() -> None:
    table = header(lm_head__weight=("BF16", (1 << 18, 1 << 18)))  # 128 GiB, can be cut
    sizes = model_sizes([table], {"lm_head.weight": 0})
    base = Fit(sizes.bytes_total, 0, 0, 0, 0, 0, CARDS["80 GB"])
    assert smallest_world(sizes, None, 0, base) == 2
    assert smallest_world(sizes, None, 0, replace(base, others_bytes=60 << 30)) == 8
    assert smallest_world(sizes, None, 0, replace(base, others_bytes=79 << 30)) is None
    assert smallest_world(sizes, LLAMA_8B, 300_000, base) == 4


def test_a_plan_reads_headers_and_the_config_and_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.safetensors", random_tensors(1, {"a.w": (1000, 100), "b.w": (1000, 100)}))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    data_begins = path.stat().st_size - 400_000
    furthest = []
    pread = os.pread

    def watched(fd: int, count: int, offset: int) -> bytes:
        furthest.append(offset + count)
        return pread(fd, count, offset)

    monkeypatch.setattr(os, "pread", watched)
    found = examine(str(tmp_path), 1000, "cpu", {"b": "cpu:1"}, {}, str(tmp_path / "no.sock"))
    assert furthest
    assert max(furthest) <= data_begins
    assert found["bytes_total"] == 400_000
    parts = {t["target"]: t for t in found["targets"]}
    assert parts["cpu"]["weights_bytes"] == parts["cpu:1"]["weights_bytes"] == 2 << 20, "whole granules on each device"
    assert parts["cpu"]["kv_cache_bytes"] * 2 == found["kv_cache_bytes"], "in proportion to the weights"


def test_a_map_that_leaves_tensors_out_is_no_plan(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", random_tensors(1, {"a.w": (10,), "b.w": (10,)}))
    with pytest.raises(UsageError, match="without a device"):
        examine(str(path), 0, None, {"b": "cpu"}, {}, str(tmp_path / "no.sock"))
