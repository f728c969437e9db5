"""Qwen2-MoE: Qwen2's attention; beside the routed experts one for every token, times the sigmoid of a gate."""

from __future__ import annotations

from typing import Any

from .. import blocks
from ..architecture import Architecture, HParams, Linear
from ..rope import rope_hparams

GATE = Linear("ffn_gate_inp_shexp", "mlp.shared_expert_gate.weight", "mlp.shared_expert_gate", "ffn_norm", float32=True)


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", qkv_bias=True, use_sliding_window=False)
    blocks.require(config, decoder_sparse_step=1, mlp_only_layers=[])
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Qwen2-MoE model, below `qwen2moe.`; it does not read expert_weights_norm, cq-run does."""
    keys = blocks.dimensions(config) | rope_hparams(config) | blocks.expert_hparams(config, config.num_experts)
    return keys | {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "expert_weights_norm": config.norm_topk_prob,
    }


ARCHITECTURE = Architecture(
    model_type="qwen2_moe",
    gguf_name="qwen2moe",
    norms=blocks.NORMS,
    vectors=blocks.QKV_BIASES,
    linears=(
        *blocks.attention("attn_norm"),
        *blocks.experts("ffn_norm", "mlp", ("gate_proj", "up_proj", "down_proj")),
        GATE,
        *blocks.shared_expert("ffn_norm", "mlp.shared_expert"),
    ),
    channels=(blocks.EXPERT_CHANNELS, blocks.SHARED_EXPERT_CHANNELS),
    heads=blocks.BIASED_VALUE_HEADS,
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_experts,
)
