"""Numbers of config.json and generation_config.json that no model can have, refused by the name of their field.

transformers takes many of them and fails later, without a name, or computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pyggml_bridge.errors import CQError
from pyggml_bridge.format import Key

from .architecture import Architecture, head_dim_of

MAX_DIMENSION = 1 << 24  # what the runner takes (pyggml_bridge/decoder/hparams.py)
MAX_HEAD_DIM = 1024  # the same
MAX_LAYERS = 10_000
MAX_CONTEXT = (1 << 31) - 1

# Field -> largest value; the smallest is 1, and null leaves the value to transformers.
COUNTS = {
    "num_hidden_layers": MAX_LAYERS,
    "max_position_embeddings": MAX_CONTEXT,
    "head_dim": MAX_HEAD_DIM,
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), MAX_DIMENSION
    ),
}
EXPERT_COUNTS = dict.fromkeys(
    (
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    MAX_DIMENSION,
)
LATENT_COUNTS = dict.fromkeys(
    ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), MAX_DIMENSION
)
POSITIVE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
NOT_NEGATIVE = ("rms_norm_eps", "router_jitter_noise")
FINITE = (
    "routed_scaling_factor",
    "partial_rotary_factor",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "short_mscale",
    "long_mscale",
    "sliding_window",
    "n_group",
    "topk_group",
    "n_shared_experts",
    "first_k_dense_replace",
)
SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "lm_head_bias",
    "norm_topk_prob",
    "use_sliding_window",
)
ROPE = ("rope_parameters", "rope_scaling")

GGUF_COUNTS = (
    Key.CONTEXT_LENGTH,
    Key.EMBEDDING_LENGTH,
    Key.BLOCK_COUNT,
    Key.FEED_FORWARD_LENGTH,
    Key.HEAD_COUNT,
    Key.HEAD_COUNT_KV,
    Key.KEY_LENGTH,
    Key.VALUE_LENGTH,
    Key.ROPE_DIMENSION_COUNT,
)

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_fields(fields: Mapping[str, Any], arch: Architecture, where: str) -> None:
    """CQError naming the field if one of a configuration's is not what its name says. where: the file.

    Fields that are absent or null are not looked at, nor are those of experts in a model without experts.
    """
    counts = COUNTS | LATENT_COUNTS if arch.model_type == "deepseek_v2" else COUNTS
    for name, most in (counts | EXPERT_COUNTS if _has_experts(arch) else counts).items():
        _check_count(fields.get(name), name, most, where)
    if (fields.get("head_dim") or 0) % 2:
        raise CQError(f"{where}: head_dim is {fields['head_dim']}, expected an even number")
    _check_numbers(fields, where)
    for name in SWITCHES:
        if not isinstance(fields.get(name), bool | None):
            raise CQError(f"{where}: {name} is {_shown(fields[name])}, expected true or false")
    for name in ROPE:
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise CQError(f"{where}: {name} is {_shown(rope)}, expected an object")
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise CQError(f"{where}: {name} is {_shown(rope)}: parameters by kind of layer are not supported")
        _check_numbers(rope, f"{where}: {name}")
        _check_count(
            rope.get("original_max_position_embeddings"), "original_max_position_embeddings", MAX_CONTEXT, where
        )
        if rope.get("low_freq_factor") is not None and rope["low_freq_factor"] == rope.get("high_freq_factor"):
            raise CQError(f"{where}: low_freq_factor and high_freq_factor are both {rope['low_freq_factor']}")


def check_relations(config: Any, arch: Architecture, where: str) -> None:
    """CQError if fields of transformers' configuration contradict each other."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        if getattr(config, name, None) is None:
            raise CQError(f"{where}: {name} is missing")
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or not isinstance(rope.get("rope_type"), str) or rope.get("rope_theta") is None:
        raise CQError(f"{where}: the rope parameters are {_shown(rope)}, expected rope_type and rope_theta")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise CQError(f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise CQError(f"{where}: hidden_size = {config.hidden_size} is not a multiple of num_attention_heads = {heads}")
    if head_dim_of(config) % 2 or not 2 <= head_dim_of(config) <= MAX_HEAD_DIM:
        raise CQError(f"{where}: head_dim is {head_dim_of(config)}, expected an even number up to {MAX_HEAD_DIM}")
    if _has_experts(arch):
        n_experts, used = arch.n_experts(config), config.num_experts_per_tok
        if n_experts and (used is None or used > n_experts):
            raise CQError(f"{where}: num_experts_per_tok is {used}, there are {n_experts} experts")


def check_generation(fields: Mapping[str, Any], where: str) -> None:
    """CQError naming the field of generation_config.json whose type is wrong; the values are the reader's matter."""
    for name in SAMPLING:
        if fields.get(name) is not None and not _is_number(fields[name]):
            raise CQError(f"{where}: {name} is {_shown(fields[name])}, expected a number")
    for name in IDS:
        ids = fields.get(name)
        if ids is not None and not all(_is_integer(i) for i in (ids if isinstance(ids, list) else [ids])):
            raise CQError(f"{where}: {name} is {_shown(ids)}, expected an integer or a list of them")
    if not isinstance(fields.get("do_sample"), bool | None):
        raise CQError(f"{where}: do_sample is {_shown(fields['do_sample'])}, expected true or false")


def check_gguf_keys(value_of: Callable[[str], Any], arch: str, where: str) -> None:
    """CQError naming the key if one of a GGUF file's dimensions is impossible. value_of: None for an absent key."""
    for key in GGUF_COUNTS:
        name = key.of(arch)
        _check_count(value_of(name), name, MAX_DIMENSION, where)


def _has_experts(arch: Architecture) -> bool:
    return any(channels.consumer == "ffn_down_exps" for channels in arch.channels)


def _check_count(value: object, name: str, most: int, where: str) -> None:
    if value is not None and not (_is_integer(value) and 1 <= int(value) <= most):  # type: ignore[call-overload]
        raise CQError(f"{where}: {name} is {_shown(value)}, expected an integer from 1 to {most}")


def _check_numbers(fields: Mapping[str, Any], where: str) -> None:
    """float32 is what files hold these numbers in."""
    for name in (*POSITIVE, *NOT_NEGATIVE, *FINITE):
        value = fields.get(name)
        if value is None:
            continue
        if not _is_number(value) or not math.isfinite(stored := _as_float32(value)):
            raise CQError(f"{where}: {name} is {_shown(value)}, expected a finite number")
        if (name in POSITIVE and stored <= 0) or (name in NOT_NEGATIVE and stored < 0):
            raise CQError(f"{where}: {name} is {_shown(value)}, expected {'more than' * (name in POSITIVE)} 0")
    for name in ("short_factor", "long_factor"):
        factors = fields.get(name)
        if factors is not None and not (isinstance(factors, list) and all(_is_finite(x) for x in factors)):
            raise CQError(f"{where}: {name} is {_shown(factors)}, expected a list of finite numbers")


def _as_float32(value: float) -> float:
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(value))
    except OverflowError:  # an integer of more digits than a float has
        return math.inf


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(_as_float32(value))


def _shown(value: object) -> str:
    return f"{value!r:.60}"
