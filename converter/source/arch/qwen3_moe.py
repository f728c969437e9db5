"""Qwen3-MoE: attention with an RMS norm over each query and key head; many narrow experts whose weights sum to 1."""

from __future__ import annotations

from typing import Any

from .. import blocks
from ..architecture import Architecture, HParams
from ..rope import rope_hparams


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", attention_bias=False, sliding_window=None)
    blocks.require(config, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of a Qwen3-MoE model, below `qwen3moe.`."""
    keys = blocks.dimensions(config) | rope_hparams(config) | blocks.expert_hparams(config, config.num_experts)
    return keys | {"expert_feed_forward_length": config.moe_intermediate_size}


ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    gguf_name="qwen3moe",
    norms=blocks.NORMS,
    vectors=blocks.QK_NORMS,
    linears=(*blocks.attention("attn_norm"), *blocks.experts("ffn_norm", "mlp", ("gate_proj", "up_proj", "down_proj"))),
    channels=(blocks.EXPERT_CHANNELS,),
    heads=blocks.VALUE_HEADS,
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_experts,
)
