"""OLMoE: RMS norms over all queries and over all keys; softmax routing whose weights are not renormalized."""

from __future__ import annotations

from typing import Any

from .. import blocks
from ..architecture import Architecture, HParams
from ..rope import rope_hparams


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    blocks.require(config, hidden_act="silu", attention_bias=False, clip_qkv=None, norm_topk_prob=False)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of an OLMoE model, below `olmoe.`; an expert is feed_forward_length wide."""
    return blocks.dimensions(config) | rope_hparams(config) | blocks.expert_hparams(config, config.num_experts)


ARCHITECTURE = Architecture(
    model_type="olmoe",
    gguf_name="olmoe",
    norms=blocks.NORMS,
    vectors=blocks.QK_NORMS,
    linears=(
        *blocks.attention("attn_norm"),
        *blocks.experts("ffn_norm", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ),
    channels=(blocks.EXPERT_CHANNELS,),
    heads=blocks.VALUE_HEADS,
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_experts,
)
