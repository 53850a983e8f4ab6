"""How large a key-value cache is, from a model's config.json in whichever words its family says it. Pure, but for one
look: what a config leaves to its class's defaults (nested ones do) is asked of transformers, where that is installed.

Every layer is one of: attention over all tokens, attention over a window, or nothing that grows with tokens (Mamba,
linear attention, convolutions, layers that use another's cache). What a sparse attention's indexer keeps is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfs.errors import UsageError

Config = Mapping[str, Any]

LAYERS_MAX = 10_000
_NESTED_MAX = 4
_TOKENS_MAX = 1 << 40  # more than any memory holds of what grows

_NESTED = (
    "thinker_config", "llm_config", "language_config", "language_model_config", "text_config", "text_model_config",
    "lm_config", "llm", "decoder", "language_model", "text_model", "llm_model_config", "decoder_config", "model_config",
)  # fmt: skip
"""Where models of several parts keep the one that writes text."""

_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_transformer_layers",
    "decoder_layers",
    "layers",
)
_DECODER_LAYERS = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers", *_LAYERS)
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
    "num_query_heads",
)  # fmt: skip
_DECODER_HEADS = (
    "decoder_attention_heads", "num_decoder_attention_heads", "decoder_num_attention_heads", *_HEADS,
)  # fmt: skip
_KV_HEADS = (
    "decoder_num_key_value_heads", "num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads",
    "num_key_value_heads_per_layer", "num_query_groups", "num_attention_groups",
)  # fmt: skip
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model", "emb_dim", "model_dim", "embed_dim", "dim")
_HEAD_DIM = ("head_dim", "attention_head_dim", "d_kv", "kv_channels", "d_head", "head_size")

_FULL = ("full_attention", "attention", "global_attention", "hybrid", "indexed_attention")
_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention")
_NOTHING = (
    "linear_attention", "mamba", "mamba2", "conv", "short_conv", "recurrent", "moe", "mlp", "kda", "gated_delta_net",
)  # fmt: skip

_WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba", "rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm")
_ENCODERS = (
    "albert", "bert", "bert-generation", "big_bird", "camembert", "clip", "convbert", "data2vec-text", "deberta",
    "deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert", "gte", "ibert", "jina_embeddings_v3", "layoutlm",
    "layoutlmv3", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "new", "nomic_bert",
    "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roformer", "siglip", "siglip2", "squeezebert",
    "vit", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""They read a text as a whole and keep nothing of it, unless `is_decoder` says otherwise."""

_EVERY = {"gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "cohere2": 4}
"""Of families whose configs need not say it: every so-manieth layer sees all tokens, the others a window."""

_ITEM_BYTES = {"float64": 8, "float32": 4, "float": 4, "fp32": 4}


@dataclass(frozen=True)
class _Layer:
    kind: str
    """'full', 'window' or 'none'."""
    own: Config
    """What is said of this layer alone."""


ITEM_BYTES = {"fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}
"""Of one number of a cache whose type is not left to the config (vLLM's --kv-cache-dtype, SGLang's)."""


def kv_cache_bytes(config: Config, tokens: int, world: int = 1, item_bytes: int | None = None) -> int:
    """Bytes of one rank's key-value cache for `tokens` tokens, from a config.json.

    item_bytes: of one number; None: as the config says.

    Heads are spread over the ranks, one at least on each. Latent attention (DeepSeek's kv_lora_rank) is one latent for
    all heads, whole on every rank. A layer with a window keeps `tokens` or its window, whichever is less: several
    sequences are counted as one. A decoder that also looks at an encoder keeps both its own and the encoder's, each of
    `tokens` tokens. What does not grow with tokens (states of Mamba, linear attention) is not in it.
    Raises: UsageError, one line, if the config does not say enough or says what is not understood.
    """
    try:
        return _counted(config, tokens, world, item_bytes)
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # lists of lists, texts for numbers
        raise _unclear(f"it is made otherwise than those known here ({str(error)[:80]})") from None


def tokens_that_fit(config: Config, room_bytes: int, world: int = 1, item_bytes: int | None = None) -> int | None:
    """How many tokens a cache of so many bytes holds on each rank; None if it never grows beyond them.

    Raises: as `kv_cache_bytes`.
    """
    if kv_cache_bytes(config, _TOKENS_MAX, world, item_bytes) <= room_bytes:
        return None
    fits, too_many = 0, _TOKENS_MAX
    while too_many - fits > 1:
        tokens = (fits + too_many) // 2
        if kv_cache_bytes(config, tokens, world, item_bytes) <= room_bytes:
            fits = tokens
        else:
            too_many = tokens
    return fits


def _counted(config: Config, tokens: int, world: int, item_bytes: int | None) -> int:
    text, is_cross = _text_of(config)
    if _has_none(text):
        return 0
    if _layers_of(text, is_cross) is None or (not text.get("kv_lora_rank") and _first(text, _HEADS) is None):
        text = _completed(text)
    item_bytes = item_bytes or _item_bytes(text, config)
    total = 0
    for layer in _layers(text, is_cross):
        if layer.kind != "none":
            own = {**text, **layer.own}
            kept = tokens if layer.kind == "full" else min(tokens, _window(own))
            total += (kept + tokens * is_cross) * _row_items(own, layer.kind, world, is_cross)
    return total * item_bytes


def _text_of(config: Config) -> tuple[Config, bool]:
    """The part that writes text, and whether it looks at an encoder besides."""
    text, is_cross = config, False
    for _ in range(_NESTED_MAX):
        is_cross = is_cross or bool(text.get("is_encoder_decoder") or text.get("add_cross_attention"))
        below = next((text[key] for key in _NESTED if isinstance(text.get(key), dict) and text[key]), None)
        if below is None or not (_is_said(below) or any(isinstance(below.get(key), dict) for key in _NESTED)):
            break
        text = below
    return text, is_cross


def _is_said(config: Config) -> bool:
    return "model_type" in config or _first(config, _DECODER_LAYERS) is not None or _has_none(config)


def _has_none(text: Config) -> bool:
    kind = text.get("model_type")
    if kind in _WITHOUT_ATTENTION or (kind in _ENCODERS and not text.get("is_decoder")):
        return True
    is_state_space = any(key in text for key in ("state_size", "ssm_cfg", "attention_hidden_size"))
    return is_state_space and "num_attention_heads" not in text and not text.get("attn_layer_idx")


def _completed(text: Config) -> Config:
    """With the defaults of its class, which configs that are parts of others leave out."""
    kind = text.get("model_type")
    if isinstance(kind, str):
        try:
            from transformers import AutoConfig

            given = {key: value for key, value in text.items() if key != "model_type"}
            return {**AutoConfig.for_model(kind, **given).to_dict(), **text}
        except (
            Exception
        ):  # not installed, or too old for this model, or it finds the config wrong: then it stays as it is
            pass
    return text


def _layers(text: Config, is_cross: bool) -> list[_Layer]:
    count = _layers_of(text, is_cross)
    kinds = _kinds(text, count)
    shared = _whole(text, "num_kv_shared_layers") or 0
    if shared:  # the last ones look into what an earlier one keeps
        kinds = [kind if i < len(kinds) - shared else "none" for i, kind in enumerate(kinds)]
    if isinstance(text.get("kv_sharing_modes"), list):
        modes = text["kv_sharing_modes"]
        kinds = ["none" if mode == "reuse" else kind for kind, mode in zip(kinds, modes, strict=False)]
    factor = _whole(text, "cla_share_factor") if text.get("use_cla") else None
    if factor:
        kinds = [kind if i % factor == 0 else "none" for i, kind in enumerate(kinds)]
    return [_Layer(kind, _own(text, i)) for i, kind in enumerate(kinds)]


def _own(text: Config, i: int) -> dict[str, Any]:
    """What is said of layer `i` alone."""
    own: dict[str, Any] = {}
    for key in (*_KV_HEADS, "num_query_heads", "sliding_window"):
        if isinstance(text.get(key), list) and text[key]:
            own[key] = text[key][i % len(text[key])]
    blocks = text.get("block_configs")
    if isinstance(blocks, list) and i < len(blocks):
        attention = _part(blocks[i], "attention")
        group = _whole(attention, "n_heads_in_group")
        if group:
            own["num_key_value_heads"] = _need(text, _HEADS) // group
        elif attention.get("num_key_value_heads"):
            own["num_key_value_heads"] = attention["num_key_value_heads"]
    others = text.get("per_layer_config")
    if isinstance(others, dict):
        own |= next((v for k, v in others.items() if str(k).isdecimal() and int(k) == i and isinstance(v, dict)), {})
    return own


def _kinds(text: Config, count: int | None) -> list[str]:
    """Of every layer, by whatever the config says of them."""
    named = next((text[key] for key in ("layer_types", "layers_block_type") if isinstance(text.get(key), list)), None)
    if named is not None:
        if count is not None and len(named) < count:
            raise _unclear(f"it names the types of {len(named)} of {count} layers")
        return [_kind(one) for one in named[:count]]
    pattern = text.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return ["full" if letter == "*" else "none" for letter in pattern]
    if count is None:
        raise _unclear("it does not say how many layers there are")
    numbers = _numbers_with_attention(text, count)
    if numbers is not None:
        kind = "window" if text.get("attention_window_size") else "full"
        return [kind if i in numbers else "none" for i in range(count)]
    return _windowed(text, count)


def _kind(named: object) -> str:
    for kind, names in (("full", _FULL), ("window", _WINDOWED), ("none", _NOTHING)):
        if named in names:
            return kind
    raise _unclear(f"it has layers of type {str(named)[:80]!r}, which are not known here")


def _numbers_with_attention(text: Config, count: int) -> set[int] | None:
    """In hybrids: which layers have attention; None where all have."""
    every = range(count)
    for key in ("attn_layer_indices", "full_attn_idxs", "attn_layer_idx"):
        if isinstance(text.get(key), list) or (key in text and text.get("model_type") == "bamba"):
            return set(text[key] or [])
    linear = _part(text, "linear_attn_config")
    if isinstance(linear.get("full_attn_layers"), list):
        return {number - 1 for number in linear["full_attn_layers"]}
    for key in ("attn_type_list", "block_types"):
        given = text.get(key)
        if isinstance(given, list) and given:
            return {i for i in every if given[i % len(given)] in (1, "attention")}
    if isinstance(text.get("block_configs"), list):
        parts = [_part(block, "attention") for block in text["block_configs"]]
        return {i for i, part in enumerate(parts) if not (part.get("no_op") or part.get("replace_with_linear"))}
    if period := _whole(text, "attn_layer_period"):
        return {i for i in every if i % period == (_whole(text, "attn_layer_offset") or 0)}
    if interval := _whole(text, "full_attention_interval"):
        return {i for i in every if (i + 1) % interval == 0}
    if group := _whole(text, "layer_group_size"):
        return {i for i in every if (i + 1) % group == 0 or i >= count // group * group}
    if step := _whole(text, "mamba_step"):
        return {i for i in every if i % step == step // 2} if count > step // 2 else {count - 1}
    return None


def _windowed(text: Config, count: int) -> list[str]:
    """Where all have attention: which of them see a window only."""
    window = text.get("sliding_window")
    if isinstance(text.get("hybrid_layer_pattern"), list):
        return ["window" if one else "full" for one in text["hybrid_layer_pattern"]][:count]
    if isinstance(window, list) and window:
        return ["window" if window[i % len(window)] else "full" for i in range(count)]
    if text.get("attention_chunk_size"):
        without_rope = text.get("no_rope_layers") or []
        interval = _whole(text, "no_rope_layer_interval") or 4
        has_rope = without_rope if len(without_rope) == count else [(i + 1) % interval for i in range(count)]
        return ["window" if rope else "full" for rope in has_rope]
    if not window or text.get("use_sliding_window") is False:
        return ["full"] * count
    every = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
    every = every or text.get("global_attn_every_n_layers") or _EVERY.get(str(text.get("model_type")))
    if isinstance(every, str):
        return ["window" if every[i % len(every)] == "L" else "full" for i in range(count)]
    if isinstance(every, int):
        return ["full" if (i + 1) % every == 0 else "window" for i in range(count)]
    first = _whole(text, "max_window_layers") or 0
    return ["full" if i < first else "window" for i in range(count)]


def _window(own: Config) -> int:
    window = _first(own, ("sliding_window", "attention_chunk_size", "attention_window_size", "sliding_window_size"))
    if window is None:
        raise _unclear("it has layers with a window and does not say how wide that is")
    return window


def _row_items(own: Config, kind: str, world: int, is_cross: bool) -> int:
    """Numbers that one token takes in one layer of one rank."""
    if own.get("kv_lora_rank") and own.get("use_mla") is not False:
        if _whole(own, "qk_rope_head_dim") is None:
            raise _unclear("it has no 'qk_rope_head_dim'")
        return _need(own, ("kv_lora_rank",)) + (_whole(own, "qk_rope_head_dim") or 0)
    heads = _need(own, _DECODER_HEADS if is_cross else _HEADS)
    kv_heads = _kv_heads(own, heads)
    key_dim = _first(own, _HEAD_DIM) or _need(own, _HIDDEN) // heads
    if not key_dim:
        raise _unclear(f"its {heads} heads are more than its width")
    value_dim = _whole(own, "v_head_dim") or key_dim
    if kind == "window":
        kv_heads = _whole(own, "swa_num_key_value_heads") or kv_heads * (1 + (own.get("model_type") == "mimo_v2_flash"))
        key_dim, value_dim = (_whole(own, "swa_head_dim") or key_dim), (_whole(own, "swa_v_head_dim") or value_dim)
    elif own.get("global_head_dim") or own.get("num_global_key_value_heads"):
        kv_heads = _whole(own, "num_global_key_value_heads") or kv_heads
        key_dim = value_dim = _whole(own, "global_head_dim") or key_dim
    return max(1, -(-kv_heads // world)) * (key_dim + value_dim)


def _kv_heads(own: Config, heads: int) -> int:
    attention = _part(own, "attn_config")
    if found := _whole(attention, "kv_n_heads"):
        return found
    if attention.get("attn_type") == "multiquery_attention":
        return 1
    if own.get("multi_query_attention") is not None:  # ChatGLM
        return _need(own, ("multi_query_group_num",)) if own["multi_query_attention"] else heads
    if own.get("multi_query") is not None and not own.get("new_decoder_architecture"):  # Falcon, GPT-BigCode
        return 1 if own["multi_query"] else heads
    for name in _KV_HEADS:  # a list of each layer's is one number by now
        if isinstance(own.get(name), bool | list | dict):
            raise _unclear(f"{name!r} is {str(own[name])[:80]!r}")
    return _first(own, _KV_HEADS) or heads


def _layers_of(text: Config, is_cross: bool) -> int | None:
    count = _first(text, _DECODER_LAYERS if is_cross else _LAYERS)
    if str(text.get("model_type", "")).startswith("longcat_flash"):  # two attentions in each layer
        count = 2 * (_whole(text, "num_layers") or 0) or count
    if count is not None and count > LAYERS_MAX:
        raise _unclear(f"{count} layers, more than {LAYERS_MAX}")
    return count


def _item_bytes(text: Config, config: Config) -> int:
    """Of one number: as the weights', unless the quantisation says that the cache has eight bits."""
    for part in (_part(text, "quantization_config"), _part(config, "quantization_config")):
        if _part(part, "kv_cache_scheme").get("num_bits") == 8 or part.get("kv_cache_quant_algo") == "FP8":
            return 1
    given = (where.get(key) for where in (text, config) for key in ("dtype", "torch_dtype"))
    name = next((one for one in given if isinstance(one, str)), "bfloat16").removeprefix("torch.")
    return 1 if name.startswith(("float8", "fp8")) else _ITEM_BYTES.get(name, 2)


def _first(config: Config, names: Sequence[str]) -> int | None:
    """The first of these that is given as a number above zero."""
    return next((found for name in names if (found := _whole(config, name))), None)


def _need(config: Config, names: Sequence[str]) -> int:
    found = _first(config, names)
    if found is None:
        raise _unclear(f"it has no {names[0]!r}, nor that by another name known here")
    return found


def _whole(config: Config, name: str) -> int | None:
    """Raises: UsageError where it is something else than a whole number that is not below zero."""
    value = config.get(name)
    if value is None or isinstance(value, bool | list | dict):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or value < 0:
        raise _unclear(f"{name!r} is {str(value)[:80]!r}")
    return value


def _part(config: object, name: str) -> Config:
    found = config.get(name) if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _unclear(why: str) -> UsageError:
    return UsageError(f"config.json does not say how large a key-value cache is: {why}")
