"""Key-value caches: configs as they stand on the Hub, counted by hand; transformers' own classes as the reference."""

from __future__ import annotations

from typing import Any

import pytest

from gpuload.fit import kv_cache_bytes
from mfs.errors import UsageError

LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
VISION = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768}
ONE = 2 * 8 * 128 * 2
"""Bytes of one token in one of LLAMA's layers."""
TOKENS = 100_000
HYBRID = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
T5 = {"d_kv": 64, "d_model": 512, "num_heads": 8, "num_layers": 12, "num_decoder_layers": 6, "is_encoder_decoder": True}

PER_TOKEN: dict[str, tuple[dict[str, Any], int]] = {
    "Falcon 7B": ({"model_type": "falcon", **VISION, "multi_query": True, "num_kv_heads": 12}, 12 * 2 * 64 * 2),
    "Falcon 40B": (
        {**VISION, "num_kv_heads": 4, "multi_query": True, "new_decoder_architecture": True}, 12 * 2 * 4 * 64 * 2,
    ),
    "Falcon, no sharing": (
        {**VISION, "multi_query": False, "new_decoder_architecture": False, "num_kv_heads": 3}, 12 * 2 * 768 * 2,
    ),
    "RefinedWeb": ({"n_layer": 60, "n_head": 128, "n_head_kv": 8, "hidden_size": 8192}, 60 * 2 * 8 * 64 * 2),
    "GPT-2": ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 12 * 2 * 768 * 2),
    "StarCoder": ({"n_layer": 40, "n_head": 48, "n_embd": 6144, "multi_query": True}, 40 * 2 * 128 * 2),
    "MPT": ({"d_model": 7168, "n_heads": 64, "n_layers": 48, "attn_config": {"kv_n_heads": 8}}, 48 * 2 * 8 * 112 * 2),
    "MPT, one": (
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "attn_config": {"attn_type": "multiquery_attention"}},
        2 * 2 * 16 * 2,
    ),
    "Bloom": ({"n_layer": 30, "n_head": 32, "hidden_size": 4096}, 30 * 2 * 4096 * 2),
    "Bloom, in its own words": ({"n_layer": 30, "num_attention_heads": 32, "n_embed": 4096}, 30 * 2 * 4096 * 2),
    "Phi-2, old": ({"n_layer": 32, "n_head": 32, "n_embd": 2560, "n_head_kv": None}, 32 * 2 * 2560 * 2),
    "ChatGLM3": (
        {"num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128,
         "multi_query_attention": True, "multi_query_group_num": 2}, 28 * 2 * 2 * 128 * 2,
    ),
    "a config of a vision tower around it": ({**VISION, "llm_config": LLAMA}, 32 * ONE),
    "language_config": ({"vision_config": VISION, "language_config": LLAMA}, 32 * ONE),
    "two levels down": ({"thinker_config": {"audio_config": VISION, "text_config": LLAMA}}, 32 * ONE),
    "language_model": ({**VISION, "language_model": LLAMA}, 32 * ONE),
    "null, and not nested": ({**LLAMA, "text_config": None, "llm_config": {}}, 32 * ONE),
    "a nested one that says nothing": ({**LLAMA, "text_config": {"vocab_size": 3}}, 32 * ONE),
    "dtype": ({**LLAMA, "dtype": "float32"}, 32 * ONE * 2),
    "torch_dtype of the whole": ({"torch_dtype": "torch.float32", "text_config": LLAMA}, 32 * ONE * 2),
    "a cache of eight bits": ({**LLAMA, "quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, 32 * ONE // 2),
    "DeepSeek": ({**LLAMA, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 32 * 576 * 2),
    "DeepSeek without latents": ({**LLAMA, "kv_lora_rank": None, "use_mla": False, "v_head_dim": 0}, 32 * ONE),
    "keys wider than values": ({**LLAMA, "head_dim": 192, "v_head_dim": 128}, 32 * 8 * 320 * 2),
    "Jamba": ({**LLAMA, "attn_layer_period": 8, "attn_layer_offset": 4}, 4 * ONE),
    "Bamba": ({**LLAMA, "model_type": "bamba", "attn_layer_indices": [9, 18, 27]}, 3 * ONE),
    "Bamba without": ({**LLAMA, "model_type": "bamba", "attn_layer_indices": None}, 0),
    "Zamba": ({**LLAMA, "layers_block_type": ["mamba"] * 30 + ["hybrid"] * 2, "attention_head_dim": 256}, 4 * ONE),
    "Nemotron-H": ({**LLAMA, "hybrid_override_pattern": "M-M*-M-E*", "num_hidden_layers": 9}, 2 * ONE),
    "Granite 4": ({**LLAMA, "layer_types": ["mamba"] * 28 + ["attention"] * 4}, 4 * ONE),
    "Qwen3-Next, old": ({**LLAMA, "full_attention_interval": 4}, 8 * ONE),
    "MiniMax": ({**LLAMA, "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 4}, 4 * ONE),
    "Kimi Linear": (
        {**LLAMA, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "linear_attn_config": {"full_attn_layers": [4, 8]}},
        2 * 576 * 2,
    ),
    "Nemotron-NAS": (
        {**LLAMA, "num_key_value_heads": None, "num_hidden_layers": 3, "block_configs": [
            {"attention": {"n_heads_in_group": 8}}, {"attention": {"no_op": True}},
            {"attention": {"n_heads_in_group": 32}}]}, 5 * 2 * 128 * 2,
    ),
    "OpenELM": ({"num_transformer_layers": 2, "num_heads": 4, "num_kv_heads": [1, 3], "head_dim": 64}, 4 * 2 * 64 * 2),
    "OpenELM, its own words": (
        {"num_transformer_layers": 2, "num_query_heads": [4, 6], "num_kv_heads": [1, 3], "head_dim": 64},
        4 * 2 * 64 * 2,
    ),
    "Gemma 3n": ({**LLAMA, "num_kv_shared_layers": 12}, 20 * ONE),
    "Hunyuan": ({**LLAMA, "use_cla": True, "cla_share_factor": 2}, 16 * ONE),
    "layers that say their own": ({**LLAMA, "per_layer_config": {"05": {"head_dim": 256}}}, 33 * ONE),
    "LongCat": ({"model_type": "longcat_flash", "num_layers": 2, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                 "num_attention_heads": 4}, 4 * 12 * 2),
    "Mamba": ({"model_type": "mamba2", "num_hidden_layers": 64, "num_heads": 80, "head_dim": 64, "state_size": 128}, 0),
    "Mamba, first": ({"d_model": 2560, "n_layer": 64, "ssm_cfg": {}}, 0),
    "RWKV": ({"model_type": "rwkv", "hidden_size": 4096, "num_hidden_layers": 32, "attention_hidden_size": 4096}, 0),
    "BERT": ({"model_type": "bert", **VISION}, 0),
    "ERNIE": ({"model_type": "ernie", **VISION}, 0),
    "T5, its own and the encoder's": (T5, 6 * 2 * 2 * 512 * 2),
    "Whisper": (
        {"is_encoder_decoder": True, "d_model": 1280, "encoder_layers": 4, "num_hidden_layers": 4, "decoder_layers": 32,
         "encoder_attention_heads": 8, "decoder_attention_heads": 20}, 32 * 2 * 2 * 1280 * 2,
    ),
}  # fmt: skip

GEMMA2 = {"model_type": "gemma2", **LLAMA, "sliding_window": 4096}
IN_A_WINDOW: dict[str, tuple[dict[str, Any], int, int]] = {
    "Mistral": ({**LLAMA, "sliding_window": 4096}, 0, 4096),
    "Mixtral": ({**LLAMA, "sliding_window": None}, 32, 0),
    "Qwen2": ({**LLAMA, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}, 32, 0),
    "Qwen2, used": ({**LLAMA, "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}, 28, 4096),
    "Gemma 2": (GEMMA2, 16, 4096),
    "Gemma 3": ({**GEMMA2, "model_type": "gemma3_text", "sliding_window": 1024}, 5, 1024),
    "Cohere2": ({**LLAMA, "sliding_window": 4096, "sliding_window_pattern": 4}, 8, 4096),
    "EXAONE 4": ({**LLAMA, "sliding_window": 4096, "sliding_window_pattern": "LLLG"}, 8, 4096),
    "gpt-oss": ({**LLAMA, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16}, 16, 128),
    "Llama 4": ({**LLAMA, "attention_chunk_size": 8192, "no_rope_layers": []}, 8, 8192),
    "a list of windows": ({**LLAMA, "sliding_window": [None, 512]}, 16, 512),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_what_one_token_takes(name: str) -> None:
    config, want = PER_TOKEN[name]
    assert kv_cache_bytes(config, 1) == want
    assert kv_cache_bytes(config, 7) == 7 * want


@pytest.mark.parametrize("name", IN_A_WINDOW)
def test_a_window_bounds_a_layer(name: str) -> None:
    config, full_count, window = IN_A_WINDOW[name]
    assert kv_cache_bytes(config, TOKENS) == (full_count * TOKENS + (32 - full_count) * window) * ONE
    assert kv_cache_bytes(config, 100) == 32 * 100 * ONE, "less than any window"


def test_an_encoder_is_looked_at_whole() -> None:
    config = {**T5, "sliding_window": 64, "layer_types": ["sliding_attention"] * 6}
    assert kv_cache_bytes(config, TOKENS) == 6 * (64 + TOKENS) * 2 * 512 * 2


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "how many layers"),
        ({"model_type": "ultravox", "text_model_id": "meta-llama/x", "hidden_size": 4096}, "how many layers"),
        ({**LLAMA, "num_hidden_layers": "x"}, "'x'"),
        ({**LLAMA, "num_key_value_heads": -1}, "'-1'"),
        ({**LLAMA, "num_key_value_heads": {}}, "num_key_value_heads"),
        ({**LLAMA, "num_key_value_heads": True}, "'True'"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "more than"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads"),
        ({**LLAMA, "num_attention_heads": 9000}, "width"),
        ({**LLAMA, "layer_types": ["full_attention"] * 3}, "3 of 32"),
        ({**LLAMA, "layer_types": ["quantum_attention"] * 32}, "quantum_attention"),
        ({**LLAMA, "layer_types": ["sliding_attention"] * 32}, "how wide"),
        ({**LLAMA, "kv_lora_rank": 512}, "qk_rope_head_dim"),
        ({**LLAMA, "attn_layer_indices": [[1]]}, "made otherwise"),
    ],
)
def test_what_is_not_understood_is_said_in_one_line(config: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=r"config\.json does not say") as caught:
        kv_cache_bytes(config, 1)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_share_heads_and_not_latents() -> None:
    assert kv_cache_bytes(LLAMA, 1, world=4) == 32 * ONE // 4
    assert kv_cache_bytes({"n_layer": 2, "n_head": 4, "n_embd": 256, "multi_query": True}, 1, world=4) == 2 * 2 * 64 * 2
    assert kv_cache_bytes({**LLAMA, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 1, world=4) == 32 * 576 * 2


CLASSES = [
    "afmoe", "apertus", "arcee", "bailing_hybrid", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2",
    "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "deepseek_v32", "doge", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "falcon_h1", "flex_olmo", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "glm",
    "glm4", "glm4_moe", "glm4_moe_lite", "glm4v", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "idefics3", "internvl", "jamba", "jetmoe", "kimi_linear", "lfm2", "llama", "llama4",
    "llava", "llava_next", "llava_onevision", "longcat_flash", "minicpm3", "minimax", "minimax_m2", "ministral",
    "mistral", "mistral3", "mixtral", "mllama", "modernbert-decoder", "mpt", "nemotron", "nemotron_h", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "paligemma", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_moe", "qwen3_next", "qwen3_vl",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "voxtral", "xglm", "youtu",
    "zamba", "zamba2",
]  # fmt: skip


def reference(config: Any, tokens: int) -> int:
    """By the names that transformers gives all of its classes, and its own list of what each layer's cache is."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    text = config.get_text_config(decoder=True)
    types, bounds = get_layer_types_and_kwargs(text)
    items = 0
    for kind, bound, layer in zip(types, bounds, text.per_layer_config, strict=True):
        if kind in ("dummy", "linear_attention", "conv", "mamba"):
            continue
        heads = layer.num_attention_heads
        key_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        row = (getattr(layer, "num_key_value_heads", None) or heads) * (
            key_dim + (getattr(layer, "v_head_dim", None) or key_dim)
        )
        if getattr(layer, "kv_lora_rank", None):
            row = layer.kv_lora_rank + layer.qk_rope_head_dim
        items += min(tokens, bound.get("sliding_window") or tokens) * row
    return 2 * items


@pytest.mark.parametrize("model_type", CLASSES)
def test_as_transformers_own_classes_say(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = transformers.CONFIG_MAPPING[model_type]()
    for tokens in (1, TOKENS):
        assert kv_cache_bytes(config.to_dict(), tokens) == reference(config, tokens)


def test_a_nested_config_that_leaves_all_to_its_class() -> None:
    """As LLaVA's and Gemma 3's on the Hub are written."""
    pytest.importorskip("transformers")
    assert kv_cache_bytes({"text_config": {"model_type": "llama", "vocab_size": 32064}}, 1) == 32 * 2 * 4096 * 2
    gemma = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    row = 2 * 4 * 256 * 2
    assert kv_cache_bytes({"text_config": gemma}, TOKENS) == (5 * TOKENS + 29 * 1024) * row
