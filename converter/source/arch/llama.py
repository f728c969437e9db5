"""Llama: RMS norms, grouped-query attention with rope on halves, SwiGLU."""

from __future__ import annotations

from typing import Any

from pyggml_bridge.errors import CQError

from ..architecture import Architecture, ChannelGroup, HeadGroup, HParams, Linear, Norm, head_dim_of
from ..rope import rope_hparams

NORMS = (Norm("attn_norm", "input_layernorm.weight"), Norm("ffn_norm", "post_attention_layernorm.weight"))

ATTENTION = (
    Linear("attn_q", "self_attn.q_proj.weight", "self_attn.q_proj", "attn_norm", rope_heads="num_attention_heads"),
    Linear("attn_k", "self_attn.k_proj.weight", "self_attn.q_proj", "attn_norm", rope_heads="num_key_value_heads"),
    Linear("attn_v", "self_attn.v_proj.weight", "self_attn.q_proj", "attn_norm", sensitive=True),
    Linear("attn_output", "self_attn.o_proj.weight", "self_attn.o_proj", writes_residual=True),
)

FFN = (
    Linear("ffn_gate", "mlp.gate_proj.weight", "mlp.gate_proj", "ffn_norm"),
    Linear("ffn_up", "mlp.up_proj.weight", "mlp.gate_proj", "ffn_norm"),
    Linear("ffn_down", "mlp.down_proj.weight", "mlp.down_proj", writes_residual=True, hadamard=True),
)


def require(config: Any, **expected: object) -> None:
    """CQError unless each config field has the expected value (a missing field counts as it)."""
    for field, value in expected.items():
        found = getattr(config, field, value)
        if found != value:
            raise CQError(f"{config.model_type}: {field} = {found!r} is not supported (only {value!r})")


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    require(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Llama-like model, below `llama.`."""
    return {**dimensions(config), **rope_hparams(config)}


def dimensions(config: Any) -> HParams:
    """Those that rope scaling has no part in."""
    head_dim = head_dim_of(config)
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
    }


ARCHITECTURE = Architecture(
    model_type="llama",
    gguf_name="llama",
    norms=NORMS,
    linears=ATTENTION + FFN,
    channels=(ChannelGroup(("ffn_gate", "ffn_up"), "ffn_down"),),
    heads=HeadGroup("attn_v", "attn_output"),
    check=check,
    hparams=hparams,
)
