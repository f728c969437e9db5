"""OLMoE: RMS norms over all queries and all keys, softmax routing whose weights are not renormalized."""

from __future__ import annotations

from typing import Any

from ..architecture import Architecture, ChannelGroup, HeadGroup, HParams
from ..rope import rope_hparams
from . import llama, qwen2, qwen3, qwen3_moe


def check(config: Any) -> None:
    """Refuse what this file does not describe."""
    llama.require(config, hidden_act="silu", attention_bias=False, clip_qkv=None, norm_topk_prob=False)
    rope_hparams(config)


def hparams(config: Any) -> HParams:
    """llama.cpp's keys of an OLMoE model, below `olmoe.`."""
    experts = {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    return {**llama.hparams(config), **experts}


ARCHITECTURE = Architecture(
    model_type="olmoe",
    gguf_name="olmoe",
    norms=llama.NORMS,
    vectors=qwen3.HEAD_NORMS,  # by name; here [heads * head_dim]
    linears=qwen2.ATTENTION + qwen3_moe.MOE,
    channels=ChannelGroup(("ffn_gate_exps", "ffn_up_exps"), "ffn_down_exps"),
    heads=HeadGroup("attn_v", "attn_output"),
    check=check,
    hparams=hparams,
    n_experts=lambda config: config.num_experts,
    gguf_input=False,
)
